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
os.environ["PYTHON_COLORS"] = "0"  # FORCE_COLOR, which many CIs set, colours --help from 3.14 on
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: run by `python -m pytest -q -m slow` alone")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def shell(*command, cwd=ROOT, **environment):
    """Runs a command in the repository; its output is in .stdout, errors included."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", **environment}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        text=True,
        timeout=300,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )


def in_process(script, *options):
    """shell(sys.executable, script, *options) without the seconds in which a new process imports
    torch."""
    output, code = io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
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
    return shell(
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        ranks,
        *command,
        **environment,
    )


def eval_settings(**changes):
    import eval as evaluation

    return evaluation.Settings(**changes)


def apples_questions(tokenizer, settings, count, split="test"):
    from data import load_task
    from engine import tasks

    return tasks.load_questions(load_task("apples"), split, count, tokenizer, settings)


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(f"{folder}/model.safetensors")


def furthest(a, b):
    """The largest difference of two dicts of tensors, or of the weights in two folders."""
    a, b = (one if isinstance(one, dict) else weights_of(one) for one in (a, b))
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def train_settings(model, rollouts, out, **changes):
    """A run of a few steps that moves the weights."""
    import train

    return train.Settings(
        model=str(model),
        rollouts=str(rollouts),
        out=str(out),
        **{"optimizer": "adamw", "learning_rate": 1e-3, "sequences": 12, **changes},
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory with the embedded task's tokenizer and a two-layer model that has seen a few
    demonstrations."""
    import train
    from data import apples

    folder = tmp_path_factory.mktemp("tiny")
    apples.write_beginner(folder, apples, 960, 3, width=32, layers=2)
    train.train(
        train_settings(
            folder / "random",
            folder / "demonstrations.jsonl",
            folder / "policy",
            loss="sft",
            learning_rate=1e-2,
            sequences=32,
        )
    )
    return str(folder / "policy")


@pytest.fixture(scope="session")
def rollouts(tiny, tmp_path_factory):
    """A rollout file that the tiny policy wrote: 10 questions, 5 completions each, a third of the
    rewards set to +1."""
    from engine.rollouts import read_rollouts, write_rollouts

    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    result = in_process(
        ROOT / "eval.py",
        "--model",
        tiny,
        "--task",
        "apples",
        "--split",
        "train",
        "--questions",
        10,
        "--samples",
        5,
        "--max-new-tokens",
        30,
        "--out",
        path,
    )
    assert result.returncode == 0, result.stdout
    rows = read_rollouts(path)
    for number, row in enumerate(rows):
        row["reward"] = 1.0 if number % 3 == 0 else -1.0
    write_rollouts(path, rows)
    return str(path)
