"""Samples completions, grades them, measures. What it writes is a rollout file for train.py.

    python eval.py --model DIR_OR_NAME --task gsm8k        measures on the test questions
    python eval.py --model DIR_OR_NAME --task gsm8k --split train --out rollouts.jsonl
                                                           rollouts to train on
    torchrun --nproc-per-node 2 eval.py ...       the questions are divided, the file is the same
    python eval.py --model NAME --server http://localhost:8000/v1 ...      a server samples
    python eval.py --grade rollouts.jsonl --task my_task.py    grades and measures an existing file

The randomness of a completion depends on the seed, its question and its number alone: the file is
the same for any batch size and any number of ranks, but for rounding, which changes about one in
thousands. (A server treats seeds in its own way.)
A finished file is reused, and a broken-off call goes on where it was.
"""

import collections
import dataclasses
import functools
import glob
import json
import math
import os
import time

import numpy as np

from data import OURS, load_task
from engine import mu, server
from engine.common import (
    Problem,
    check_same,
    draw_lines,
    lock,
    parse,
    progress,
    read_json_lines,
    run_main,
    say,
    setting,
    table,
    write_json,
    writing,
)
from engine.measures import interval, interval_text, measure, paired_interval, summary
from engine.packing import make_policy
from engine.parallel import barrier, from_first, gather_on_first, rank, start_ranks, world
from engine.rollouts import each_rollout, read_rollouts, short_hash, write_rollouts
from engine.sampler import Sampling, check_room, fingerprint, generate, load_model, load_tokenizer
from engine.tasks import list_questions, load_questions, one_line
from engine.tokens import end_tokens, prompt_tokens, stop_position, until_stop


@dataclasses.dataclass
class Settings(Sampling):
    model: str = setting("", "directory or hub name; with --server also its name there", main=True)
    task: str = setting("", f"{', '.join(OURS)}, or the path of your own task.py", main=True)
    # The default is "test": by mistake it makes a file that train.py refuses. By mistake "train"
    # would report figures of questions that the model has seen.
    split: str = setting("test", "which questions: train to train on", ("train", "test"), main=True)
    questions: int = setting(0, "number of questions (0: all, or 250 generated ones)", main=True)
    out: str = setting("", "rollout file to write; its measures go beside it", main=True)
    grade: str = setting("", "grade and measure this rollout file, sample nothing", main=True)
    greedy: bool = setting(True, "also answer each test question once at temperature 0")
    server: str = setting(
        "",
        "sample from a server with OpenAI's completions, such as "
        "http://localhost:8000/v1; OPENAI_API_KEY holds its key, if any",
    )


# ---- measuring ----


def evaluate(model, tokenizer, task, settings, split, count, out="", greedy=True, logprobs=True):
    """{name: [a value for each question]} of `count` questions of a split, on every rank.

    greedy: each question is also answered at temperature 0, which gives the first measure once
    more. The completions are kept in the file `out` (the greedy ones beside it), when it is named.
    """
    questions = load_questions(task, split, count, tokenizer, settings)
    rows = sample_rollouts(model, tokenizer, questions, task.grade, settings, out, logprobs)
    values = measured(task, rows, settings.seed)
    for row in rows[:: math.ceil(len(rows) / 3) or 1]:  # three of them, for people to read
        say(
            f"--- {row['id']}: answer {row['answer']!r}, reward {row['reward']:g}\n"
            f"{row['prompt'][-300:]}{row['completion'][:1000]}"
        )
    if greedy:
        likeliest = dataclasses.replace(settings, temperature=0.0, samples=1)
        beside = out and f"{out.removesuffix('.jsonl')}-greedy.jsonl"
        rows = sample_rollouts(
            model, tokenizer, questions, task.grade, likeliest, beside, logprobs=False
        )
        values["greedy"] = next(iter(measured(task, rows, settings.seed).values()), [])
    return from_first(values)  # who has the rows measures


