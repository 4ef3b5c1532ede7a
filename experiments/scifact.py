"""The query expander on real documents: SmolLM2 adds words to SciFact's queries.

    python experiments/run.py scifact --corpus DIR      SciFact in BEIR's layout, about 75 minutes

The expanders are compared with no expansion and with Rocchio's, a classical one: the best words of
the documents that the query itself finds, their number and weight chosen on the training queries.
"""

import collections
import dataclasses
import functools
import itertools

import numpy as np

import search
import train
from engine.rollouts import read_rollouts
from engine.bm25 import analyse, is_common, read_texts, row_of, search as look_for
from engine.common import Problem, part_of, table
from engine.measures import interval, interval_text, paired_interval
from experiments.common import bars, compare, name_of, picture, run_again, verdict
from experiments.pretrained import PRECISION, find_model

OUT = "runs/search-scifact"
RATES = (6e-6, 2e-5)
CLAIMED = "TOPR, share 0.5"  # the README's advice where few are right
ARMS = {"positives only": {"loss": "sft"}, "TOPR": {"loss": "topr"},
        CLAIMED: {"loss": "topr", "positive_share": 0.5}}
LEARN, CHOOSE = 200, 100  # training queries to learn from; to choose rates and Rocchio's form on
MEASURES = ("recall@100", "recall@10", "ndcg@10")  # the first columns of what search.py measures
NDCG = MEASURES.index("ndcg@10")
DOCUMENTS, WORDS, WEIGHTS = (3, 5, 10), (5, 10, 20), (1, 2, 4)  # the forms of Rocchio's
EXAMPLES = 10


def run(settings, each):
    if not settings.corpus:
        raise Problem("scifact needs --corpus DIR: SciFact in BEIR's layout")
    job = functools.partial(collection, settings.corpus, find_model(settings), settings.quick)
    base, index, topics = job()
    learned = search.make_rollouts(base, index, topics["learn"], base.model)
    form = max(itertools.product(DOCUMENTS, WORDS, WEIGHTS),
               key=lambda form: rocchio(base, index, topics["choose"], form)[:, NDCG].mean())
    fixed = {"no expansion": search.look_up_alone(index, topics["test"], with_measures(base)),
             "Rocchio": rocchio(base, index, topics["test"], form)}
    found = {name: dict.fromkeys(search.KINDS, values) for name, values in fixed.items()}
    found["base"] = measure_policy(base, index, topics["test"], base.model, "base")
    run = functools.partial(run_arm, job)
    once = dataclasses.replace(settings, seeds=1)
    arms = compare(once, each, run, ARMS, "scifact", RATES[1:] if settings.quick else RATES)
    for name, arm in arms.items():
        found[name] = run_again(each, run, arm, f"scifact: {name} by query")[0]["right"]
    return {"learned": learned, "queries": len(topics["test"]), "arms": arms,
            "Rocchio": dict(zip(("documents", "words", "weight of the query"), form)),
            **compared(found), "used": {name: used(found[name]) for name in ("base", *arms)},
            "examples": examples(base, index, topics["test"], arms)}


