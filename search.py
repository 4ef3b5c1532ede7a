"""Query expansion: a model adds words to a search query, and learns from what the engine returns.

    torchrun search.py                            the embedded collection, an expander from nothing
    torchrun search.py --corpus DIR --model NAME  a collection in BEIR's layout, your model
    python search.py ask heart kidney children    an expansion, the documents before and after

No reference answer exists here, only a score: reward +1 if the results are better than the query's
own. The engine is BM25, in engine/bm25.py; the sampler is eval.py's and the loop train.py's.
"""

import collections
import dataclasses
import functools
import itertools
import os
import re
import sys
import time
from typing import Optional

import numpy as np

import train
from data import library
from engine.rollouts import write_rollouts
from engine.tasks import render_prompt, without_marks
from engine import measures, run_folder, sampler
from engine.bm25 import (
    ANALYSERS,
    analyse,
    find_text,
    index_corpus,
    is_common,
    measure,
    open_index,
    read_texts,
    read_topics,
    search,
    text_at,
)
from engine.common import (
    Problem,
    parse,
    part_of,
    progress,
    read_json,
    run_main,
    say,
    setting,
    table,
    write_json,
)
from engine.parallel import barrier, from_first, gather, rank, start_ranks, world

# ---- the task: a query, the words that the model adds to it, and what comes back ----

ASK = ("Which other words would the documents hold that answer this search query? Write at most "
       "ten of them, technical terms and synonyms, on one line, and nothing else.")
EXAMPLES = """Query: aspirin after a heart attack
Words: acetylsalicylic acid antiplatelet myocardial infarction secondary prevention

Query: why do leaves turn yellow
Words: chlorosis chlorophyll foliage nitrogen iron deficiency senescence

Query: laws on keeping bees in town
Words: apiculture beekeeping urban ordinance zoning hive regulation"""
STOP = "\nQuery:"  # a plain model continues with a query of its own
FAULTS = ("no words", "repeats", "cut off")
SHOWN = ("recall@10", "ndcg@10", "mrr")
KINDS = {"sampled": {}, "greedy": {"temperature": 0.0, "samples": 1}}


@dataclasses.dataclass
class Settings(train.Optimisation, sampler.Sampling):
    corpus: str = setting("", "collection to search, a folder in BEIR's layout (none: the embedded "
                          "one, made here)", main=True)
    model: str = setting("", "expander to start from: a directory or a hub name (none: the "
                         "embedded one, made here)", main=True)
    out: str = setting("", "folder for all results (default: runs/search-CORPUS)", main=True)
    split: str = setting("test", "judged queries to measure on")
    train_split: str = setting("train", "judged queries to learn from")
    queries: int = setting(0, "number of queries to learn from (0: all)")
    test_queries: int = setting(0, "number of queries to measure on (0: all)")
    k1: float = setting(0.9, "BM25's k1: how much further occurrences of a word add")
    b: float = setting(0.4, "BM25's b: how much the length of a document takes away", most=1)
    analyser: str = setting("simple", "how a text becomes words", tuple(ANALYSERS))
    # SciFact, 809 training queries: 77% have Recall@10 = 1 already, so that no expansion earns +1.
    # On the other 185, three words of a relevant document earn +1 in 68% of the cases, three words
    # of a random document in 2%. nDCG@100 leaves 385 queries; there they earn +1 in 94% and 10%.
    metric: str = setting("ndcg@100", "measure to reward: recall, ndcg or p at a depth, map or mrr")
    bar: Optional[float] = setting(None, "value of the measure that earns +1 (none: any value "
                                   "above that of the query without expansion)")
    skip_full: bool = setting(True, "skip training queries whose own results are the best possible")
    repeats: int = setting(2, "occurrences of a word that an expansion may have; words of more "
                           "than an eighth of the documents are free", least=1)
    losses: str = setting("sft", "losses to compare with --loss, comma-separated; topr:0.4 is topr "
                          "with a positive share of 0.4", main=True)
    max_new_tokens: int = setting(64, "longest expansion", least=1)
    rounds: int = setting(1, "rounds of sample-then-train for each loss", least=1)
    seeds: int = setting(1, "runs to average, each with the next seed", least=1)


# The published results are with all queries: 3 of the 512 cannot be improved.
EMBEDDED = dict(metric="recall@10", skip_full=False, optimizer="adamw", learning_rate=1e-3,
                epochs=2, sequences=128, prompt_group=1, tokens_per_pass=4096, max_new_tokens=12,
                batch_size=512, seeds=3)


def make_prompt(query, tokenizer, settings):
    """Exactly what the model sees: the chat template, or three worked examples without one. The
    embedded expander knows no English: it sees the words of the query alone."""
    if not settings.model:
        return " ".join(analyse(query, settings.analyser))
    query = " ".join(without_marks(query, tokenizer).split())
    message, plain = f"{ASK}\n\nQuery: {query}", f"{EXAMPLES}\n\nQuery: {query}\nWords:"
    return render_prompt(message, plain, tokenizer, settings)


