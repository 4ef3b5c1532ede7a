"""completion_logprobs against the model's own log-softmax, for heads that scale, divide and cap their logits."""

import sys

import pytest
import torch
from test_eval import FAMILIES, random_model

import topr
from conftest import ROOT, shell
from engine import batches


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


@pytest.mark.parametrize("kind", FAMILIES)
def test_behind_one_prompt_or_alone(kind):
    """The same values and gradients to 1e-5 from completions in one row, or a word that this model cannot do it.

    A completion that sees its neighbour, or stands at another position, would be off by far more.
    """
    model = random_model(kind)
    prompt, completions = [1, 5, 6, 7, 8], [[9, 10], [11], [12, 13, 14, 15], [9, 16, 17]]
    results = []
    for rows in ([(prompt, [c]) for c in completions], [(prompt, completions)], [(prompt, completions[:1]), (prompt, completions[1:])]):
        packed = batches.pack(rows)
        model.zero_grad()
        logp = topr.completion_logprobs(model, **packed)[packed["mask"]]
        (logp * torch.arange(1.0, 11)).sum().backward()
        results.append((logp.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    can = batches.can_pack(model)
    assert can == (kind not in ("mistral", "gemma2", "gemma3_text"))  # windows of 6 tokens, and a mask that is added
    for logp, gradients in results[1:]:
        differ = max((a - b).abs().max().item() / max(1, b.abs().max()) for a, b in zip([logp, *gradients], [results[0][0], *results[0][1]]))
        assert differ < 1e-5 if can else differ > 1e-2


def test_who_cannot_share_a_prompt():
    """A state-space model carries the row along; a sliding window counts only while it is shorter than a sequence."""
    from transformers import MambaConfig, MambaForCausalLM

    assert not batches.can_pack(MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2)).eval())
    model = random_model("mistral")
    model.config.sliding_window = 100
    assert batches.can_pack(model, 100) and not batches.can_pack(model, 101)


def test_how_many_share_a_prompt():
    """Long prompts are worth sharing, short ones with long completions are not: pairs that the mask hides cost too."""
    assert batches.completions_per_row(512, 96, 8, 512) == 8 and batches.completions_per_row(16, 2000, 8, 64) == 1
    assert batches.completions_per_row(512, 400, 16, 4096) > 4 and batches.completions_per_row(64, 96, 1, 512) == 1


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
