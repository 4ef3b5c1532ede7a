"""The search task: query expansion learned from what a search engine returns alone."""

import dataclasses
import functools

import search
import train
from engine.common import part_of
from experiments.common import (
    bars, by_arm, by_seed, compare, name_of, picture, rows_of, show_arms, spread, verdict)

ARMS = {"positives only": {"loss": "sft"}, "TOPR": {"loss": "topr"}}
MEASURE, HELD_OUT = search.EMBEDDED["metric"], 128  # training queries to choose the rate on
OUT = "runs/search-library"


def run(settings, each):
    seeds = range(settings.seeds)
    each(collection, [()], "the collection and its index")
    each(expander, [(seed,) for seed in seeds], "base expanders")
    none = each(measure_once, [(collection()[0], None, "none", "test")], "the queries alone")
    jobs = [(settings_of(seed, "test"), f"{OUT}/seed{seed}/base", "base", "test") for seed in seeds]
    base = each(measure_once, jobs, "base expanders: test")
    arms = compare(settings, each, run_expander, ARMS, "queries")
    return {"no expansion": none[0]["sampled"], "base": by_seed(base), "arms": arms}


@functools.cache
def collection():
    """search.py's settings and its index: made once, opened once by each process."""
    settings = search.Settings(**search.EMBEDDED, out=OUT)
    return settings, search.prepare(settings)


def settings_of(seed, split, **changes):
    """search.py's settings for a seed; the test split has the folder of `torchrun search.py`."""
    out = f"{OUT}/seed{seed}" + ("" if split == "test" else f"/{split}")
    return dataclasses.replace(collection()[0], seed=seed, out=out, **changes)


def expander(seed):
    """Makes the base expander and its rollouts, with and without the queries of the validation."""
    base = search.base_expander(OUT, seed)
    for split in ("test", "validation"):
        learn, _ = topics(split)
        search.make_rollouts(settings_of(seed, split), collection()[1], learn, base)


def topics(split):
    """(queries to learn from, queries to measure on)"""
    learn, test = search.read_splits(*collection())
    if split == "test":
        return learn, test
    queries = list(learn.items())
    return dict(queries[:-HELD_OUT]), dict(queries[-HELD_OUT:])


def run_expander(seed, arm, rate, split):
    settings = settings_of(seed, split, learning_rate=rate, **arm)
    rollouts = f"{settings.out}/rollouts.jsonl"
    settings.out += f"/{name_of(arm, rate)}"
    policy = f"{settings.out}/{settings.loss}"
    train.train_once(part_of(train.Settings, settings, model=f"{OUT}/seed{seed}/base",
                             rollouts=rollouts, out=policy))
    return measure_once(settings, policy, settings.loss, split)


def measure_once(settings, policy, name, split):
    _, test = topics(split)
    means = {}
    for kind in search.KINDS:
        found = search.measure_once(settings, collection()[1], test, policy, name, kind)
        means[kind] = float(found[:, 0].mean())  # the rewarded measure is the first
    return {"score": means["sampled"], **means}


def show(result):
    return (f"the queries alone: {result['no expansion']:.3f}\n\n"
            + show_arms(rows_of(result), search.KINDS, MEASURE))


def draw(result, path):
    with picture(path) as (axes,):
        bars(axes, rows_of(result), search.KINDS)
        axes.axhline(result["no expansion"], color="black", linestyle="--", label="no expansion")
        axes.set(ylabel=MEASURE)


def claims(result):
    found = by_arm(result, "sampled")
    base, positives, topr = found["base"], found["positives only"], found["TOPR"]
    ahead = topr - positives
    yield ("A query expander learns from nothing but a search engine's score (search)",
           f"sampled {MEASURE}: no expansion {result['no expansion']:.3f}, base {spread(base)}, "
           f"positives only {spread(positives)}, TOPR {spread(topr)}: TOPR over positives "
           f"{spread(ahead, '+')}",
           verdict(min(topr - base) > 0 and min(ahead) > 0, topr.mean() > base.mean()))
