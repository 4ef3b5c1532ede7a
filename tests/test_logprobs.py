"""completion_logprobs against the model's own log-softmax, for heads that scale, divide and cap
their logits; several completions behind one prompt; the peak memory."""

import sys

import pytest
import torch

import topr
import train
from conftest import shell
from engine import optim
from engine.batches import completions_per_row
from engine.packing import LogProbs, abilities, pack
from test_models import ATTENTION, FAMILIES, random_model


def gradients(model, logp):
    """The values, and the gradients of a sum in which each of them counts differently."""
    model.zero_grad()
    (logp * torch.arange(1.0, len(logp) + 1)).sum().backward()
    return [logp.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def distance(results, others):
    return max(
        (a - b).abs().max().item() / max(1, b.abs().max())
        for a, b in zip(results, others, strict=True)
    )


def some_ids(rows, time):
    return torch.randint(3, 61, (rows, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("chunk", [64, 4])
def test_equals_the_models_own(kind, chunk):
    """Whether the head runs once, or chunk by chunk and again in the backward pass."""
    model, ids = random_model(kind), some_ids(3, 12)
    if getattr(model.config, "final_logit_softcapping", "absent") is None:
        model.config.final_logit_softcapping = 2.0
    model.config.vocab_size = 2**26 // chunk  # of tokens
    mask = torch.arange(12) >= torch.tensor([4, 3, 1])[:, None]
    logp = topr.completion_logprobs(model, ids, mask)
    assert logp.dtype == torch.float32 and not logp[~mask].any()
    plain = topr.token_logprobs(model(ids).logits, ids)
    assert distance(gradients(model, logp[mask]), gradients(model, plain[mask])) < 1e-4


def test_left_padding():
    model, ids = random_model("llama"), some_ids(2, 9)
    mask, pad = (torch.arange(9) > 3).expand(2, -1), torch.nn.functional.pad
    padded = topr.completion_logprobs(
        model,
        pad(ids, (3, 0), value=5),
        pad(mask, (3, 0)),
        attention_mask=pad(torch.ones_like(ids), (3, 0)),
    )
    plain = topr.completion_logprobs(model, ids, mask)
    assert (padded[:, 3:] - plain).abs().max() < 1e-5


def some_mask(completions):
    lengths = torch.tensor(list(map(len, completions)))
    return torch.arange(lengths.max()) < lengths[:, None]


@pytest.mark.parametrize("kind", FAMILIES)
def test_behind_one_prompt_or_alone(kind):
    """A completion that sees its neighbour, or stands at another position, is off by far more; it
    does where a model keeps a state, or counts its neighbours in a window of 6 tokens."""
    model = random_model(kind)
    prompt, completions = [1, 5, 6, 7, 8], [[9, 10], [11], [12, 13, 14, 15], [9, 16, 17]]
    policy = LogProbs(model)
    alone, *others = [
        gradients(model, policy(*pack(rows, "cpu"))[some_mask(completions)])
        for rows in (
            [(prompt, [c]) for c in completions],
            [(prompt, completions)],
            [(prompt, completions[:1]), (prompt, completions[1:])],
        )
    ]
    has_window = kind in ("mistral", "gemma2", "gemma3_text")
    can = not has_window and kind not in ("falcon_h1", "granitemoehybrid", "qwen3_next")
    assert abilities(policy, 9) == (True, can)
    if has_window:
        model.config.sliding_window = 9
        is_sdpa = model.config._attn_implementation == "sdpa"  # gemma2's is in older versions
        assert abilities(policy, 9) == (True, is_sdpa) and (is_sdpa or kind == "gemma2")
    for other in others:
        assert distance(other, alone) < 1e-5 if can else distance(other, alone) > 1e-2


@pytest.mark.parametrize(
    "lengths, width, most, count",
    [((512, 96), 512, 8, 8), ((16, 2000), 64, 8, 1), ((64, 96), 512, 1, 1)],
)
def test_how_many_share_a_prompt(lengths, width, most, count):
    """Long prompts are worth sharing, short ones with long completions are not: pairs that the mask
    hides cost too."""
    assert completions_per_row(*lengths, most, width) == count


BOTH = (torch.float32, torch.bfloat16)
ODD = {  # kind: its sizes, where its head is known, whether it packs
    "llama4_text": (
        dict(
            **ATTENTION,
            intermediate_size_mlp=64,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            attention_chunk_size=64,
        ),
        (),
        False,
    ),
    "lfm2": (dict(**ATTENTION, layer_types=["conv", "full_attention"]), BOTH, False),
    "gemma3": (
        dict(
            text_config={
                **ATTENTION,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "vocab_size": 300,
                "head_dim": 8,
            },
            vision_config=dict(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                image_size=32,
                patch_size=16,
            ),
            mm_tokens_per_image=4,
            image_token_index=290,
        ),
        BOTH,
        True,
    ),
    "opt": ({}, BOTH, True),
    "gpt2": ({}, BOTH, True),
    "mamba": ({}, BOTH[:1], False),
    "falcon_h1": (dict(lm_head_multiplier=0.3), (), False),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("dtype", BOTH)
def test_families_with_oddities(kind, dtype):
    """Llama 4 names itself as its decoder, Falcon-H1 multiplies its logits, Mamba's hidden states
    are float32 where its head is bfloat16: these take the plain way. LFM2 and Mamba leak between
    packed completions, in bfloat16 too; Gemma 3's vision tower gets no gradient; layers of OPT and
    GPT-2 drop out when they are checkpointed, and pi/mu would be noise."""
    sizes, known_in, packs = ODD[kind]
    model = random_model(kind, **sizes).to(dtype)
    optim.prepare_model(train.Settings(gradient_checkpointing=True), model)
    policy = LogProbs(model)
    policy.head_is_known = dtype in known_in
    assert abilities(policy, 20) == (dtype in known_in, packs)
    ids, mask = some_ids(2, 10), torch.ones(2, 6) > 0
    packed = {"ids": ids, "mask": (torch.arange(10) > 3).expand(2, -1)}
    logp = policy(packed, mask)
    plain = topr.token_logprobs(model(input_ids=ids).logits, ids)[:, 4:]
    assert (logp - plain).abs().max() < (1e-5 if dtype == torch.float32 else 0.2)
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
    """[batch, time, vocab] logits: the first cause of out-of-memory reports."""
    script = tmp_path / "peak.py"
    script.write_text(PEAK)
    plain, ours = (
        int(shell(sys.executable, script, way).stdout.split()[-1]) / 2**20
        for way in ("plain", "ours")
    )
    print(f"peak memory over the start in GiB: plain {plain:.2f}, completion_logprobs {ours:.2f}")
    assert ours < plain / 2  # a sixth of it at 4 x 1,024 tokens
