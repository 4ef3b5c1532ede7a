"""A search engine in numpy: BM25 over an index in a folder, and trec_eval's measures.

index = index_corpus("corpus.jsonl", "folder")
numbers, scores = search(index, analyse("a query"), k=10)
"""

import dataclasses
import json
import math
import os
import re

import numpy as np

from engine.common import Problem, read_json, say, whole_file, write_json
from engine.rollouts import file_fingerprint, read_lines
from engine.tasks import one_line


def analyse(text):
    """The words of a text, repetitions included: "BM-25, bm!" -> ["bm", "25", "bm"]"""
    return re.findall("[a-z0-9]+", text.lower())


# ---- a collection in BEIR's layout: corpus.jsonl, queries.jsonl, qrels.tsv or qrels/test.tsv ----


def read_texts(path):
    """(id, title + " " + text) of each line of a .jsonl file; queries have no title."""
    known, needed = set(), 'a JSON object with strings for "_id", "text" and perhaps "title"'
    for number, line in read_lines(path):
        with one_line(f"{path}, line {number}: {needed} is required"):
            record = json.loads(line)
            id, text = record["_id"], record.get("title", "") + " " + record["text"]
            (id + text).encode()  # JSON can spell half a surrogate pair, which is not text
            if id in known:
                raise ValueError("this _id occurs on an earlier line")
        known.add(id)
        yield id, text


def read_topics(folder, index, split="test"):
    """A split's judged queries {id: text} and judgements {query id: {document number: grade}}.

    Judgements that cannot be used, as of a query without words, are counted and skipped.
    """
    tail = "" if split == "test" else f"_{split}"
    path = f"{folder}/queries{tail}.jsonl"
    if not os.path.exists(path):
        path = f"{folder}/queries.jsonl"
    queries = {id: text.strip() for id, text in read_texts(path) if analyse(text)}
    path = f"{folder}/qrels/{split}.tsv"
    if not os.path.exists(path):
        path = f"{folder}/qrels{tail}.tsv"
    numbers = {id: number for number, id in enumerate(index.ids)}
    judgements, skipped = {}, []  # line numbers
    for line_number, line in read_lines(path):
        row = re.fullmatch("(.+)\t(.+)\t([+-]?[0-9]+)\\s*", line.decode(errors="replace"))
        if row and row[1] in queries and row[2] in numbers:
            judgements.setdefault(row[1], {})[numbers[row[2]]] = int(row[3])
        elif not line.startswith(b"query-id\t"):
            skipped.append(line_number)
    message = (
        f"{path}: {len(skipped)} line(s) cannot be used (the first: {skipped[:1]}): a query "
        "that is there and has words (a to z, digits), a document of the corpus and a whole "
        "number are required, tab-separated"
    )
    if not judgements:
        raise Problem(message)
    if skipped:
        say(message)
    return {id: queries[id] for id in queries if id in judgements}, judgements


# ---- the index: a row for each word, what it adds to the score of each document that holds it ----


@dataclasses.dataclass
class Index:
    """Documents are numbered by id in descending order: trec_eval orders equal scores so."""

    ids: list  # of the documents
    words: dict  # word -> number of its row, from 1
    ends: list  # where each row ends; row 0 is empty [1 + words]
    postings: np.ndarray  # document and score of each entry, row by row [entries]


def index_documents(texts, k1=0.9, b=0.4):
    """The index of (id, text) pairs.

    score(q, d) = sum over t in q of  ln(1 + (N - df + .5) / (df + .5))  tf / (tf + k1 B(d))
    B(d) = 1 - b + b |d| / mean |d|
    """
    texts = dict(sorted(texts, reverse=True))
    count, numbers = len(texts), {}  # a new word gets the next number
    keys = np.fromiter(
        (
            numbers.setdefault(word, len(numbers) + 1) * count + document
            for document, text in enumerate(texts.values())
            for word in analyse(text)
        ),
        np.int64,
    )  # [words of all texts]
    if not numbers:
        raise Problem("no document holds a word: there is nothing to search")
    keys, tf = np.unique(keys, return_counts=True)  # [entries]
    words, documents = np.divmod(keys, count)  # [entries]
    df = np.bincount(words)  # [1 + words]
    length = np.bincount(documents, tf, count)  # [documents]
    idf = np.log(1 + (count - df + 0.5) / (df + 0.5))
    divisor = k1 * (1 - b + b * length / length.mean())
    scores = tf / (tf + divisor[documents]) * idf[words]  # [entries]
    postings = np.rec.fromarrays([documents, scores], names="document, score")
    return Index(list(texts), numbers, np.cumsum(df).tolist(), postings)


