"""The search task: query expansion learned from what a search engine returns alone."""

import dataclasses
import functools

import numpy as np

import search
import train
from data import library
from experiments.common import (
    bars,
    by_seed,
    compare,
    difference,
    name_of,
    picture,
    show_arms,
    spread,
    verdict,
)

ARMS = {"positives only": {"loss": "sft"}, "TOPR": {"loss": "topr"}}
MEASURE, HELD_OUT = "recall@10", 128  # training queries to choose the rate on
OUT = "runs/search-library"


def run(settings, each):
    seeds = [(seed,) for seed in range(settings.seeds)]
    each(collection, [()], "the collection and its index")
    each(expander, seeds, "base expanders")
    base = each(run_base, seeds, "base expanders: test")
    arms = compare(settings, each, run_expander, ARMS, "queries")
    return {"no expansion": each(without, [()], "the queries alone")[0],
            "base": by_seed(base), "arms": arms}


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
    _, index = collection()
    base = train.base_policy(f"{OUT}/seed{seed}", seed, library, steps=500, layers=2)
    for split in ("test", "validation"):
        learn, _ = topics(split)
        search.make_rollouts(settings_of(seed, split), index, learn, base)


def topics(split):
    """(queries to learn from, queries to measure on)"""
    learn, test = search.read_splits(*collection())
    if split == "test":
        return learn, test
    queries = list(learn.items())
    return dict(queries[:-HELD_OUT]), dict(queries[-HELD_OUT:])


def run_base(seed):
    return measure_once(settings_of(seed, "test"), f"{OUT}/seed{seed}/base", "base", "test")


def run_expander(seed, arm, rate, split):
    settings = settings_of(seed, split, learning_rate=rate)
    settings = dataclasses.replace(settings, epochs=arm.get("epochs", settings.epochs))
    rollouts, loss = f"{settings.out}/rollouts.jsonl", arm["loss"]
    settings.out += f"/{name_of(arm, rate)}"
    policy = f"{settings.out}/{loss}"
    train.train_once(search.arm_settings(settings, loss, model=f"{OUT}/seed{seed}/base",
                                         rollouts=rollouts, out=policy))
    return measure_once(settings, policy, loss, split)


def measure_once(settings, policy, name, split):
    _, test = topics(split)
    kept = search.measure_once(settings, collection()[1], test, policy, name)
    column = search.columns_of(settings).index(MEASURE)
    means = {kind: float(np.mean(kept[kind], 0)[column]) for kind in ("sampled", "greedy")}
    return {"score": means["sampled"], **means}


def without():
    settings, index = collection()
    _, test = topics("test")
    values = search.look_up(index, test, search.alone(test), settings)
    return float(values[:, search.columns_of(settings).index(MEASURE)].mean())


def show(result):
    arms = {"base": result["base"], **result["arms"]}
    return (f"the queries alone: {result['no expansion']:.3f}\n\n"
            + show_arms(arms, ("sampled", "greedy"), MEASURE))


def draw(result, path):
    arms = {"base": result["base"], **result["arms"]}
    values = {name: np.array([arm["sampled"], arm["greedy"]]).T for name, arm in arms.items()}
    with picture(path) as (axes,):
        bars(axes, ["sampled", "greedy"], values)
        axes.axhline(result["no expansion"], color="black", linestyle="--", label="no expansion")
        axes.set(ylabel=MEASURE)


def claims(result):
    arms, base = result["arms"], result["base"]["sampled"]
    topr, positives = arms["TOPR"]["sampled"], arms["positives only"]["sampled"]
    over_base, over_positives = difference(topr, base), difference(topr, positives)
    measured = (f"sampled {MEASURE}: no expansion {result['no expansion']:.3f}, base "
                f"{spread(base)}, positives only {spread(positives)}, TOPR {spread(topr)}: "
                f"TOPR over positives {spread(over_positives, sign=True)}")
    reproduced = min(over_base) > 0 and min(over_positives) > 0
    yield ("A query expander learns from nothing but a search engine's score (search)", measured,
           verdict(reproduced, np.mean(topr) > np.mean(base)))
