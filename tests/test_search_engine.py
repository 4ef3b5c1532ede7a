"""The search engine against slow, plain computations, trec_eval's own numbers and files with mistakes in them."""

import csv
import json
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine import bm25 as engine
from engine.common import Problem

SCIFACT = Path(__file__).parents[2] / "shared" / "data" / "scifact"
needs_scifact = pytest.mark.skipif(not SCIFACT.exists(), reason="SciFact is not here")


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(row if isinstance(row, bytes) else (
        row if isinstance(row, str) else json.dumps(row)).encode() + b"\n" for row in rows))
    return str(path)


def collection(folder, documents=({"_id": "d1", "title": "Red", "text": "fox"}, {"_id": "d2", "text": "blue fox"}),
               queries=({"_id": "q1", "text": "red"}, {"_id": "q2", "text": "blue"}),
               judgements=("query-id\tcorpus-id\tscore", "q1\td1\t1")):
    write(folder / "corpus.jsonl", *documents)
    write(folder / "queries.jsonl", *queries)
    write(folder / "qrels.tsv", *judgements)
    return folder


def index_of(folder):
    return engine.index_corpus(f"{folder}/corpus.jsonl", f"{folder}/index")


def search(index, text, k=10):
    """(ids, scores) of the k best documents."""
    numbers, scores = engine.search(index, engine.analyse(text), k)
    return [engine.text_at(index.ids, number) for number in numbers], scores.tolist()


def run_of(index, queries, k):
    return {id: engine.search(index, engine.analyse(text), k)[0].tolist()
            for id, text in queries.items()}


def slow_ranking(documents, query, k1, b):
    """[(id, score)] by the formula, a document and a word at a time; rounded as trec_eval stores scores."""
    count, mean = len(documents), sum(len(words) for _, words in documents) / len(documents)
    df = Counter(word for _, words in documents for word in set(words))
    ranking = []
    for id, words in documents:
        tf, score = Counter(words), 0.0
        for word in query:
            if tf[word]:
                idf = math.log(1 + (count - df[word] + 0.5) / (df[word] + 0.5))
                score += idf * tf[word] / (tf[word] + k1 * (1 - b + b * len(words) / mean))
        if score > 0:
            ranking.append((float(np.float32(score)), id))
    return [(id, score) for score, id in sorted(ranking, reverse=True)]


# ---- BM25 ----


@needs_scifact
@pytest.mark.parametrize("k1, b, means", [(0.9, 0.4, (0.661069, 0.885222, 0.624252)),
                                          (1.2, 0.75, (0.662213, 0.882556, 0.623235))])
