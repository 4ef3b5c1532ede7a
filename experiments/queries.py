"""The search task: query expansion learned from what a search engine returns, without any reference answer."""

import dataclasses
import functools

import numpy as np

import search
import train
from data import library
from experiments.common import bars, by_seed, compare, difference, name_of, picture, show_arms, spread, verdict

ARMS = {"positives only": {"loss": "sft"}, "TOPR": {"loss": "topr"}}
MEASURE, HELD_OUT = "recall@10", 128  # training queries to choose the rate on
OUT = "runs/search-library"


def run(settings, each):
    each(collection, [()], "the collection and its index")
    each(expander, [(seed,) for seed in range(settings.seeds)], "base expanders")
    base = each(run_base, [(seed,) for seed in range(settings.seeds)], "base expanders: test")
    arms = compare(settings, each, run_expander, ARMS, "queries")
    return {"no expansion": each(without, [()], "the queries alone")[0],
            "base": by_seed(base), "arms": arms}


@functools.cache
def collection():
    """search.py's settings and its index: made once, opened once by each process."""
    settings = search.Settings(**search.EMBEDDED, out=OUT)
    return settings, search.prepare(settings)


def expander(seed):
    """Makes the base expander and its rewarded rollouts, on all training queries and without those of the validation."""
    settings, index = collection()
    base = train.base_policy(f"{OUT}/seed{seed}", seed, library, steps=500, layers=2)
    for split in ("test", "validation"):
        learn, _ = topics(split)
        search.rewarded_rollouts(settings, index, learn, base, folder_of(seed, split), seed)


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
    return f"{OUT}/seed{seed}" + ("" if split == "test" else f"/{split}")  # torchrun search.py has its own here too


def run_base(seed):
    return measured(f"{OUT}/seed{seed}/base", folder_of(seed, "test"), seed, "test")


def run_expander(seed, arm, rate, split):
    settings, _ = collection()
    settings = dataclasses.replace(settings, learning_rate=rate, epochs=arm.get("epochs", settings.epochs))
    rollouts, folder = f"{folder_of(seed, split)}/rollouts.jsonl", f"{folder_of(seed, split)}/{name_of(arm, rate)}"
    policy = search.trained(settings, f"{OUT}/seed{seed}/base", rollouts, folder, arm["loss"], "", seed)
    return measured(policy, folder, seed, split)


def measured(policy, folder, seed, split):
    settings, index = collection()
    _, test = topics(split)
    kept = search.measured(settings, index, test, policy, list(search.SHOWN), folder, seed)
    column = search.SHOWN.index(MEASURE)
    sampled, greedy = (float(np.mean(kept[kind]["scores"], 0)[column]) for kind in ("sampled", "greedy"))
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


def claims(result):
    arms, base = result["arms"], result["base"]["sampled"]
    topr, positives = arms["TOPR"]["sampled"], arms["positives only"]["sampled"]
    yield ("A query expander learns from nothing but a search engine's score (search)",
           f"sampled {MEASURE}: no expansion {result['no expansion']:.3f}, base {spread(base)}, positives only "
           f"{spread(positives)}, TOPR {spread(topr)}: TOPR over positives {spread(difference(topr, positives), sign=True)}",
           verdict(min(difference(topr, base)) > 0 and min(difference(topr, positives)) > 0, np.mean(topr) > np.mean(base)))
