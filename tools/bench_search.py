"""The search engine beside bm25s on SciFact, then a corpus of a million made-up documents.

    python tools/bench_search.py [--data DIR] [--documents 1000000] [--pairs 7]

Both engines have the same words and run one after the other, in pairs: the ratio of each pair is taken
before the median, so that a machine which slows down slows both. Above 1 this engine is the quicker one.
"""

import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine import bm25 as engine  # noqa: E402
from engine.common import Problem, parse, progress, run_main, say, setting, table, write_json  # noqa: E402


@dataclasses.dataclass
class Settings:
    data: str = setting(
        str(Path(__file__).parents[2] / "shared" / "data" / "scifact"), "SciFact, in BEIR's layout"
    )
    documents: int = setting(
        1_000_000, "how many documents of 60 words to make up (0: skip that part)"
    )
    pairs: int = setting(7, "how often each pair is timed")
    stage: str = setting("", "used by the benchmark itself", choices=["", "index", "open"])
    folder: str = setting("", "used by the benchmark itself")
    out: str = setting("", "JSON file for the comparison with bm25s")


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(mine, theirs, pairs):
    """Median seconds of each, and the median over the pairs of theirs / mine, with its range."""
    mine(), theirs()  # caches, and what numba compiles
    times = [(seconds(mine), seconds(theirs)) for _ in range(pairs)]
    ratios = [other / own for own, other in times]
    medians = [statistics.median(column) for column in (*zip(*times), ratios)]
    return [*medians, min(ratios), max(ratios)]


def beside_bm25s(settings):
    try:
        import bm25s
    except ImportError:
        raise Problem(
            "bm25s is not installed, and only this benchmark needs it: pip install bm25s (numba as well "
            "for its faster backend)"
        )
    corpus = list(engine.read_texts(os.path.join(settings.data, "corpus.jsonl")))
    index = engine.index_documents(corpus)
    queries = [
        engine.analyse(text)
        for _, text in engine.read_texts(os.path.join(settings.data, "queries.jsonl"))
    ]

    def bm25s_index(backend="numpy"):
        other = bm25s.BM25(k1=0.9, b=0.4, backend=backend)
        other.index([engine.analyse(text) for _, text in corpus], show_progress=False)
        return other

    backends = {"numpy": bm25s_index()}
    with contextlib.suppress(ImportError):
        backends["numba"] = bm25s_index("numba")
    same_scores(index, backends["numpy"], queries)

    times = compare(lambda: engine.index_documents(corpus), bm25s_index, settings.pairs)
    rows = [[f"index {len(corpus)} documents", *times]]
    for k in (10, 100, 1000):
        for backend, other in backends.items():
            rows.append(
                [
                    f"{len(queries)} queries, k={k}, bm25s with {backend}",
                    *compare(
                        lambda: [engine.search(index, query, k) for query in queries],
                        lambda: other.retrieve(queries, k=k, show_progress=False),
                        settings.pairs,
                    ),
                ]
            )
    columns = ["case", "seconds", "bm25s", "ratio", "from", "to"]
    say(table(columns, rows))
    if settings.out:
        write_json(settings.out, [dict(zip(columns, row)) for row in rows])
    say(f"queries a second at k=10: {len(queries) / rows[1][1]:.0f}")


def same_scores(index, other, queries):
    """Both answer the same question: the ten best scores agree (bm25s adds up in float32, and cuts ties anyhow)."""
    found = other.retrieve(queries, k=10, show_progress=False).scores
    for row, query in zip(found, queries):
        assert np.allclose(engine.search(index, query, 10)[1], row[row > 0], rtol=1e-5)


def million(settings):
    """A process of its own for each stage, so that the memory it reports is that stage's alone."""
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(os.path.join(folder, "corpus.jsonl"), settings.documents)
        for stage in ("index", "open"):
            subprocess.run(
                [sys.executable, __file__, "--stage", stage, "--folder", folder], check=True
            )


def make_corpus(path, documents, words=60, vocabulary=500_000):
    """Words drawn as language draws them: the n-th most frequent one with a chance like 1 / (n + 2.7)."""
    rng, spelt = np.random.default_rng(0), [f"w{n:x}" for n in range(vocabulary)]
    chances = np.cumsum(1 / (np.arange(vocabulary) + 2.7))
    with open(path, "w") as file:
        for start in progress(range(0, documents, 1000), what="making documents up"):
            drawn = np.searchsorted(
                chances, rng.random((min(1000, documents - start), words)) * chances[-1]
            )
            for number, row in enumerate(drawn.tolist(), start):
                document = {
                    "_id": f"d{number}",
                    "title": "",
                    "text": " ".join(spelt[n] for n in row),
                }
                file.write(json.dumps(document) + "\n")


def index_stage(folder):
    before = peak()
    taken = seconds(lambda: engine.index_corpus(folder + "/corpus.jsonl", folder + "/index"))
    size = sum(path.stat().st_size for path in Path(folder, "index").iterdir()) / 2**30
    say(
        f"indexing: {taken:.1f} s, peak memory {peak():.2f} GiB (of these {before:.2f} before it began), "
        f"{size:.2f} GiB on disk"
    )


def open_stage(folder):
    opened = seconds(lambda: engine.open_index(folder + "/index"))
    checked = seconds(lambda: engine.index_corpus(folder + "/corpus.jsonl", folder + "/index"))
    index = engine.open_index(folder + "/index")
    queries = [f"w{n:x} w{n * 7:x} w{n * 50:x} w0 w1 w5".split() for n in range(1, 101)]
    first = seconds(lambda: engine.search(index, queries[0], 10))
    many = seconds(lambda: [engine.search(index, query, 10) for query in queries]) / len(queries)
    say(
        f"opening: {opened:.4f} s, {checked:.4f} s with a look whether the corpus is still the same; "
        f"first search {first * 1000:.0f} ms, then {many * 1000:.1f} ms each; peak memory {peak():.2f} GiB"
    )


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux


def main():
    settings = parse(Settings, description=__doc__)
    if settings.stage:
        return {"index": index_stage, "open": open_stage}[settings.stage](settings.folder)
    beside_bm25s(settings)
    if settings.documents:
        million(settings)


if __name__ == "__main__":
    run_main(main)
