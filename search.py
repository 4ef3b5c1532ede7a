"""Query expansion: a model adds words to a search query, and learns from what the engine returns.

    torchrun search.py                            the embedded collection, an expander from nothing
    torchrun search.py --corpus DIR --model NAME  a collection in BEIR's layout, your model

No reference answer exists here, only a score: reward +1 if the results are better than the query's
own. The engine is BM25, in engine/bm25.py; sampling, training and measuring are train.py's.
"""

import collections
import dataclasses
import functools
import types
from pathlib import Path

import train
from data import library
from engine import tasks
from engine.bm25 import analyse, index_corpus, is_common, measure, open_index, read_topics, search
from engine.common import Problem, parse, run_main, say, setting
from engine.measures import mean_by
from engine.parallel import barrier, rank, start_ranks
from engine.rollouts import read_rollouts


@dataclasses.dataclass
class Settings(train.Job):
    corpus: str = setting(
        "",
        "collection to search, a folder in BEIR's layout (none: the embedded one, made here)",
        main=True,
        free=True,
    )
    # SciFact, 809 training queries: 77% have Recall@10 = 1 already, so that no expansion earns +1.
    # On the other 185, three words of a relevant document earn +1 in 68% of the cases, three words
    # of a random document in 2%. nDCG@100 leaves 385 queries; there they earn +1 in 94% and 10%.
    metric: str = setting(
        "ndcg@100", "measure to reward: recall, ndcg or p at a depth, map or mrr", main=True
    )
    k1: float = setting(0.9, "BM25's k1: how much further occurrences of a word add")
    b: float = setting(0.4, "BM25's b: how much the length of a document takes away", most=1)
    max_new_tokens: int = setting(64, "longest expansion in tokens", least=1, free=True)


EMBEDDED = dict(
    metric="recall@10",
    learning_rate=1e-3,
    epochs=2,
    sequences=128,
    tokens_per_pass=4096,
    max_new_tokens=12,
    batch_size=512,
)

# ---- the prompt: a query, and how to ask for words ----

ASK = (
    "Which other words would the documents hold that answer this search query? Write at most "
    "ten of them, technical terms and synonyms, on one line, and nothing else."
)
EXAMPLES = """Query: aspirin after a heart attack
Words: acetylsalicylic acid antiplatelet myocardial infarction secondary prevention

Query: why do leaves turn yellow
Words: chlorosis chlorophyll foliage nitrogen iron deficiency senescence

Query: laws on keeping bees in town
Words: apiculture beekeeping urban ordinance zoning hive regulation"""
STOP = "\nQuery:"  # a plain model continues with a query of its own


def make_question(id, text, embedded=False):
    """The query as a chat message, or below three worked examples. The embedded expander knows no
    English: it sees the words of the query alone."""
    query = f"Query: {' '.join(text.split())}"
    plain = " ".join(analyse(text)) if embedded else f"{EXAMPLES}\n\n{query}\nWords:"
    return {"id": id, "question": text, "messages": f"{ASK}\n\n{query}", "prompt": plain}


# ---- the expansion: the words that the model adds, and what comes back ----


def read_expansion(index, completion, finish=None):
    """The words that a completion adds. None if there are none, if it is cut off, or if it
    repeats a word that is not common."""
    words = analyse(completion)
    counts = collections.Counter(words).items()
    repeats = any(count > 2 and not is_common(index, word) for word, count in counts)
    return None if repeats or finish == "length" else " ".join(words) or None


def find(index, id, text, added=None, depth=1000):
    """The numbers of the documents that query + added words find, best first."""
    numbers, _ = search(index, analyse(f"{text} {added or ''}"), depth)
    # If queries are documents, BEIR excludes their own.
    return [number for number in numbers.tolist() if index.ids[number] != id]


# ---- the queries ----


def read_splits(settings, index):
    """{split: {query id: (text, {document number: grade})}}; no test query is in training."""
    splits, test_texts = {}, set()
    for split in ("test", "train"):
        queries, judgements = read_topics(settings.corpus, index, split)
        splits[split] = {
            id: (text, judgements[id])
            for id, text in queries.items()
            if max(judgements[id].values()) > 0 and text not in test_texts
        }
        left_out = len(queries) - len(splits[split])
        if left_out:
            say(
                f"{settings.corpus}: {left_out} of {len(queries)} {split} queries are left out: "
                "they have no relevant document, or are test queries too"
            )
        test_texts = {text for text, _ in splits["test"].values()}
    return splits


