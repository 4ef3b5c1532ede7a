"""A search engine in numpy: BM25 over an index on disk, judged as trec_eval does. search.py trains on what it returns.

    index = index_corpus("corpus.jsonl", "folder")      numbers, scores = search(index, "a query", k=10)
"""

import bisect
import collections
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from array import array

import numpy as np

from engine.common import Problem, progress, read_json, say, whole_file, write_json

ANALYSERS = {  # text -> words, as often as they stand: "BM-25, bm!" -> ["bm", "25", "bm"]
    "simple": lambda text: re.findall("[a-z0-9]+", text.lower()),
    "unicode": lambda text: re.findall(r"\w+", text.lower()),  # for text that is not English
}


# ---- a collection in BEIR's layout: corpus.jsonl, queries.jsonl and qrels.tsv (or qrels/test.tsv) ----


def opened(path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise Problem(f"{path}: cannot be read ({error.strerror}): a collection is a folder with corpus.jsonl, "
                      "queries.jsonl and qrels.tsv or qrels/test.tsv")


def lines(path, what=None):
    """Every line that is not blank, with its place; a progress bar where `what` names the work."""
    with opened(path) as file:
        bar = progress(total=os.fstat(file.fileno()).st_size, what=what) if what else None
        for number, line in enumerate(file, 1):
            if bar is not None:
                bar.update(len(line))
            if line.strip():
                yield f"{path}, line {number}", line


def texts(path, what=None):
    """Place, id and title + " " + text of each line of a .jsonl file; queries have no title."""
    known = set()
    for where, line in lines(path, what):
        try:
            record = json.loads(line)
            id, text = record["_id"], " ".join([record.get("title", ""), record["text"]])
            text.encode(), id.encode()  # half a surrogate pair, which JSON can spell, is no text either
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise Problem(f'{where}: not a JSON object such as {{"_id": "7", "title": "...", "text": "..."}} with '
                          f"strings for values ({type(error).__name__}: {error}): mend or remove this line")
        if id in known:
            raise Problem(f"{where}: _id {id!r} stands on an earlier line already: keep one of the two")
        known.add(id)
        yield where, id, text


def read_queries(path, analyser="simple"):
    """{query id: text}"""
    queries = {}
    for where, id, text in texts(path):
        if not ANALYSERS[analyser](text):
            raise Problem(f"{where}: query {id!r} has no words (analyser {analyser}): mend or remove this line")
        queries[id] = text.strip()
    return queries


def read_judgements(path, queries, index):
    """{query id: {document id: grade}} from lines of query-id, corpus-id and score, with a header or without."""
    judgements = {}
    for where, line in lines(path):
        columns = line.decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
        if columns == ["query-id", "corpus-id", "score"] and not judgements:
            continue
        if len(columns) != 3:
            raise Problem(f"{where}: {len(columns)} column(s) instead of 3: write query-id, corpus-id and score, "
                          "parted by tabs")
        query, document, score = columns
        if not re.fullmatch("[+-]?[0-9]+", score):
            raise Problem(f"{where}: score {score!r} is not a whole number: write 0, 1, 2 ...")
        if query not in queries:
            raise Problem(f"{where}: query {query!r} is not among the queries: add it, or remove this line")
        if place(index.ids, document) is None:
            raise Problem(f"{where}: document {document!r} is not in the corpus: add it, or remove this line")
        if judgements.setdefault(query, {}).setdefault(document, int(score)) != int(score):
            raise Problem(f"{where}: query {query!r} and document {document!r} had another score above: keep one")
    return judgements


def read_topics(folder, index, split="test"):
    """A split's judged queries {query id: text} and their judgements {query id: {document id: grade}}."""
    def first_of(*names):
        paths = [os.path.join(folder, name) for name in names]
        return next(filter(os.path.exists, paths), paths[-1])

    tail = "" if split == "test" else f"_{split}"
    queries = read_queries(first_of(f"queries{tail}.jsonl", "queries.jsonl"), index.facts["analyser"])
    judgements = read_judgements(first_of(f"qrels/{split}.tsv", f"qrels{tail}.tsv"), queries, index)
    return {id: text for id, text in queries.items() if id in judgements}, judgements


# ---- the index: a row for each word, what it adds to the score of each document that holds it ----


@dataclasses.dataclass
class Index:
    """Words and documents are numbered down the alphabet: that is how trec_eval orders the ids of equal scores."""
    words: tuple           # bytes end to end [bytes], and where each word starts [words + 1]
    ids: tuple             # the same for the documents' ids
    starts: np.ndarray     # where each word's row starts [words + 1]
    documents: np.ndarray  # int32 [entries]
    scores: np.ndarray     # float64 [entries]
    facts: dict            # k1, b, analyser, number of documents, fingerprint of the corpus file
    rows: dict = dataclasses.field(default_factory=dict)  # word -> its row, once looked up


def text_table(texts):
    """The texts packed in descending order (bytes, starts), and each one's place there [texts]."""
    order = sorted(range(len(texts)), key=texts.__getitem__, reverse=True)
    rank = np.empty(len(texts), np.int64)
    rank[order] = np.arange(len(texts))
    pieces = [texts[n].encode() for n in order]
    return (np.frombuffer(b"".join(pieces), np.uint8), np.cumsum([0, *map(len, pieces)])), rank


def text_at(table, number):
    data, starts = table
    return data[starts[number]:starts[number + 1]].tobytes().decode()


def place(table, text):
    """The number of a text, or None: found by halving, so that opening an index reads no words."""
    last = len(table[1]) - 2
    number = last - bisect.bisect_left(range(last + 1), text, key=lambda n: text_at(table, last - n))
    return number if number >= 0 and text_at(table, number) == text else None


def index_documents(documents, k1=0.9, b=0.4, analyser="simple"):
    """The index of (id, words) pairs, read once.

        score(q, d) = sum over t in q of  ln(1 + (N - df + .5) / (df + .5))  tf / (tf + k1 B(d))
        B(d) = 1 - b + b |d| / mean |d|

    All of it is float64, and the sum is rounded to float32, once: trec_eval keeps scores so, and what is equal
    then is a tie. Rows in float32 would swap documents, and break ties, by their rounding.
    """
    if analyser not in ANALYSERS:
        raise Problem(f"there is no analyser {analyser!r}: choose one of {', '.join(ANALYSERS)}")
    if not (0 <= k1 < math.inf and 0 <= b <= 1):
        raise Problem(f"k1 = {k1}, b = {b}: k1 must be 0 or more, and b between 0 and 1")
    numbers = collections.defaultdict()
    numbers.default_factory = numbers.__len__  # a new word gets the next number
    text, lengths, ids = array("i"), array("i"), []  # machine integers, an eighth of what a list of them takes
    for id, words in documents:
        text.extend(map(numbers.__getitem__, words))
        lengths.append(len(words))
        ids.append(id)
    if not text:
        raise Problem("no document holds a word: there is nothing to search")
    words, word_rank = text_table(list(numbers))
    count, (ids, id_rank) = len(ids), text_table(ids)

    # a key for each word of the text, its number above its document's; sorted, what is equal stands together
    keys = (word_rank << 32)[np.frombuffer(text, np.int32)]  # [words of the text]
    keys |= np.repeat(id_rank.astype(np.int32), lengths)
    del text
    keys.sort()
    new = np.ones(len(keys) + 1, bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:-1])
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
    divisor += scores  # in place, here and below: arrays of [entries] are what takes the memory
    scores /= divisor
    scores *= np.repeat(np.log(1 + (count - df + 0.5) / (df + 0.5)), df)
    facts = {"k1": k1, "b": b, "analyser": analyser, "documents": count}
    return Index(words, ids, starts, documents, scores, facts)


