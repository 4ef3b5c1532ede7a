"""completion_logprobs against the model's own log-softmax, for heads that scale, divide and cap their logits."""

import sys

import pytest
import torch

import topr
from conftest import ROOT, shell
from test_eval import FAMILIES, random_model


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_equals_the_models_own(kind, chunk_tokens):
    """Values and gradients to 1e-4, whether the head runs once or chunk by chunk and again in the backward pass."""
    model = random_model(kind)
    if getattr(model.config, "final_logit_softcapping", "absent") is None:
        model.config.final_logit_softcapping = 2.0
    ids = torch.randint(3, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, 4:9], mask[1, 3:12], mask[2, 1:5] = True, True, True
    coefficient = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    results = []
    for own in (False, True):
        model.zero_grad()
        if own:
            logits = model(ids).logits.float()
            logp = torch.zeros(3, 12)
            logp[:, 1:] = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            logp = torch.where(mask, logp, 0.0)
        else:
            logp = topr.completion_logprobs(model, ids, mask, chunk_tokens=chunk_tokens)
        (logp * coefficient).sum().backward()
        results.append((logp.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert ours.dtype == torch.float32 and (ours - theirs).abs().max() < 1e-4 and (ours[~mask] == 0).all()
    assert len(our_gradients) == len(their_gradients)
    for a, b in zip(our_gradients, their_gradients):
        assert (a - b).abs().max() < 1e-4 * max(1, b.abs().max())


def test_the_first_token_cannot_be_predicted():
    with pytest.raises(ValueError, match="sequence 1"):
        topr.completion_logprobs(random_model("llama"), torch.ones(2, 4, dtype=torch.long),
                                 torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]))


PEAK = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
import topr
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=128256, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                                     num_attention_heads=4, tie_word_embeddings=True))
ids = torch.randint(0, 128256, (2, 1024))
mask = torch.ones(2, 1024, dtype=torch.bool)
mask[:, 0] = False
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "plain":
    logp = model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])
else:
    logp = topr.completion_logprobs(model, ids, mask)
logp.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_logits_are_never_held_whole(tmp_path):
    """[batch, time, vocab] logits: the first cause of out-of-memory reports, ahead of the model itself."""
    script = tmp_path / "peak.py"
    script.write_text(PEAK)
    plain, ours = (int(shell(sys.executable, script, way, cwd=ROOT).stdout.split()[-1]) / 2**20 for way in ("plain", "ours"))
    print(f"\npeak memory over the start: plain {plain:.2f} GiB, completion_logprobs {ours:.2f} GiB, {ours / plain:.2f} of it")
    assert ours < plain / 2  # a sixth of it at 4 x 1,024 tokens