def make_questions(topics, settings, tokenizer):
    stop = [STOP] if settings.model else []
    return [{"id": id, "question": text, "prompt": make_prompt(text, tokenizer, settings),
             "stop": stop} for id, (text, _) in topics.items()]


def read_expansion(index, row, settings):
    """(words that a completion adds, its fault or None). With a fault no word is added."""
    words = analyse(row["completion"], settings.analyser)
    if not words:
        return [], "no words"
    for word, count in collections.Counter(words).items():
        if count > settings.repeats and not is_common(index, word):
            return [], "repeats"
    return ([], "cut off") if row.get("finish") == "length" else (words, None)


def read_split(settings, index, split, count, besides=()):
    """{query id: (text, {document number: grade})}, without the texts of `besides`."""
    queries, judgements = read_topics(settings.corpus, index, split)
    topics = {id: (text, judgements[id]) for id, text in queries.items()
              if max(judgements[id].values()) > 0 and text not in besides}
    if len(topics) < len(queries):
        say(f"{settings.corpus}: {len(queries) - len(topics)} of {len(queries)} {split} queries "
            "are left out: they have no relevant document, or are test queries too")
    if not topics:
        raise Problem(f"{settings.corpus}: {split!r} has no query with a relevant document")
    return dict(list(topics.items())[:count or None])


def columns_of(settings):
    """What is measured of an expansion: the rewarded measure first, other measures, the faults."""
    return list(dict.fromkeys([settings.metric, *SHOWN, *FAULTS]))


def look_up(index, topics, rows, settings):
    """What query + expansion find: array [rows, columns_of(settings)]. The ranks share the rows."""
    columns, part = columns_of(settings), []
    depth = max(1000, int(settings.metric.partition("@")[2] or 0))
    for row in progress(rows[rank()::world()], what="searching"):
        text, grades = topics[row["id"]]
        added, fault = read_expansion(index, row, settings)
        numbers, _ = search(index, analyse(text, settings.analyser) + added, depth)
        own = find_text(index.ids, row["id"])  # if queries are documents, BEIR excludes their own
        found = numbers[numbers != own].tolist()
        part.append([name == fault if name in FAULTS else measure(name, found, grades)
                     for name in columns])
    scores = np.empty((len(rows), len(columns)))
    for first_row, theirs in enumerate(gather(part)):
        scores[first_row::world()] = np.reshape(theirs, (-1, len(columns)))
    return scores


def look_up_alone(index, topics, settings):
    """The same of the queries without an expansion. [queries, columns]"""
    rows = [{"id": id, "completion": ""} for id in topics]
    return look_up(index, topics, rows, settings)


def skip_full(index, topics, settings):
    """The queries that can earn a reward: the best ranking has a higher value than their own."""
    kept, values = {}, look_up_alone(index, topics, settings)[:, 0]
    for id, value in zip(topics, values):
        _, grades = topics[id]
        best = sorted(grades, key=grades.get, reverse=True)
        if value < measure(settings.metric, best, grades):
            kept[id] = topics[id]
    say(f"{len(topics) - len(kept)} of {len(topics)} training queries are skipped: no expansion "
        f"can improve their {settings.metric}")
    if not kept:
        raise Problem("no training query is left: choose another --metric, or a --bar to reach")
    return kept


def reward(index, topics, rows, settings):
    """Gives each row +1 if what the expansion finds is good enough, else -1. Equal is not better: a
    reward for repeating the query would teach just that."""
    before = dict(zip(topics, look_up_alone(index, topics, settings)[:, 0]))
    scores = look_up(index, topics, rows, settings)[:, 0].tolist()
    for row, score in zip(rows, scores):
        words, fault = read_expansion(index, row, settings)
        enough = score > before[row["id"]] if settings.bar is None else score >= settings.bar
        row.update(reward=1.0 if enough and not fault else -1.0, answer=" ".join(words) or None,
                   score=score, fault=fault)
    return rows


# ---- the job: sample, reward, train, measure ----


def main():
    if sys.argv[1:2] == ["ask"]:
        return ask(sys.argv[2:])
    settings, start = parse(Settings, description=__doc__), time.time()
    if not settings.model:
        settings = parse(Settings, description=__doc__, **EMBEDDED)
    start_ranks()
    index = prepare(settings)
    splits = read_splits(settings, index)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    bases = [settings.model or base_expander(settings.out, seed) for seed in seeds]
    compare(settings, index, splits, bases)
    if not settings.model and settings.bar is None:
        say("\nWith few positives the baseline matters. +1 from 0.6 on, the first seed alone:")
        few = dataclasses.replace(settings, out=f"{settings.out}/few", bar=0.6, loss="topr",
                                  losses="sft,topr,topr:0.4", positive_share=None)
        compare(few, index, splits, bases[:1])
    say(f"{time.time() - start:.0f} s; the expanders, rollouts and results are in {settings.out}")


