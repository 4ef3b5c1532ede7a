"""The sampler with models that are not a small Llama: state-space and hybrid ones, learned
positions, stop strings, several end tokens, broken weights, other dtypes."""

import gc
import math
import sys
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from types import SimpleNamespace

import eval as evaluation
from conftest import ROOT, apples_questions, shell
from data import load_task
from engine import tasks, tokens
from engine.rollouts import read_rollouts
from engine import sampler
from engine.common import Problem, run_main

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
STATES = dict(
    mamba=dict(state_size=8),
    mamba2=dict(state_size=8, num_heads=4, head_dim=16, n_groups=1, expand=2, chunk_size=4),
    falcon_h1=dict(
        **ATTENTION,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=4,
        head_dim=8,
    ),
    granitemoehybrid=dict(
        **ATTENTION,
        layer_types=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=32,
    ),
    qwen3_next=dict(
        **ATTENTION,
        layer_types=["linear_attention", "full_attention"],
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
)
PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 3, 4, 5, 6, 7, 8, 9, 10, 11], [1, 30, 31, 32, 33, 34]]


def random_model(kind, **sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **STATES.get(kind, {}), **sizes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name and "conv" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
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


def written(generate, model, prompts, ends, settings):
    """{number of the prompt: completions}"""
    model.generation_config.eos_token_id = ends
    questions = [{"id": str(number), "prompt": "", "prompt_ids": prompt, "stop": []}
                 for number, prompt in enumerate(prompts)]
    todo, bar = range(len(prompts)), sampler.progress(total=0)
    return dict(generate(model, Letters(), questions, todo, settings, 0, bar))


def rollouts(model, settings, texts, out="", stop=()):
    questions = [
        {"id": text, "question": text, "prompt": text, "stop": list(stop)} for text in texts
    ]
    return sampler.sample_rollouts(
        model, Letters(), questions, lambda *_: (None, -1.0), settings, str(out)
    )


@pytest.mark.parametrize("kind", STATES)
def test_state_space_and_hybrid_models(kind, tmp_path, capsys):
    """They ended in a traceback, or wrote other text than generate: the cache of keys and values
    is not theirs."""
    model = random_model(kind)
    settings = evaluation.Settings(model="x", samples=1, temperature=0.0, max_new_tokens=8)
    assert sampler.cache_bytes(model, settings) == 0
    texts = ["".join(chr(65 + i) for i in prompt) for prompt in PROMPTS]
    rows = rollouts(model, settings, texts, tmp_path / "r.jsonl")
    assert capsys.readouterr().out.count("transformers' generate") == 1
    for prompt, row in zip(PROMPTS, rows):
        theirs = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=8, eos_token_id=2
        )
        assert row["completion_ids"] == theirs[0, len(prompt) :].tolist()
    few = evaluation.Settings(model="x", samples=4, max_new_tokens=6, batch_size=3)
    many = evaluation.Settings(model="x", samples=4, max_new_tokens=6, batch_size=4)
    sampled = [
        [row["completion_ids"] for row in rollouts(model, one, texts[:2])] for one in (few, many)
    ]
    assert sampled[0] == sampled[1] and len(set(map(tuple, sampled[0]))) > 4


def test_the_fallback_samples_what_the_batches_sample():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **SIZES, **ATTENTION)
    ).eval()
    settings = evaluation.Settings(samples=3, max_new_tokens=10, batch_size=5)
    assert (
        sampler.cache_bytes(model, settings) == 2 * 2 * 2 * 8 * 4
    )  # layers, keys and values, heads, width, bytes
    both = [written(generate, model, PROMPTS, [2, 7], settings)
            for generate in (sampler.generate, sampler.generate_alone)]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("gpt2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=20)),
        (
            "opt",
            dict(
                ffn_dim=64,
                num_attention_heads=4,
                max_position_embeddings=20,
                word_embed_proj_dim=32,
            ),
        ),
    ],
)
def test_learned_positions_up_to_the_last(kind, sizes):
    """The positions of rows that had finished grew past the model's room: IndexError."""
    model = random_model(kind, **sizes)
    settings = evaluation.Settings(samples=20, max_new_tokens=10, batch_size=20)
    ends = list(range(2, 8))
    found = written(sampler.generate, model, [PROMPTS[2], PROMPTS[0]], ends, settings)
    lengths = {len(tokens) for completions in found.values() for tokens in completions}
    assert 10 in lengths and len(lengths) > 4


