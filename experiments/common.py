"""What the experiments share: arms, their learning rates, the questions, the pictures.

An arm is what is compared: a dict of train.py's settings where they differ from the embedded job's. "positives" in it is
no setting: the share of positives of the data set that is drawn from the rollouts.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
from typing import Optional

import numpy as np
import torch

import eval as evaluation
import train
from data.rollouts import read_rollouts, write_rollouts
from engine import sampler
from engine.measures import measure
from engine.common import Problem, Stopped, progress, read_json, setting, table, write_json

RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # the grid that every arm chooses its learning rate from
WORKING_RATE = 1e-3  # train.py's own for the embedded job
QUICK = {"epochs": 1}  # what differs in the quick form
TUNING_SEEDS = 2  # seeds on which an arm chooses
QUESTIONS = {"test": slice(0, 500), "validation": slice(500, 750)}  # no training question is among them
ROLLOUTS = "rollouts-512x16.jsonl"  # as train.py names those of the embedded job
PART = 2400  # completions in a data set with a share of positives of its own
STYLES = {  # colour, line, marker, hatch: the same for a method in every picture, and told apart without colours
    "TOPR": ("#1f4e9c", "-", "o", ""), "positives only": ("#2f9e44", "--", "s", "//"), "PPO": ("#f08c00", "-.", "^", ""),
    "naive REINFORCE": ("#c92a2a", ":", "X", ""), "DPO": ("#7048a8", (0, (4, 1, 1, 1, 1, 1)), "v", ""),
    "base": ("#868e96", ":", ".", "xx"), "majority": ("#ced4da", "--", ".", ""),
    "importance sampling": ("#b5651d", "-.", "D", ".."),
    "truncated importance sampling": ("#a9c46c", ":", "P", "//")}


@dataclasses.dataclass
class Settings:
    quick: bool = setting(False, "one seed, one pass over the rollouts, the working learning rate instead of the grid")
    show: bool = setting(False, "run nothing: tables, pictures and claims of the results that are there")
    seeds: Optional[int] = setting(None, "base policies, each with its own rollouts and questions (default: 5; with --quick 1)",
                                   least=1)
    processes: int = setting(0, "arms trained at once (0: one on each core)")
    out: str = setting("", "folder for results and pictures (default: experiments/results; unless all is as there, runs/results)")


# ---- many arms at once ----


@contextlib.contextmanager
def workers(settings):
    """each(function, jobs, what) -> its results in the order of the jobs; a job is a tuple of arguments."""
    os.makedirs("runs", exist_ok=True)
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # it counts what processes leave that were stopped
    processes, spawn = settings.processes or len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,))

    def each(function, jobs, what):
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process, which tells the others
        futures = [pool.submit(in_silence, function, *job) for job in jobs]
        signal.signal(signal.SIGINT, handler)
        for future in jobs and progress(concurrent.futures.as_completed(futures), total=len(jobs), what=what, unit="arm"):
            future.result()
        return [future.result() for future in futures]

    try:
        yield each
        pool.shutdown()
    except concurrent.futures.process.BrokenProcessPool:
        raise Problem("a process died, perhaps for want of memory (--processes 1 takes less); the same command goes on from "
                      "what is finished; runs/experiments.log has its last words")
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()  # one that trains ends its step and keeps it
        pool.shutdown()
        raise


def in_silence(function, *job):
    """What an arm says of itself goes to a file: the terminal shows how many are done."""
    with open("runs/experiments.log", "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            return function(*job)
        except Stopped as stopped:  # by a signal, in good order: this process is not to take up another arm
            os._exit(stopped.exit_code)


def compare(settings, each, run, arms, what):
    """Each arm at the learning rate that suits it: {name: its settings, rate, measures by seed}.

    run(seed, arm, rate, split) -> measures as a dict. The rate is the one with the best mean "score" on the validation
    questions of the first seeds; what is reported is measured on the test questions of all seeds.
    """
    seeds, rates = range(settings.seeds), (WORKING_RATE,) if settings.quick else RATES
    arms = {name: {**arm, **(QUICK if settings.quick else {})} for name, arm in arms.items()}
    tries = [(name, rate, seed) for name in arms for rate in rates for seed in seeds[:TUNING_SEEDS] if len(rates) > 1]
    measures = each(run, [(seed, arms[name], rate, "validation") for name, rate, seed in tries], f"{what}: learning rates")
    scores = collections.defaultdict(lambda: {rate: [] for rate in rates})
    for (name, rate, _), measured in zip(tries, measures):
        scores[name][rate].append(measured["score"])
    best = {name: max(rates, key=lambda rate: np.sum(scores[name][rate])) for name in arms}
    tests = iter(each(run, [(seed, arm, best[name], "test") for name, arm in arms.items() for seed in seeds], f"{what}: test"))
    return {name: {"settings": arm, "learning_rate": best[name], "validation": scores[name],
                   **by_seed([next(tests) for _ in seeds])} for name, arm in arms.items()}


def by_seed(measured):
    """[{measure: value} of each seed] -> {measure: [values]}, of what is reported"""
    return {name: [one[name] for one in measured] for name in measured[0] if name not in ("score", "right")}


# ---- the embedded task: base policies, data sets, arms, measures ----


def folder_of(seed, larger=False):
    return f"runs/apples-seed{seed}" + ("/larger" if larger else "")  # torchrun train.py has its own here too


def prepare(seed, larger=False):
    """A base policy and its rollouts, as the embedded job of train.py makes them; five times larger on request."""
    folder = folder_of(seed, larger)
    model = train.base_policy(folder, seed, **(dict(width=128, layers=4, rate=2e-3) if larger else {}))
    train.sampled(train.Settings(**train.EMBEDDED, seed=seed), model, f"{folder}/{ROLLOUTS}")


def name_of(arm, rate):
    """What the folder of an arm is called."""
    return "-".join([f"{key}={value}" for key, value in arm.items()] + [f"{rate:g}"])


def settings_of(seed, arm, rate):
    """train.py's settings for an arm."""
    folder = folder_of(seed, arm.get("larger"))
    changes = {name: value for name, value in arm.items() if name not in ("larger", "positives")}
    if set(arm) - {"loss", "epochs"}:
        changes["eval_every"] = 0  # only collapse.py, whose arms differ in the loss alone, draws curves
    rollouts = data_set(folder, seed, arm.get("positives"))
    return train.Settings(**{**train.EMBEDDED, "model": f"{folder}/base", "rollouts": rollouts, "seed": seed,
                             "learning_rate": rate, "out": f"{folder}/experiments/{name_of(arm, rate)}", **changes})


