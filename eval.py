"""Samples completions, grades them, measures. What it writes is a rollout file for train.py.

    python eval.py --model DIR_OR_NAME --task gsm8k        measures on the test questions
    python eval.py --model DIR_OR_NAME --task gsm8k --split train --out rollouts.jsonl
                                                           rollouts to train on
    torchrun --nproc-per-node 2 eval.py ...       the questions are divided, the file is the same
    python eval.py --model NAME --server http://localhost:8000/v1 ...      a server samples
    python eval.py --grade rollouts.jsonl --task my_task.py    grades and measures an existing file

The randomness of a completion depends on the seed, its question and its number alone: the file is
the same for any batch size and any number of ranks. (A server treats seeds in its own way.)
"""

import dataclasses
from dataclasses import dataclass

from data.rollouts import read_rollouts, write_rollouts
from data.tasks import OURS, load_questions, load_task
from data.tokens import stop_position
from engine.common import Problem, parse, run_main, say, setting, write_json
from engine.measures import interval, measure, report
from engine.parallel import rank, start_ranks
from engine.sampler import Sampling, load_policy, sample_rollouts


@dataclass
class Settings(Sampling):
    model: str = setting("", "directory or hub name; with --server its name there", main=True)
    task: str = setting("apples", f"{', '.join(OURS)}, or the path of your own task.py", main=True)
    # The default is "test": by mistake it makes a file that train.py refuses. By mistake "train"
    # would report figures of questions that the model has seen.
    split: str = setting("test", "which questions: train to train on", ("train", "test"), main=True)
    questions: int = setting(0, "number of questions (0: all, or 250 generated ones)", main=True)
    out: str = setting("", "rollout file to write; its measures go beside it", main=True)
    grade: str = setting("", "grade and measure this rollout file, sample nothing", main=True)
    greedy: bool = setting(True, "also answer each question once at temperature 0")
    answer_marker: str = setting("", "words before an answer, for the tasks of data/maths.py "
                                 "(none: The answer is)")


def evaluate(model, tokenizer, task, settings, split, questions, out="", what="sampling",
             greedy=True):
    """Samples `questions` (their number) of a split and measures; greedy: also at temperature 0."""
    questions = load_questions(task, split, questions, settings.seed, tokenizer, settings)
    rows = sample_rollouts(model, tokenizer, questions, task.grade, settings, out, what)
    measures = measure(rows, settings.seed, same_answer=task.same_answer)
    if greedy:
        likeliest = dataclasses.replace(settings, temperature=0.0, samples=1)
        rows = sample_rollouts(
            model, tokenizer, questions, task.grade, likeliest, what=f"{what}, greedy")
        measures["greedy"] = interval([row["reward"] > 0 for row in rows])
    return measures


def regrade(path, task):
    """The rows of an existing file, with the task's answers and rewards."""
    rows = read_rollouts(path, zero_is_wrong=True)
    for number, row in enumerate(rows, 1):
        if row.get("gold") is None and task.name in OURS:
            raise Problem(f'{path}: rollout {number} (id {row["id"]!r}) has no "gold"')
        text = row["completion"]
        row["answer"], row["reward"] = task.grade(row, text[: stop_position(text, task.STOP)])
    return rows


def main():
    settings = parse(Settings, description=__doc__)
    start_ranks()
    marker = {"marker": settings.answer_marker} if settings.answer_marker else {}
    task = load_task(settings.task, **marker)
    if settings.grade:
        rows = regrade(settings.grade, task)
        measures = measure(rows, settings.seed, same_answer=task.same_answer)
        if settings.out and rank() == 0:
            write_rollouts(settings.out, rows)
    elif settings.model:
        measures = evaluate(*load_policy(settings, settings.model), task, settings, settings.split,
                            settings.questions, settings.out, greedy=settings.greedy)
    else:
        raise Problem("--model is needed: a directory or a hub name (train.py makes one)")
    say(report(measures, settings.grade or settings.model))
    if settings.out and rank() == 0:
        path = settings.out.removesuffix(".jsonl") + ".json"
        write_json(path, {"settings": dataclasses.asdict(settings), **measures})
        say(f"wrote {settings.out} and its measures beside it")


if __name__ == "__main__":
    run_main(main)
