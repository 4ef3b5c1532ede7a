"""The search engine against slow computations, trec_eval's own numbers, and files with mistakes."""

import csv
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine import bm25 as engine
from engine.common import Problem

SCIFACT = Path(__file__).parents[2] / "shared" / "data" / "scifact"
FOX, HEN = {"_id": "d1", "title": "Red", "text": "fox"}, {"_id": "d2", "text": "blue hen"}
QUERIES = [{"_id": "q1", "text": "red"}, {"_id": "q2", "text": "blue"}, {"_id": "q3", "text": "?"}]


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))


def collection(folder, documents=(FOX, HEN), queries=QUERIES, judgements=(b"q1\td1\t1",)):
    write(folder / "corpus.jsonl", *documents)
    write(folder / "queries.jsonl", *queries)
    write(folder / "qrels.tsv", *judgements)


def index_of(folder, **settings):
    return engine.index_corpus(f"{folder}/corpus.jsonl", f"{folder}/index", **settings)


def search(index, text, k=10):
    """[(id, score)] of the k best documents."""
    numbers, scores = engine.search(index, engine.analyse(text), k)
    return [(index.ids[number], score) for number, score in zip(numbers, scores)]


# ---- BM25 ----


@pytest.mark.skipif(not SCIFACT.exists(), reason="SciFact is not here")
@pytest.mark.parametrize("k1, b", [(0.9, 0.4), (1.2, 0.75)])
def test_scifact_equals_the_reference(tmp_path, k1, b):
    """trec_eval's numbers, query by query: a wrong idf, a title or empty documents left out, all
    shift the third decimal."""
    index = engine.index_corpus(f"{SCIFACT}/corpus.jsonl", f"{tmp_path}/index", k1, b)
    queries, judgements = engine.read_topics(SCIFACT, index)
    columns = {
        "ndcg10": "ndcg@10",
        "recall100": "recall@100",
        "map": "map",
        "mrr": "mrr",
        "p10": "p@10",
        "p30": "p@30",
        "recall1000": "recall@1000",
    }
    with open(SCIFACT / f"scifact.simple.k1_{k1}.b_{b}.perquery.tsv") as file:
        expected = {row["qid"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert expected.keys() == queries.keys() == judgements.keys() and len(queries) == 300
    for id, text in queries.items():
        ranked = engine.search(index, engine.analyse(text), 1000)[0].tolist()
        values = [engine.measure(name, ranked, judgements[id]) for name in columns.values()]
        assert values == pytest.approx([float(expected[id][name]) for name in columns], abs=6e-7)
    queries, judgements = engine.read_topics(SCIFACT, index, split="train")  # in files of its own
    assert len(queries) == len(judgements) == 809


def slow_ranking(documents, query, k1, b):
    """[(id, score)] by the formula, word by word; rounded as trec_eval stores scores."""
    count, mean = len(documents), sum(map(len, documents.values())) / len(documents)
    df = Counter(word for words in documents.values() for word in set(words))
    ranking = []
    for id, words in documents.items():
        tf, score = Counter(words), 0.0
        for word in query:
            if tf[word]:
                idf = math.log(1 + (count - df[word] + 0.5) / (df[word] + 0.5))
                score += idf * tf[word] / (tf[word] + k1 * (1 - b + b * len(words) / mean))
        if score > 0:
            ranking.append((float(np.float32(score)), id))
    return [(id, score) for score, id in sorted(ranking, reverse=True)]


@pytest.mark.parametrize("k1, b", [(0.9, 0.4), (1.2, 0.75), (0.0, 1.0)])
def test_equals_a_plain_computation(k1, b):
    """Ties go to the higher id, a string ("9" above "10"), also at the cut. Copies, empty
    documents, one word 10,000 times, text that is not ASCII: the same documents and scores."""
    rng = random.Random(0)
    vocabulary = ["the", "Zelle", "naïve", "ΑΒΓ", "1,000", "İstanbul", "don't"] + [*"abcdefgh"] * 9
    draw = lambda k: " ".join(rng.choices(vocabulary, k=k))
    texts = {str(n): draw(rng.choice([1, 5, 20, 60])) for n in range(300)}
    texts |= {"10": "", "20": "¡¿ — ?!", "30": "ten " * 10_000}
    texts |= {str(n): texts[str(n % 5 + 40)] for n in range(100, 160)}
    words_of = lambda text: re.findall("[a-z0-9]+", text.lower())
    documents = {id: words_of(text) for id, text in texts.items()}
    index = engine.index_documents(texts.items(), k1, b)
    for query in [
        "ten",
        "the the the a",
        "İstanbul na",
        "missing",
        "",
        "b " * 40,
        *(draw(12) for _ in range(20)),
    ]:
        expected = slow_ranking(documents, words_of(query), k1, b)
        for k in (1, 2, 7, 50, 1000):
            assert search(index, query, k) == expected[:k], (query, k)


# ---- the index in its folder ----


def test_an_index_is_kept_until_something_changes(tmp_path, monkeypatch):
    """An index made at each start, or one opened for another corpus or other settings."""
    collection(tmp_path)
    found, builds = search(index_of(tmp_path), "blue fox"), []
    build = engine.index_documents
    monkeypatch.setattr(engine, "index_documents", lambda *all: builds.append(1) or build(*all))
    again = index_of(tmp_path)
    assert search(again, "blue fox") == found and not again.postings.flags.writeable and not builds
    index_of(tmp_path, k1=1.2)
    write(tmp_path / "corpus.jsonl", HEN)
    assert not search(index_of(tmp_path, k1=1.2), "fox") and len(builds) == 2


def test_a_crash_leaves_no_half_index(tmp_path, monkeypatch):
    """What dies while it writes is made again, and not taken for the index that it replaced."""
    collection(tmp_path)
    index_of(tmp_path)
    monkeypatch.setattr(np, "save", lambda *_: 1 / 0)
    for settings in ({"k1": 1.2}, {}):
        with pytest.raises(ZeroDivisionError):
            index_of(tmp_path, **settings)


# ---- measures ----


def slow_measures(ranked, grades):
    """trec_eval's definitions, spelt out."""
    result, total = {}, sum(grade >= 1 for grade in grades.values())
    for k in (1, 5, 10, 100):
        dcg = ideal = hits = 0.0
        for i, id in enumerate(ranked[:k]):
            if grades.get(id, 0) >= 1:
                dcg, hits = dcg + grades[id] / math.log2(i + 2), hits + 1
        for i, grade in enumerate(sorted(grades.values(), reverse=True)[:k]):
            if grade > 0:
                ideal += grade / math.log2(i + 2)
        result |= {
            f"ndcg@{k}": dcg / (ideal or 1),
            f"recall@{k}": hits / (total or 1),
            f"p@{k}": hits / k,
        }
    places = [i for i, id in enumerate(ranked, 1) if grades.get(id, 0) >= 1]
    result["mrr"] = 1 / places[0] if places else 0
    result["map"] = sum(n / i for n, i in enumerate(places, 1)) / (total or 1)
    return result


def test_measures_equal_a_plain_computation():
    """Exponential gains, ideal orders cut at what was found, negative grades in the ideal, MAP over
    found documents only: each is some library's nDCG or MAP, none is trec_eval's."""
    rng = random.Random(0)
    for size in [3, 30, 300] * 50:
        pool = [f"d{n}" for n in range(size)]  # some have no relevant document, some are unjudged
        grades = {id: rng.randint(-2, 3) for id in rng.sample(pool, rng.randint(1, size // 3))}
        ranked = rng.sample(pool, rng.randint(1, size))
        for name, value in slow_measures(ranked, grades).items():
            assert engine.measure(name, ranked, grades) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    "name, value",
    [
        ("ndcg@10", (2 / math.log2(3) + 1 / math.log2(5)) / (2 + 1 / math.log2(3) + 0.5)),
        ("map", (1 / 2 + 2 / 4) / 3),
        ("map@2", 1 / 6),
        ("mrr@1", 0),
        ("p@10", 0.2),
    ],
)
def test_an_example_by_hand(name, value):
    """Ranks 2 and 4 are relevant, of three: by hand, so that no shared mistake goes unseen."""
    found = engine.measure(name, "abcd", {"b": 2, "d": 1, "z": 1, "a": -1})
    assert found == pytest.approx(value)


@pytest.mark.parametrize("name", ["ndcg@0", "ndgc@10", "p"])
def test_names_of_measures(name):
    """A misspelt measure that is 0 for everything."""
    with pytest.raises(Problem, match="no measure"):
        engine.measure(name, ["x"], {"x": 1})


# ---- files with mistakes ----


@pytest.mark.parametrize(
    "rows, line, said",
    [
        ([FOX, b'{"_id": "d2", "text": '], 2, "JSON"),
        ([FOX, b'{"_id": "d2", "text": "\xff"}'], 2, "JSON"),
        ([b"", FOX, {"_id": "d2", "title": "no text"}], 3, "'text'"),
        ([FOX, {"_id": 2, "text": "id that is a number"}], 2, "strings"),
        ([FOX, {"_id": "d2", "text": None}], 2, "strings"),
        ([FOX, {"_id": "d2", "text": "half a pair \ud800"}], 2, "surrogate"),
        ([FOX, HEN, FOX], 3, "earlier line"),
    ],
)
def test_mistakes_in_texts(tmp_path, rows, line, said):
    """Each is one line that names file and line; a skipped document would change every score."""
    write(tmp_path / "corpus.jsonl", *rows)
    with pytest.raises(Problem) as problem:
        index_of(tmp_path)
    assert f"corpus.jsonl, line {line}: " in str(problem.value) and said in str(problem.value)
    assert "\n" not in str(problem.value) and not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    "line",
    [
        b"q1\td9\t1",
        b"q9\td1\t1",
        b"q3\td1\t1",
        b"q1 d1 1",
        b"q1\t0\td1\t1",
        b"q1\td1\t0.5",
        b"\xff\td1\t1",
    ],
)
def test_judgements_that_cannot_be_used_are_counted(tmp_path, capsys, line):
    """A query without words or a withdrawn document stopped everything, a line at a time. A file
    of which nothing is left would measure on no query at all."""
    collection(tmp_path, judgements=[b"q1\td1\t1", line, line, b"q2\td2\t1"])
    index = index_of(tmp_path)
    queries, judgements = engine.read_topics(tmp_path, index)
    assert queries == {"q1": "red", "q2": "blue"}
    assert judgements == {"q1": {1: 1}, "q2": {0: 1}}
    assert "qrels.tsv: 2 line(s) cannot be used (the first: [2])" in capsys.readouterr().out
    write(tmp_path / "qrels.tsv", line)
    with pytest.raises(Problem, match="1 line.* cannot be used"):
        engine.read_topics(tmp_path, index)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels.tsv"])
def test_missing_files(tmp_path, name):
    """A path that is not there is a line that says what belongs there."""
    collection(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(Problem, match=f"{name}: cannot be read"):
        engine.read_topics(tmp_path, index_of(tmp_path))


@pytest.mark.parametrize("texts", [[], [("a", "?")]])
def test_a_corpus_without_words(texts):
    """It has no mean length."""
    with pytest.raises(Problem, match="no document holds a word"):
        engine.index_documents(texts)


@pytest.mark.parametrize("name", ["qrels.tsv", "qrels/test.tsv"])
@pytest.mark.parametrize("header", [(), (b"query-id\tcorpus-id\tscore\r",)])
def test_layouts_of_judgements(tmp_path, capsys, name, header):
    """A first judgement taken for a header, a carriage return kept in the score."""
    collection(tmp_path)
    (tmp_path / "qrels.tsv").unlink()
    write(tmp_path / name, *header, b"q2\td2\t2\r", b"q2\td1\t-1")
    queries, judgements = engine.read_topics(tmp_path, index_of(tmp_path))
    assert queries == {"q2": "blue"} and judgements == {"q2": {0: 2, 1: -1}}
    assert "cannot be used" not in capsys.readouterr().out
