"""What the experiments share: arms, their learning rates, the embedded task, tables, pictures.

A finding is a module with run(settings) -> {"arms": what compare() returns, ...}, with
claims(result), which yields (claim, what was measured, verdict), and with draw(result, *axes), on
so many axes as PANELS says (none: one). If it has MEASURES, its table shows these; if it has
show(result), that makes its tables.

An arm is a method to compare: a dict of the train.py settings that differ from the embedded job's.
METHODS has those that several findings compare.
Two of its keys are not settings: "positives" is the share of positives in the data set that is
drawn from the rollouts, "base" names the policy to start from (BASES). An arm without a loss is
that policy itself, at learning rate 0.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import random
import sys

import numpy as np
import torch
from filelock import FileLock

import eval as evaluation
import topr
import train
from data import load_task
from engine import losses
from engine.common import read_json, say, setting, table, write_json
from engine.measures import interval_text, measure, paired_interval
from engine.parallel import start_ranks
from engine.rollouts import each_rollout, write_rollouts
from engine.sampler import load_model
from engine.tasks import load_questions
from experiments import long_apples

RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # --quick takes the third
WORKING_RATE = 1e-3  # train.py's own for the embedded job
TUNING_SEEDS = 2  # the learning rate is chosen on the first seeds
QUESTIONS = {"test": slice(0, 500), "validation": slice(500, 750)}  # of split "test"
SAMPLES = 16  # answers to each question
MEASURES = ("pass@1", "maj@16", "invalid")
BASES = {  # policies to start from: the embedded one, larger ones, one that gives long answers
    "small": {},
    "larger": {"width": 128, "layers": 4, "rate": 2e-3},
    "largest": {"width": 384, "layers": 7, "rate": 1e-3, "steps": 300},
    "long": {"task": long_apples},
}
LONG = {"task": long_apples.__file__, "max_new_tokens": 160, "questions": 256}
PART = 2400  # completions in a data set with its own share of positives
METHODS = {
    "base": {},
    "TOPR": {"loss": "topr"},
    "TOPR, share 0.5": {"loss": "topr", "positive_share": 0.5},
    "TOPR, mean ratio": {"loss": "topr", "ratio": "mean"},
    "TOPR, token ratio": {"loss": "topr", "ratio": "token"},
    "TOPR, Anna Karenina": {"loss": "topr", "anna_karenina": True},
    "positives only": {"loss": "sft"},
    "PPO": {"loss": "ppo"},
    "naive REINFORCE": {"loss": "reinforce"},
    "DPO": {"loss": "dpo"},
    # Not in the paper: arXiv 2506.20520. The best of -0.7, -0.8, -0.9 on validation questions.
    "AsymRE": {"loss": "reinforce", "baseline": -0.9},
    "importance sampling": {"loss": "is"},
    "truncated importance sampling": {"loss": "tis"},
    "CISPO": {"loss": "cispo"},
    "GSPO": {"loss": "gspo"},
    "negatives only": {"loss": "nsr"},
}
STYLES = {  # colour, line, marker, hatch: one look per method, distinct without colours too
    "TOPR": "#1f4e9c - o",
    "TOPR, share 0.5": "#74a9e6 - * \\\\",
    "TOPR, mean ratio": "#b5651d -- s",
    "TOPR, token ratio": "#c92a2a : ^",
    "positives only": "#2f9e44 -- s //",
    "PPO": "#f08c00 -. ^",
    "naive REINFORCE": "#c92a2a : X",
    "DPO": "#7048a8 -. v",
    "AsymRE": "#0c8599 : < --",
    "base": "#868e96 : . xx",
    "no expansion": "#ced4da - p",
    "Rocchio": "#b5651d -- h ..",
    "importance sampling": "#b5651d -. D ..",
    "truncated importance sampling": "#a9c46c : P //",
}


@dataclasses.dataclass
class Settings:
    quick: bool = setting(
        False, "one seed, one pass over the rollouts, one learning rate instead of the grid"
    )
    show: bool = setting(False, "run nothing: show tables, pictures and claims of existing results")
    seeds: int = setting(5, "base policies, with their own rollouts and questions", least=1)
    processes: int = setting(0, "arms trained at once (0: one on each core)")
    corpus: str = setting("", "scifact: the collection's folder, in BEIR's layout")
    pretrained: str = setting(
        "runs/smollm2/model",
        "pretrained, scifact: the model's directory "
        "or hub name (python tools/smollm2.py makes the default)",
    )
    out: str = setting(
        "",
        "folder for results and pictures (default: experiments/results with 5 "
        "seeds and without --quick, else runs/results)",
    )


def methods(*names):
    return {name: METHODS[name] for name in names}


def gspo_loss(logp, mu_logp, reward, mask, count=None):
    """GSPO (arXiv 2507.18071): PPO's clip with one ratio a sequence, its mean over tokens.

    That is ppo_loss of sequences of a single token, the mean of theirs. The clip is PPO's, 0.2.
    """
    length = mask.sum(-1, keepdim=True)  # [batch, 1]
    logp, mu_logp = (
        torch.where(mask, values, 0.0).sum(-1, keepdim=True) / length for values in (logp, mu_logp)
    )  # [batch, 1]
    loss, stats = topr.ppo_loss(logp, mu_logp, reward, length > 0, count=count)
    return loss, {**stats, "log_ratio": stats["log_ratio"] * length[:, 0]}


losses.OTHERS["gspo"] = gspo_loss


# ---- many arms at once ----


def submit(settings, function, *job):
    """function(*job) in another process: its result() is what that returns."""
    return pool(settings.processes).submit(function, *job)


@functools.cache
def pool(processes):
    os.makedirs("runs", exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes or None, spawn, start_worker)


def start_worker():
    """One thread each, and the output in a file: the terminal shows the progress over all jobs."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open("runs/experiments.log", "a")


