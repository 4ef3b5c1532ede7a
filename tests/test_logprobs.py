"""completion_logprobs against the model's own log-softmax, for heads that scale, divide and cap their logits."""

import sys

import pytest
import torch
from test_eval import FAMILIES, random_model

import topr
import train
from conftest import ROOT, shell
from engine import batches, optim


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
import train
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


@pytest.mark.slow
def test_the_logits_are_never_held_whole(tmp_path):
    """[batch, time, vocab] logits: the first cause of out-of-memory reports, ahead of the model itself."""
    script = tmp_path / "peak.py"
    script.write_text(PEAK)
    plain, ours = (int(shell(sys.executable, script, way, cwd=ROOT).stdout.split()[-1]) / 2**20 for way in ("plain", "ours"))
    print(f"\npeak memory over the start: plain {plain:.2f} GiB, completion_logprobs {ours:.2f} GiB, {ours / plain:.2f} of it")
    assert ours < plain / 2  # a sixth of it at 4 x 1,024 tokens


def tiny_model(kind):
    """A random model of a family with an oddity of its own."""
    import transformers

    size = dict(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    if kind == "llama4":
        return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
            **size, intermediate_size_mlp=64, head_dim=8, num_local_experts=2,
            num_experts_per_tok=1, attention_chunk_size=64))
    if kind == "lfm2":
        return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(
            **size, layer_types=["conv", "full_attention"]))
    if kind == "jamba":
        return transformers.JambaForCausalLM(transformers.JambaConfig(
            **size, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
            expert_layer_offset=1, num_experts=2, use_mamba_kernels=False, mamba_d_state=4))
    if kind == "gemma3":
        text = {**size, "vocab_size": 300, "head_dim": 8}
        vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                      num_attention_heads=4, image_size=32, patch_size=16)
        return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=290))
    return transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=0))


@pytest.mark.parametrize("kind", ["llama4", "lfm2", "jamba", "gemma3", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_with_oddities(kind, dtype):
    """Llama 4 names itself as its decoder, LFM2 and Jamba leak between packed completions (in
    bfloat16 too), Gemma 3's vision tower gets no gradient, OPT's layers drop out when they are
    checkpointed."""
    model = tiny_model(kind).to(dtype).eval()
    optim.prepare_model(train.Settings(gradient_checkpointing=True), model)
    ids = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(10) > 3).expand(2, -1)
    logp = topr.completion_logprobs(model, ids, mask, chunk_tokens=5)
    plain = topr.token_logprobs(model(input_ids=ids).logits, ids)
    assert ((logp - plain) * mask).abs().max() < (1e-5 if dtype == torch.float32 else 0.1)
    again = topr.completion_logprobs(model, ids, mask, chunk_tokens=5)
    assert again.equal(logp)  # nothing is dropped at random
    logp.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    frozen = sum(not p.requires_grad for p in model.parameters())
    assert (frozen > 0) == (kind == "gemma3")
    assert batches.can_pack(model, 20, dtype) == (kind not in ("lfm2", "jamba"))