def test_a_stop_string_ends_a_completion(tmp_path):
    """Base models ran on to the limit, and the next question that they invented was trained on."""
    model = random_model("llama", **ATTENTION)
    settings = evaluation.Settings(model="x", samples=40, max_new_tokens=30)
    plain = rollouts(model, settings, ["BFGH"])
    stop = plain[0]["completion"][5:7]
    rows = rollouts(model, settings, ["BFGH"], tmp_path / "r.jsonl", stop=[stop])
    cut = [(row, whole) for row, whole in zip(rows, plain) if stop in whole["completion"]]
    assert len(cut) >= 1 and rows[0]["completion"] == plain[0]["completion"][:5]
    for row, whole in zip(rows, plain):
        assert row["completion"] == whole["completion"].partition(stop)[0]
        ids = row["prompt_ids"] + row["completion_ids"]
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(row["prompt_ids"])
        expected = [logp[t - 1, ids[t]].item() for t in range(start, len(ids))]
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4)
    for row, whole in cut:
        assert row["finish"] == "stop" and 2 not in row["completion_ids"]
        assert row["completion_ids"] == whole["completion_ids"][: max(1, len(row["completion"]))]
    at_once = rollouts(model, settings, ["BFGH"], stop=[plain[0]["completion"][:1]])[0]
    assert at_once["completion"] == "" and len(at_once["completion_ids"]) == 1


def test_a_token_that_holds_text_before_the_stop_is_kept():
    """One token may hold "18.", the line's end and the next: without it the answer would be
    lost."""

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

    model = random_model("llama", **ATTENTION)
    model.generation_config.eos_token_id = [2, 3]
    assert tokens.end_tokens(model, Letters()) == [2, 3]
    assert tokens.end_token_of(model, Letters()) == 2 and tokens.end_token_of(model, Gemma()) == 3
    assert tokens.end_token_of(model.config, Gemma()) == 2 == tokens.end_token_of(None, Gemma())
    without = Letters()
    without.eos_token_id = None
    assert tokens.end_token_of(model, without) == 2
    with pytest.raises(Problem, match="end-of-sequence"):
        tokens.end_tokens(None, without)