def data_set(folder, seed, share):
    """The rollout file; with a share PART of its completions, so many of them positive."""
    whole = f"{folder}/{ROLLOUTS}"
    path = whole.replace(".jsonl", f"-{share}.jsonl")
    if share is None or os.path.exists(path):
        return path if share else whole
    rows, rng = read_rollouts(whole), random.Random(seed)
    sides = [[n for n, row in enumerate(rows) if (row["reward"] > 0) == positive] for positive in (True, False)]
    counts = round(share * PART), PART - round(share * PART)
    if any(len(side) < count for side, count in zip(sides, counts)):
        raise Problem(f"{whole}: {counts[0]} positives and {counts[1]} negatives are needed, it has {len(sides[0])} and "
                      f"{len(sides[1])}: leave this seed out")
    kept = sorted(n for side, count in zip(sides, counts) for n in rng.sample(side, count))
    write_rollouts(path, [rows[n] for n in kept])
    return path


def train_arm(seed, arm, rate):
    """(train.py's settings, the curve along the training): trained, or reused."""
    settings = settings_of(seed, arm, rate)
    tokenizer = sampler.load_tokenizer(settings.model)

    def along(model):
        measures = measure(answers(model.eval(), tokenizer, seed, "test", samples=1))  # of all 500 questions
        return {name: measures[name]["mean"] for name in ("pass@1", "invalid")}

    return settings, train.curve([train.train_or_reuse(settings, along)])


def run_arm(seed, arm, rate, split):
    return measured(train_arm(seed, arm, rate)[0].out, seed, split)


def run_base(seed, larger=False):
    return measured(f"{folder_of(seed, larger)}/base", seed, "test")


