"""A search engine in numpy: BM25 over an index on disk, and trec_eval's measures.

    index = index_corpus("corpus.jsonl", "folder")
    numbers, scores = search(index, analyse("a query"), k=10)
"""

import bisect
import collections
import dataclasses
import json
import math
import os
import re
from array import array

import numpy as np

from engine.rollouts import file_fingerprint, read_lines
from engine.common import Problem, read_json, say, whole_file, write_json

ANALYSERS = {"simple": "[a-z0-9]+", "unicode": r"\w+"}  # what a word is; unicode: beyond English


def analyse(text, analyser="simple"):
    """The words of a text, repetitions included: "BM-25, bm!" -> ["bm", "25", "bm"]"""
    return re.findall(ANALYSERS[analyser], text.lower())


# ---- a collection in BEIR's layout: corpus.jsonl, queries.jsonl, qrels.tsv or qrels/test.tsv ----


def read_texts(path):
    """(id, title + " " + text) of each line of a .jsonl file; queries have no title."""
    known = set()
    for number, line in read_lines(path, "reading"):
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
            id, text = record["_id"], " ".join([record.get("title", ""), record["text"]])
            text.encode(), id.encode()  # JSON can spell half a surrogate pair, which is not text
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise Problem(f'{place}: not a JSON object such as {{"_id": "7", "title": "...", '
                          '"text": "..."}} with strings for values '
                          f"({type(error).__name__}: {error}): correct or remove this line")
        if id in known:
            raise Problem(f"{place}: _id {id!r} occurs on an earlier line: keep one of the two")
        known.add(id)
        yield id, text


def read_judgements(path, queries, index):
    """{query id: {document number: grade}}. Lines that cannot be used are counted and skipped."""
    judgements, faults = {}, collections.defaultdict(list)  # fault -> line numbers
    for line_number, line in read_lines(path, "reading"):
        columns = line.decode(errors="replace").rstrip("\r\n").split("\t")
        query, document, score, *_ = *columns, "", ""
        if columns == ["query-id", "corpus-id", "score"]:
            continue
        if len(columns) != 3:
            faults["not query-id, corpus-id, score, tab-separated"].append(line_number)
        elif not re.fullmatch("[+-]?[0-9]+", score):
            faults["a score that is not a whole number"].append(line_number)
        elif query not in queries:
            faults["a query that is not there or has no words"].append(line_number)
        elif (number := find_text(index.ids, document)) is None:
            faults["a document that is not in the corpus"].append(line_number)
        elif judgements.setdefault(query, {}).setdefault(number, int(score)) != int(score):
            faults["a score that contradicts an earlier line"].append(line_number)
    for fault, lines in faults.items():
        say(f"{path}: {len(lines)} line(s) skipped: {fault} (first: line {lines[0]})")
    if not judgements:
        raise Problem(f"{path}: no line of it can be used: write query-id, corpus-id and score, "
                      "tab-separated, with ids that the queries and the corpus have")
    return judgements


def read_topics(folder, index, split="test"):
    """A split's judged queries {id: text} and judgements {query id: {document number: grade}}."""
    tail = "" if split == "test" else f"_{split}"
    path = f"{folder}/queries{tail}.jsonl"
    if not os.path.exists(path):
        path = f"{folder}/queries.jsonl"
    analyser = index.facts["analyser"]
    texts = {id: text.strip() for id, text in read_texts(path)}
    queries = {id: text for id, text in texts.items() if analyse(text, analyser)}
    if len(queries) < len(texts):  # as in real collections
        say(f"{path}: {len(texts) - len(queries)} of {len(texts)} queries have no words (analyser "
            f"{analyser}) and are skipped")
    path = f"{folder}/qrels/{split}.tsv"
    if not os.path.exists(path):
        path = f"{folder}/qrels{tail}.tsv"
    judgements = read_judgements(path, queries, index)
    return {id: queries[id] for id in queries if id in judgements}, judgements


