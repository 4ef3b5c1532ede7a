"""The query expander on real documents: SmolLM2 adds words to SciFact's queries.

    python tools/smollm2.py                             makes the model
    python experiments/run.py scifact --corpus DIR      SciFact in BEIR's layout, about 75 minutes

The expanders are compared with no expansion and with Rocchio's, a classical one: the best words of
the documents that the query itself finds.
"""

import collections
import dataclasses
import functools
import itertools

import numpy as np
from filelock import FileLock

import search
from engine.bm25 import analyse, is_common, read_texts, row_of
from engine.common import Problem
from engine.measures import interval_text
from experiments.common import (
    bars_of,
    compare,
    differences,
    measure_arm,
    methods,
    spread,
    verdict,
    with_rollouts,
)
from experiments.pretrained import TRAINING
from experiments.queries import measure_added

OUT = "runs/search-scifact"
RATES = (6e-6, 2e-5)
CLAIMED = "TOPR, share 0.5"  # the README's advice where few are right
# Rocchio's: documents, words, weight of the query, the best of 27 forms on training queries
ARMS = {
    "no expansion": {"form": (0, 0, 1)},
    "Rocchio": {"form": (3, 10, 4)},
    **methods("base", "positives only", "TOPR", CLAIMED),
}
LEARN, CHOOSE = 200, 100  # training queries to learn from; to choose the rates on
COMPARED = ("recall@100", "recall@10", "ndcg@10")
MEASURES = (*COMPARED, "without fault")


def run(settings):
    if not settings.corpus:
        raise Problem("scifact needs --corpus DIR: SciFact in BEIR's layout")
    run = functools.partial(run_arm, settings.corpus, settings.pretrained)
    arms = compare(settings, run, ARMS, RATES, seeds=1)
    pairs = [(later, earlier) for earlier, later in itertools.combinations(arms, 2)]
    return {"arms": arms, "paired": differences(arms, COMPARED, pairs)}


@functools.cache
def make_job(corpus, model, split):
    """(search.py's settings, the task with the queries to learn from and those to measure on, the
    index)"""
    settings = search.Settings(
        **TRAINING,
        corpus=corpus,
        model=model,
        samples=8,
        batch_size=128,
        max_new_tokens=48,
        out=OUT,
    )
    with FileLock(f"{OUT}.lock"):
        index = search.prepare(settings)
        splits = search.read_splits(settings, index)
        queries = list(splits["train"].items())
        can_gain = search.skip_full(settings, index, dict(queries[:-CHOOSE]))
        splits["train"] = dict(itertools.islice(can_gain.items(), LEARN))
        if split == "validation":
            splits["test"] = dict(queries[-CHOOSE:])
        task = search.make_task(settings, index, splits)
        settings = with_rollouts(settings, task)
    reported = dataclasses.replace(settings, metric=COMPARED[0])
    task.measure = search.make_task(reported, index, splits).measure
    return settings, task, index


def run_arm(corpus, model, seed, arm, rate, split):
    settings, task, index = make_job(corpus, model, split)
    if "form" in arm:
        values = measure_added(task, functools.partial(rocchio, corpus, index, *arm["form"]))
    else:
        two = dataclasses.replace(settings, samples=2)
        values = measure_arm(two, task, arm, rate, split)
    means = {measure: np.mean(values[measure]) for measure in MEASURES}
    each = {f"by question, {measure}": values[measure] for measure in COMPARED}
    return {**means, **each, "score": means["ndcg@10"]}


def rocchio(corpus, index, documents, count, weight, text):
    """The best words of the first documents, and the query's own weight - 1 times."""
    query, totals = analyse(text), collections.Counter()
    for number in search.find(index, None, text)[:documents]:
        for word in words_of(corpus)[index.ids[number]] - set(query):
            if not is_common(index, word):
                holders, scores = row_of(index, word)
                totals[word] += scores[np.searchsorted(holders, number)]
    best = [word for word, _ in totals.most_common(count)]
    return " ".join(best + query * (weight - 1))


@functools.cache
def words_of(corpus):
    """{document: its different words}"""
    return {id: set(analyse(text)) for id, text in read_texts(f"{corpus}/corpus.jsonl")}


# ---- what came of it ----


draw = bars_of(COMPARED)


def claims(result):
    arms = result["arms"]
    over = [
        result["paired"]["ndcg@10"][f"{CLAIMED} minus {other}"]
        for other in ("no expansion", "base", "positives only")
    ]
    over_none, over_base, _ = (interval_text(interval, "+") for interval in over)
    # What is faulty adds nothing, and does no harm.
    expands = arms[CLAIMED]["without fault"] >= arms["base"]["without fault"]
    found = ", ".join(f"{name} {spread(arms[name]['ndcg@10'])}" for name in arms)
    faultless = ", ".join(
        f"{name} {spread(arms[name]['without fault'])}" for name in list(ARMS)[2:]
    )
    yield (
        "A pretrained model learns to expand the queries of a real collection (search)",
        f"nDCG@10 on SciFact's queries: {found}; {CLAIMED}, over the base {over_base}, over no "
        f"expansion {over_none}; expansions without a fault: {faultless}",
        verdict(*(expands and gain["low"] > 0 for gain in over)),
    )