def index_corpus(corpus, folder=None, k1=0.9, b=0.4, analyser="simple"):
    """The index of a corpus.jsonl. A folder keeps it: opened where it fits, else built and put there."""
    with opened(corpus) as file:
        facts = {"k1": k1, "b": b, "analyser": analyser, "corpus": hashlib.file_digest(file, "sha256").hexdigest()}
    if folder and in_use(folder):
        index = open_index(folder)
        if facts.items() <= index.facts.items():
            return index
        say(f"{folder}: made from another corpus or with other settings, building it again")
    documents = ((id, ANALYSERS[analyser](text)) for _, id, text in texts(corpus, what="indexing"))
    index = index_documents(documents, k1, b, analyser)
    index.facts.update(facts)
    if folder:
        save_index(index, folder)
    return index


def in_use(folder):
    return os.path.isfile(folder) or (os.path.isdir(folder) and os.listdir(folder) != [])


ARRAYS = ("words", "word_starts", "ids", "id_starts", "row_starts", "row_documents", "row_scores")


def save_index(index, folder):
    """The arrays and index.json, in a folder made beside and renamed: the index is there whole or not at all."""
    folder = os.path.normpath(folder)
    if in_use(folder):
        open_index(folder)  # a Problem if it is anything else: that is not ours to replace
    beside, old = f"{folder}.part-{os.getpid()}", f"{folder}.old-{os.getpid()}"
    try:
        for name, values in zip(ARRAYS, (*index.words, *index.ids, index.starts, index.documents, index.scores)):
            with whole_file(os.path.join(beside, f"{name}.npy"), "wb") as file:
                np.save(file, values, allow_pickle=False)
        write_json(os.path.join(beside, "index.json"), index.facts)
        if os.path.isdir(folder):
            os.rename(folder, old)
        os.rename(beside, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def open_index(folder):
    """Maps a saved index into memory: only what a search touches is read."""
    try:
        arrays = [np.asarray(np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r", allow_pickle=False))
                  for name in ARRAYS]
    except (OSError, ValueError, EOFError) as error:
        raise Problem(f"{folder}: not a whole index ({error}): delete it, or name another folder to build one in")
    facts = read_json(os.path.join(folder, "index.json"))
    return Index(tuple(arrays[:2]), tuple(arrays[2:4]), *arrays[4:], facts)


# ---- search ----


def row_of(index, word):
    """The documents that hold a word, and what it adds to each. (None, [documents]) where these are many: in a
    small collection one sum over all documents is far quicker than one that picks."""
    if word not in index.rows:
        number, count = place(index.words, word), index.facts["documents"]
        at = slice(*index.starts[number:number + 2]) if number is not None else slice(0)
        documents, scores = index.documents[at], index.scores[at]
        if count < 2**16 and len(documents) > count // 8:
            full = np.zeros(count)
            full[documents] = scores
            documents, scores = None, full
        index.rows[word] = documents, scores
    return index.rows[word]


def search(index, query, k=10):
    """The k best documents for a text or a list of words: numbers [found] and float32 scores [found], best first,
    ties by id downwards. A word counts as often as it stands; documents without any of the words are not found."""
    if k < 1:
        raise Problem(f"k = {k}: ask for at least one document")
    count = index.facts["documents"]
    totals = np.zeros(count)
    for word in ANALYSERS[index.facts["analyser"]](query) if isinstance(query, str) else query:
        documents, scores = row_of(index, word)
        if documents is None:
            totals += scores
        else:
            np.add.at(totals, documents, scores)
    scores, k = totals.astype(np.float32), min(k, count)  # [documents]
    # the k-th best of a sample: k documents and all that tie with the last of them reach it, and few others do
    floor = np.partition(scores[::min(max(count // (64 * k), 1), 8)], -k)[-k]
    found, = np.nonzero(scores >= floor if floor > 0 else scores)
    found = found[np.argsort(-scores[found], kind="stable")[:k]]
    return found, scores[found]


def search_many(index, queries, k=10, what=None):
    """`search` for each query; a progress bar where `what` names the work."""
    return [search(index, query, k) for query in (progress(queries, what=what) if what else queries)]


def document_ids(index, numbers):
    return [text_at(index.ids, number) for number in numbers]


# ---- trec_eval's measures ----


def measure(name, ranked, grades):
    """"ndcg@10", "recall@100", "p@10", "map", "mrr" ... of ids ranked best first against {id: grade}.
    A document without a grade, or with one below 1, is not relevant."""
    parts = re.fullmatch("(ndcg|recall|map|mrr|p(?=@))(?:@([1-9][0-9]*))?", name)
    if not parts:
        raise Problem(f"there is no measure {name!r}: write ndcg@10, recall@100, p@10 (at any depth), map or mrr")
    kind, depth = parts[1], int(parts[2]) if parts[2] else None
    gains = [max(grades.get(id, 0), 0) for id in ranked[:depth]]
    best = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
    ranks = [rank for rank, gain in enumerate(gains, 1) if gain]  # of the relevant documents found
    if not ranks:
        return 0.0
    if kind == "ndcg":  # DCG = sum over ranks r of gain / log2(r + 1), over the DCG of the best order there is
        dcg, ideal = (sum(gain / math.log2(rank + 1) for rank, gain in enumerate(order, 1))
                      for order in (gains, best[:depth]))
        return dcg / ideal
    if kind == "map":  # the precision at each relevant document; one that was not found adds 0
        return sum(found / rank for found, rank in enumerate(ranks, 1)) / len(best)
    if kind == "mrr":
        return 1 / ranks[0]
    return len(ranks) / (depth if kind == "p" else len(best))


def evaluate(run, judgements, names=("ndcg@10", "recall@100", "map", "mrr")):
    """Means over the queries of a run {query id: ranked ids} that have a relevant document; "queries" says how
    many these are, and "left_out" how many have none."""
    judged = [id for id in run if any(grade > 0 for grade in judgements.get(id, {}).values())]
    means = {name: sum(measure(name, run[id], judgements[id]) for id in judged) / max(len(judged), 1)
             for name in names}
    return {**means, "queries": len(judged), "left_out": len(run) - len(judged)}
