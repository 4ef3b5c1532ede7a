"""Other systems: without Unix's own modules no script started; a CUDA build without a GPU."""

import sys

import pytest
import torch

from conftest import ROOT, shell
from engine import parallel

HIDDEN = """
import builtins, runpy, sys
root, script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
own_import = builtins.__import__

def hidden(name, globals=None, *rest, **more):  # other packages know their system
    file = (globals or {}).get("__file__", "")
    ours = file.startswith(root + "/") and "site-packages" not in file  # root may hold a .venv
    if name in ("fcntl", "resource") and ours:
        raise ImportError(name)
    return own_import(name, globals, *rest, **more)

builtins.__import__ = hidden
runpy.run_path(script, run_name="__main__")
"""
SCRIPTS = ["train.py", "eval.py", "verifier.py", "search.py"]


@pytest.fixture
def without_unix(tmp_path):
    (tmp_path / "hidden.py").write_text(HIDDEN)
    return lambda script, *options: shell(
        sys.executable, tmp_path / "hidden.py", ROOT, ROOT / script, *options
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_starts(without_unix, script):
    result = without_unix(script, "--help")
    assert result.returncode == 0 and "--model" in result.stdout, result.stdout


def test_training_and_its_lock_work(without_unix, tiny, rollouts, tmp_path):
    out = tmp_path / "out"
    result = without_unix(
        "train.py",
        "--model",
        tiny,
        "--rollouts",
        rollouts,
        "--out",
        out,
        "--optimizer",
        "adamw",
        "--learning-rate",
        "1e-3",
        "--sequences",
        20,
    )
    assert result.returncode == 0, result.stdout
    assert (out / "model.safetensors").exists() and not list(out.glob("checkpoint-*"))


def test_a_build_for_cuda_without_a_gpu_runs_on_the_cpu(monkeypatch):
    """pip installs that build by default; it names cuda as its accelerator, GPU or not."""

    def of_a_cuda_build(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", of_a_cuda_build)
    assert parallel.start_ranks() == torch.device("cpu")