def measured(task, rows, seed):
    """The task's own measures, or ours; of no rows, which other ranks than the first have, none."""
    if not rows:
        return {}
    with one_line(f"{task.name}: measure or same_answer"):
        if not task.measure:
            return measure(rows, seed, same_answer=task.same_answer)
        values = {name: list(map(float, each)) for name, each in task.measure(rows).items()}
    if not values or not all(each and 0 <= min(each) <= max(each) <= 1 for each in values.values()):
        raise Problem(f"{task.name}: measure must return lists of values from 0 to 1")
    return values


def regrade(rows, task):
    """The rows of a file with the task's answers and rewards; they may have none."""
    for row in rows:
        text = row["completion"][: stop_position(row["completion"], task.STOP)]
        row["answer"], row["reward"] = task.grade(row, text)
    return rows


# ---- what train.py samples and measures ----


def sample_rollout_file(settings, task, policy, path, number=1):
    """The rollout file that a policy writes on the training questions in a round; made once."""
    model, tokenizer = load_model(policy, settings, start_ranks())
    questions = load_questions(task, "train", settings.questions, tokenizer, settings)
    seed = settings.seed + 1_000_003 * (number - 1)
    sampling = dataclasses.replace(settings, model=policy, seed=seed)
    sample_rollouts(model, tokenizer, questions, task.grade, sampling, path)


def measure_once(settings, task, policy, name):
    """The values of a policy on the test questions; its completions stay in the run's folder."""
    model, tokenizer = load_model(policy, settings, start_ranks())
    sampling = dataclasses.replace(settings, model=policy, seed=settings.seed + 1)
    return evaluate(
        model,
        tokenizer,
        task,
        sampling,
        "test",
        settings.test_questions,
        f"{settings.out}/{name}.jsonl",
        logprobs=False,
    )


def curve_point(settings, task):
    """model -> the first two measures on a few test questions, for the learning curve."""
    tokenizer = load_tokenizer(settings.model)
    sampling = dataclasses.replace(settings, seed=settings.seed + 1, samples=4)
    few = min(100, settings.test_questions or 100)
    questions = load_questions(task, "test", few, tokenizer, sampling)

    def point(model):
        rows = sample_rollouts(model.eval(), tokenizer, questions, task.grade, sampling)
        values = from_first(measured(task, rows, sampling.seed))
        return {name: interval(values[name])["mean"] for name in list(values)[:2]}

    return point


def check_overlap(settings, task):
    """Refuses to train on questions that would be measured on: what is measured is worth nothing.
    A question is known by its id."""
    test = list_questions(task, "test", settings.test_questions, settings.seed + 1).keys()
    if settings.rollouts:
        train = {row["id"] for _, row in each_rollout(settings.rollouts, settings.map_rewards)}
    else:
        train = list_questions(task, "train", settings.questions, settings.seed).keys()
    both = test & train
    if both:
        raise Problem(
            f"{settings.rollouts or task.name}: {len(both)} training questions are test "
            f"questions of {task.name}, too, such as {min(both)!r}: sample rollouts with "
            "eval.py --split train"
        )


def report_change(settings, before, after, logs, seconds):
    """The tables of the curve and of before and after, the picture, and results.json."""
    points = curve(logs)
    if points:
        say(table(points[0], [point.values() for point in points]) + "\n")
    rows = [
        (
            name,
            interval_text(interval(before[name])),
            interval_text(interval(after[name])),
            interval_text(paired_interval(before[name], after[name]), "+"),
        )
        for name in before
    ]
    results = {
        "settings": dataclasses.asdict(settings),
        "before": summary(before),
        "after": summary(after),
        "curve": points,
        "seconds": seconds,
    }
    title = f"{results['before']['questions']} held-out questions"
    say(table((title, "before", "after", "change"), rows))
    name, *_ = before
    gain = paired_interval(before[name], after[name])
    rose = "rose" if gain["low"] > 0 else "fell" if gain["high"] < 0 else "did not change"
    say(
        f"{name} {rose}, by its 95% interval ({interval_text(gain, '+')}); the trained policy, its "
        f"completions, results.json and the log are in {settings.out}"
    )
    if rank() == 0:
        write_json(f"{settings.out}/results.json", results)
        if points:
            draw_lines(
                f"{settings.out}/curve.png",
                points,
                points[0],
                title=settings.loss,
                xlabel="optimizer step",
                ylabel="mean over questions",
                ylim=(0, 1),
            )


