"""The plain loop is the specification of train.py: same loss, gradient norm and weights."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT, shell, torchrun
from data.rollouts import read_rollouts, write_rollouts
from engine import batches, sampler

OPTIONS = ["--optimizer", "adamw", "--learning-rate", "1e-3", "--schedule", "cosine", "--epochs",
           "2", "--sequences", "12", "--mu", "file"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_train_does_what_the_plain_loop_does(tiny, rollouts, tmp_path, ranks):
    """Packing, dealing out to ranks, and micro-batches must not change what is computed."""
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, [{**row, "reward": row["reward"]} for row in read_rollouts(rollouts)])
    settings = train.Settings(rollouts=str(path), epochs=2, sequences=12)
    model, tokenizer = sampler.load_model(tiny, settings, "cpu")
    data = batches.read_data(settings, model, tokenizer, torch.device("cpu"))
    steps = batches.steps_per_epoch(data) * settings.epochs
    order = [batches.step_units(settings, data, step).ravel().tolist() for step in range(steps)]
    (tmp_path / "order.json").write_text(json.dumps(order))

    run = torchrun if ranks > 1 else lambda _, *command: shell(sys.executable, *command)
    plain = run(ranks, ROOT / "tests/plain_loop.py", tiny, path, tmp_path / "order.json",
                tmp_path / "plain")
    assert plain.returncode == 0, plain.stdout
    ours = run(ranks, ROOT / "train.py", "--model", tiny, "--rollouts", path, "--out",
               tmp_path / "out", *OPTIONS)
    assert ours.returncode == 0, ours.stdout

    expected = json.loads((tmp_path / "plain/log.json").read_text())
    log = [json.loads(line) for line in open(tmp_path / "out/log.jsonl")]
    assert len(log) == len(expected) == steps
    for entry, plain in zip(log, expected):
        for name in ("loss", "gradient_norm"):
            assert entry[name] == pytest.approx(plain[name], abs=1e-5), (entry["step"], name)
    weights = load_file(tmp_path / "out/model.safetensors")
    theirs = load_file(tmp_path / "plain/model.safetensors")
    start = load_file(f"{tiny}/model.safetensors")
    assert max((weights[name] - theirs[name]).abs().max() for name in weights) < 1e-4
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-3