def skip_full(settings, index, topics):
    """The queries that can earn a reward: the best ranking has a higher value than their own."""
    kept = {}
    for id, (text, grades) in topics.items():
        best = sorted(grades, key=grades.get, reverse=True)
        own = measure(settings.metric, find(index, id, text), grades)
        if own < measure(settings.metric, best, grades):
            kept[id] = text, grades
    say(
        f"{len(topics) - len(kept)} of {len(topics)} training queries are skipped: no expansion "
        f"can improve their {settings.metric}"
    )
    return kept


# ---- the task ----


def make_task(settings, index, splits):
    """splits: as of read_splits"""
    metric, embedded = settings.metric, not settings.model
    depth = max(1000, int(metric.partition("@")[2] or 0))

    @functools.cache
    def look_up(split, id, added=None):
        """{name: value} of what query + added words find"""
        text, grades = splits[split][id]
        found = find(index, id, text, added, depth)
        values = {name: measure(name, found, grades) for name in (metric, "recall@10", "ndcg@10")}
        return {**values, "without fault": added is not None}

    def questions(split):
        return [make_question(id, text, embedded) for id, (text, _) in splits[split].items()]

    def grade(question, completion):
        """+1 for better results than those of the query alone. Equal is not better: a reward for
        repeating the query would teach just that."""
        added = read_expansion(index, completion, question.get("finish"))
        query = question["split"], question["id"]
        is_better = look_up(*query, added)[metric] > look_up(*query)[metric]
        return added, 1.0 if is_better else -1.0

    def measure_rows(rows):
        def values(row):
            return look_up(row["split"], row["id"], row["answer"])

        return {
            name: mean_by(rows, "id", lambda row: values(row)[name]).values()
            for name in values(rows[0])
        }

    return tasks.make_task(
        "search",
        types.SimpleNamespace(
            questions=questions, grade=grade, measure=measure_rows, STOP="" if embedded else STOP
        ),
    )


# ---- the whole job ----


def main():
    settings = parse(Settings, __doc__, EMBEDDED)
    start_ranks()
    folder = f"runs/search-{Path(settings.corpus or 'library').name}-seed{settings.seed}"
    settings.out = settings.out or f"{folder}/{settings.loss}"
    index = prepare(settings)
    splits = read_splits(settings, index)
    if settings.model:
        splits["train"] = skip_full(settings, index, splits["train"])
    task = make_task(settings, index, splits)
    train.check_settings(settings, task)
    if not settings.model:
        settings.model = train.base_policy(folder, settings.seed, library, steps=500, layers=2)
    train.job(settings, task)
    if rank() == 0:
        show_examples(settings, index, splits["test"])


def prepare(settings):
    """Checks what can be checked before hours of work; makes the collection and the index."""
    measure(settings.metric, [], {})  # a Problem if there is no such measure
    if settings.corpus and not settings.model:
        raise Problem("--corpus needs --model: the embedded expander knows no other collection")
    corpus, folder = settings.corpus or f"{settings.out}/corpus", f"{settings.out}/index"
    if rank() == 0:
        if not settings.corpus:
            library.write_collection(corpus)
        index_corpus(f"{corpus}/corpus.jsonl", folder, settings.k1, settings.b)
    settings.corpus = corpus
    barrier()
    return open_index(folder)


def show_examples(settings, index, topics):
    """Three test queries: what the trained expander adds, and where it brings the documents."""
    for row in read_rollouts(f"{settings.out}/after-greedy.jsonl")[:3]:
        text, grades = topics[row["id"]]
        say(f"\nquery  {text}\nadded  {row['answer']}")
        for when, added in (("before", None), ("after ", row["answer"])):
            found = find(index, row["id"], text, added)
            ranks = [str(rank) for rank, number in enumerate(found, 1) if grades.get(number, 0) > 0]
            say(f"{when} ranks of relevant documents: {', '.join(ranks[:10]) or 'none is found'}")


if __name__ == "__main__":
    run_main(main)