def curve(logs):
    """The measurements along all rounds, one dict each, with the steps counted through."""
    points, steps = [], 0
    for log in logs:
        for entry in log:
            if "measured" in entry:
                points.append({"step": steps, **entry["measured"]})
            steps += "loss" in entry
    return points


# ---- sampling into a file ----


def sample_rollouts(model, tokenizer, questions, grade, settings, out="", logprobs=True):
    """Rollout rows for all questions, on the first rank; also as the file `out` when it is named.

    The other ranks get an empty list: the rows of a large file would fill the memory of each.
    A finished file is reused; other rollouts are never overwritten. The questions are divided among
    the ranks, and each finished one is kept at once in OUT.part-*: the next call samples the rest.
    questions: dicts with "id", "prompt" and what grade(row, completion) needs, where row is the
    question with the fields of its completion. model: None for settings.server.
    """
    sampling = describe(model, settings)
    with one_line("the questions cannot be written as JSON"):
        questions = [prepare(question, tokenizer, settings) for question in questions]
        job = [sampling, settings.samples, questions]
        job = json.dumps(job, ensure_ascii=False, allow_nan=False)
        sampling["questions"] = f"{short_hash(job) % 2**32:08x}"
    questions = json.loads(job)[-1]  # as a file gives them back: for --grade, and when reused
    rows = finished_rows(out, questions, grade, sampling, settings.samples) if rank() == 0 else []
    if from_first(bool(rows)):
        return rows
    parts = f"{out}.part-{sampling['questions']}-"
    finished = {}  # {number of a question: its rows}
    for part in glob.glob(glob.escape(parts) + "*") if rank() == 0 else []:
        for number, kept in read_json_lines(part):  # graded again: the grader may have been mended
            finished[number] = [make_row(grade, row, {}, sampling) for row in kept]
    kept = from_first(set(finished))
    if kept:
        say(f"{out}: {len(kept)} of {len(questions)} questions were finished before, going on")
    todo = [number for number in range(len(questions)) if number not in kept]
    todo.sort(key=lambda number: -len(questions[number]["prompt_ids"]))  # alike ones together
    todo, own_part = todo[rank() :: world()], f"{parts}{rank()}-{time.time_ns()}"
    here = functools.partial(complete_here, model, logprobs and out)
    complete = here if model else server.complete
    what = os.path.basename(out) or "sampling"
    with progress(total=len(todo) * settings.samples, what=what, unit="completion") as bar:
        for number, completions in complete(tokenizer, questions, todo, settings, bar):
            finished[number] = [
                make_row(grade, questions[number], completion, sampling)
                for completion in completions
            ]
            if out:
                with writing(own_part), open(own_part, "a", encoding="utf-8") as file:
                    file.write(json.dumps([number, finished[number]]) + "\n")
    finished = collections.ChainMap(*gather_on_first(finished))
    rows = [row for number in sorted(finished) for row in finished[number]]
    if out and rank() == 0:
        write_rollouts(out, rows)
        for part in glob.glob(glob.escape(parts) + "*"):
            os.remove(part)
    barrier()
    return rows


def prepare(question, tokenizer, settings):
    """A question with what the sampler needs; "key" is the seed of its random numbers."""
    return {
        **question,
        "prompt_ids": prompt_tokens(question["prompt"], tokenizer),
        "stop": list(filter(None, question.get("stop") or [])),
        "key": short_hash(f"{settings.seed}\0{question['id']}\0{question['prompt']}"),
    }


