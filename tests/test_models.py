"""The sampler, tokens in and tokens out, against transformers' own loop and plain forward passes,
for every family of models."""

import gc
import math
import sys
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import eval as evaluation
from conftest import apples_questions
from engine import mu, packing, sampler, tokens
from engine.common import Problem, progress, run_main

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    vocab_size=61,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
ATTENTION = dict(
    intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128
)
MAMBA = dict(mamba_n_heads=4, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=4)
EXPERTS = dict(num_experts_per_tok=1)
FAMILIES = dict(
    llama=ATTENTION,
    qwen2=ATTENTION,
    qwen3=dict(**ATTENTION, head_dim=8),
    mistral=dict(**ATTENTION, sliding_window=6),
    gemma2=dict(**ATTENTION, head_dim=8, sliding_window=6),
    gemma3_text=dict(**ATTENTION, head_dim=8, sliding_window=6),
    gpt2=dict(n_embd=32, n_layer=2, n_head=4, n_positions=32),
    opt=dict(ffn_dim=64, num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=32),
    gpt_neox=dict(intermediate_size=64, num_attention_heads=4),
    phi=dict(intermediate_size=64, num_attention_heads=4),
    cohere=dict(**ATTENTION, logit_scale=0.3),
    granite=dict(**ATTENTION, logits_scaling=3.0),
    falcon_h1=dict(**ATTENTION, **MAMBA, mamba_d_ssm=32, mamba_d_head=8, head_dim=8),
    granitemoehybrid=dict(
        **ATTENTION,
        **MAMBA,
        **EXPERTS,
        layer_types=["mamba", "attention"],
        mamba_d_head=16,
        num_local_experts=2,
        shared_intermediate_size=32,
    ),
    qwen3_next=dict(
        **ATTENTION,
        **EXPERTS,
        layer_types=["linear_attention", "full_attention"],
        head_dim=8,
        num_experts=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
)
PROMPTS = [
    [1, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    [1, 30, 31, 32, 33, 34],
    [1, 5, 6, 7],
    [1, 20, 21],
    [1, 9],
]


def random_model(kind, **sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **FAMILIES.get(kind, {}), **sizes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name and "conv" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = [2]
    return model


class Letters:
    """A tokenizer of 61 letters: as much of one as the sampler needs."""

    eos_token_id, bos_token_id, bos_token, chat_template, is_fast = 2, None, None, None, False

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=[ord(letter) - 65 for letter in text])

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(65 + i) for i in ids if i != 2)

    def __len__(self):
        return 61


def written(model, prompts, **settings):
    """The completions of each prompt, as lists of tokens."""
    settings = sampler.Sampling(**settings)
    questions = [
        {"id": str(number), "prompt_ids": prompt, "stop": [], "key": number}
        for number, prompt in enumerate(prompts)
    ]
    todo, bar = range(len(prompts)), progress(total=0)
    found = dict(sampler.generate(model, Letters(), questions, todo, settings, bar))
    return [found[number] for number in todo]


def rollouts(model, texts, out="", stop=(), **settings):
    questions = [{"id": text, "prompt": text, "stop": list(stop)} for text in texts]
    settings = evaluation.Settings(model="x", **settings)
    return evaluation.sample_rollouts(
        model, Letters(), questions, lambda *_: (None, -1.0), settings, str(out)
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_is_what_generate_writes(kind):
    """Prompts of mixed length, rows that leave, sliding windows, learned positions, hybrids.

    Under a name that a version of transformers does not know the cache was ignored silently.
    """
    model = random_model(kind)
    greedy = dict(samples=1, temperature=0.0, max_new_tokens=12)
    theirs = [
        model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=2)[
            0, len(prompt) :
        ].tolist()
        for prompt in PROMPTS
    ]
    for size in (1, 2, 64):
        assert written(model, PROMPTS, batch_size=size, **greedy) == [[row] for row in theirs]


@pytest.mark.parametrize("kind", FAMILIES)
def test_sampled_is_what_plain_passes_and_the_same_random_numbers_give(kind):
    """So they are the same for any size of a batch."""
    model = random_model(kind)
    found = written(model, PROMPTS, samples=3, max_new_tokens=10, batch_size=7, temperature=0.8)
    for number, prompt in enumerate(PROMPTS):
        table = torch.rand(3, 10, generator=torch.Generator().manual_seed(number))
        for completion, uniform in zip(found[number], table):
            ids = list(prompt)
            for u in uniform:
                with torch.no_grad():
                    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
                cumulative = (logits / 0.8).softmax(-1).cumsum(-1)
                ids.append(int((cumulative <= u * cumulative[-1]).sum()))
                if ids[-1] == 2:
                    break
            assert completion == ids[len(prompt) :]


def test_a_family_that_does_not_work_in_batches_is_refused():
    """It wrote other text than generate, unnoticed."""
    with pytest.raises(Problem, match="type 'mamba' do not work in batches.*--server"):
        written(random_model("mamba", state_size=8), PROMPTS, samples=1, max_new_tokens=2)


def test_sampling_follows_the_softmax():
    """4,000 first tokens against the model's own probabilities; nothing outside top-k, top-p."""
    model, many = random_model("llama"), dict(samples=4000, max_new_tokens=1, temperature=0.7)
    probabilities = model(torch.tensor([PROMPTS[2]])).logits[0, -1].div(0.7).softmax(-1)
    order = probabilities.sort(descending=True)
    nucleus = int((order.values.cumsum(0) < 0.5).sum()) + 1
    for options, kept in (({}, 61), (dict(top_k=5), 5), (dict(top_p=0.5), nucleus)):
        counts = Counter(row[0] for row in written(model, [PROMPTS[2]], **many, **options)[0])
        kept = order.indices[:kept]
        assert set(counts) <= set(kept.tolist())
        for token in kept.tolist():
            p = (probabilities[token] / probabilities[kept].sum()).item()
            assert abs(counts[token] / 4000 - p) < 5 * math.sqrt(p * (1 - p) / 4000) + 1e-3


@pytest.mark.parametrize(
    "kind, sizes",
    [("llama", {}), ("gpt2", dict(n_positions=20)), ("opt", dict(max_position_embeddings=20))],
)
def test_several_end_tokens_and_cut_completions(kind, sizes):
    """Up to the last position that a model has learned, and never longer than asked for."""
    model, ends = random_model(kind, **sizes), {2, 3, 4, 5, 6, 7}
    model.generation_config.eos_token_id = list(ends)
    found = written(model, [PROMPTS[0], PROMPTS[2]], samples=20, max_new_tokens=10, batch_size=20)
    for row in sum(found, []):
        assert (row[-1] in ends or len(row) == 10) and not ends & set(row[:-1])
    lengths = {len(row) for row in sum(found, [])}
    assert 10 in lengths and len(lengths) > 4


def test_a_stop_string_ends_a_completion(tmp_path):
    """Base models ran on to the limit, and the next question that they invented was trained on."""
    model, settings = random_model("llama"), dict(samples=40, max_new_tokens=30)
    plain = rollouts(model, ["BFGH"], **settings)
    stop = plain[0]["completion"][5:7]
    rows = rollouts(model, ["BFGH"], tmp_path / "r.jsonl", [stop], **settings)
    assert rows[0]["completion"] == plain[0]["completion"][:5]
    for row, whole in zip(rows, plain):
        assert row["completion"] == whole["completion"].partition(stop)[0]
        if stop in whole["completion"]:
            size = max(1, len(row["completion"]))
            assert row["finish"] == "stop" and 2 not in row["completion_ids"]
            assert row["completion_ids"] == whole["completion_ids"][:size]
        ids, start = row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"])
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [logp[t - 1, ids[t]].item() for t in range(start, len(ids))]
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4)
    at_once = rollouts(model, ["BFGH"], stop=[plain[0]["completion"][:1]], **settings)[0]
    assert at_once["completion"] == "" and len(at_once["completion_ids"]) == 1


