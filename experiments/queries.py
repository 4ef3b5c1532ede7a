"""The search task: query expansion learned from what a search engine returns alone."""

import functools

import numpy as np
from filelock import FileLock

import search
import train
from data import library
from experiments.common import (
    bars_of,
    by_arm,
    compare,
    measure_arm,
    methods,
    spread,
    verdict,
    with_rollouts,
)

ARMS = {"no expansion": {"alone": True}, **methods("base", "positives only", "TOPR")}
REWARDED, HELD_OUT = search.EMBEDDED["metric"], 128  # training queries to choose the rate on
MEASURES = ("sampled", "greedy")
OUT = "runs/search-library"


def run(settings):
    return {"arms": compare(settings, run_expander, ARMS)}


@functools.cache
def make_job(seed, split):
    """(search.py's settings with a base expander and its rollouts, the task)"""
    settings = search.Settings(**search.EMBEDDED, seed=seed, out=OUT)
    with FileLock(f"{OUT}.lock"):
        index = search.prepare(settings)
        splits = search.read_splits(settings, index)
        if split == "validation":
            queries = list(splits["train"].items())
            splits = {"train": dict(queries[:-HELD_OUT]), "test": dict(queries[-HELD_OUT:])}
        task = search.make_task(settings, index, splits)
        settings.out = f"{OUT}/seed{seed}/{split}"
        settings.model = train.base_policy(f"{OUT}-seed{seed}", seed, library, steps=500, layers=2)
        return with_rollouts(settings, task), task


def measure_added(task, words):
    """{measure: its value for each query} of the words that a function adds to each."""
    rows = [
        {**query, "split": "test", "answer": words(query["question"])}
        for query in task.questions("test")
    ]
    values = {name: list(each) for name, each in task.measure(rows).items()}
    return {**values, "greedy": values[next(iter(values))]}


def run_expander(seed, arm, rate, split):
    settings, task = make_job(seed, split)
    if "alone" in arm:
        values = measure_added(task, lambda query: "")
    else:
        values = measure_arm(settings, task, arm, rate, split)
    sampled = np.mean(values[REWARDED])
    return {"sampled": sampled, "greedy": np.mean(values["greedy"]), "score": sampled}


draw = bars_of(MEASURES, ylabel=REWARDED)


def claims(result):
    found = by_arm(result, "sampled")
    base, positives, topr = found["base"], found["positives only"], found["TOPR"]
    ahead = topr - positives
    yield (
        "A query expander learns from nothing but a search engine's score (search)",
        f"sampled {REWARDED}: no expansion {found['no expansion'].mean():.3f}, base "
        f"{spread(base)}, positives only {spread(positives)}, TOPR {spread(topr)}: TOPR over "
        f"positives {spread(ahead, '+')}",
        verdict(min(topr - base) > 0 and min(ahead) > 0, topr.mean() > base.mean()),
    )