@functools.cache
def collection(corpus, model, quick):
    """(search.py's settings, the index, {part: queries}); opened once by each process."""
    settings = search.Settings(
        corpus=corpus, model=model, out=f"{OUT}/{'quick' if quick else 'full'}", samples=8,
        max_new_tokens=48, batch_size=128, precision=PRECISION, optimizer="adamw", sequences=16,
        warmup=10, schedule="cosine", prompt_group=8, skip_full=False)
    index, few = search.prepare(settings), 6 if quick else 1
    learn, test = map(list, map(dict.items, search.read_splits(settings, index)))
    can_gain = search.skip_full(index, dict(learn[:-CHOOSE]), settings)
    return settings, index, {"learn": dict(list(can_gain.items())[: LEARN // few]),
                             "choose": dict(learn[-CHOOSE // few :]),
                             "test": dict(test[: 300 // few])}


def folder_of_arm(base, arm, rate):
    return f"{base.out}/{name_of(arm, rate)}"


def run_arm(job, seed, arm, rate, split):
    base, index, topics = job()
    settings = dataclasses.replace(base, out=folder_of_arm(base, arm, rate), seed=seed,
                                   learning_rate=rate, **arm)
    policy = f"{settings.out}/policy"
    train.train_once(part_of(train.Settings, settings, rollouts=f"{base.out}/rollouts.jsonl",
                             out=policy))
    part = "test" if split == "test" else "choose"
    right = measure_policy(settings, index, topics[part], policy, part)
    means = {kind: float(right[kind][:, NDCG].mean()) for kind in right}
    return {**means, "score": means["sampled"], "right": right}


def measure_policy(settings, index, topics, policy, name):
    """{kind: measures of its expansions, [queries, columns]}"""
    settings = with_measures(dataclasses.replace(settings, samples=2))
    return {kind: search.measure_once(settings, index, topics, policy, name, kind)
            for kind in search.KINDS}


def with_measures(settings):
    """The rewarded measure is the first that search.py reports; two others follow."""
    return dataclasses.replace(settings, metric=MEASURES[0])


# ---- Rocchio's expansion ----


def rocchio(settings, index, topics, form):
    """The measures of the queries with the best words of the first documents that they find.

    [queries, columns]; form: (documents, words, how many times each word of the query counts)
    """
    documents, count, weight = form
    rows = []
    for id, (text, _) in topics.items():
        query = analyse(text)
        totals = collections.Counter()
        for number in look_for(index, query, documents)[0]:
            for word in words_of(settings.corpus)[index.ids[number]] - set(query):
                if not is_common(index, word):
                    holders, scores = row_of(index, word)
                    totals[word] += scores[np.searchsorted(holders, number)]
        added = [word for word, _ in totals.most_common(count)]
        rows.append({"id": id, "completion": " ".join(added + query * (weight - 1))})
    anything = dataclasses.replace(with_measures(settings), repeats=1000)
    return search.look_up(index, topics, rows, anything)


@functools.cache
def words_of(corpus):
    """{document: its different words}"""
    return {id: set(analyse(text)) for id, text in read_texts(f"{corpus}/corpus.jsonl")}


# ---- what came of it ----


def compared(found):
    """Means and paired differences with 95% intervals over the queries.

    found: {name: {kind: [queries, columns]}}
    """
    means, gains = {}, {}
    for kind in search.KINDS:
        values = {name: np.transpose(of_name[kind]) for name, of_name in found.items()}
        for name in found:
            means[f"{name}, {kind}"] = dict(zip(MEASURES, map(interval, values[name])))
        for name, other in itertools.combinations(found, 2):
            pairs = map(paired_interval, values[name], values[other])
            gains[f"{other} minus {name}, {kind}"] = dict(zip(MEASURES, pairs))
    return {"means": means, "gains": gains}


def used(of_kind):
    """The share of sampled expansions without a fault; a faulty one adds nothing."""
    faults = of_kind["sampled"][:, -len(search.FAULTS):]
    return 1 - float(faults.sum(1).mean())


def examples(base, index, topics, arms):
    """The greedy expansions of the first queries, by the base policy and by what it became."""
    shown = [{"query": text} for text, _ in list(topics.values())[:EXAMPLES]]
    files = {"base": f"{base.out}/test-base-greedy.jsonl"}
    for name, arm in arms.items():
        folder = folder_of_arm(base, arm["settings"], arm["learning_rate"])
        files[name] = f"{folder}/test-test-greedy.jsonl"
    for name, path in files.items():
        for example, row in zip(shown, read_rollouts(path, zero_is_wrong=True)):
            words, fault = search.read_expansion(index, row, base)
            example[name] = " ".join(words) or f"({fault})"
    return shown


def show(result):
    parts = []
    for part in ("means", "gains"):
        rows = [(name, *(interval_text(one, "+" if part == "gains" else "")
                         for one in measures.values())) for name, measures in result[part].items()]
        parts.append(table((f"{result['queries']} test queries", *MEASURES), rows))
    rows = [(name, f"{share:.3f}") for name, share in result["used"].items()]
    parts.append(table(("sampled", "expansions without a fault"), rows))
    for example in result["examples"]:
        parts.append("\n".join(f"{name:15} {text}" for name, text in example.items()))
    return "\n\n".join(parts)


def draw(result, path):
    names = ("no expansion", "Rocchio", "base", *result["arms"])
    arms = {name: {measure: [interval["mean"]] for measure, interval in
                   result["means"][f"{name}, sampled"].items()} for name in names}
    with picture(path) as (axes,):
        bars(axes, arms, MEASURES)


def claims(result):
    def text(name, part="means"):
        sign = "+" if part == "gains" else ""
        return interval_text(result[part][f"{name}, sampled"]["ndcg@10"], sign)

    shares, others = result["used"], ("no expansion", "base", "positives only")
    over = [result["gains"][f"{CLAIMED} minus {other}, sampled"]["ndcg@10"] for other in others]
    expands = shares[CLAIMED] >= shares["base"]  # what is faulty adds nothing, and does no harm
    means = ", ".join(f"{name} {text(name)}" for name in ("no expansion", "Rocchio", *shares))
    faultless = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    yield ("A pretrained model learns to expand the queries of a real collection (search)",
           f"nDCG@10 on {result['queries']} SciFact queries: {means}; {CLAIMED}, over the base "
           f"{text(f'{CLAIMED} minus base', 'gains')}, over no expansion "
           f"{text(f'{CLAIMED} minus no expansion', 'gains')}; expansions without a fault: "
           f"{faultless}",
           verdict(*(expands and gain["low"] > 0 for gain in over)))