# ---- the index: a row for each word, what it adds to the score of each document that holds it ----


@dataclasses.dataclass
class Index:
    """Words and documents are numbered in descending order: trec_eval orders equal scores so."""
    words: tuple           # bytes end to end [bytes], and where each word starts [words + 1]
    ids: tuple             # the same for the documents' ids
    starts: np.ndarray     # where each word's row starts [words + 1]
    documents: np.ndarray  # int32 [entries]
    scores: np.ndarray     # float64 [entries]
    facts: dict            # k1, b, analyser, number of documents, hash of the corpus file
    rows: dict = dataclasses.field(default_factory=dict)  # word -> its row, cached


def text_table(texts):
    """The texts packed in descending order (bytes, starts), and the rank of each [texts]."""
    order = sorted(range(len(texts)), key=texts.__getitem__, reverse=True)
    rank = np.empty(len(texts), np.int64)
    rank[order] = np.arange(len(texts))
    pieces = [texts[n].encode() for n in order]
    return (np.frombuffer(b"".join(pieces), np.uint8), np.cumsum([0, *map(len, pieces)])), rank


def text_at(table, number):
    data, starts = table
    return data[starts[number]:starts[number + 1]].tobytes().decode()


def find_text(table, text):
    """The number of a text, or None: a binary search, so that opening an index reads no words."""
    last = len(table[1]) - 2
    number = last - bisect.bisect_left(range(last + 1), text,
                                       key=lambda n: text_at(table, last - n))
    return number if number >= 0 and text_at(table, number) == text else None


def index_documents(documents, k1=0.9, b=0.4):
    """The index of (id, words) pairs, read once.

        score(q, d) = sum over t in q of  ln(1 + (N - df + .5) / (df + .5))  tf / (tf + k1 B(d))
        B(d) = 1 - b + b |d| / mean |d|

    Computed in float64; the sum is rounded to float32 once, as trec_eval stores scores: equal
    values are then ties. Rows in float32 would swap documents, and break ties, by their rounding.
    """
    if b > 1:
        raise Problem(f"--b {b}: a number from 0 to 1 is required")
    numbers = collections.defaultdict()
    numbers.default_factory = numbers.__len__  # a new word gets the next number
    text, lengths, ids = array("i"), array("i"), []  # arrays take an eighth of a list's memory
    for id, words in documents:
        text.extend(map(numbers.__getitem__, words))
        lengths.append(len(words))
        ids.append(id)
    if not text:
        raise Problem("no document holds a word: there is nothing to search")
    words, word_rank = text_table(list(numbers))
    count, (ids, id_rank) = len(ids), text_table(ids)

    # a key for each word of the text: its number in the upper half, its document's in the lower
    keys = (word_rank << 32)[np.frombuffer(text, np.int32)]  # [words of the text]
    keys |= np.repeat(id_rank.astype(np.int32), lengths)
    del text
    keys.sort()
    new = np.concatenate([[True], keys[1:] != keys[:-1], [True]])
    first = np.flatnonzero(new)  # [entries + 1]
    scores = np.subtract(first[1:], first[:-1], dtype=np.float64)  # [entries], tf so far
    keys = keys[first[:-1]]      # [entries]
    del new, first
    starts = np.searchsorted(keys, np.arange(len(word_rank) + 1) << 32)
    documents = keys.astype(np.int32)  # the lower half
    del keys

    length, df = np.empty(count), np.diff(starts)
    length[id_rank] = lengths
    divisor = (k1 * (1 - b + b * length / length.mean()))[documents]
    divisor += scores  # in place: arrays of [entries] take the memory
    scores /= divisor
    scores *= np.repeat(np.log(1 + (count - df + 0.5) / (df + 0.5)), df)
    return Index(words, ids, starts, documents, scores, {"documents": count})


