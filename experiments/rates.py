"""The learning rate for a model's size: the best of a grid, and what the log says at step 20."""

import dataclasses

from engine import run_folder
from engine.common import table
from experiments import pretrained
from experiments.common import measure_once, picture, train_arm

SEEDS = 1
GRIDS = {  # {base policy: learning rates}
    "small": (1e-4, 3e-4, 1e-3, 3e-3),
    "larger": (1e-4, 3e-4, 1e-3, 3e-3),
    "largest": (3e-5, 1e-4, 3e-4),
    "pretrained": (2e-6, 6e-6, 2e-5)}
SIZES = {"small": "0.14 million", "larger": "0.7 million", "largest": "10 million",
         "pretrained": "135 million"}
OPTIMIZERS = ("adamw", "adafactor")
SHOWN = 20  # the step to look at
FIELDS = ("d_mean", "negative_weight", "gradient_norm")


def run(settings, each):
    bases = list(GRIDS)[: 1 if settings.quick else None]
    if "pretrained" in bases:
        settings = pretrained.prepare(dataclasses.replace(settings, seeds=SEEDS), each)
    jobs = [(settings, base, optimizer, rate) for base in reversed(bases)
            for optimizer in OPTIMIZERS for rate in GRIDS[base]]
    runs = each(run_rate, jobs, "rates")
    found = {}
    for (_, base, optimizer, rate), measures in zip(jobs, runs):
        found.setdefault(f"{SIZES[base]}, {optimizer}", {})[f"{rate:g}"] = measures
    return {"runs": found}


def run_rate(settings, base, optimizer, rate):
    """pass@1 on validation questions after a pass of TOPR, and the log of step 20."""
    if base == "pretrained":  # the two larger rates with AdamW are runs of pretrained.py, too
        other = {} if optimizer == "adamw" else {"optimizer": optimizer}
        arm = {**pretrained.ARMS["TOPR, share 0.5"], **other}
        policy = pretrained.train_arm(settings, 0, arm, rate)
        measures = pretrained.measure_once(settings, policy, "validation")
        score = measures["validation"]
    else:
        # 2,400 rollouts of which a fifth is right, whatever the size
        arm = {"loss": "topr", "optimizer": optimizer, "base": base, "positives": 0.2, "epochs": 1}
        made, _ = train_arm(0, arm, rate)
        policy = made.out
        measures = measure_once(policy, 0, "validation")
        score = measures["pass@1"]
    entry = run_folder.read_log(policy)[SHOWN - 1]
    return {"pass@1": score, "invalid": measures["invalid"],
            **{field: entry[field] for field in FIELDS}}


def show(result):
    rows = []
    for name, runs in result["runs"].items():
        best = max(runs, key=lambda rate: runs[rate]["pass@1"])
        for rate, run in runs.items():
            mark = "best" if rate == best else ""
            rows.append((name, rate, mark, *(f"{value:.3f}" for value in run.values())))
    fields = [f"{field} at step {SHOWN}" for field in FIELDS]
    return table(("size, optimizer", "rate", "", "pass@1", "invalid", *fields), rows)


def draw(result, path):
    with picture(path) as (axes,):
        for number, (name, runs) in enumerate(result["runs"].items()):
            marker, dashes = "osD^"[number // 2], "-:"[number % 2]
            scores = [run["pass@1"] for run in runs.values()]
            axes.plot(list(map(float, runs)), scores, dashes, marker=marker, label=name)
        axes.set(xscale="log", xlabel="learning rate", ylabel="pass@1")


def claims(result):
    """The paper says nothing of the rates of other sizes."""
    return []