def base_expander(folder, seed):
    return train.base_policy(f"{folder}/seed{seed}", seed, library, steps=500, layers=2)


def prepare(settings):
    """Checks what can be checked before hours of work; makes the collection and the index."""
    measure(settings.metric, [], {})  # a Problem if there is no such measure
    for arm in arms_of(settings):
        train.check_settings(arm_settings(settings, arm))
    if not settings.model and (settings.corpus or settings.server):
        raise Problem("--corpus and --server need --model: the embedded expander knows no other "
                      "collection, and no server holds it")
    embedded = not settings.corpus
    name = os.path.basename(os.path.normpath(settings.corpus or "library"))
    settings.out = settings.out or f"runs/search-{name}"
    settings.corpus = settings.corpus or f"{settings.out}/corpus"
    check_same_job(settings)
    if rank() == 0:
        if embedded and not os.path.exists(f"{settings.corpus}/qrels.tsv"):
            library.write_collection(settings.corpus)
        index_corpus(f"{settings.corpus}/corpus.jsonl", f"{settings.out}/index", settings.k1,
                     settings.b, settings.analyser)
    barrier()
    return open_index(f"{settings.out}/index")


def check_same_job(settings):
    """A folder that has rollouts belongs to one job: another one is refused, naming what differs.
    (train.py and the sampler compare their own settings.)"""
    path, now = f"{settings.out}/job.json", vars(settings)
    before = read_json(path) if os.path.exists(path) else now
    for name in vars(Settings)["__annotations__"]:
        if name not in ("out", "losses", "seeds") and before.get(name) != now[name]:
            raise Problem(f"{settings.out} holds another job: {name} was {before.get(name)!r} and "
                          f"is {now[name]!r}. Use another --out, or remove it")


def read_splits(settings, index):
    """(queries to learn from, queries to measure on)"""
    test = read_split(settings, index, settings.split, settings.test_queries)
    texts = {text for text, _ in test.values()}
    learn = read_split(settings, index, settings.train_split, settings.queries, texts)
    if settings.skip_full and settings.bar is None:
        learn = skip_full(index, learn, settings)
    return learn, test


def arms_of(settings):
    """The losses to train with, a name or a name and a share of positives; that of --loss last."""
    share = "" if settings.positive_share is None else settings.positive_share
    losses = settings.losses.replace(":", "").split(",") if settings.losses else []
    return list(dict.fromkeys([*losses, f"{settings.loss}{share}"]))


def arm_settings(settings, arm, **changes):
    """train.py's settings for one of the losses."""
    parts = re.fullmatch("(topr|reinforce|is|tis|sft|ppo|dpo)([0-9]*[.]?[0-9]+(?:e-[0-9]+)?)?", arm)
    if not parts or float(parts[2] or 0) > 1:
        raise Problem(f"--losses: {arm!r} is not a loss, or a loss with a share as topr:0.4")
    share = float(parts[2]) if parts[2] else None
    return part_of(train.Settings, settings, loss=parts[1], positive_share=share, rounds=1,
                   **changes)


def compare(settings, index, splits, bases):
    """Trains with each loss from each seed's base expander; measures on the test queries."""
    learn, test = splits
    scores, learned = {kind: collections.defaultdict(list) for kind in KINDS}, []
    for seed, base in enumerate(bases, settings.seed):
        this = dataclasses.replace(settings, seed=seed, out=f"{settings.out}/seed{seed}")
        learned.append(make_rollouts(this, index, learn, base))
        if rank() == 0:
            write_json(f"{settings.out}/job.json", vars(settings))
        policies = {"no expansion": None, "base": base}
        for arm in arms_of(settings):
            policies[arm] = train_rounds(this, index, learn, base, arm)
        for kind in KINDS:
            for name, policy in policies.items():
                found = measure_once(this, index, test, policy, name, kind)
                scores[kind][name].append(found)
    report(settings, scores, learned)


def make_rollouts(settings, index, topics, policy):
    """Writes what a policy samples on the training queries, rewarded. Returns what that holds."""
    path, unrewarded = f"{settings.out}/rollouts.jsonl", f"{settings.out}/unrewarded.jsonl"
    questions = functools.partial(make_questions, topics, settings)
    rows = from_first(sampler.sample_once(settings, policy, questions, unknown, unrewarded))
    rows = reward(index, topics, rows, settings)
    if rank() == 0:
        write_rollouts(path, rows)
    barrier()
    facts = {"expansions": len(rows), "positive": sum(row["reward"] > 0 for row in rows),
             **collections.Counter(row["fault"] or "without fault" for row in rows)}
    say(f"{path}:", ", ".join(f"{name} {count:,}" for name, count in facts.items()))
    return facts


