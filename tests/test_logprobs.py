"""completion_logprobs against the model's own log-softmax, for heads that scale, divide and cap their
logits; several completions behind one prompt; the peak memory."""

import sys

import pytest
import torch
from test_eval import FAMILIES, random_model
from transformers import AutoConfig, AutoModelForCausalLM

import topr
import train
from conftest import shell
from engine import optim
from engine.batches import completions_per_row
from engine.packing import LogProbs, abilities, pack


def gradients(model, logp):
    """The values, and the gradients of a sum in which each of them counts differently."""
    model.zero_grad()
    (logp * torch.arange(1.0, len(logp) + 1)).sum().backward()
    return [logp.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def distance(results, others):
    return max((a - b).abs().max().item() / max(1, b.abs().max())
               for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("chunk", [64, 4])
def test_equals_the_models_own(kind, chunk, monkeypatch):
    """Whether the head runs once, or chunk by chunk and again in the backward pass."""
    monkeypatch.setattr(topr, "max", lambda *_: chunk, raising=False)  # of tokens
    model = random_model(kind)
    if getattr(model.config, "final_logit_softcapping", "absent") is None:
        model.config.final_logit_softcapping = 2.0
    ids = torch.randint(3, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, 4:9], mask[1, 3:12], mask[2, 1:5] = True, True, True
    logp = topr.completion_logprobs(model, ids, mask)
    assert logp.dtype == torch.float32 and not logp[~mask].any()
    plain = model(ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert distance(gradients(model, logp[mask]), gradients(model, plain[mask[:, 1:]])) < 1e-4


def test_left_padding():
    model = random_model("llama")
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) > 3).expand(2, -1)
    pad = torch.nn.functional.pad
    padded = topr.completion_logprobs(model, pad(ids, (3, 0), value=5), pad(mask, (3, 0)),
                                      attention_mask=pad(torch.ones_like(ids), (3, 0)))
    plain = topr.completion_logprobs(model, ids, mask)
    assert (padded[:, 3:] - plain).abs().max() < 1e-5


def test_the_first_token_cannot_be_predicted():
    with pytest.raises(ValueError, match="sequence 1"):
        topr.completion_logprobs(random_model("llama"), torch.ones(2, 4, dtype=torch.long),
                                 torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]))


@pytest.mark.parametrize("kind", FAMILIES)
def test_behind_one_prompt_or_alone(kind):
    """A completion that sees its neighbour, or stands at another position, is off by far more; it
    is so where a window of 6 tokens counts the neighbours."""
    model = random_model(kind)
    prompt, completions = [1, 5, 6, 7, 8], [[9, 10], [11], [12, 13, 14, 15], [9, 16, 17]]
    alone, *others = [
        gradients(model, topr.completion_logprobs(model, **packed)[packed["mask"]])
        for packed in map(pack, ([(prompt, [c]) for c in completions], [(prompt, completions)],
                                 [(prompt, completions[:1]), (prompt, completions[1:])]))]
    can = kind not in ("mistral", "gemma2", "gemma3_text")
    assert abilities(model, 9, "float32", torch.float32) == (True, can)
    if not can:
        model.config.sliding_window = 9
        assert abilities(model, 9, "float32", torch.float32) == (True, kind != "gemma2")
    for other in others:
        assert distance(other, alone) < 1e-5 if can else distance(other, alone) > 1e-2


@pytest.mark.parametrize("lengths, width, most, count", [
    ((512, 96), 512, 8, 8), ((16, 2000), 64, 8, 1), ((64, 96), 512, 1, 1)])
def test_how_many_share_a_prompt(lengths, width, most, count):
    """Long prompts are worth sharing, short ones with long completions are not: pairs that the mask
    hides cost too."""
    assert completions_per_row(*lengths, most, width) == count


SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)
BOTH = (torch.float32, torch.bfloat16)
ODD = {  # kind: its sizes, where its head is known, whether it packs
    "llama4_text": (dict(intermediate_size_mlp=64, head_dim=8, num_local_experts=2,
                         num_experts_per_tok=1, attention_chunk_size=64), (), False),
    "lfm2": (dict(layer_types=["conv", "full_attention"]), BOTH, False),
    "jamba": (dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                   expert_layer_offset=1, num_experts=2, use_mamba_kernels=False,
                   mamba_d_state=4), BOTH, False),
    "gemma3": (dict(text_config={**SIZES, "vocab_size": 300, "head_dim": 8}, vision_config=dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        image_size=32, patch_size=16), mm_tokens_per_image=4, image_token_index=290), BOTH, True),
    "opt": (dict(ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64), BOTH, True),
    "gpt2": (dict(n_embd=32, n_layer=2, n_head=4), BOTH, True),
    "mamba": ({}, BOTH[:1], False),
    "falcon_h1": (dict(lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
                       mamba_d_state=8, mamba_chunk_size=8), (), False)}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("dtype", BOTH)
def test_families_with_oddities(kind, dtype):
    """Llama 4 names itself as its decoder, Falcon-H1 multiplies its logits, Mamba's hidden states are
    float32 where its head is bfloat16: these take the plain way. LFM2, Jamba and Mamba leak between
    packed completions, in bfloat16 too; Gemma 3's vision tower gets no gradient; layers of OPT and
    GPT-2 drop out when they are checkpointed, and pi/mu would be noise."""
    sizes, known_in, packs = ODD[kind]
    known = dtype in known_in
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **sizes}))
    model = model.to(dtype).eval()
    optim.prepare_model(train.Settings(gradient_checkpointing=True), model)
    assert abilities(model, 20, "float32", dtype) == (known, packs)
    ids = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))
    packed, mask = {"ids": ids, "mask": (torch.arange(10) > 3).expand(2, -1)}, torch.ones(2, 6) > 0
    policy = LogProbs(model, head_is_known=known)
    logp = policy(packed, mask)
    plain = topr.token_logprobs(model(input_ids=ids).logits, ids)[:, 4:]
    assert (logp - plain).abs().max() < (1e-5 if dtype == torch.float32 else 0.1)
    assert policy(packed, mask).equal(logp)  # nothing is dropped at random
    logp.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert any(not p.requires_grad for p in model.parameters()) == (kind == "gemma3")


PEAK = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
import topr
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=128256, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
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
    plain, ours = (int(shell(sys.executable, script, way).stdout.split()[-1]) / 2**20
                   for way in ("plain", "ours"))
    print(f"peak memory over the start in GiB: plain {plain:.2f}, completion_logprobs {ours:.2f}")
    assert ours < plain / 2  # a sixth of it at 4 x 1,024 tokens