def test_a_token_that_holds_text_before_the_stop_is_kept():
    """A token may hold "18.", the line's end and the next: without it the answer would be lost."""

    class Words(Letters):
        def decode(self, ids, skip_special_tokens=True):
            return "".join(("The answer is ", "18.\n\n", "Question:", " more")[i] for i in ids)

    row = tokens.until_stop([0, 1, 2, 3], False, ["\nQuestion:", ""], Words())
    assert row == {"completion": "The answer is 18.\n", "finish": "stop", "completion_ids": [0, 1]}
    assert tokens.until_stop([0, 3], False, ["\nQuestion:"], Words())["finish"] == "length"


def test_the_end_token_of_text():
    """Gemma and Phi end their turns with another token than the tokenizer's eos."""

    class Gemma(Letters):
        chat_template = "yes"

        def apply_chat_template(self, messages, **options):
            return "user" + messages[0]["content"] + "D" + messages[1]["content"] + "DZ"

    model, without = random_model("llama"), Letters()
    model.generation_config.eos_token_id, without.eos_token_id = [2, 3], None
    assert tokens.end_tokens(model, Letters()) == [2, 3]
    assert tokens.end_token_of(model, Letters()) == 2 and tokens.end_token_of(model, Gemma()) == 3
    assert tokens.end_token_of(model.config, Gemma()) == 2 == tokens.end_token_of(None, Gemma())
    assert tokens.end_token_of(model, without) == 2
    with pytest.raises(Problem, match="end-of-sequence"):
        tokens.end_tokens(None, without)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_stop_at_once(tmp_path, temperature):
    """NaN was found after all sampling, and the part file that it left made the next call fail."""
    model, options = random_model("llama"), dict(samples=2, max_new_tokens=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[40] = math.nan  # the letter i
    with pytest.raises(Problem, match="question 'Bi'.*NaN"):
        rollouts(model, ["BF", "Bi"], tmp_path / "r.jsonl", temperature=temperature, **options)
    assert not any("NaN" in part.read_text() for part in tmp_path.iterdir())
    assert len(rollouts(model, ["BF"], tmp_path / "other.jsonl", **options)) == 2


def test_precision_and_weights(tiny, tmp_path):
    """mu is of the model as it is trained: weights by --weights, arithmetic by --precision."""
    first = {}
    for weights, precision in (
        ("auto", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
    ):
        settings = evaluation.Settings(
            model=tiny, weights=weights, precision=precision, samples=2, max_new_tokens=20
        )
        model, tokenizer = sampler.load_model(tiny, settings, "cpu")
        assert model.dtype == (torch.bfloat16 if weights == "bfloat16" else torch.float32)
        row = first[weights, precision] = evaluation.sample_rollouts(
            model,
            tokenizer,
            apples_questions(tokenizer, settings, 2),
            lambda *_: (None, 0.0),
            settings,
            str(tmp_path / f"{weights}-{precision}.jsonl"),
        )[0]
        policy = packing.make_policy(model, precision, 40)
        again = mu.score(policy, row["prompt_ids"], [row["completion_ids"]])
        assert row["logprobs"] == pytest.approx(again[0], abs=0.05)
    assert first["auto", "float32"]["logprobs"] != first["float32", "bfloat16"]["logprobs"]
    model.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    half, _ = sampler.load_model(str(tmp_path / "half"), evaluation.Settings(), "cpu")
    assert half.dtype == torch.bfloat16


def test_an_earlier_model_is_freed_first(tiny):
    """Models sit in reference cycles: without a collection two of them were in memory."""
    gc.disable()
    try:
        model, _ = sampler.load_model(tiny, evaluation.Settings(), "cpu")
        model.itself = model.model.parent = [model]
        earlier = weakref.ref(model)
        del model
        sampler.load_model(tiny, evaluation.Settings(), "cpu")
        assert earlier() is None
    finally:
        gc.enable()


def test_a_batch_that_fits_and_one_that_does_not(tiny, monkeypatch, capsys):
    """256 rows were 75 GiB for 8 billion weights; out of memory was a traceback."""
    model = random_model("llama").double()  # in float32 the size of a batch can turn a draw
    sizes, results, write = [], [], sampler.write

    def spy(model, tokenizer, questions, batch, *rest):
        sizes[-1] = max(sizes[-1], len(batch))
        return write(model, tokenizer, questions, batch, *rest)

    monkeypatch.setattr(sampler, "write", spy)
    for left in (10**12, 10**5, 1):
        sizes.append(0)
        monkeypatch.setattr(sampler, "memory_left", lambda device, left=left: left)
        results.append(written(model, PROMPTS, samples=200, max_new_tokens=4))
    assert sizes[0] == 512 and 1 < sizes[1] < 100 and sizes[2] == 1
    assert results[0] == results[1] == results[2]

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 75 GiB")

    monkeypatch.setattr(sampler, "write", full)
    options = ["--model", tiny, "--task", "apples", "--max-new-tokens", "9"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *options])
    with pytest.raises(SystemExit) as ended:
        run_main(evaluation.main)
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "75 GiB" in line and "--batch-size" in line
