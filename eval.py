"""Samples completions, grades them, measures. What it writes is a rollout file that train.py trains on.

    python eval.py --model DIR_OR_NAME --task gsm8k --samples 16 --out rollouts.jsonl
    torchrun --nproc-per-node 2 eval.py ...          the prompts are shared out, the file is the same
    python eval.py --model NAME --server http://localhost:8000/v1 ...          a server writes the completions
    python eval.py --grade rollouts.jsonl --task gsm8k          grades and measures a file that exists

The randomness of a completion depends on the seed, its question and its number alone: the file is the same for
any batch size and any number of ranks. (A server has its own ways with seeds.)
"""

import dataclasses
from dataclasses import dataclass

from data.rollouts import RolloutFile, to_line
from engine.common import Problem, parse, run_main, say, setting, whole_file, write_json
from engine.measures import interval, measure, report
from engine.parallel import rank, start_ranks
from engine.sampler import Sampling, load_model, load_tokenizer, sample_rollouts

TASKS = ("apples", "gsm8k", "math")


@dataclass
class Settings(Sampling):
    model: str = setting("", "model to sample from: a directory or a hub name; with --server its name there", main=True)
    task: str = setting("apples", "what to ask and how to grade it", TASKS, main=True)
    split: str = setting("test", "which questions", ("train", "test"), main=True)
    questions: int = setting(0, "number of questions (0: all; 250 of the generated ones)", main=True)
    out: str = setting("", "rollout file to write; its measures go beside it", main=True)
    grade: str = setting("", "grade and measure this rollout file, sample nothing", main=True)
    greedy: bool = setting(True, "also answer each question once at temperature 0")
    answer_marker: str = setting("The answer is", "words in front of an answer (gsm8k and math)")


# ---- the questions and their graders ----


def load_questions(settings, tokenizer):
    """Dicts with "id", "prompt", "gold" and "question" for settings.task."""
    if settings.task == "apples":
        from data import apples

        problems = apples.make_problems(settings.questions or 250, settings.seed, settings.split)
        return [{**problem, "prompt": problem["question"]} for problem in problems]
    from data import maths

    questions = maths.load_questions(settings.task, settings.split)[: settings.questions or None]
    return [{**question, "prompt": maths.make_prompt(settings.task, question["question"], tokenizer)} for question in questions]


def grader(task, marker="The answer is"):
    """(question, completion) -> (answer or None, reward)"""
    if task == "apples":
        from data import apples

        return lambda question, completion: apples.grade(completion, question["gold"])
    from data import maths

    return lambda question, completion: maths.grade(task, completion, question["gold"], marker)


def evaluate(model, tokenizer, settings, out="", what="sampling"):
    """Samples and measures; with settings.greedy also the accuracy at temperature 0."""
    questions, grade = load_questions(settings, tokenizer), grader(settings.task, settings.answer_marker)
    measures = measure(sample_rollouts(model, tokenizer, questions, grade, settings, out, what), settings.seed)
    if settings.greedy:
        likeliest = dataclasses.replace(settings, temperature=0.0, samples=1)
        rows = sample_rollouts(model, tokenizer, questions, grade, likeliest, what=f"{what}, greedy")
        measures["greedy"] = interval([row["reward"] > 0 for row in rows])
    return measures


def regrade(path, settings):
    """Grades the completions of an existing file again; returns its rows with the new answer and reward."""
    file, grade, rows = RolloutFile(path, what="grading", zero_is_wrong=True), grader(settings.task, settings.answer_marker), []
    for i in range(len(file)):
        row = file[i]
        if row.get("gold") is None:
            raise Problem(f'{path}:{file.lines[i]}: no "gold" to grade against')
        row["answer"], row["reward"] = grade(row, row["completion"])
        rows.append(row)
    return rows


def main():
    settings = parse(Settings, description=__doc__.split("\n\n")[0])
    device = start_ranks()
    if settings.grade:
        rows = regrade(settings.grade, settings)
        measures = measure(rows, settings.seed)
        if settings.out and rank() == 0:
            with whole_file(settings.out) as file:
                file.writelines(map(to_line, rows))
    else:
        if not settings.model:
            raise Problem("--model is needed: a directory or a hub name (train.py makes one for the apples task)")
        if settings.server:
            model, tokenizer = None, load_tokenizer(settings.tokenizer or settings.model, "; name its tokenizer with --tokenizer")
        else:
            model, tokenizer = load_model(settings.model, settings.precision, device)
        measures = evaluate(model, tokenizer, settings, settings.out)
    say(report(measures, settings.grade or settings.model))
    if settings.out and rank() == 0:
        write_json(settings.out.removesuffix(".jsonl") + ".json", {"settings": dataclasses.asdict(settings), **measures})
        say(f"wrote {settings.out} and its measures beside it")


if __name__ == "__main__":
    run_main(main)
