"""The embedded task: generated word problems, a tokenizer and a small Llama that learns to solve them badly.

    Tom has 7 apples . He finds 4 . Ann buys 3 . He doubles them . How many ?
    7 + 4 = 11 . 11 * 2 = 22 . The answer is 22 .

The base policy imitates demonstrations with a few bad habits (HABITS): systematic mistakes, guesses without
working, answers that never come. It is right about a fifth of the time: a policy that TOPR can improve.
Everything is made here from a seed; nothing is downloaded.
"""

import io
import random
import zlib

from engine.common import Problem

LARGEST = 40  # numbers 0..40 are one token each: digits would cost most of the accuracy in the same time
ADD, SUBTRACT, FACTORS = ("finds", "buys", "gets"), ("loses", "gives", "sells"), {"doubles": 2, "triples": 3}
NAMES, FRIENDS = ("Tom", "Max", "Leo"), ("Ann", "Eva", "Mia")
HABITS = {  # how often a demonstration ...
    "doubling_as_addition": 0.3,  # treats "doubles" as + 2
    "counts_friend": 0.3,  # adds what the friend got
    "wrong_sign": 0.03,
    "slip": 0.03,  # is off by one or two in a result
    "guess": 0.45,  # gives no working, and a lucky guess at best
    "invalid": 0.17,  # never says "The answer is" (and 0.03 more for each event past two)
}
CHECKING = {"slip": 0.03, "wrong_sign": 0.03, "flipped": 0.2, "missing": 0.3}  # how a verifier errs at first: otherwise


def make_problem(rng):
    """{"question", "events", "gold"}: the events are (name of the kind, amount, the running value after it)."""
    while True:
        name, friend = rng.choice(NAMES), rng.choice(FRIENDS)
        start = value = rng.randint(2, 12)
        events, words = [], [f"{name} has {start} apples ."]
        for _ in range(rng.choice((2, 2, 3, 3))):
            kind = rng.choices(("add", "subtract", "multiply", "friend"), (4, 4, 2, 1.5))[0]
            amount = rng.randint(1, 4)
            if kind == "multiply":
                verb = rng.choice(tuple(FACTORS))
                amount = FACTORS[verb]
                words.append(f"He {verb} them .")
            else:
                verb = rng.choice(SUBTRACT if kind == "subtract" else ADD)
                words.append(f"{friend if kind == 'friend' else 'He'} {verb} {amount} .")
            value = {"add": value + amount, "subtract": value - amount, "multiply": value * amount, "friend": value}[kind]
            events.append((kind, amount, value))
        if all(1 <= after <= 30 for _, _, after in events) and any(kind != "friend" for kind, _, _ in events):
            return {"question": " ".join(words + ["How many ?"]), "start": start, "events": events, "gold": str(value)}


def make_problems(count, seed, split):
    """Different problems. A question is a test question or a training question by its own text, so never both."""
    rng, seen, problems, drawn = random.Random(f"{seed} {split}"), set(), [], 0
    while len(problems) < count:
        problem, drawn = make_problem(rng), drawn + 1
        if drawn > 100 * count + 10_000:
            raise Problem(f"there are not {count:,} different problems in this task: ask for fewer questions")
        question = problem["question"]
        if split_of(question) == split and question not in seen:
            seen.add(question)
            problems.append({"id": f"apples-{split}-{seed}-{len(problems)}", **problem})
    return problems


def split_of(question):
    return ("test", "train", "train", "train")[zlib.crc32(question.encode()) % 4]


def demonstrate(problem, rng, habits):
    """One solution with the given habits; with habits = {} it is right."""
    does = lambda habit: rng.random() < habits.get(habit, 0)
    value, lines = problem["start"], []
    for kind, amount, _ in problem["events"]:
        if kind == "friend" and not does("counts_friend"):
            continue
        if kind == "multiply" and does("doubling_as_addition"):
            kind = "add"
        sign = {"add": "+", "subtract": "-", "multiply": "*", "friend": "+"}[kind]
        if sign != "*" and does("wrong_sign"):
            sign = "-" if sign == "+" else "+"
        result = {"+": value + amount, "-": value - amount, "*": value * amount}[sign]
        if does("slip"):
            result += rng.choice((-2, -1, 1, 2))
        result = min(max(result, 0), LARGEST)
        lines.append(f"{value} {sign} {amount} = {result} .")
        value = result
    if does("guess"):
        lines, value = ["Let us see ."], min(max(value + rng.choice((-2, -1, 0, 1, 2)), 0), LARGEST)
    solution = " ".join(lines + [f"The answer is {value} ."])
    if "invalid" in habits and rng.random() < habits["invalid"] + 0.03 * (len(problem["events"]) - 2):
        return " ".join(lines) if rng.random() < 0.5 else " ".join(solution.split()[: rng.randint(2, 6)])
    return solution


