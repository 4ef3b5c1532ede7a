"""--shard: the same training with a part of every weight on each rank, against DDP on the same two ranks."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import topr
import train
from conftest import ROOT, shell, torchrun
from data import apples
from engine import sampler
from engine.common import Problem

SCRIPT = """
import os, shutil, sys, torch, train, topr
from engine import batches, parallel, run_folder
from engine.common import Problem
from engine.parallel import rank, barrier
tied, rollouts, folder = sys.argv[1:]
topr.completion_logprobs.__kwdefaults__["chunk_tokens"] = 16  # the head in several chunks, run again in the backward pass
own_clip, own_backward, own_passes = torch.nn.utils.clip_grad_norm_, train.backward, batches.micro_batches
gradients, uneven = [], []

def clip(parameters, limit):
    parameters = list(parameters)
    gradients.append([parallel.gather_shards(p.grad).clone() for p in parameters])
    return own_clip(parameters, limit)

def micro_batches(settings, data, units, device):
    mine = own_passes(settings, data, units, device)
    uneven.append(set(parallel.gather(sum(len(batch.rows) > 0 for batch in mine))))
    assert not settings.shard or len(set(parallel.gather(len(mine)))) == 1
    return mine

def run(name, **changes):
    path, out = f"{folder}/{name}.jsonl", f"{folder}/{name}"
    shutil.copyfile(rollouts, path) if rank() == 0 else None
    barrier()
    gradients.clear()
    settings = dict(model=tied, rollouts=path, out=out, mu="start", learning_rate=1e-3, sequences=7, tokens_per_pass=80,
                    checkpoint_every=3, gradient_checkpointing=True)
    train.train(train.Settings(**{**settings, **changes}))
    torch.save(gradients[0], f"{out}/gradient-{rank()}.pt")

def breaks_off(*arguments):
    if len(gradients) == 5:
        raise KeyboardInterrupt
    return own_backward(*arguments)

def broken(name, before, after, **changes):
    train.backward = breaks_off
    try:
        run(name, shard=before, **changes)
    except KeyboardInterrupt:
        if rank() == 0:
            assert run_folder.checkpoints(f"{folder}/{name}")[0].endswith("-00000003")
    train.backward = own_backward
    run(name, shard=after, **changes)

torch.nn.utils.clip_grad_norm_, batches.micro_batches = clip, micro_batches
for optimizer in ("adamw", "adafactor"):
    run(f"{optimizer}-ddp", optimizer=optimizer)
    run(f"{optimizer}-shard", optimizer=optimizer, shard=True)
    broken(f"{optimizer}-resumed", True, True, optimizer=optimizer)
short = dict(optimizer="adafactor", weights="bfloat16", precision="bfloat16", mu="file")
run("bfloat16-shard", **short, shard=True)
broken("bfloat16-resumed", True, True, **short)
broken("ddp-then-shard", False, True, optimizer="adafactor")

def spoiled(parameters, limit):
    parameters = list(parameters)
    if rank() == 1:
        parallel.local_shard(parameters[3].grad)[0] = float("nan")
    return own_clip(parameters, limit)

torch.nn.utils.clip_grad_norm_ = spoiled
try:
    run("spoiled", shard=True)
    raise AssertionError("a NaN on one rank was not seen by the other")
except Problem as problem:
    assert "step 0: " in str(problem) and "gradient norm nan" in str(problem), problem
