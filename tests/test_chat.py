"""A chat model as people have it: a template, pad equal to the end token, two end tokens, no start token."""

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import eval as evaluation
from conftest import ROOT, shell
from data import maths
from data.rollouts import read_rollouts, token_ids

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A random Qwen2-shaped model over bytes."""
    folder = str(tmp_path_factory.mktemp("chat"))
    bytes_of = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(bytes_of)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>", pad_token="<|im_end|>",
                                        additional_special_tokens=["<|im_start|>", "<|endoftext|>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3, eos_token_id=ends[0], pad_token_id=ends[0]))
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])
    model.save_pretrained(folder)
    return folder


def test_both_end_tokens_are_known(chat):
    model, tokenizer = evaluation.load_model(chat, "float32", "cpu")
    assert len(evaluation.end_tokens(model, tokenizer)) == 2


def test_prompts_go_through_the_template_once(chat):
    _, tokenizer = evaluation.load_model(chat, "float32", "cpu")
    prompt = maths.make_prompt("gsm8k", "How many? <|im_end|>", tokenizer)
    ids, _ = token_ids({"prompt": prompt, "completion": "x"}, tokenizer)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert ids.count(tokenizer.eos_token_id) == 1  # the template's own; the one in the question is only text


def test_sample_grade_train_sample(chat, tmp_path, monkeypatch):
    """The end token is learned when it was sampled and absent when the completion was cut; it goes round twice."""
    (tmp_path / "gsm8k").mkdir()
    rows = [dict(id=f"q{i}", question=f"What is {i} + 2?", gold=str(i + 2), solution="") for i in range(6)]
    (tmp_path / "gsm8k/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(maths, "HERE", tmp_path)
    model, tokenizer = evaluation.load_model(chat, "float32", "cpu")
    settings = evaluation.Settings(model=chat, task="gsm8k", split="train", samples=6, max_new_tokens=24)
    out = str(tmp_path / "r.jsonl")
    evaluation.sample_rollouts(model, tokenizer, evaluation.load_questions(settings, tokenizer), evaluation.grader("gsm8k"), settings, out)
    rollouts, ends = read_rollouts(out), evaluation.end_tokens(model, tokenizer)
    assert {row["finish"] for row in rollouts} == {"stop", "length"}
    assert len({row["completion_ids"][-1] for row in rollouts if row["finish"] == "stop"}) == 2
    assert all((row["completion_ids"][-1] in ends) == (row["finish"] == "stop") for row in rollouts)
    for row in rollouts[::2]:
        row["reward"] = 1.0
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))
    result = shell(sys.executable, ROOT / "train.py", "--model", chat, "--rollouts", tmp_path / "scored.jsonl", "--out", tmp_path / "out",
                   "--learning-rate", "1e-4", "--sequences", "12", "--gradient-checkpointing")
    assert result.returncode == 0, result.stdout
    trained, tokenizer = evaluation.load_model(str(tmp_path / "out"), "float32", "cpu")
    assert tokenizer.chat_template == TEMPLATE and evaluation.end_tokens(trained, tokenizer) == ends
    measures = evaluation.measure(evaluation.sample_rollouts(
        trained, tokenizer, evaluation.load_questions(settings, tokenizer), evaluation.grader("gsm8k"), settings))
    assert measures["completions"] == 36
