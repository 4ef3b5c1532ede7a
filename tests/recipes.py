"""The recipes of docs/recipes: each takes the same steps as a plain loop over the same rollouts.

python -m pytest -q tests/recipes.py      in an environment that also has trl and peft
"""

import itertools
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import topr
import train
from conftest import ROOT, shell, torchrun
from data import apples
from engine.rollouts import read_rollouts, write_rollouts

pytest.importorskip("trl")
pytest.importorskip("peft")
RECIPES = ROOT / "docs/recipes"
sys.path.insert(0, str(RECIPES))
import hf_trainer  # noqa: E402
import peft_lora  # noqa: E402
import plain_pytorch  # noqa: E402
import trl_trainer  # noqa: E402, F401

RATE, STEP = 0.3, 8  # learning rate, and sequences of an optimizer step
# SGD: Adam makes whole steps out of gradients that are 0 but for rounding
TRAINER = {
    "use_cpu": True,
    "optim": "sgd",
    "learning_rate": RATE,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "train_sampling_strategy": "sequential",
}
TRAINERS = ["hf_trainer", "trl_trainer"]


@pytest.fixture(scope="module")
def policy(tiny, tmp_path_factory):
    """A model with dropout that is no nn.Dropout layer, in a directory."""
    folder = str(tmp_path_factory.mktemp("dropout"))
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config.attention_dropout = 0.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def rows_of(rollouts, count):
    """The first rollouts, cut off, so that neither the text nor an end token gives the tokens."""
    return [
        row | {"completion_ids": row["completion_ids"][:5], "logprobs": None}
        for row in read_rollouts(rollouts)[:count]
    ]


def log_pi(model, row):
    """[1, time], its mask, of one rollout without any padding."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])  # [1, time]
    mask = torch.arange(ids.shape[1])[None] >= len(row["prompt_ids"])  # [1, time]
    return topr.token_logprobs(model(input_ids=ids).logits, ids), mask


def add_gradient(model, mu, rows):
    """The loss of a step, one sequence at a time."""
    total = 0.0
    for row in rows:
        logp, mask = log_pi(model, row)
        with torch.no_grad():
            mu_logp, _ = log_pi(mu, row)
        reward = torch.tensor([row["reward"]])  # [1]
        loss, _ = topr.topr_loss(logp, mu_logp, reward, mask, count=len(rows))
        loss.backward()
        total += loss.item()
    return total


def plain_loop(name, rows):
    """[(loss, norm before clipping)], final weights."""
    model, mu = (AutoModelForCausalLM.from_pretrained(name).eval() for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    log = []
    for start in range(0, len(rows), STEP):
        loss = add_gradient(model, mu, rows[start : start + STEP])
        log.append([loss, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()])
        optimizer.step()
        optimizer.zero_grad()
    return log, model.state_dict()


def assert_saved(out, weights):
    saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_take_the_steps_of_the_plain_loop(name, policy, rollouts, tmp_path, monkeypatch):
    """Guards against a gradient that is four times too large where the batch has labels; dropout,
    which each step switches on; a wrong N in a shorter last step (21 rollouts are steps of 8, 8 and
    5); and TRL's own loss, tokens and end tokens."""
    module, path, rows = sys.modules[name], tmp_path / "rollouts.jsonl", rows_of(rollouts, 21)
    write_rollouts(path, rows)
    if name == "hf_trainer":
        collate = module.collate
        monkeypatch.setattr(
            module,
            "collate",
            lambda rows: (batch := collate(rows)) | {"labels": batch["input_ids"]},
        )
    kind = getattr(module, "KTOConfig", TrainingArguments)
    trainer = module.main(policy, path, kind(tmp_path / "out", **module.DEFAULTS | TRAINER))
    log, weights = plain_loop(policy, rows)
    taken = [
        [entry["loss"], entry["grad_norm"]]
        for entry in trainer.state.log_history
        if "grad_norm" in entry
    ]
    torch.testing.assert_close(torch.tensor(taken), torch.tensor(log), rtol=1e-5, atol=1e-5)
    assert_saved(tmp_path / "out", weights)


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_on_two_ranks(name, policy, rollouts, tmp_path):
    """Guards against ranks that each train a model of their own, as they do when the loss calls the
    model past its DDP wrapper, and against a mean over ranks where the loss is a sum."""
    path, rows = tmp_path / "rollouts.jsonl", rows_of(rollouts, 20)
    write_rollouts(path, rows)
    options = TRAINER | {"gradient_accumulation_steps": 2, "output_dir": tmp_path / "out"}
    words = [f"--{option}={value}" for option, value in options.items()]
    result = torchrun(2, RECIPES / f"{name}.py", policy, path, *words, HF_HOME=str(tmp_path))
    assert result.returncode == 0, result.stdout
    assert_saved(tmp_path / "out", plain_loop(policy, rows)[1])


def test_no_dropout_layer_stays():
    hf_trainer.remove_dropout(layer := torch.nn.Dropout(0.5))
    assert layer.p == 0