assert any(len(real) > 1 for real in uneven) and any(0 in real for real in uneven)
"""


@pytest.fixture(scope="module")
def runs(tiny, rollouts, tmp_path_factory):
    """One start of two ranks does everything: their start takes longer than the training."""
    folder = tmp_path_factory.mktemp("shard")
    tokenizer = sampler.load_tokenizer(tiny)
    tokenizer.save_pretrained(folder / "tied")
    model = apples.make_model(tokenizer, 0, width=32, layers=2)
    model.config.tie_word_embeddings = True
    type(model)(model.config).save_pretrained(folder / "tied")
    (folder / "script.py").write_text(SCRIPT)
    result = torchrun(2, folder / "script.py", folder / "tied", rollouts, folder)
    assert result.returncode == 0, result.stdout
    return folder


def furthest(a, b):
    assert len(a) == len(b)
    pairs = [(a[name], b[name]) for name in a] if isinstance(a, dict) else zip(a, b)
    return max((x.float() - y.float()).abs().max().item() for x, y in pairs)


def log_of(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_same_gradient_and_weights_as_ddp(runs, optimizer):
    """Ranks with different numbers of micro-batches, one with none, tied embeddings, chunks of the head run again."""
    ddp, shard = runs / f"{optimizer}-ddp", runs / f"{optimizer}-shard"
    for number in range(2):
        distance = furthest(torch.load(ddp / "gradient-0.pt"), torch.load(shard / f"gradient-{number}.pt"))
        print(f"{optimizer}: gradient {distance:.1e}")
        assert distance < 1e-5
    distance = furthest(load_file(ddp / "model.safetensors"), load_file(shard / "model.safetensors"))
    print(f"{optimizer}: weights {distance:.1e}")
    assert distance < 1e-4
    assert furthest(load_file(runs / "tied/model.safetensors"), load_file(shard / "model.safetensors")) > 1e-3
    for entry, other in zip(log_of(ddp), log_of(shard), strict=True):
        for name in ("loss", "gradient_norm", "d_min", "d_mean", "negative_weight", "sequences"):
            assert other[name] == pytest.approx(entry[name], abs=2e-4), name
    (mu,), (other_mu,) = (list(runs.glob(f"{optimizer}-{kind}.jsonl.mu-*")) for kind in ("ddp", "shard"))
    assert furthest(load_file(mu), load_file(other_mu)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor", "bfloat16"])
def test_it_goes_on_exactly_from_a_checkpoint(runs, name):
    whole, resumed = runs / f"{name}-shard", runs / f"{name}-resumed"
    assert furthest(load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")) == 0
    assert [entry["loss"] for entry in log_of(whole)] == [entry["loss"] for entry in log_of(resumed)]


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint_of_ddp(runs):
    ddp, resumed = (load_file(runs / name / "model.safetensors") for name in ("adafactor-ddp", "ddp-then-shard"))
    assert furthest(ddp, resumed) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor-shard", "bfloat16-shard"])
def test_one_process_opens_what_was_saved(runs, name):
    model = AutoModelForCausalLM.from_pretrained(runs / name)
    assert model.dtype == (torch.bfloat16 if name == "bfloat16-shard" else torch.float32)
    weights = load_file(runs / name / "model.safetensors")
    assert len(weights) == len(list(model.parameters()))  # the tied one once
    assert furthest(dict(model.named_parameters()), weights) == 0
    start = load_file(runs / "tied/model.safetensors")
    assert furthest(start, weights) > 1e-3
    ids = torch.arange(12).reshape(2, 6)
    assert topr.completion_logprobs(model, ids, ids % 6 > 1).isfinite().all()
    assert sampler.load_tokenizer(str(runs / name)).eos_token_id is not None
    assert all(math.isfinite(entry["gradient_norm"]) for entry in log_of(runs / name))


def test_what_it_cannot_do_is_one_line(tiny, rollouts, tmp_path, monkeypatch):
    command = [sys.executable, ROOT / "train.py", "--model", tiny, "--rollouts", rollouts, "--out", tmp_path / "out", "--shard"]
    result = shell(*command)
    assert result.returncode == 2 and "needs more than one process" in result.stdout and len(result.stdout.splitlines()) == 1
    monkeypatch.setattr(train, "world", lambda: 2)
    with pytest.raises(Problem, match="--eval-every 0"):
        train.check_settings(train.Settings(shard=True, task="apples", eval_every=5))
