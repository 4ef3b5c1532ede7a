"""--shard: the same training with a part of every weight on each rank, against DDP on the same two
ranks."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import topr
from conftest import furthest, torchrun, weights_of
from data import apples
from engine import run_folder, sampler
from engine.rollouts import read_rollouts, write_rollouts

SCRIPT = """
import shutil, sys, torch, train, topr
from engine import batches, parallel, run_folder
from engine.common import Problem
from engine.parallel import rank, barrier
tied, rollouts, folder = sys.argv[1:]
own_logprobs = topr.completion_logprobs

def in_chunks(model, *given, **more):  # of 16 tokens: the head runs again in the backward pass
    vocabulary, model.config.vocab_size = model.config.vocab_size, 2**22
    try:
        return own_logprobs(model, *given, **more)
    finally:
        model.config.vocab_size = vocabulary

topr.completion_logprobs = in_chunks
own_clip, own_backward, own_passes = (
    torch.nn.utils.clip_grad_norm_, train.backward, batches.micro_batches)
steps, uneven = [], []

def micro_batches(settings, data, units, device):
    mine = own_passes(settings, data, units, device)
    uneven.append(set(parallel.gather(sum(len(batch.rows) > 0 for batch in mine))))
    assert not settings.shard or len(set(parallel.gather(len(mine)))) == 1
    return mine

def backward(*arguments):
    steps.append(1)
    return own_backward(*arguments)

def breaks_off(*arguments):
    if len(steps) == 5:
        raise KeyboardInterrupt
    return backward(*arguments)

def run(name, source="rollouts", **changes):
    path, out = f"{folder}/{name}.jsonl", f"{folder}/{name}"
    shutil.copyfile(f"{folder}/{source}.jsonl", path) if rank() == 0 else None
    barrier()
    steps.clear()
    settings = dict(model=tied, rollouts=path, out=out, mu="start", learning_rate=1e-3,
                    sequences=7, tokens_per_pass=80, checkpoint_every=3,
                    gradient_checkpointing=True)
    train.train(train.Settings(**{**settings, **changes}))

def broken(name, before, after, **changes):
    train.backward = breaks_off
    try:
        run(name, shard=before, **changes)
    except KeyboardInterrupt:
        if rank() == 0:
            assert run_folder.checkpoints(f"{folder}/{name}")[0].endswith("-00000003")
    train.backward = backward
    run(name, shard=after, **changes)

train.backward, batches.micro_batches = backward, micro_batches
for optimizer in ("adamw", "adafactor"):
    run(f"{optimizer}-ddp", optimizer=optimizer)
    run(f"{optimizer}-shard", optimizer=optimizer, shard=True)
    broken(f"{optimizer}-resumed", True, True, optimizer=optimizer)
for kind in ("ddp", "shard"):  # most steps, and most ranks, have nothing to do
    run(f"sparse-{kind}", "sparse", optimizer="adafactor", loss="sft", shard=kind == "shard")
short = dict(optimizer="adafactor", weights="bfloat16", precision="bfloat16", mu="file")
run("bfloat16-shard", **short, shard=True)
broken("bfloat16-resumed", True, True, **short)
broken("then-shard", False, True, optimizer="adafactor")

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
    assert "step 0: the gradient norm is nan" in str(problem), problem
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
    rows = read_rollouts(rollouts)
    write_rollouts(folder / "rollouts.jsonl", rows)
    write_rollouts(
        folder / "sparse.jsonl",
        [{**row, "reward": 1.0 if number == 7 else -1.0} for number, row in enumerate(rows)],
    )
    (folder / "script.py").write_text(SCRIPT)
    result = torchrun(2, folder / "script.py", folder / "tied", rollouts, folder)
    assert result.returncode == 0, result.stdout
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor", "sparse"])
def test_the_same_weights_as_ddp(runs, name):
    """Ranks with different numbers of micro-batches, one with none, tied embeddings, chunks of the
    head run again."""
    ddp, shard = runs / f"{name}-ddp", runs / f"{name}-shard"
    assert furthest(ddp, shard) < 1e-4 and furthest(runs / "tied", shard) > 1e-3
    for entry, other in zip(*map(run_folder.read_log, (ddp, shard)), strict=True):
        for key in entry.keys() - {"seconds"}:
            assert other[key] == pytest.approx(entry[key], abs=2e-4), key
    if name != "sparse":  # positives only needs no mu
        mu, other = (np.load(path) for path in runs.glob(f"{name}-[ds]*.jsonl.mu-*"))
        assert abs(mu - other).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "whole, resumed, tolerance",
    [
        ("adamw-shard", "adamw-resumed", 0),
        ("adafactor-shard", "adafactor-resumed", 0),
        ("bfloat16-shard", "bfloat16-resumed", 0),
        ("adafactor-ddp", "then-shard", 1e-4),
    ],
)
def test_it_goes_on_from_a_checkpoint(runs, whole, resumed, tolerance):
    """Exactly; and from a checkpoint of DDP, too."""
    assert furthest(runs / whole, runs / resumed) <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor-shard", "bfloat16-shard"])
def test_one_process_opens_what_was_saved(runs, name):
    model, weights = AutoModelForCausalLM.from_pretrained(runs / name), weights_of(runs / name)
    assert model.dtype == (torch.bfloat16 if name == "bfloat16-shard" else torch.float32)
    assert furthest(dict(model.named_parameters()), weights) == 0  # the tied one once
    assert furthest(runs / "tied", weights) > 1e-3
    ids = torch.arange(12).reshape(2, 6)
    assert topr.completion_logprobs(model, ids, ids % 6 > 1).isfinite().all()
    assert sampler.load_tokenizer(str(runs / name)).eos_token_id is not None
    log = run_folder.read_log(runs / name)
    assert all(math.isfinite(entry["gradient_norm"]) for entry in log)