def index_corpus(corpus, folder, k1=0.9, b=0.4, analyser="simple"):
    """The index of a corpus.jsonl; kept in a folder, and opened there if nothing has changed."""
    facts = {"k1": k1, "b": b, "analyser": analyser, "corpus": file_fingerprint(corpus)}
    if os.path.exists(f"{folder}/index.json"):
        index = open_index(folder)
        if facts.items() <= index.facts.items():
            return index
        say(f"{folder}: made from another corpus or with other settings, building it again")
    documents = ((id, analyse(text, analyser)) for id, text in read_texts(corpus))
    index = index_documents(documents, k1, b)
    index.facts.update(facts)
    save_index(index, folder)
    return index


ARRAYS = ("words", "word_starts", "ids", "id_starts", "row_starts", "row_documents", "row_scores")


def save_index(index, folder):
    """index.json is removed first and written last: without it the folder holds no index."""
    path = f"{folder}/index.json"
    if os.path.exists(path):
        os.remove(path)
    arrays = (*index.words, *index.ids, index.starts, index.documents, index.scores)
    for name, values in zip(ARRAYS, arrays):
        with whole_file(f"{folder}/{name}.npy", "wb") as file:
            np.save(file, values, allow_pickle=False)
    write_json(path, index.facts)


def open_index(folder):
    """Maps a saved index into memory: only what a search touches is read."""
    try:
        arrays = [np.asarray(np.load(f"{folder}/{name}.npy", mmap_mode="r")) for name in ARRAYS]
    except (OSError, ValueError, EOFError) as error:
        raise Problem(f"{folder}: not a whole index ({error}): delete it, or name another folder")
    facts = read_json(f"{folder}/index.json")
    return Index(tuple(arrays[:2]), tuple(arrays[2:4]), *arrays[4:], facts)


# ---- search ----


def row_of(index, word):
    """The documents that hold a word, and what it adds to each: all documents if these are many,
    for in a small collection adding a whole array is far faster than picking entries."""
    if word not in index.rows:
        number, count = find_text(index.words, word), index.facts["documents"]
        entries = slice(0) if number is None else slice(*index.starts[number:number + 2])
        documents, scores = index.documents[entries], index.scores[entries]
        if count < 2**16 and len(documents) > count // 8:
            full = np.zeros(count)
            full[documents] = scores
            documents, scores = slice(None), full
        index.rows[word] = documents, scores
    return index.rows[word]


def is_common(index, word):
    """Whether more than an eighth of the documents hold a word, as "the", "of" and "which"."""
    _, scores = row_of(index, word)
    return np.count_nonzero(scores) > index.facts["documents"] / 8


def search(index, query, k):
    """The k best documents for a list of words: numbers [found], float32 scores [found].

    Best first, ties by id in descending order. Each occurrence of a word counts; a document without
    any of the words is not found.
    """
    count = index.facts["documents"]
    totals = np.zeros(count)
    for word in query:
        documents, scores = row_of(index, word)
        totals[documents] += scores
    scores, k = totals.astype(np.float32), min(k, count)  # [documents]
    # the k-th best of a sample: at least k documents reach it, and few others
    floor = np.partition(scores[::min(max(count // (64 * k), 1), 8)], -k)[-k]
    found, = np.nonzero(scores >= floor if floor > 0 else scores)
    found = found[np.argsort(-scores[found], kind="stable")[:k]]
    return found, scores[found]


# ---- trec_eval's measures ----


def measure(name, ranked, grades):
    """"ndcg@10", "recall@100", "p@10", "map", "mrr" ... of ids ranked best first.

    grades: {id: grade}. A document without a grade, or with one below 1, is not relevant.
    """
    parts = re.fullmatch("(ndcg|recall|map|mrr|p(?=@))(?:@([1-9][0-9]*))?", name)
    if not parts:
        raise Problem(f"there is no measure {name!r}: write ndcg@10, recall@100, p@10 (at any "
                      "depth), map or mrr")
    kind, depth = parts[1], int(parts[2]) if parts[2] else None
    gains = [max(grades.get(id, 0), 0) for id in ranked[:depth]]
    best = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
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
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))