def unknown(question, completion):
    """A grade for the sampler; the search engine grades afterwards, all rows at once."""
    return None, -1.0


def train_rounds(settings, index, topics, policy, arm):
    """The folder of the expander that a loss makes, in --rounds of sample-then-train."""
    out, rollouts = f"{settings.out}/{arm}", f"{settings.out}/rollouts.jsonl"
    for number in range(1, settings.rounds + 1):
        here = out if number == settings.rounds else f"{out}/round-{number}"
        train.train_once(arm_settings(settings, arm, model=policy, rollouts=rollouts, out=here))
        policy, rollouts = here, f"{here}/rollouts.jsonl"
        if number < settings.rounds:  # no server holds the new policy
            seed = settings.seed + 1000 * number
            this = dataclasses.replace(settings, out=here, server="", seed=seed)
            make_rollouts(this, index, topics, policy)
    return out


def measure_once(settings, index, topics, policy, name, kind):
    """What a policy's sampled or greedy expansions find. [queries, columns]"""
    if policy is None:
        return look_up_alone(index, topics, settings)
    path = f"{settings.out}/test-{name}-{kind}.jsonl"
    questions = functools.partial(make_questions, topics, settings)
    rows = sampler.sample_once(settings, policy, questions, unknown, path, logprobs=False,
                               server="", **KINDS[kind])  # base and trained expanders alike
    rows = from_first(rows)
    scores = look_up(index, topics, rows, settings)
    return scores.reshape(len(topics), -1, scores.shape[1]).mean(1)


def report(settings, scores, learned):
    """Means over the seeds with 95% intervals over the queries, and the paired differences.

    scores: {kind: {name: [seeds, queries, columns]}}
    """
    columns, intervals = columns_of(settings), {}
    for kind in scores:
        means = {name: np.mean(seeds, 0).T for name, seeds in scores[kind].items()}
        for name, values in means.items():  # [columns, queries]
            intervals[f"{name}, {kind}"] = map(measures.interval, values)
        for one, other in itertools.combinations(means, 2):
            gains = map(measures.paired_interval, means[one], means[other])
            intervals[f"{other} - {one}, {kind}"] = gains
    results = {name: dict(zip(columns, each)) for name, each in intervals.items()}
    rows = [(name, *map(measures.interval_text, each.values())) for name, each in results.items()]
    say(table([f"{len(values[0])} test queries", *columns], rows))
    if rank() == 0:
        kept = {"settings": vars(settings), "learned": learned, "means": results}
        write_json(f"{settings.out}/results.json", kept)


# ---- one typed query ----


@dataclasses.dataclass
class Ask:
    out: str = setting("runs/search-library", "folder of the expander's job", main=True)
    expander: str = setting("seed0/topr", "which of its expanders", main=True)
    documents: int = setting(5, "number of documents to show", least=1, main=True)


def ask(argv):
    """Shows the greedy expansion of a query, and the best documents without and with it."""
    words, options = [], []
    for before, word in zip(["", *argv], argv):
        is_value = before.startswith("-") and "=" not in before
        (options if is_value or word.startswith("-") else words).append(word)
    asked = parse(Ask, options, "python search.py ask WORDS [options]")
    policy = f"{asked.out}/{asked.expander}"
    if not run_folder.finished(policy):
        raise Problem(f"no expander in {policy}: torchrun search.py --out {asked.out} makes one")
    settings = Settings(**read_json(f"{asked.out}/job.json"))
    settings.server = ""  # the trained expander is here
    query = " ".join(words).encode(errors="replace").decode()  # a terminal can pass half characters
    words = analyse(query, settings.analyser)
    if not words:
        raise Problem("the query has no words: python search.py ask heart kidney children")
    index = open_index(f"{asked.out}/index")
    questions = functools.partial(make_questions, {"query": (query, {})}, settings)
    row, = sampler.sample_once(settings, policy, questions, unknown, temperature=0.0, samples=1)
    added, fault = read_expansion(index, row, settings)
    say(f"query      {query}\nexpansion  {' '.join(added) or f'none ({fault})'}")
    found = []
    for wanted in (words, words + added):
        numbers, _ = search(index, wanted, asked.documents)
        found.append([text_at(index.ids, number) for number in numbers])
    text_of = {id: text for id, text in read_texts(f"{settings.corpus}/corpus.jsonl")
               if id in found[0] + found[1]}
    for title, ids in zip(("the query alone finds", "query and expansion find"), found):
        say(f"\n{title}")
        for number, id in enumerate(ids, 1):
            say(f"{number:3}  {id:8}  {' '.join(text_of[id].split()):.100}")


if __name__ == "__main__":
    run_main(main)