def index_corpus(corpus, folder, k1=0.9, b=0.4):
    """The index of a corpus.jsonl; kept in a folder, and made again if something has changed."""
    facts = [k1, b, file_fingerprint(corpus)]
    path = f"{folder}/facts.json"
    if not os.path.exists(path) or read_json(path) != facts:
        index = index_documents(read_texts(corpus), k1, b)
        write_json(path, None)  # a crash from here on leaves no index that looks whole
        with whole_file(f"{folder}/postings.npy") as file:
            np.save(file.buffer, index.postings)
        write_json(f"{folder}/names.json", [index.ids, index.words, index.ends])
        write_json(path, facts)
    return open_index(folder)


def open_index(folder):
    """A saved index: the postings are mapped into memory, only what a search touches is read."""
    postings = np.load(f"{folder}/postings.npy", mmap_mode="r")
    # As a plain array, because slices of a memmap take long to make.
    return Index(*read_json(f"{folder}/names.json"), np.asarray(postings))


# ---- search ----


def row_of(index, word):
    """The documents that hold a word, in ascending order, and what it adds to the score of each."""
    number = index.words.get(word, 0)
    row = index.postings[index.ends[number - 1] : index.ends[number]]
    return row["document"], row["score"]


def is_common(index, word):
    """Whether more than an eighth of the documents hold a word, as "the", "of" and "which"."""
    return len(row_of(index, word)[0]) > len(index.ids) / 8


def search(index, words, k):
    """The k best documents for a list of words: numbers [found], float32 scores [found].

    Best first, ties by id in descending order. Each occurrence of a word counts; a document without
    any of the words is not found. The sum of float64 is rounded to float32 once, as trec_eval
    stores scores: equal values are then ties.
    """
    totals = np.zeros(len(index.ids))
    for word in words:
        np.add.at(totals, *row_of(index, word))  # twice as fast as totals[documents] += scores
    scores = totals.astype(np.float32)  # [documents]
    k = min(k, np.count_nonzero(scores))
    found = np.flatnonzero(scores >= np.partition(scores, -k)[-k])  # and ties with the k-th
    found = found[np.argsort(-scores[found], kind="stable")[:k]]
    return found, scores[found]


# ---- trec_eval's measures ----


def measure(name, ranked, grades):
    """ "ndcg@10", "recall@100", "p@10", "map", "mrr" ... of ids ranked best first.

    grades: {id: grade}. A document without a grade, or with one below 1, is not relevant.
    """
    if not re.fullmatch("map|mrr|(ndcg|recall|p|map|mrr)@[1-9][0-9]*", name):
        raise Problem(
            f"there is no measure {name!r}: write ndcg@10, recall@100, p@10 (at any "
            "depth), map or mrr"
        )
    kind, _, depth = name.partition("@")
    depth = int(depth or len(ranked))
    best = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
    gains = [max(grades.get(id, 0), 0) for id in ranked[:depth]]
    ranks = [rank for rank, gain in enumerate(gains, 1) if gain]  # of the relevant documents found
    if not ranks:
        return 0.0
    if kind == "ndcg":
        return discounted(gains) / discounted(best[:depth])
    if kind == "map":  # the precision at each relevant document; one that was not found adds 0
        return sum(found / rank for found, rank in enumerate(ranks, 1)) / len(best)
    if kind == "mrr":
        return 1 / ranks[0]
    return len(ranks) / (depth if kind == "p" else len(best))


def discounted(gains):
    """DCG: the sum over ranks r of gain / log2(r + 1)"""
    return sum(gain / math.log2(r_plus_1) for r_plus_1, gain in enumerate(gains, 2))