def answers(model, tokenizer, seed, split, samples=16):
    wish = evaluation.Settings(split="test", questions=QUESTIONS["validation"].stop, samples=samples, seed=seed + 1,
                               max_new_tokens=train.EMBEDDED["max_new_tokens"], batch_size=512)
    questions = evaluation.load_questions(wish, tokenizer)[QUESTIONS[split]]
    return sampler.sample_rollouts(model, tokenizer, questions, evaluation.grader("apples"), wish)


def measured(policy, seed, split):
    """Measures of a policy's 16 answers to each question, kept in its folder; the score is what arms are chosen by."""
    path = f"{policy}/{split}.json"
    if not os.path.exists(path):
        rows = answers(*sampler.load_model(policy, "float32", "cpu"), seed, split)
        every = measure(rows, draws=1)
        measures = {name: every[name]["mean"] for name in ("pass@1", "maj@16", "invalid")}
        right = collections.Counter({row["id"]: 0 for row in rows})
        right.update(row["id"] for row in rows if row["reward"] > 0)
        write_json(path, {**measures, "score": (measures["pass@1"] + measures["maj@16"]) / 2, "right": list(right.values())})
    return read_json(path)


# ---- what came of it ----


def spread(values, sign=False):
    """'0.598 ± 0.021': mean and standard deviation over the seeds that have a value."""
    values = [value for value in values if value is not None]
    mean = f"{np.mean(values):{'+' if sign else ''}.3f}" if values else "-"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


def difference(one, other):
    return (np.array(one) - np.array(other)).tolist()


def show_arms(arms, measures, title):
    """A row for each arm: its rate and its measures."""
    edge = lambda arm: "*" if len(arm["validation"]) > 1 and arm["learning_rate"] in (min(RATES), max(RATES)) else " "
    rate = lambda arm: f"{arm['learning_rate']:g}{edge(arm)}" if "learning_rate" in arm else ""
    return table((title, "rate (* edge)", *measures), [(name, rate(arm), *(spread(arm[measure]) for measure in measures))
                                              for name, arm in arms.items()])


def verdict(whole, part=True):
    return "reproduces" if whole else "in part" if part else "does not at this size"


@contextlib.contextmanager
def picture(path, rows=1, columns=1):
    """`with picture(path, 1, 2) as (left, right):` axes to draw on, where matplotlib is installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 15, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3,
                            "legend.fontsize": 14}):
        width = 5.4 * columns if columns > 1 else 8.6
        figure, axes = pyplot.subplots(rows, columns, figsize=(width, 4.2 * rows), squeeze=False, layout="constrained")
        yield axes.ravel()
        names = {name: handle for ax in axes.ravel() for handle, name in zip(*ax.get_legend_handles_labels())}
        figure.legend(names.values(), names.keys(), loc="outside upper center", ncols=3 if len(names) < 6 else 2)
        figure.savefig(path, dpi=100, metadata={"Software": None})
        pyplot.close(figure)


def line(axes, x, values, name, label=None, **changes):
    """A method's mean over seeds with its standard deviation shaded. values: [seeds, len(x)]"""
    colour, style, marker, _ = STYLES[name]
    mean, deviation = np.mean(values, 0), np.std(values, 0, ddof=1) if len(values) > 1 else 0.0
    axes.plot(x, mean, **{"color": colour, "linestyle": style, "marker": marker, "label": label or name, **changes})
    axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)


def bars(axes, groups, values, labels=None):
    """Bars side by side with their standard deviation. values: {name: [seeds, groups]}, labels: other names for some"""
    for number, (name, one) in enumerate(values.items()):
        colour, _, _, hatch = STYLES[name]
        place = np.arange(len(groups)) + (number - (len(values) - 1) / 2) * 0.8 / len(values)
        drawn = axes.bar(place, np.mean(one, 0), 0.8 / len(values), yerr=np.std(one, 0, ddof=1) if len(one) > 1 else None,
                         label=(labels or {}).get(name, name), color=colour, hatch=hatch, edgecolor="white", capsize=3)
        axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=11)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.12)  # room for the numbers