@pytest.mark.parametrize("name", [*TRAINERS, "peft_lora"])
def test_four_fields_are_enough(name, tiny, rollouts, tmp_path):
    """KeyError prompt_ids, for a file of the fields that suffice elsewhere; rates that could not be
    given; a saved model without its adapter."""
    path, out, rows = tmp_path / "rollouts.jsonl", tmp_path / "out", read_rollouts(rollouts)
    write_rollouts(
        path,
        [{field: row[field] for field in ("id", "prompt", "completion", "reward")} for row in rows],
    )
    options = [f"--output_dir={out}", "--learning_rate=3e-3", "--use_cpu"]
    if name == "peft_lora":
        options = [out, "3e-3", "16"]
    result = shell(
        sys.executable, RECIPES / f"{name}.py", tiny, path, *options, HF_HOME=str(tmp_path)
    )
    assert result.returncode == 0, result.stdout
    AutoTokenizer.from_pretrained(out)
    before, after = (
        log_pi(AutoModelForCausalLM.from_pretrained(folder), rows[0])[0].sum()
        for folder in (tiny, out)
    )
    assert after > before + 1  # of a positive


def test_lora_takes_the_gradient_of_the_plain_loop(tiny, rollouts):
    """Guards against a mu that moves with the policy."""
    rows = rows_of(rollouts, 10)
    ours = [(row["prompt_ids"], row["completion_ids"], row["reward"]) for row in rows]
    base, mu = (AutoModelForCausalLM.from_pretrained(tiny).eval() for _ in range(2))
    model = peft_lora.get_peft_model(base, peft_lora.LoraConfig(target_modules="all-linear")).eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        expected = add_gradient(model, mu, rows)
        gradients = [p.grad for p in weights]
        model.zero_grad()
        assert peft_lora.backward(model, ours) == pytest.approx(expected, abs=1e-5)
        for p, gradient in zip(weights, gradients):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-5)
            p.data -= 10 * p.grad
        model.zero_grad()


def test_gru_has_the_same_loss_in_micro_batches_and_learns(capsys):
    """Guards against a mask that takes the prompt in or leaves the end token out, a wrong N, and a
    recipe that trains nothing."""
    torch.manual_seed(0)
    model = plain_pytorch.GRU()
    ids, mask, reward = plain_pytorch.sample(model, 20)
    for row in range(20):
        first, *written = ids[row].tolist()
        length = written.index(0) + 1 if 0 in written else len(written)
        assert mask[row].nonzero()[:, 0].tolist() == list(range(1, length + 1))
        assert reward[row] == (1 if written[:length].count(first) >= 2 else -1)
    mu_logp = topr.token_logprobs(model(ids), ids).detach() + 0.1  # [batch, time]
    loss, _ = topr.topr_loss(topr.token_logprobs(model(ids), ids), mu_logp, reward, mask)
    parts = plain_pytorch.backward(model, ids, mask, reward, mu_logp, micro_batch=6)
    assert parts == pytest.approx(loss.item(), abs=1e-5)
    plain_pytorch.main()
    _, before, _, after, _ = capsys.readouterr().out.split()
    assert float(after) > float(before) + 0.1


# ---- vLLM ----


class StandIn:
    """vLLM's LLM as far as the recipe uses it. Its tokens are drawn by lot."""

    def __init__(self, model, logprobs_mode="raw_logprobs"):
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.temperature = 1.0 if logprobs_mode == "raw_logprobs" else 0.7

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, prompts, sampling):
        for prompt in prompts:
            yield types.SimpleNamespace(
                **prompt,
                outputs=[
                    self.complete(**prompt, end=[2][: number % 2]) for number in range(sampling.n)
                ],
            )

    @torch.no_grad()
    def complete(self, prompt_token_ids, end):
        ids = torch.randint(3, 20, (9,)).tolist() + end
        logits = self.model(torch.tensor([prompt_token_ids + ids])).logits[0]  # [time, vocab]
        logprobs = (logits / self.temperature).log_softmax(-1)[len(prompt_token_ids) - 1 :]
        return types.SimpleNamespace(
            token_ids=ids,
            text=self.tokenizer.decode(ids, skip_special_tokens=True),
            logprobs=[
                {token: types.SimpleNamespace(logprob=row[token].item())}
                for token, row in zip(ids, logprobs)
            ],
            finish_reason="stop" if end else "length",
        )


def test_vllm_rollouts_fit_the_model(tiny, tmp_path, monkeypatch):
    """Guards against log mu of another distribution than pi's, tokens made again from the text, a
    lost end token, and a reward of 0. vLLM cannot run here: a stand-in takes its place."""
    stand_in = types.SimpleNamespace(LLM=StandIn, SamplingParams=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    import vllm_rollouts

    write_rollouts(tmp_path / "questions.jsonl", itertools.islice(apples.questions("train", 0), 4))
    path = tmp_path / "rollouts.jsonl"
    vllm_rollouts.main(tiny, tmp_path / "questions.jsonl", path, samples=4)
    ended = [row["completion_ids"][-1] == 2 for row in read_rollouts(path)]
    assert ended == [False, True] * 8
    log = train.train(train.Settings(model=tiny, rollouts=str(path), out=str(tmp_path / "out")))
    assert max(-log[0]["d_min"], log[0]["d_max"]) < 1e-3
    assert vllm_rollouts.grade({"gold": "18"}, "18") == (None, -1.0)