def compare(settings, run, arms, rates=RATES, seeds=None):
    """Each arm at its best learning rate: {name: its settings, rate, measures by seed}.

    run(seed, arm, rate, split) returns measures as a dict. The best rate has the highest mean
    "score" on the validation questions of the first seeds; the reported measures are those on
    the test questions of all seeds, or of the first `seeds`.
    """
    if settings.quick:
        arms = {name: {**arm, "epochs": 1} for name, arm in arms.items()}
        rates = [rates[len(rates) // 2]]
    seeds, compared = range(settings.seeds)[:seeds], {}
    tuning = seeds[:TUNING_SEEDS] if len(rates) > 1 else []
    tries = {
        name: {
            rate: [submit(settings, run, seed, arm, rate, "validation") for seed in tuning]
            for rate in (rates if "loss" in arm else [0])
        }
        for name, arm in arms.items()
    }
    for name, arm in arms.items():
        scores = {
            rate: [job.result()["score"] for job in jobs] for rate, jobs in tries[name].items()
        }
        best = max(scores, key=lambda rate: sum(scores[rate]))
        compared[name] = {
            "settings": arm,
            "learning_rate": best,
            "validation": scores,
            "jobs": [submit(settings, run, seed, arm, best, "test") for seed in seeds],
        }
    for name, arm in compared.items():
        found = [job.result() for job in arm.pop("jobs")]
        arm |= {
            measure: [one[measure] for one in found]
            for measure in found[0]
            if measure not in ("score", "right")
        }
        say(f"{name}: measured, at rate {arm['learning_rate']:g}")
    return compared


# ---- the embedded task: base policies, data sets, arms, measures ----


def folder_of(seed, base="small"):
    """The folder that train.py, too, uses for the embedded job."""
    return f"runs/apples-seed{seed}" + ("" if base == "small" else f"/{base}")


def job_settings(base, **changes):
    """The embedded job's, or that of long answers."""
    return train.Settings(**{**train.EMBEDDED, **(LONG if base == "long" else {}), **changes})


@functools.cache
def prepare(seed, base):
    """(base policy, its rollouts): made as train.py does, by the first process that needs them."""
    folder, settings = folder_of(seed, base), job_settings(base, seed=seed)
    rollouts = f"{folder}/rollouts-{settings.questions}x{SAMPLES}.jsonl"
    with FileLock(f"{folder}/.making"):
        policy = train.base_policy(folder, seed, **BASES[base])
        evaluation.sample_rollout_file(settings, load_task(settings.task), policy, rollouts)
    return policy, rollouts


def data_set(path, seed, share):
    """A file with PART of the rollouts, of which a share is positive."""
    drawn = path.replace(".jsonl", f"-{share}.jsonl")
    if not os.path.exists(drawn):
        rng, count, rows = random.Random(seed), round(share * PART), list(each_rollout(path))
        right, wrong = ([row for row in rows if row[1]["reward"] == side] for side in (1, -1))
        kept = rng.sample(right, count) + rng.sample(wrong, PART - count)
        write_rollouts(drawn, [row for _, row in sorted(kept)])  # each has the number of its line
    return drawn


def name_of(arm, rate):
    """The name of an arm's folder."""
    return "-".join([f"{key}={value}" for key, value in arm.items()] + [f"{rate:g}"])


def arm_settings(seed, arm, rate):
    """train.py's settings for an arm."""
    changes = {**arm, "learning_rate": rate}
    base, share = changes.pop("base", "small"), changes.pop("positives", None)
    policy, rollouts = prepare(seed, base)
    if share is not None:
        rollouts = data_set(rollouts, seed, share)
    out = f"{folder_of(seed, base)}/experiments/{name_of(arm, rate)}"
    return job_settings(base, seed=seed, model=policy, rollouts=rollouts, out=out, **changes)


def train_arm(seed, arm, rate):
    """(The folder of an arm's policy, its log), trained once."""
    settings = arm_settings(seed, arm, rate)
    if not rate:
        return settings.model, []
    is_drawn = arm.keys() <= {"loss", "baseline", "epochs"}  # collapse.py draws these curves
    point = is_drawn and evaluation.curve_point(settings, load_task(settings.task))
    return settings.out, train.train_once(settings, point)


def run_arm(seed, arm, rate, split):
    policy, _ = train_arm(seed, arm, rate)
    return measure_once(policy, seed, split, arm.get("base", "small"))


def measure_once(policy, seed, split, base="small"):
    """Measures a policy and keeps the result in its folder; arms are chosen by the score."""
    path, settings = f"{policy}/{split}.json", job_settings(base, seed=seed + 1)
    task = load_task(settings.task)
    if not os.path.exists(path):
        model, tokenizer = load_model(policy, settings, start_ranks())
        questions = load_questions(task, "test", 750, tokenizer, settings)
        asked = questions[QUESTIONS[split]]
        rows = evaluation.sample_rollouts(model, tokenizer, asked, task.grade, settings)
        values = measure(rows)
        found = {name: np.mean(values[name]) for name in MEASURES}
        score = (found["pass@1"] + found["maj@16"]) / 2
        write_json(path, {**found, "score": score, "right": values["pass@1"]})
    return read_json(path)


# ---- other tasks: one folder for the rollouts and the arms ----


def with_rollouts(settings, task):
    """The settings, with the rollouts of their model, which the first process samples."""
    rollouts = f"{settings.out}/rollouts.jsonl"
    with FileLock(f"{rollouts}.lock"):
        evaluation.sample_rollout_file(settings, task, settings.model, rollouts)
    return dataclasses.replace(settings, rollouts=rollouts)


def measure_arm(settings, task, arm, rate, split):
    """{measure: its value for each question} of an arm's samples, and "greedy"."""
    out = f"{settings.out}/{name_of(arm, rate)}"
    trained = dataclasses.replace(settings, learning_rate=rate, **arm, out=out)
    if rate:
        train.train_once(trained)
    return evaluation.measure_once(trained, task, out if rate else settings.model, split)


# ---- what came of it ----


def spread(values, sign=""):
    """'0.598 ± 0.021': mean and deviation over the seeds with a value. sign: "" or "+"."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean = f"{np.mean(values):{sign}.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


def show_arms(result, measures=MEASURES):
    """A row for each arm: its rate and its measures; and paired differences, if there are any."""
    rows = [
        (name, f"{arm['learning_rate']:g}", *(spread(arm.get(one, [])) for one in measures))
        for name, arm in result["arms"].items()
    ]
    found = table(("", "rate", *measures), rows)
    for part, paired in result.get("paired", {}).items():
        rows = [(pair, interval_text(interval, "+")) for pair, interval in paired.items()]
        found += "\n\n" + table((f"{part}, 95% intervals over questions", ""), rows)
    return found


def by_arm(result, measure):
    """{name: values of all seeds, [seeds]}, NaN for None"""
    return {
        name: np.array(arm[measure], float)
        for name, arm in result["arms"].items()
        if measure in arm
    }


def differences(arms, parts, pairs):
    """{part: {"one minus other": paired interval over the questions, in the mean of the seeds}}

    Takes "by question, PART" out of the arms: [seeds] of [questions].
    """
    paired = {}
    for part in parts:
        values = {name: np.mean(arm.pop(f"by question, {part}"), 0) for name, arm in arms.items()}
        paired[part] = {
            f"{one} minus {other}": paired_interval(values[other], values[one])
            for one, other in pairs
        }
    return paired


def verdict(*conditions):
    """All conditions of a claim hold, some of them, or none."""
    if all(conditions):
        return "reproduces"
    return "in part" if any(conditions) else "does not at this size"


def sure(*gains):
    """The verdict whether gains, each a mean with its interval, are above 0."""
    return verdict(*(gain["low"] > 0 for gain in gains))


def beyond_noise(gains):
    """The mean over the seeds is more than two standard errors above 0."""
    return gains.mean() > 2 * gains.std() / len(gains) ** 0.5


# ---- pictures ----


@contextlib.contextmanager
def picture(path, panels):
    """`with picture(path, 2) as (left, right):` axes to draw on."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 14, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3})
    rows = (panels + 1) // 2
    figure = Figure(figsize=(10.8, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, panels // rows, squeeze=False).ravel()
    yield axes
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3 if len(names) < 6 else 2)
    figure.savefig(path, metadata={"Software": None})


def over_seeds(values):
    """Mean and standard deviation (0 with one seed). [points, seeds] -> two of [points]"""
    return np.mean(values, 1), np.std(values, 1, ddof=min(1, len(values[0]) - 1))


def line(axes, x, values, name, label=None, **changes):
    """Mean over seeds with its standard deviation shaded. values: [len(x), seeds]"""
    colour, dashes, marker, *_ = STYLES[name].split()
    style = {"color": colour, "linestyle": dashes, "marker": marker, **changes}
    mean, deviation = over_seeds(values)
    axes.plot(x, mean, label=label or name, **style)
    axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)


def bars(axes, arms, groups, **labels):
    """Bars side by side with their standard deviation, for the arms with a style.

    arms: {name: {group: values of all seeds}}
    """
    arms = {name: arms[name] for name in arms if name in STYLES}
    width = 0.8 / len(arms)
    for number, (name, arm) in enumerate(arms.items()):
        colour, _, _, *hatch = STYLES[name].split()
        x = np.arange(len(groups)) + (number - (len(arms) - 1) / 2) * width
        mean, deviation = over_seeds([arm[group] for group in groups])
        drawn = axes.bar(
            x,
            mean,
            width,
            yerr=deviation,
            capsize=3,
            color=colour,
            hatch="".join(hatch),
            edgecolor="white",
            label=name,
        )
        axes.bar_label(drawn, fmt="%.2f", fontsize=11)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.12)  # room for the numbers
    axes.set(**labels)


def bars_of(groups, **labels):
    """A finding's draw(): bars of all arms."""
    return lambda result, axes: bars(axes, result["arms"], groups, **labels)