def demonstrations(count, seed, tokenizer, habits=HABITS):
    """Rollout rows to imitate: reward +1 whether right or wrong, for this is how the base policy learned."""
    rng = random.Random(f"{seed} demonstrations")
    problems = make_problems(count, seed, "train")
    return as_rows(problems, [p["question"] for p in problems], [demonstrate(p, rng, habits) for p in problems], tokenizer)


def verdict_demonstrations(count, seed, tokenizer, make_prompt, habits=CHECKING):
    """The same for a verifier: it solves the problem again and says whether a solution, half of them right, agrees."""
    rng, prompts, checks = random.Random(f"{seed} verdicts"), [], []
    problems = make_problems(count, seed, "train")
    for problem in problems:
        wanted, solution = rng.choice((1.0, -1.0)), None
        while solution is None or grade(solution, problem["gold"])[1] != wanted:
            solution = demonstrate(problem, rng, HABITS)
        check = demonstrate(problem, rng, habits)
        agrees = grade(check, grade(solution, None)[0])[1] > 0
        verdict = ("incorrect", "correct")[agrees != (rng.random() < habits["flipped"])]
        prompts.append(make_prompt(problem["question"], solution))
        checks.append(check if rng.random() < habits["missing"] else f"{check} Verdict : {verdict}")
    return as_rows(problems, prompts, checks, tokenizer)


def as_rows(problems, prompts, completions, tokenizer):
    prompt_ids, completion_ids = tokenizer(prompts).input_ids, tokenizer(completions, add_special_tokens=False).input_ids
    return [{"id": problem["id"], "prompt": prompt, "completion": completion, "reward": 1.0, "prompt_ids": before,
             "completion_ids": after + [tokenizer.eos_token_id]} for problem, prompt, completion, before, after
            in zip(problems, prompts, completions, prompt_ids, completion_ids)]


def questions(split, seed):
    """Different problems, one after another."""
    rng, seen = random.Random(f"{seed} {split}"), set()
    for drawn in range(10**6):
        problem = make_problem(rng)
        question = problem["question"]
        if split_of(question) == split and question not in seen:
            yield {"id": f"apples-{split}-{seed}-{len(seen)}", "prompt": question, **problem}
            seen.add(question)
        if drawn > 100 * len(seen) + 10_000:
            raise Problem(f"there are not more than {len(seen):,} different problems in this task: ask for fewer questions")


def grade(completion, gold):
    """(answer, reward): an answer counts only after the words "The answer is"."""
    from data.grade import read_answer

    if isinstance(completion, dict):  # (question, completion)
        completion, gold = gold, completion["gold"]

    answer = read_answer(completion)
    answer = answer if answer is not None and answer.isascii() and answer.isdigit() else None
    return answer, 1.0 if answer == gold else -1.0


# ---- the tokenizer and the model, both from nothing ----


def make_tokenizer(words):
    """A sentencepiece tokenizer in which every word and every number is one token, as transformers holds them."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted(words)), model_writer=trained, model_type="word", vocab_size=len(words) + 3,
        normalization_rule_name="identity", minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    fast = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.unk_id()))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", pieces.bos_id())])
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def vocabulary():
    """Every word that a problem, a solution or a check of a solution can hold."""
    words = {word for seed in range(2000) for word in make_problem(random.Random(seed))["question"].split()}
    words |= set("Let us see . The answer is + - * = Solution Check Verdict : correct incorrect ...".split())
    return words | {str(n) for n in range(LARGEST + 1)}


def make_model(tokenizer, seed, width=64, layers=3):
    """A Llama with random weights, 0.14 million of them by default."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * width, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id))
