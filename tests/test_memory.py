"""What optim.memory counts, against what is really held; and the script that measures it on a GPU."""

import sys

import pytest
import torch
from torch.autograd.profiler import profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import topr
import train
from conftest import ROOT, shell, torchrun
from engine import optim


def held(run):
    """The most bytes that were allocated at once while it ran, beyond those from before."""
    with profile(profile_memory=True, use_kineto=True) as profiler:
        run()
    now, most = 0, 0
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("weights, precision, optimizer, checkpointing", [
    ("float32", "float32", "adafactor", False), ("float32", "bfloat16", "adamw", True), ("bfloat16", "bfloat16", "adafactor", True)])
def test_the_count_is_what_is_held(weights, precision, optimizer, checkpointing, monkeypatch):
    """Weights, gradients and optimizer state to the byte; the passes and the update within 15%."""
    monkeypatch.setitem(topr.completion_logprobs.__kwdefaults__, "chunk_tokens", 256)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, hidden_size=128, num_hidden_layers=3, num_attention_heads=8,
                                         num_key_value_heads=2, intermediate_size=352)).to(getattr(torch, weights)).eval()
    settings = train.Settings(weights=weights, precision=precision, optimizer=optimizer, gradient_checkpointing=checkpointing)
    if checkpointing:
        optim.checkpoint_layers(model)
    policy, steps = train.LogProbs(model), optim.make_optimizer(settings, model)
    ids = torch.randint(1024, (8, 128))
    mask = (torch.arange(128) > 32).expand(8, -1)

    def passes():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logp = policy(mask, {"ids": ids, "mask": mask})
        logp.mean().backward()

    passes()
    optim.update(settings, steps, 0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # as under DDP, where they stay
    counted = optim.memory(settings, model, ids.numel())
    size = lambda tensors: sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert counted["weights"] == size(model.parameters())
    assert counted["gradients"] == size(p.grad for p in model.parameters())
    assert counted["optimizer"] == size(v for state in steps.state.values() for v in state.values() if torch.is_tensor(v) and v.dim())
    counted["logits"] -= 12 * 1024 * (1024 - 256)  # the chunk is smaller here
    expected = counted["activations"] + max(counted["a layer again"], counted["logits"] + counted["copies"])
    measured = held(passes)
    print(f"passes: {measured / 2**20:.2f} MiB measured, {expected / 2**20:.2f} counted")
    assert expected == pytest.approx(measured, rel=0.15)
    measured = held(lambda: optim.update(settings, steps, 1))
    print(f"update: {measured / 2**20:.2f} MiB measured, {counted['update'] / 2**20:.2f} counted")
    if optimizer == "adafactor":  # AdamW goes through all weights at once on a GPU, and one by one here
        assert counted["update"] == pytest.approx(measured, rel=0.15)


def test_any_model_is_counted_and_shards_divide():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100))
    whole = optim.memory(train.Settings(), model, 1000)
    assert whole["weights"] == 4 * sum(p.numel() for p in model.parameters()) and whole["at most"] > whole["weights"]
    shards = optim.memory(train.Settings(shard=True), model, 1000, ranks=4)
    assert shards["weights"] == whole["weights"] // 4 and shards["activations"] == whole["activations"]


def test_the_table_of_the_documents():
    result = shell(sys.executable, ROOT / "tests/gpu.py", "--table")
    assert result.returncode == 0, result.stdout
    written = [line.strip() for line in (ROOT / "docs/performance.md").read_text().splitlines()]
    for line in result.stdout.strip().splitlines():
        assert line in written, line


@pytest.mark.parametrize("options", [[], ["--shard"]])
def test_the_gpu_script_runs_at_tiny_size(options):
    result = torchrun(2 if options else 1, ROOT / "tests/gpu.py", "--shape", "tiny", "--steps", 2, "--sequences", 8, "--longest", 64, *options)
    assert result.returncode == 0 and "peak memory measured" in result.stdout and "tokens a second" in result.stdout, result.stdout