def describe(model, settings):
    """What a row says of its sampling; a finished file must say the same to be reused."""
    source = {"weights": fingerprint(model)} if model else {"server": settings.server}
    names = ("temperature", "top_k", "top_p", "max_new_tokens", "seed", "precision")
    return {
        "model": os.path.normpath(settings.model),
        **source,
        **{name: getattr(settings, name) for name in names},
    }


def make_row(grade, question, completion, sampling):
    """A whole row, as it is in the file: all that the question and the completion have."""
    hidden = ("stop", "messages", "key")
    own = {name: value for name, value in question.items() if name not in hidden}
    row = {**own, **completion, "sampling": sampling}
    row["answer"], row["reward"] = grade(row, row["completion"])
    return row


def finished_rows(out, questions, grade, sampling, samples):
    """The rows of a finished file, which must be of these settings; [] if it is not there.

    They are graded again, because the grader may have been mended.
    """
    if not os.path.exists(out):
        return []
    rows = read_rollouts(out, need_reward=False)
    asked = {"completions": len(questions) * samples, **sampling}
    there = dict.fromkeys(asked) | {"completions": len(rows)} | (rows[0].get("sampling") or {})
    check_same(out, "other rollouts", there, asked)
    graded = [make_row(grade, row, {}, sampling) for row in rows]
    if graded != rows:
        write_rollouts(out, graded)
    say(f"{out}: the rollouts are there, reusing them" + ", graded again" * (graded != rows))
    return graded


def complete_here(model, with_logprobs, tokenizer, questions, todo, settings, bar):
    """Yields (question number, the fields of its completions), each question when it is done."""
    longest = check_room(model, questions, settings.max_new_tokens)
    policy, ends = make_policy(model, settings.precision, longest), end_tokens(model, tokenizer)
    for number, completions in generate(model, tokenizer, questions, todo, settings, bar):
        question = questions[number]
        rows = [
            until_stop(tokens, tokens[-1] in ends, question["stop"], tokenizer)
            for tokens in completions
        ]
        if with_logprobs:
            ids = [row["completion_ids"] for row in rows]
            for row, logprobs in zip(rows, mu.score(policy, question["prompt_ids"], ids)):
                row["logprobs"] = logprobs
        yield number, rows


# ---- the command ----


def main():
    settings = parse(Settings, description=__doc__)
    device = start_ranks()
    if not settings.task:
        raise Problem(f"--task is needed: {', '.join(OURS)}, or the path of your own task.py")
    task = load_task(settings.task)
    if settings.grade:
        rows = regrade(read_rollouts(settings.grade, need_reward=False), task)
        values = measured(task, rows, settings.seed)
        if settings.out and rank() == 0:
            write_rollouts(settings.out, rows)
    elif settings.model:
        folder, name = os.path.split(settings.out)
        held = name and lock(os.path.join(folder, f".{name}.lock"))  # up to the end of main
        policy = (
            (None, load_tokenizer(settings.model))
            if settings.server
            else load_model(settings.model, settings, device)
        )
        values = evaluate(
            *policy,
            task,
            settings,
            settings.split,
            settings.questions,
            settings.out,
            settings.greedy and settings.split == "test",
        )
    else:
        raise Problem("--model is needed: a directory or a hub name (train.py makes one)")
    lines = [(name, interval_text(interval(each))) for name, each in values.items()]
    say(table((settings.grade or settings.model, "mean, 95% interval"), lines))
    if np.mean(values.get("cut off", 0)) > 0.2:
        say("many completions are cut off: raise --max-new-tokens, or give the task a STOP")
    if settings.out and rank() == 0:
        write_json(
            f"{settings.out.removesuffix('.jsonl')}.json",
            {"settings": dataclasses.asdict(settings), **summary(values)},
        )
        say(f"wrote {settings.out} and its measures beside it")


if __name__ == "__main__":
    run_main(main)
