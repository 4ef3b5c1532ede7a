"""docs/recipes/loop.py is the specification of train.py: same loss, norm and weights."""

import re

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT, in_process, torchrun
from engine import batches, run_folder, sampler
from engine.rollouts import read_rollouts, write_rollouts

OPTIONS = ["--optimizer", "adamw", "--learning-rate", "1e-3", "--sequences", 64, "--mu", "start"]
LOOP = ROOT / "docs/recipes/loop.py"


def test_the_loop_is_short():
    assert len(LOOP.read_text().splitlines()) <= 72


@pytest.mark.parametrize("ranks", [1, 2])
def test_train_does_what_the_plain_loop_does(tiny, rollouts, tmp_path, ranks):
    """Packing, dealing out to ranks, and micro-batches must not change what is computed."""
    path, ordered = tmp_path / "rollouts.jsonl", tmp_path / "ordered.jsonl"
    write_rollouts(path, read_rollouts(rollouts) * 5)
    settings = train.Settings(rollouts=str(path))
    model, tokenizer = sampler.load_model(tiny, settings, "cpu")
    data = batches.read_data(settings, model, tokenizer)
    steps = data.steps
    order = [row for step in range(steps) for row in batches.step_units(settings, data, step).flat]
    rows = read_rollouts(path)
    # as the loop does
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    placed = dict(zip(shuffled.tolist(), order, strict=True))
    write_rollouts(ordered, [rows[placed[place]] for place in range(len(rows))])

    def run(*command):
        result = torchrun(ranks, *command) if ranks > 1 else in_process(*command)
        assert result.returncode == 0, result.stdout
        return result.stdout

    printed = run(LOOP, tiny, ordered, tmp_path / "plain", "1e-3")
    run(ROOT / "train.py", "--model", tiny, "--rollouts", path, "--out", tmp_path / "out", *OPTIONS)
    expected = [
        list(map(float, numbers))
        for numbers in re.findall(r"step \d+ loss (\S+) norm (\S+)", printed)
    ]
    log = run_folder.read_log(tmp_path / "out")
    assert len(log) == len(expected) == steps == 4
    for entry, (loss, norm) in zip(log, expected):
        assert entry["loss"] == pytest.approx(loss, abs=1e-5)
        assert entry["gradient_norm"] == pytest.approx(norm, abs=1e-5)
    start, ours, plain = (
        load_file(f"{folder}/model.safetensors")
        for folder in (tiny, tmp_path / "out", tmp_path / "plain")
    )
    assert max((ours[name] - plain[name]).abs().max() for name in ours) < 1e-4
    assert max((ours[name] - start[name]).abs().max() for name in ours) > 1e-3
