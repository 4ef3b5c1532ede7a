"""The search task: query expansion learned from what a search engine returns, without any reference answer."""

import dataclasses
import functools

import numpy as np

import search
import train
from data import library
from experiments.common import bars, by_seed, compare, difference, picture, show_arms, spread, verdict

ARMS = {"positives only": {"loss": "sft"}, "TOPR": {"loss": "topr"}}
MEASURE, HELD_OUT = "recall@10", 128  # training queries to choose the rate on
OUT = "runs/search-library"


def run(settings, each):
    each(collection, [()], "the collection and its index")
    each(expander, [(seed,) for seed in range(settings.seeds)], "base expanders")
    base = each(measures_of, [(seed, "", "test") for seed in range(settings.seeds)], "base expanders: test")
    arms = compare(settings, each, run_expander, ARMS, "queries")
    return {"no expansion": each(without, [()], "the queries alone")[0],
            "base": by_seed(base), "arms": arms}


@functools.cache
def collection():
    """search.py's settings and its index: made once, opened once by each process."""
    settings = search.Settings(**search.EMBEDDED, out=OUT)
    return settings, search.prepare(settings)


def expander(seed):
    """The base expander and its rewarded rollouts, on all training queries and without those of the validation."""
    settings, index = collection()
    base = train.base_policy(f"{OUT}/seed{seed}", seed, library, steps=500, layers=2)
    for split in ("test", "validation"):
        learn, _ = topics(split)
        search.rewarded_rollouts(settings, index, learn, base, folder_of(seed, split), seed)
    return base


def topics(split):
    """(queries to learn from, queries to measure on)"""
    settings, index = collection()
    test = search.read_split(settings, index, settings.split, settings.test_queries)
    learn = search.read_split(settings, index, settings.train_split, settings.queries, {text for text, _ in test.values()})
    if split == "test":
        return learn, test
    queries = list(learn.items())
    return dict(queries[:-HELD_OUT]), dict(queries[-HELD_OUT:])


def folder_of(seed, split):
    return f"{OUT}/seed{seed}" + ("" if split == "test" else f"/{split}")


def run_expander(seed, arm, rate, split):
    settings, index = collection()
    learn, _ = topics(split)
    folder = folder_of(seed, split)
    rollouts, _ = search.rewarded_rollouts(settings, index, learn, expander(seed), folder, seed)
    settings = dataclasses.replace(settings, learning_rate=rate, epochs=arm.get("epochs", settings.epochs))
    policy = search.trained(settings, expander(seed), rollouts, f"{folder}/{rate:g}",
                            arm["loss"], "", seed)
    return measures_of(seed, policy, split, f"{folder}/{rate:g}")


def measures_of(seed, policy, split, folder=""):
    settings, index = collection()
    _, test = topics(split)
    policy, folder = policy or expander(seed), folder or folder_of(seed, split)
    kept = search.measured(settings, index, test, policy, list(search.SHOWN), folder, seed)
    sampled, greedy = (float(np.mean(kept[kind]["scores"], 0)[search.SHOWN.index(MEASURE)]) for kind in ("sampled", "greedy"))
    return {"score": sampled, "sampled": sampled, "greedy": greedy}


def without():
    settings, index = collection()
    _, test = topics("test")
    return float(search.look_up(index, test, search.alone(test), [MEASURE], settings).mean())


def show(result):
    return f"the queries alone: {result['no expansion']:.3f}\n\n" + show_arms(
        {"base": result["base"], **result["arms"]}, ("sampled", "greedy"), MEASURE)


def draw(result, path):
    with picture(path) as (axes,):
        bars(axes, ["sampled", "greedy"], {name: np.array([arm["sampled"], arm["greedy"]]).T for name, arm in {
            "base": result["base"], **result["arms"]}.items()})
        axes.axhline(result["no expansion"], color="black", linestyle="--", label="no expansion")
        axes.set(ylabel=MEASURE)
        axes.legend()


def claims(result):
    arms, base = result["arms"], result["base"]["sampled"]
    topr, positives = arms["TOPR"]["sampled"], arms["positives only"]["sampled"]
    yield ("An expander learns from the score of a search engine (search)",
           f"{MEASURE}: no expansion {result['no expansion']:.3f}, base {spread(base)}, positives only {spread(positives)}, "
           f"TOPR {spread(topr)}: TOPR over positives {spread(difference(topr, positives), sign=True)}",
           verdict(min(difference(topr, base)) > 0 and min(difference(topr, positives)) > 0, np.mean(topr) > np.mean(base)))