def test_scifact_equals_the_reference(tmp_path, k1, b, means):
    """A wrong idf, a title left out, a mean length without the empty documents: all shift the third decimal."""
    index = engine.index_corpus(str(SCIFACT / "corpus.jsonl"), str(tmp_path / "index"), k1, b)
    queries, judgements = engine.read_topics(SCIFACT, index)
    run = run_of(index, queries, 1000)
    assert len(run) == len(judgements) == 300
    for name, mean in zip(("ndcg@10", "recall@100", "map"), means):
        values = [engine.measure(name, run[id], judgements[id]) for id in run]
        assert round(sum(values) / 300, 6) == mean
    names = {"ndcg10": "ndcg@10", "recall100": "recall@100", "recall1000": "recall@1000", "map": "map", "mrr": "mrr",
             "p10": "p@10", "p30": "p@30"}
    with open(SCIFACT / f"scifact.simple.k1_{k1}.b_{b}.perquery.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 300
    for row in rows:
        for column, name in names.items():
            value = engine.measure(name, run[row["qid"]], judgements[row["qid"]])
            assert value == pytest.approx(float(row[column]), abs=6e-7), (row["qid"], name)


@needs_scifact
def test_the_training_split_has_its_own_files(tmp_path):
    """Training queries judged by the test split's file would all be called unknown."""
    index = engine.index_corpus(str(SCIFACT / "corpus.jsonl"), str(tmp_path / "index"))
    queries, judgements = engine.read_topics(SCIFACT, index, split="train")
    assert len(queries) == len(judgements) == 809


@pytest.mark.parametrize("seed, k1, b", [(0, 0.9, 0.4), (1, 1.2, 0.75), (2, 0.0, 0.0), (3, 2.0, 1.0)])
def test_equals_a_plain_computation(tmp_path, seed, k1, b):
    """Ids as strings ("9" above "10"), copies that tie, empty documents, one word ten thousand times, text that is
    not ASCII: the same documents, in the same order, with the same scores, cut at any k."""
    rng = random.Random(seed)
    vocabulary = ["the", "of", "Zelle", "naïve", "ΑΒΓ", "1,000", "İstanbul", "\u212a2", "don't"] + [
        f"w{n}" for n in range(120)]
    weights = [1 / (n + 1) for n in range(len(vocabulary))]
    texts = [" ".join(rng.choices(vocabulary, weights, k=rng.choice([1, 5, 20, 60]))) for _ in range(300)]
    texts[10], texts[20], texts[30] = "", "¡¿ — ?!", "ten " * 10_000
    texts[100:160] = [texts[rng.randrange(40, 45)] for _ in range(60)]
    rows = [{"_id": str(n), "title": rng.choice(["", "The title"]), "text": text} for n, text in enumerate(texts)]
    rng.shuffle(rows)
    documents = [(row["_id"], re.findall("[a-z0-9]+", (row["title"] + " " + row["text"]).lower())) for row in rows]
    index = engine.index_corpus(write(tmp_path / "corpus.jsonl", *rows), str(tmp_path / "index"), k1, b)
    for query in ["ten", "the of", "the the the w3", "w5 w9 w17 w44 don't", "İstanbul na k2", "missing", "w7 " * 40,
                  *(" ".join(rng.choices(vocabulary, weights, k=12)) for _ in range(20))]:
        expected = slow_ranking(documents, re.findall("[a-z0-9]+", query.lower()), k1, b)
        for k in (1, 2, 7, 50, 1000):
            assert list(zip(*search(index, query, k))) == expected[:k], (query, k)


def test_ties_at_the_cut_go_to_the_higher_id():
    """A cut that keeps any k of the tied documents, or sorts ids as numbers, gives other measures than trec_eval."""
    index = engine.index_documents([(str(n), ["fox"]) for n in range(200)] + [("other", ["hen"])])
    ids, scores = search(index, "fox", 5)
    assert ids == ["99", "98", "97", "96", "95"] and len(set(scores)) == 1
    assert len(engine.search(index, ["fox"], 1000)[0]) == 200


def test_a_repeated_word_counts_again():
    """A query turned into a set of words would score once."""
    index = engine.index_documents([("a", ["x", "y"]), ("b", ["z"])])
    assert search(index, "x X x")[1][0] == pytest.approx(3 * search(index, "x")[1][0])


def test_nothing_is_found_without_a_shared_word():
    """Filling up to k with documents of score 0 would hand out ranks, and reward, for nothing."""
    index = engine.index_documents([("a", ["x"]), ("b", ["y"]), ("c", [])])
    assert search(index, "x")[0] == ["a"]
    for query in ("unknown", "", "?"):
        assert search(index, query) == ([], [])


def test_any_size_of_k_cuts_the_same_ranking():
    """The floor taken from a sample of the documents must let every document of the first k through."""
    rng = random.Random(7)
    texts = [[f"w{min(int(rng.expovariate(0.1)), 60)}" for _ in range(rng.randint(1, 9))] for _ in range(9000)]
    index = engine.index_documents((str(n), words) for n, words in enumerate(texts))
    for query in ("w3 w3 w20", "w59", "w1 w2 w4 w30 w45"):
        query = query.split()
        numbers, scores = engine.search(index, query, 9000)
        assert np.all(np.diff(scores) <= 0) and np.all((np.diff(scores) < 0) | (np.diff(numbers) > 0))
        for k in (1, 2, 10, 17, 18, 100, 141, 5000):
            assert np.array_equal(engine.search(index, query, k)[0], numbers[:k]), (query, k)


# ---- the index on disk ----


def test_a_saved_index_searches_the_same_and_is_opened_again(tmp_path, monkeypatch):
    """An index rebuilt at each start, or one opened for another corpus or other settings."""
    collection(tmp_path)
    corpus, folder = str(tmp_path / "corpus.jsonl"), str(tmp_path / "index/")
    built = engine.index_corpus(corpus, folder)
    again = engine.open_index(folder)
    assert again.facts == built.facts and type(again.scores) is np.ndarray and not again.scores.flags.writeable
    for query in ("red", "fox", "blue fox"):
        for mine, other in zip(search(built, query), search(again, query)):
            assert mine == other
    builds = []
    slow = engine.index_documents
    monkeypatch.setattr(engine, "index_documents", lambda *all, **named: builds.append(1) or slow(*all, **named))
    engine.index_corpus(corpus, folder)
    assert not builds
    assert engine.index_corpus(corpus, folder, k1=1.2).facts["k1"] == 1.2 and len(builds) == 1
    collection(tmp_path, documents=[{"_id": "d1", "title": "Red", "text": "hen"}, {"_id": "d2", "text": "blue fox"}])
    index = engine.index_corpus(corpus, folder, k1=1.2)
    assert len(builds) == 2 and search(index, "hen")[0] == ["d1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "index", "qrels.tsv", "queries.jsonl"]


def test_a_crash_leaves_no_half_index(tmp_path, monkeypatch):
    """A build that dies while it writes must not be opened; the next call builds it again."""
    collection(tmp_path)
    calls, save = [], np.save

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        save(*args, **kwargs)

    for before in (False, True):
        if before:
            write(tmp_path / "corpus.jsonl", DOCUMENT)
        calls.clear()
        monkeypatch.setattr(engine.np, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            index_of(tmp_path)
        monkeypatch.undo()
        with pytest.raises(Problem, match="index"):
            engine.open_index(f"{tmp_path}/index")
        assert len(search(index_of(tmp_path), "fox")[0]) == (1 if before else 2)


def test_an_index_that_is_not_whole_is_refused(tmp_path):
    """A missing or cut file, one with pickled objects, or a folder of something else."""
    folder = tmp_path / "index"
    for name, spoil in [("row_scores.npy", lambda p: p.unlink()), ("index.json", lambda p: p.unlink()),
                        ("row_documents.npy", lambda p: p.write_bytes(p.read_bytes()[:-4])),
                        ("words.npy", lambda p: np.save(p, np.array([{}], object), allow_pickle=True))]:
        engine.save_index(engine.index_documents([("a", ["x"])]), str(folder))
        spoil(folder / name)
        with pytest.raises(Problem, match="index"):
            engine.open_index(str(folder))
        shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(Problem, match="not a whole index"):
        engine.open_index(str(folder))
    engine.save_index(engine.index_documents([("a", ["x"])]), str(folder))
    assert (folder / "thesis.txt").read_text() == "mine"


# ---- measures ----


def slow_measures(scores, grades):
    """trec_eval's definitions, spelt out: scores {id: score} sorted by score, then id, both downwards."""
    ranked = sorted(scores, key=lambda id: (scores[id], id), reverse=True)
    total = sum(1 for grade in grades.values() if grade >= 1)
    result = {}
    for k in (1, 5, 10, 100):
        dcg = ideal = hits = 0.0
        for i in range(min(k, len(ranked))):
            grade = grades.get(ranked[i], 0)
            if grade >= 1:
                dcg, hits = dcg + grade / math.log2(i + 2), hits + 1
        for i, grade in enumerate(sorted(grades.values(), reverse=True)[:k]):
            if grade > 0:
                ideal += grade / math.log2(i + 2)
        result |= {f"ndcg@{k}": dcg / ideal if ideal else 0, f"recall@{k}": hits / total if total else 0,
                   f"p@{k}": hits / k}
    places = [i for i, id in enumerate(ranked, 1) if grades.get(id, 0) >= 1]
    result["mrr"] = 1 / places[0] if places else 0
    result["map"] = sum(n / i for n, i in enumerate(places, 1)) / total if total else 0
    return result


def random_runs(seed, count=150):
    """Scores with many ties, documents nobody judged, grades from -2 to 3, queries without a relevant document."""
    rng = random.Random(seed)
    scores, grades = {}, {}
    for q in range(count):
        pool = [f"d{n}" for n in range(rng.choice([3, 30, 300]))]
        judged = rng.sample(pool, rng.randint(1, min(20, len(pool))))
        choices = [0, -1, -2] if q % 7 == 0 else [-2, -1, 0, 0, 1, 1, 2, 3]
        grades[f"q{q}"] = {id: rng.choice(choices) for id in judged}
        found = rng.sample(pool, rng.randint(1, len(pool)))
        scores[f"q{q}"] = {id: rng.choice([rng.random(), rng.randint(1, 4) / 2]) for id in found}
    return scores, grades


def as_ranking(scores):
    return sorted(scores, key=lambda id: (np.float32(scores[id]), id), reverse=True)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_measures_equal_a_plain_computation(seed):
    """Exponential gains, ideal orders cut at what was found, negative grades in the ideal, MAP over found documents
    only: each is some library's nDCG or MAP, none is trec_eval's."""
    scores, grades = random_runs(seed)
    for query in scores:
        for name, value in slow_measures(scores[query], grades[query]).items():
            assert engine.measure(name, as_ranking(scores[query]), grades[query]) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_measures_equal_trec_eval(seed):
    """The same against trec_eval itself, where its Python package is installed."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    scores, grades = random_runs(seed, count=400)
    for judged in grades.values():
        judged["never found"] = 0  # trec_eval crashes on a query whose grades are all negative
    theirs = pytrec_eval.RelevanceEvaluator(
        grades, {"ndcg_cut.5,10,100", "recall.5,10,100", "P.5,10", "map", "recip_rank"}).evaluate(scores)
    names = {"map": "map", "recip_rank": "mrr", "P_5": "p@5", "P_10": "p@10"}
    for k in (5, 10, 100):
        names |= {f"ndcg_cut_{k}": f"ndcg@{k}", f"recall_{k}": f"recall@{k}"}
    compared = 0
    for query in scores:
        for their_name, name in names.items():
            mine = engine.measure(name, as_ranking(scores[query]), grades[query])
            assert mine == pytest.approx(theirs[query][their_name], abs=1e-12), (query, name)
            compared += 1
    assert compared == 400 * len(names)


def test_an_example_by_hand():
    """Ranks 2 and 4 are relevant, of three: by hand, so that no shared mistake goes unseen."""
    ranked, grades = ["a", "b", "c", "d"], {"b": 2, "d": 1, "z": 1, "a": -1}
    assert engine.measure("ndcg@10", ranked, grades) == pytest.approx(
        (2 / math.log2(3) + 1 / math.log2(5)) / (2 + 1 / math.log2(3) + 0.5))
    assert engine.measure("map", ranked, grades) == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert engine.measure("map@2", ranked, grades) == pytest.approx((1 / 2) / 3)
    assert engine.measure("mrr", ranked, grades) == 0.5 and engine.measure("mrr@1", ranked, grades) == 0
    assert engine.measure("recall@100", ranked, grades) == pytest.approx(2 / 3)
    assert engine.measure("p@10", ranked, grades) == pytest.approx(0.2)


def test_names_of_measures():
    """A misspelt measure that is 0 for everything."""
    for name in ("ndcg@0", "ndgc@10", "p", "map@x", "", "ndcg@10 "):
        with pytest.raises(Problem, match="no measure"):
            engine.measure(name, ["x"], {"x": 1})


# ---- files with mistakes ----

DOCUMENT = {"_id": "d1", "title": "Red", "text": "fox"}


@pytest.mark.parametrize("rows, line, said", [
    ([DOCUMENT, '{"_id": "d2", "text": '], 2, "JSON"),
    ([DOCUMENT, '"text"'], 2, "JSON object"),
    ([DOCUMENT, "7"], 2, "JSON object"),
    ([DOCUMENT, "[" * 100_000], 2, "JSON"),
    ([DOCUMENT, b'{"_id": "d2", "text": "\xff"}\n'], 2, "JSON"),
    (["", DOCUMENT, {"_id": "d2", "title": "no text"}], 3, "'text'"),
    ([DOCUMENT, {"text": "no id"}], 2, "'_id'"),
    ([DOCUMENT, {"_id": 2, "text": "id that is a number"}], 2, "strings"),
    ([DOCUMENT, {"_id": "d2", "text": None}], 2, "strings"),
    ([DOCUMENT, {"_id": "d2", "text": "half a pair \ud800"}], 2, "surrogate"),
    ([DOCUMENT, {"_id": "d2", "text": "hen"}, DOCUMENT], 3, "earlier line"),
])
def test_mistakes_in_a_corpus(tmp_path, rows, line, said):
    """Each is one line that names file and line; a skipped document would change every score."""
    path = write(tmp_path / "corpus.jsonl", *rows)
    with pytest.raises(Problem) as problem:
        engine.index_corpus(path, str(tmp_path / "index"))
    assert f"corpus.jsonl, line {line}: " in str(problem.value) and said in str(problem.value)
    assert "\n" not in str(problem.value) and not (tmp_path / "index").exists()


@pytest.mark.parametrize("queries, where, said", [
    ([{"_id": "q1", "text": "red"}] * 2, "queries.jsonl, line 2", "earlier line"),
    ([{"_id": "q1"}], "queries.jsonl, line 1", "'text'")])
def test_mistakes_in_queries(tmp_path, queries, where, said):
    """Two queries of one id, or a line that is no query, are not what anybody publishes."""
    collection(tmp_path, queries=queries)
    index = index_of(tmp_path)
    with pytest.raises(Problem) as problem:
        engine.read_topics(tmp_path, index)
    assert f"{where}: " in str(problem.value) and said in str(problem.value)
    assert "\n" not in str(problem.value)


FAULTS = [("q1\td9\t1", "a document that is not in the corpus"),
          ("q9\td1\t1", "a query that is not there or has no words"),
          ("q3\td1\t1", "a query that is not there or has no words"),
          ("q1 d1 1", "not query-id, corpus-id, score, tab-separated"),
          ("q1\t0\td1\t1", "not query-id, corpus-id, score, tab-separated"),
          ("q1\td1\t0.5", "a score that is not a whole number"),
          ("q1\td1\tyes", "a score that is not a whole number"),
          ("q1\td1\t2", "a score that contradicts an earlier line")]
QUERIES = ({"_id": "q1", "text": "red"}, {"_id": "q2", "text": "blue"}, {"_id": "q3", "text": "?!"})


@pytest.mark.parametrize("line, fault", FAULTS)
def test_judgements_that_cannot_be_used_are_counted(tmp_path, capsys, line, fault):
    """A query without ASCII words or a withdrawn document stopped everything, a line at a time."""
    collection(tmp_path, queries=QUERIES, judgements=["q1\td1\t1", line, line, "q2\td2\t1"])
    index = index_of(tmp_path)
    queries, judgements = engine.read_topics(tmp_path, index)
    assert queries == {"q1": "red", "q2": "blue"}
    assert judgements == {"q1": {1: 1}, "q2": {0: 1}}, "d2 is document 0, d1 document 1"
    said = capsys.readouterr().out
    assert f"2 line(s) skipped: {fault} (first: line 2)" in said
    assert "1 of 3 queries have no words (analyser simple) and are skipped" in said


def test_a_file_of_which_nothing_is_left_stops(tmp_path):
    """TREC's four columns: every line skipped, and a job that measures on no query at all."""
    collection(tmp_path, judgements=["q1 0 d1 1", "q2 0 d2 1"])
    with pytest.raises(Problem, match="no line of it can be used"):
        engine.read_topics(tmp_path, index_of(tmp_path))


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels.tsv"])
def test_missing_files(tmp_path, name):
    """A path that is not there is a line that says what belongs there."""
    (collection(tmp_path) / name).unlink()
    with pytest.raises(Problem, match=f"{name}: cannot be read"):
        engine.read_topics(tmp_path, index_of(tmp_path))


def test_mistakes_in_settings(tmp_path):
    """A corpus without words has no mean length, a b above 1 makes lengths negative."""
    with pytest.raises(Problem, match="from 0 to 1"):
        engine.index_documents([("a", ["x"])], b=1.5)
    for documents in ([], [("a", [])]):
        with pytest.raises(Problem, match="no document holds a word"):
            engine.index_documents(documents)
    with pytest.raises(Problem, match="cannot be written"):
        engine.index_corpus(str(collection(tmp_path) / "corpus.jsonl"), str(tmp_path / "qrels.tsv"))


@pytest.mark.parametrize("name", ["qrels.tsv", "qrels/test.tsv"])
@pytest.mark.parametrize("header", [(), ("query-id\tcorpus-id\tscore",)])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_layouts_of_judgements(tmp_path, name, header, end):
    """A header counted as a judgement, a first judgement taken for a header, a carriage return kept in the score."""
    (collection(tmp_path) / "qrels.tsv").unlink()
    write(tmp_path / name, "".join(row + end for row in [*header, "q2\td2\t2", "q2\td1\t-1"]).encode())
    index = index_of(tmp_path)
    queries, judgements = engine.read_topics(tmp_path, index)
    assert queries == {"q2": "blue"} and judgements == {"q2": {0: 2, 1: -1}}
