"""A chat model as people have it: a template, pad equal to the end token, two end tokens, no
start token."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import eval as evaluation
import train
from conftest import ROOT, in_process
from data import load_task, maths
from engine import sampler, tasks
from engine.rollouts import read_rollouts, write_rollouts
from engine.tokens import end_tokens, token_ids
from test_maths import need

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A random Qwen2-shaped model over bytes."""
    folder = str(tmp_path_factory.mktemp("chat"))
    bytes_of = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(bytes_of)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.3,
            eos_token_id=ends[0],
            pad_token_id=ends[0],
        )
    )
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[0], do_sample=True, temperature=0.6, top_p=0.9
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def gsm8k(tmp_path, monkeypatch):
    """Six questions in the place of GSM8K's own."""
    (tmp_path / "gsm8k").mkdir()
    rows = [
        dict(id=f"q{i}", question=f"What is {i} + 2?", gold=str(i + 2), solution="")
        for i in range(6)
    ]
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"gsm8k/{split}.jsonl").write_text(lines)
    monkeypatch.setattr(maths, "HERE", tmp_path)
    return load_task("gsm8k")


def test_prompts_go_through_the_template_once(chat):
    model, tokenizer = sampler.load_model(chat, evaluation.Settings(), "cpu")
    row = {"id": "q", "question": "How many? <|im_end|>"}
    prompt = tasks.make_prompt(load_task("gsm8k"), row, tokenizer, evaluation.Settings())
    ids, _ = token_ids({"prompt": prompt, "completion": "x"}, tokenizer, 0)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert ids.count(tokenizer.eos_token_id) == 1  # the template's; the question's is only text
    assert len(end_tokens(model, tokenizer)) == 2


def test_sample_grade_train_sample(chat, gsm8k, tmp_path):
    """The end token is learned when it was sampled and absent when the completion was cut; it goes
    round twice."""
    model, tokenizer = sampler.load_model(chat, evaluation.Settings(), "cpu")
    settings = evaluation.Settings(model=chat, samples=16, max_new_tokens=24)
    out, scored, trained = tmp_path / "r.jsonl", tmp_path / "scored.jsonl", tmp_path / "out"
    evaluation.evaluate(model, tokenizer, gsm8k, settings, "train", 0, str(out))
    rollouts, ends = read_rollouts(out), end_tokens(model, tokenizer)
    assert {row["finish"] for row in rollouts} == {"stop", "length"}
    assert len({row["completion_ids"][-1] for row in rollouts if row["finish"] == "stop"}) == 2
    assert all((row["completion_ids"][-1] in ends) == (row["finish"] == "stop") for row in rollouts)
    for row in rollouts[::2]:
        row["reward"] = 1.0
    write_rollouts(scored, rollouts)
    result = in_process(
        ROOT / "train.py",
        "--model",
        chat,
        "--rollouts",
        scored,
        "--out",
        trained,
        "--learning-rate",
        "1e-4",
        "--sequences",
        "12",
        "--gradient-checkpointing",
    )
    assert result.returncode == 0, result.stdout
    model, tokenizer = sampler.load_model(str(trained), evaluation.Settings(), "cpu")
    assert tokenizer.chat_template == TEMPLATE and end_tokens(model, tokenizer) == ends
    assert (trained / "chat_template.jinja").read_text() == TEMPLATE
    assert same_generation(chat, trained)
    values = evaluation.evaluate(model, tokenizer, gsm8k, settings, "test", 0)
    assert set(map(len, values.values())) == {6}


def same_generation(one, other):
    """Are all settings of generation the same?"""
    read = lambda folder: json.loads(Path(folder, "generation_config.json").read_text())
    return {**read(one), "transformers_version": ""} == {**read(other), "transformers_version": ""}


def test_odd_generation_settings_are_handed_on(chat, tmp_path):
    """Many published models name a temperature and do not sample, which transformers calls
    invalid: the run still ends well."""
    model, tokenizer = sampler.load_model(chat, evaluation.Settings(), "cpu")
    odd, out, rollouts = tmp_path / "odd", tmp_path / "out", tmp_path / "r.jsonl"
    model.save_pretrained(odd)
    tokenizer.save_pretrained(odd)
    (odd / "generation_config.json").write_text(
        json.dumps(
            {
                "temperature": 0.6,
                "top_p": 0.9,
                "do_sample": False,
                "eos_token_id": end_tokens(model, tokenizer),
            }
        )
    )
    row = dict(id="q", prompt="How many?", completion="The answer is 5.", reward=1.0)
    write_rollouts(rollouts, [row])
    train.train(train.Settings(model=str(odd), rollouts=str(rollouts), out=str(out)))
    assert same_generation(odd, out)


def test_gsm8k_end_to_end(chat, tmp_path, monkeypatch):
    """Real questions, with a model that knows nothing: sampled, graded, trained on, sampled and
    measured again."""
    questions, test = need("gsm8k/train.jsonl", "gsm8k/test.jsonl")
    maths.main(["gsm8k", "--train", questions, "--test", test, "--out", str(tmp_path)])
    monkeypatch.setattr(maths, "HERE", tmp_path)
    out = tmp_path / "out"
    train.job(
        train.Settings(
            model=chat,
            out=str(out),
            questions=4,
            samples=4,
            test_questions=4,
            max_new_tokens=24,
            learning_rate=1e-3,
            sequences=8,
            rounds=2,
            eval_every=1,
        ),
        load_task("gsm8k"),
    )
    results = json.loads((out / "results.json").read_text())
    assert results["before"]["questions"] == results["after"]["questions"] == 4
    assert len(results["curve"]) == 6
    first, second = (read_rollouts(out / f"rollouts-{number}.jsonl") for number in (1, 2))
    assert len(second) == 16 and {row["reward"] for row in second} <= {-1.0, 1.0}
    assert second[0]["id"].startswith("gsm8k-train") and all(row["gold"] for row in second)
    assert second[0]["prompt"].startswith("<|im_start|>user")
    weights = {row["sampling"]["weights"] for row in first + second}
    assert len(weights) == 2  # the second round was written by the policy of the first
