"""The search task: query expansion learned from what a search engine returns alone."""

import dataclasses
import functools

import numpy as np
from filelock import FileLock

import eval as evaluation
import search
import train
from data import library
from experiments.common import bars, by_arm, compare, name_of, spread, verdict

ARMS = {
    "no expansion": {"alone": True},
    "base": {},
    "positives only": {"loss": "sft"},
    "TOPR": {"loss": "topr"},
}
REWARDED, HELD_OUT = search.EMBEDDED["metric"], 128  # training queries to choose the rate on
MEASURES = ("sampled", "greedy")
OUT = "runs/search-library"
PANELS = 1


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
        task = search.make_task(settings, index, splits, embedded=True)
        settings.out = f"{OUT}/seed{seed}/{split}"
        settings.model = train.base_policy(f"{OUT}-seed{seed}", seed, library, steps=500, layers=2)
        return with_rollouts(settings, task), task


def with_rollouts(settings, task):
    """The settings, with the rollouts of the base expander."""
    rollouts = f"{settings.out}/rollouts.jsonl"
    evaluation.sample_rollout_file(settings, task, settings.model, rollouts)
    return dataclasses.replace(settings, rollouts=rollouts)


def measure_arm(settings, task, arm, rate, split):
    """{measure: its value for each query} of an arm's sampled expansions, and "greedy"."""
    if "alone" in arm:
        return measure_added(task, lambda query: "")
    policy = settings.model
    this = dataclasses.replace(
        settings, learning_rate=rate, **arm, out=f"{settings.out}/{name_of(arm, rate)}"
    )
    if rate:
        train.train_once(this)
        policy = this.out
    return evaluation.measure_once(this, task, policy, split)


def measure_added(task, words):
    """The same for the words that a function adds to each query."""
    values = task.measure(
        [
            {**query, "split": "test", "answer": words(query["question"])}
            for query in task.questions("test")
        ]
    )
    values = {name: list(of_queries) for name, of_queries in values.items()}
    return {**values, "greedy": next(iter(values.values()))}


def run_expander(seed, arm, rate, split):
    values = measure_arm(*make_job(seed, split), arm, rate, split)
    sampled = np.mean(values[REWARDED])
    return {"sampled": sampled, "greedy": np.mean(values["greedy"]), "score": sampled}


def draw(result, ax):
    bars(ax, result["arms"], MEASURES, ylabel=REWARDED)


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
