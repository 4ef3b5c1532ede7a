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
import os
from dataclasses import dataclass

from engine.rollouts import read_rollouts, write_rollouts
from data import OURS, load_task
from engine.tasks import load_questions
from engine.tokens import stop_position
from engine.common import (Problem, draw_lines, parse, read_json, run_main, say, setting, table,
                           write_json)
from engine.measures import interval, interval_text, measure, report
from engine.parallel import from_first, rank, start_ranks
from engine.sampler import (Sampling, fingerprint, load_model, load_policy, load_tokenizer,
                            sample_once, sample_rollouts)


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


def evaluate(model, tokenizer, task, settings, split, questions, out="", what="sampling",
             greedy=True):
    """Samples `questions` (their number) of a split and measures; greedy: also at temperature 0."""
    questions = load_questions(task, split, questions, settings.seed, tokenizer, settings)
    rows = sample_rollouts(model, tokenizer, questions, task.grade, settings, out, what)
    measures = {}
    if rank() == 0:
        measures = measure(rows, settings.seed, same_answer=task.same_answer)
    if greedy:
        likeliest = dataclasses.replace(settings, temperature=0.0, samples=1)
        rows = sample_rollouts(
            model, tokenizer, questions, task.grade, likeliest, what=f"{what}, greedy")
        if rank() == 0:
            measures["greedy"] = interval([row["reward"] > 0 for row in rows])
    return from_first(measures)  # who has the rows measures


def regrade(path, task):
    """The rows of an existing file, with the task's answers and rewards."""
    rows = read_rollouts(path, zero_is_wrong=True)
    for number, row in enumerate(rows, 1):
        if row.get("gold") is None and task.name in OURS:
            raise Problem(f'{path}: rollout {number} (id {row["id"]!r}) has no "gold"')
        text = row["completion"]
        row["answer"], row["reward"] = task.grade(row, text[: stop_position(text, task.STOP)])
    return rows


# ---- what train.py samples and measures ----


def sample_rollout_file(settings, policy, path, number=1):
    """The rollout file that a policy writes on the training questions in a round; made once."""
    task = load_task(settings.task)
    server = settings.server if number == 1 else ""  # it serves the starting policy

    def questions(tokenizer):
        return load_questions(task, "train", settings.questions, settings.seed, tokenizer, settings)

    sample_once(settings, policy, questions, task.grade, path, server=server,
                seed=settings.seed + 1_000_003 * (number - 1))


def measure_once(settings, policy, name):
    """The measures of a policy on the test questions; kept in the run's folder."""
    path = os.path.join(settings.out, f"{name}.json")
    model, tokenizer = load_model(policy, settings, start_ranks())
    facts = {"settings": dataclasses.asdict(settings), "weights": fingerprint(model)}
    kept = from_first(read_json(path) if os.path.exists(path) else {})
    if {key: kept.get(key) for key in facts} == facts:
        return kept["measures"]
    sampling = dataclasses.replace(settings, model=policy, server="", seed=settings.seed + 1)
    measures = evaluate(model, tokenizer, load_task(settings.task), sampling, "test",
                        settings.test_questions, what=f"measuring {name}")
    if rank() == 0:
        write_json(path, {**facts, "measures": measures})
    return measures


def curve_point(settings):
    """model -> pass@1 and invalid on a few test questions, for the learning curve."""
    task, tokenizer = load_task(settings.task), load_tokenizer(settings.model)
    sampling = dataclasses.replace(settings, server="", seed=settings.seed + 1, samples=4)
    count = min(100, settings.test_questions or 100)

    def point(model):
        measures = evaluate(model.eval(), tokenizer, task, sampling, "test", count,
                            what="measuring", greedy=False)
        return {name: measures[name]["mean"] for name in ("pass@1", "invalid")}

    return point


def check_overlap(settings):
    """Refuses a rollout file with questions that would be measured on."""
    task, tokenizer = load_task(settings.task), load_tokenizer(settings.model)
    questions = load_questions(task, "test", settings.test_questions, settings.seed + 1, tokenizer,
                               settings)
    measured = {question["prompt"] for question in questions}
    trained = {row["prompt"]: row["id"] for row in read_rollouts(settings.rollouts,
                                                                 settings.map_rewards)}
    both = measured & trained.keys()
    if both:
        raise Problem(f"{settings.rollouts}: {len(both)} of its questions are test questions of "
                      f"--task {settings.task} (such as {trained[min(both)]!r}), and what is "
                      "measured on them is worth nothing: sample with eval.py --split train")


def report_change(settings, before, after, points):
    """The tables of the curve and of before and after; the curve also as a picture."""
    say(table(("step", "pass@1", "invalid"), [tuple(point.values()) for point in points]) + "\n")
    rows = []
    for name, value in before.items():
        if isinstance(value, dict) and name in after:
            change = after[name]["mean"] - value["mean"]
            rows.append((name, interval_text(value), interval_text(after[name]), f"{change:+.3f}"))
    say(table((f"{after['questions']} held-out questions", "before", "after", "change"), rows))
    if rank() == 0:
        draw_lines(os.path.join(settings.out, "curve.png"), points, "step", ["pass@1", "invalid"],
                   title=settings.loss, xlabel="optimizer step", ylabel="share of completions",
                   ylim=(0, 1))


def main():
    settings = parse(Settings, description=__doc__)
    start_ranks()
    task = load_task(settings.task)
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