def test_broken_weights_stop_at_once(tmp_path):
    """NaN was found after all sampling, and the part file that it left made the next call fail
    too."""
    model = random_model("llama", **ATTENTION)
    settings = evaluation.Settings(model="x", samples=2, max_new_tokens=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[40] = math.nan  # the letter i
    for kind in ({}, {"temperature": 0.0}):
        changed = evaluation.Settings(model="x", samples=2, max_new_tokens=5, **kind)
        with pytest.raises(Problem, match="question 'B.'.*NaN"):
            rollouts(model, changed, ["BF", "Bi"], tmp_path / "r.jsonl")
    for part in tmp_path.iterdir():
        assert "NaN" not in part.read_text()
    assert len(rollouts(model, settings, ["BF"], tmp_path / "other.jsonl")) == 2


def test_precision_and_weights(tiny, tmp_path):
    """mu is of the model as it is trained: weights by --weights, arithmetic by --precision."""
    rows = {}
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
        out = tmp_path / f"{weights}-{precision}.jsonl"
        rows[weights, precision] = row = sampler.sample_rollouts(
            model,
            tokenizer,
            apples_questions(tokenizer, settings, 2),
            lambda *_: (None, 0.0),
            settings,
            str(out),
        )[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            again = sampler.score(model, row["prompt_ids"], [row["completion_ids"]], share=False)[0]
        assert row["logprobs"] == pytest.approx(again, abs=0.05)
    assert rows["auto", "float32"]["logprobs"][0] != rows["float32", "bfloat16"]["logprobs"][0]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    assert (
        sampler.load_model(str(tmp_path / "half"), evaluation.Settings(), "cpu")[0].dtype
        == torch.bfloat16
    )


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
    settings = evaluation.Settings(model=tiny, samples=3, max_new_tokens=10)
    model, tokenizer = sampler.load_model(tiny, settings, "cpu")
    questions, sizes = apples_questions(tokenizer, settings, 3), []

    def spy(model, tokenizer, questions, todo, settings, *rest):
        sizes.append(settings.batch_size)
        return sampler_generate(model, tokenizer, questions, todo, settings, *rest)

    sampler_generate = sampler.generate
    monkeypatch.setattr(sampler, "generate", spy)
    results = []
    for left in (10**12, 2 * 10**5, 1):
        monkeypatch.setattr(sampler, "memory_left", lambda device, left=left: left)
        results.append(
            sampler.sample_rollouts(model, tokenizer, questions, lambda *_: (None, 0.0), settings)
        )
    assert sizes[0] == 256 and 1 < sizes[1] < 256 and sizes[2] == 1
    assert results[0] == results[1] == results[2]
    assert sampler.memory_left(model.device) > 0

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 75 GiB")

    monkeypatch.setattr(sampler, "generate", full)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", tiny, "--max-new-tokens", "9"])
    with pytest.raises(SystemExit) as ended:
        run_main(evaluation.main)
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "75 GiB" in line and "--batch-size" in line


def test_a_finished_file_is_extended(tiny, tmp_path):
    """More samples on a finished file were refused; a refusal did not say what differs."""
    few, many = (evaluation.Settings(model=tiny, samples=n, max_new_tokens=20) for n in (3, 5))
    model, tokenizer = sampler.load_model(tiny, few, "cpu")
    questions, grade = apples_questions(tokenizer, few, 6), load_task("apples").grade
    out, whole = str(tmp_path / "r.jsonl"), str(tmp_path / "whole.jsonl")
    first = sampler.sample_rollouts(model, tokenizer, questions, grade, few, out)
    calls = []

    def dying(question, text):
        calls.append(text)
        if len(calls) == 18 + 5:  # after the 18 that are graded again
            raise KeyboardInterrupt
        return grade(question, text)

    with pytest.raises(KeyboardInterrupt):
        sampler.sample_rollouts(model, tokenizer, questions, dying, many, out)
    assert read_rollouts(out) == first and len(list(tmp_path.glob("*.part-*"))) == 1
    rows = sampler.sample_rollouts(model, tokenizer, questions, grade, many, out)
    fresh = sampler.sample_rollouts(model, tokenizer, questions, grade, many, whole)
    assert rows == read_rollouts(out) and len(rows) == 30 and not list(tmp_path.glob("*.part-*"))
    for row, other in zip(rows, fresh):
        assert row["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5)
        assert {**row, "logprobs": 0} == {**other, "logprobs": 0}
    assert first == [row for n, row in enumerate(rows) if n % 5 < 3]
    for changes, named in (
        (dict(temperature=0.5), "temperature is 1.0 there and 0.5"),
        (dict(samples=2), "number.*30 .*12"),
        (dict(seed=3), "seed is 0"),
    ):
        other = evaluation.Settings(**{**vars(many), **changes})
        with pytest.raises(Problem, match=named):
            sampler.sample_rollouts(model, tokenizer, questions, grade, other, out)
    with pytest.raises(Problem, match="id is|number of completions"):
        sampler.sample_rollouts(model, tokenizer, questions[1:], grade, many, out)
    slash = evaluation.Settings(**{**vars(many), "model": tiny + "/"})
    assert sampler.sample_rollouts(model, tokenizer, questions, grade, slash, out) == rows
    assert rows == sampler.sample_once(many, tiny, lambda tokenizer: questions, grade, out)


def test_the_rows_name_their_split(tiny, tmp_path):
    """Training on the test questions went unnoticed."""
    result = shell(
        sys.executable,
        ROOT / "eval.py",
        "--model",
        tiny,
        "--questions",
        3,
        "--samples",
        2,
        "--split",
        "train",
        "--max-new-tokens",
        20,
        "--out",
        tmp_path / "r.jsonl",
    )
    assert result.returncode == 0, result.stdout
    assert {row["split"] for row in read_rollouts(tmp_path / "r.jsonl")} == {"train"}
