"""A rollout file from vLLM's LLM class, with log mu of every token. Needs vLLM 0.10.2 or later.

    python docs/recipes/vllm_rollouts.py MODEL QUESTIONS.jsonl ROLLOUTS.jsonl

QUESTIONS.jsonl has a line {"id": ..., "question": ..., "gold": ...} for each question.
"""

import json
import sys

from vllm import LLM, SamplingParams


def grade(question, completion):
    """(the answer or None, the reward): +1 or -1, never 0. Put your own grader here."""
    _, found, answer = completion.rpartition("The answer is")
    answer = answer.strip().rstrip(".").strip() if found else None
    return answer, 1.0 if answer == question["gold"] else -1.0


def prompt_of(question, tokenizer):
    """The text that the model sees, and its tokens."""
    if not tokenizer.chat_template:
        return question["question"], tokenizer(question["question"]).input_ids
    messages = [{"role": "user", "content": question["question"]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text, tokenizer(text, add_special_tokens=False).input_ids  # they are in the text


def rows_of(question, prompt, output):
    for completion in output.outputs:
        ids = list(completion.token_ids)  # the end token included, if it was sampled
        # logprobs=0 below asks for the sampled token alone: one dict {token: Logprob} a position
        logprobs = [position[token].logprob for token, position in zip(ids, completion.logprobs)]
        answer, reward = grade(question, completion.text)
        yield {
            "id": question["id"],
            "prompt": prompt,
            "completion": completion.text,
            "reward": reward,
            "answer": answer,
            "gold": question["gold"],
            "prompt_ids": output.prompt_token_ids,
            "completion_ids": ids,
            "logprobs": logprobs,
            "finish": completion.finish_reason,
        }


def main(model, questions, out, samples=16, max_tokens=512):
    with open(questions) as file:
        questions = [json.loads(line) for line in file]
    # raw_logprobs: the softmax of the model's own logits, before temperature, top_p, top_k and
    # penalties. That is log mu as train.py and topr_loss want it, whatever the sampling was.
    # processed_logprobs come after them: pi/mu would not be 1 before the first step.
    llm = LLM(model=model, logprobs_mode="raw_logprobs")
    sampling = SamplingParams(
        n=samples, temperature=1.0, top_p=1.0, top_k=0, max_tokens=max_tokens, logprobs=0
    )
    prompts = [prompt_of(question, llm.get_tokenizer()) for question in questions]
    outputs = llm.generate([{"prompt_token_ids": ids} for _, ids in prompts], sampling)
    with open(out, "w") as file:
        for question, (prompt, _), output in zip(questions, prompts, outputs):
            for row in rows_of(question, prompt, output):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
