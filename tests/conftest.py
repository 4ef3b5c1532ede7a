import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are tiny; threads only fight
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: run by `python -m pytest -q -m slow` alone")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def shell(*command, cwd=None, **environment):
    """Runs a command in the repository; its output is in .stdout, errors included."""
    return subprocess.run([str(part) for part in command], cwd=cwd or ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", **environment})


def in_process(script, *options):
    """shell(sys.executable, script, *options) without the seconds in which a new process imports torch."""
    output, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        patch.setattr(sys, "argv", [str(script), *map(str, options)])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return SimpleNamespace(returncode=code, stdout=output.getvalue())


def torchrun(ranks, *command, **environment):
    import torch

    if 0 < torch.cuda.device_count() < ranks:  # NCCL refuses two ranks on one card
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return shell(sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", ranks, *command, **environment)


def eval_settings(**changes):
    import eval as evaluation

    return evaluation.Settings(**changes)


def apples_questions(tokenizer, settings, count, split="test"):
    from data import load_task
    from engine import tasks

    return tasks.load_questions(load_task("apples"), split, count, settings.seed, tokenizer, settings)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory with the embedded task's tokenizer and a two-layer model that has seen a few demonstrations."""
    import train
    from data import apples, load_task
    from engine.rollouts import write_rollouts

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = apples.make_tokenizer(apples.vocabulary())
    tokenizer.save_pretrained(folder / "random")
    apples.make_model(tokenizer, seed=3, width=32, layers=2).save_pretrained(folder / "random")
    write_rollouts(folder / "demonstrations.jsonl", apples.demonstrations(960, 3))
    train.train(train.Settings(model=str(folder / "random"), rollouts=str(folder / "demonstrations.jsonl"), loss="sft",
                               out=str(folder / "policy"), optimizer="adamw", learning_rate=1e-2, sequences=32))
    return str(folder / "policy")


@pytest.fixture(scope="session")
def rollouts(tiny, tmp_path_factory):
    """A rollout file that the tiny policy wrote: 10 questions, 5 completions each, some rewards set to +1."""
    from engine.rollouts import write_rollouts
    import eval as evaluation

    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    settings = eval_settings(model=tiny, samples=5, max_new_tokens=30)
    model, tokenizer = evaluation.load_model(tiny, settings, "cpu")
    rows = evaluation.sample_rollouts(model, tokenizer, apples_questions(tokenizer, settings, 10, "train"),
                                   lambda question, text: (text[-3:], -1.0), settings, str(path))
    for number, row in enumerate(rows):
        row["reward"] = 1.0 if number % 3 == 0 else -1.0
    write_rollouts(path, rows)
    return str(path)
