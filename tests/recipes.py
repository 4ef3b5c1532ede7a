"""The recipes of docs/recipes: each takes the same steps as a plain loop over the same rollouts.

    python -m pytest -q tests/recipes.py      in an environment that also has trl and peft
"""

import dataclasses
import importlib
import json
import math
import sys
import types

import pytest
import torch
from conftest import ROOT, eval_settings, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import topr
from data import apples, load_task
from engine.rollouts import read_rollouts, write_rollouts

sys.path.insert(0, str(ROOT / "docs/recipes"))
RATE, STEP = 0.3, 8  # learning rate, and sequences of an optimizer step
# SGD: Adam makes whole steps out of gradients that are 0 but for rounding, GPT-2's key biases
TRAINER = {"use_cpu": True, "optim": "sgd", "learning_rate": RATE, "disable_tqdm": True,
           "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
           "train_sampling_strategy": "sequential"}


def recipe(name, *packages):
    for package in packages:
        pytest.importorskip(package, reason=f"the recipe {name}.py needs {package}")
    return importlib.import_module(name)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def policy(request, tiny, tmp_path_factory):
    """A model with dropout, in a directory: Llama's is no nn.Dropout layer, GPT-2's is."""
    folder = str(tmp_path_factory.mktemp(request.param))
    model = AutoModelForCausalLM.from_pretrained(tiny)
    if request.param == "gpt2":
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=model.config.vocab_size, n_positions=256,
                                           n_embd=32, n_layer=2, n_head=2, bos_token_id=1,
                                           eos_token_id=2))
    else:
        model.config.attention_dropout = 0.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def sequence(row):
    """ids and mask of one rollout, [1, time]: no padding at all."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    return ids, torch.arange(ids.shape[1])[None] >= len(row["prompt_ids"])


def rollout_file(path, rollouts, model_name, count):
    """The first `count` rollouts, with log mu of this model."""
    model = AutoModelForCausalLM.from_pretrained(model_name).eval()
    rows = read_rollouts(rollouts)[:count]
    for row in rows:
        ids, mask = sequence(row)
        with torch.no_grad():
            row["logprobs"] = topr.completion_logprobs(model, ids, mask)[mask].tolist()
    write_rollouts(path, rows)
    return str(path), rows


def plain_loop(model_name, rows):
    """The README's loop, one sequence at a time: [(loss, norm before clipping)], final weights."""
    model = AutoModelForCausalLM.from_pretrained(model_name).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    log = []
    for start in range(0, len(rows), STEP):
        step, total = rows[start : start + STEP], 0.0
        for row in step:
            ids, mask = sequence(row)
            mu_logp = torch.zeros(ids.shape).masked_scatter(mask, torch.tensor(row["logprobs"]))
            logp = topr.completion_logprobs(model, ids, mask)  # [1, time]
            reward = torch.tensor([row["reward"]])  # [1]
            loss, _ = topr.topr_loss(logp, mu_logp, reward, mask, count=len(step))
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        log.append((total, norm.item()))
        optimizer.step()
        optimizer.zero_grad()
    return log, model.state_dict()


def logged(history):
    """[(loss, norm)] from a Trainer's log_history."""
    return [(entry["loss"], entry["grad_norm"]) for entry in history if "grad_norm" in entry]


def assert_same(log, weights, out, expected):
    """Losses and norms to 1e-5; the weights in `out`, which from_pretrained reads, to 1e-4."""
    expected_log, expected_weights = expected
    assert len(log) == len(expected_log) > 1
    torch.testing.assert_close(torch.tensor(log), torch.tensor(expected_log), rtol=1e-5, atol=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for each in (saved, weights):
        for name, weight in expected_weights.items():
            torch.testing.assert_close(each[name], weight, rtol=0, atol=1e-4)


# ---- Hugging Face's Trainer ----


@pytest.mark.parametrize("labels", [False, True])
def test_trainer_takes_the_steps_of_the_plain_loop(labels, policy, rollouts, tmp_path):
    """Guards against a gradient that is four times too large where the batch has labels, against
    dropout, which Trainer switches on in every step, and against a wrong N in a shorter last step:
    21 rollouts are steps of 8, 8 and 5, the last in micro-batches of 2, 2 and 1."""
    hf_trainer = recipe("hf_trainer", "accelerate")
    path, rows = rollout_file(tmp_path / "rollouts.jsonl", rollouts, policy, 21)

    def collate(rows):
        batch = hf_trainer.collate(rows)
        return batch | ({"labels": batch["input_ids"]} if labels else {})

    trainer = hf_trainer.main(policy, path, str(tmp_path / "out"), collate=collate, **TRAINER)
    assert_same(logged(trainer.state.log_history), trainer.model.state_dict(), tmp_path / "out",
                plain_loop(policy, rows))


DRIVER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch, {name}
trainer = {name}.main(*sys.argv[2:5], **json.loads(sys.argv[5]))
torch.save([trainer.state.log_history, trainer.model.state_dict()],
           sys.argv[4] + "/rank" + os.environ["RANK"])
"""


def train_on_two_ranks(name, policy, path, folder, **changes):
    """What a recipe's main leaves behind on each of two ranks: [(log, weights)]."""
    (folder / "driver.py").write_text(DRIVER.format(name=name))
    settings = TRAINER | {"gradient_accumulation_steps": 2} | changes
    result = torchrun(2, folder / "driver.py", ROOT / "docs/recipes", policy, path,
                      folder / "out", json.dumps(settings), HF_HOME=str(folder / "cache"))
    assert result.returncode == 0, result.stdout
    ranks = [torch.load(folder / f"out/rank{rank}", weights_only=False) for rank in (0, 1)]
    return [(logged(history), weights) for history, weights in ranks]


def test_trainer_on_two_ranks(policy, rollouts, tmp_path):
    """Guards against ranks that each train a model of their own, as they do when the loss calls the
    model past its DDP wrapper, and against a mean over ranks where the loss is a sum."""
    recipe("hf_trainer", "accelerate")
    path, rows = rollout_file(tmp_path / "rollouts.jsonl", rollouts, policy, 20)
    expected = plain_loop(policy, rows)
    ranks = train_on_two_ranks("hf_trainer", policy, path, tmp_path)
    for _, weights in ranks:
        assert_same(ranks[0][0], weights, tmp_path / "out", expected)


# ---- TRL ----


def test_trl_takes_the_steps_of_the_plain_loop(policy, rollouts, tmp_path, monkeypatch):
    """Guards against what TRL does by itself: tokens made again from the text, an end token after
    completions that were cut off, KTO's own loss, and attention dropout that it overlooks."""
    trl_trainer = recipe("trl_trainer", "trl", "datasets")
    path, rows = rollout_file(tmp_path / "rollouts.jsonl", rollouts, policy, 21)
    for row in rows:
        row["completion_ids"] = row["completion_ids"][:5]  # cut off, and not what the text says
        row["logprobs"] = row["logprobs"][:5]
    write_rollouts(path, rows)
    trainer = trl_trainer.main(policy, path, str(tmp_path / "out"), bf16=False, **TRAINER)
    assert_same(logged(trainer.state.log_history), trainer.model.state_dict(), tmp_path / "out",
                plain_loop(policy, rows))


def test_trl_on_two_ranks(policy, rollouts, tmp_path):
    """Guards as test_trainer_on_two_ranks does; log mu is computed by both ranks, each its part."""
    recipe("trl_trainer", "trl", "datasets")
    path, rows = rollout_file(tmp_path / "rollouts.jsonl", rollouts, policy, 20)
    expected = plain_loop(policy, rows)
    ranks = train_on_two_ranks("trl_trainer", policy, path, tmp_path, bf16=False)
    for _, weights in ranks:
        assert_same(ranks[0][0], weights, tmp_path / "out", expected)


# ---- PEFT ----


def test_lora_takes_the_gradient_of_the_plain_loop(tiny, rollouts, tmp_path):
    """Guards against a mu that moves with the policy: after a step the model without its adapter
    still gives the log mu of the base model, and the gradient is that of a loop that stored it."""
    peft_lora = recipe("peft_lora", "peft")
    _, rows = rollout_file(tmp_path / "rollouts.jsonl", rollouts, tiny, 10)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    model = peft_lora.get_peft_model(base, peft_lora.LoraConfig(target_modules="all-linear")).eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    for step in range(3):
        expected = 0.0
        for row in rows:
            ids, mask = sequence(row)
            mu_logp = torch.zeros(ids.shape).masked_scatter(mask, torch.tensor(row["logprobs"]))
            logp = topr.token_logprobs(model(input_ids=ids).logits, ids)  # [1, time]
            loss, stats = topr.topr_loss(logp, mu_logp, torch.tensor([row["reward"]]), mask,
                                         count=len(rows))
            loss.backward()
            expected += loss.item()
        gradients = [p.grad for p in weights]
        model.zero_grad()
        assert peft_lora.backward(model, rows, micro_batch=4) == pytest.approx(expected, abs=1e-5)
        for p, gradient in zip(weights, gradients):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-5)
            p.data -= 10 * p.grad
        model.zero_grad()
    assert stats["log_ratio"].abs().item() > 0.1  # the policy has moved away from mu


def test_lora_trains_above_its_base(tmp_path):
    """Guards against an adapter that learns nothing, or is not in the model that is saved."""
    peft_lora = recipe("peft_lora", "peft")
    import train
    from data import load_task
    from engine import tasks
    from engine import measures, sampler

    base = train.base_policy(str(tmp_path), seed=0, steps=500, width=64, layers=2)

    def measure(name, split, count, out=""):
        settings = eval_settings(model=name, samples=16, max_new_tokens=40)
        model, tokenizer = sampler.load_model(name, settings, "cpu")
        task = load_task("apples")
        questions = tasks.load_questions(task, split, count, 0, tokenizer, settings)
        rows = sampler.sample_rollouts(model, tokenizer, questions, apples.grade, settings, out)
        return measures.measure(rows)["pass@1"]

    measure(base, "train", 256, str(tmp_path / "rollouts.jsonl"))
    peft_lora.main(base, tmp_path / "rollouts.jsonl", str(tmp_path / "out"), sequences=32,
                   learning_rate=3e-3)
    before, after = measure(base, "test", 128), measure(str(tmp_path / "out"), "test", 128)
    assert after["low"] > before["high"], (before, after)


# ---- plain PyTorch ----


def test_gru_takes_the_gradient_of_the_plain_loop():
    """Guards against a mask that takes the prompt in or leaves the end token out, and against
    micro-batches that change the gradient."""
    plain_pytorch = recipe("plain_pytorch")
    torch.manual_seed(0)
    model = plain_pytorch.GRU()
    ids, mask, reward = plain_pytorch.sample(model, 20)
    with torch.no_grad():
        mu_logp = topr.token_logprobs(model(ids), ids)  # [batch, time]
        model.head.weight.mul_(1.2)  # the policy has moved: weights of negatives are not 1
    expected = 0.0
    for row in range(20):
        written = ids[row, 1:].tolist()
        length = written.index(0) + 1 if 0 in written else len(written)
        logprobs = model(ids[row, : length + 1][None])[0].log_softmax(-1)  # [time, vocab]
        logp = torch.stack([logprobs[t, written[t]] for t in range(length)])  # [time]
        d = (logp - mu_logp[row, 1 : length + 1]).sum().item()
        right = written[:length].count(ids[row, 0].item()) >= 2
        assert reward[row] == (1 if right else -1) and mask[row].sum() == length
        weight = 1.0 if right else min(1.0, math.exp(d))
        expected = expected - reward[row] * weight * logp.mean() / 20
    expected.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss = plain_pytorch.backward(model, ids, mask, reward, mu_logp, micro_batch=6)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-5)


def test_gru_learns(capsys):
    """Guards against a recipe that runs and trains nothing."""
    recipe("plain_pytorch").main()
    words = capsys.readouterr().out.split()
    before, after = float(words[1]), float(words[3])
    assert after > before + 0.1


# ---- vLLM ----


@dataclasses.dataclass
class StandIn:
    """vLLM's LLM as far as the recipe uses it: a model of transformers, one token at a time."""

    model: str
    logprobs_mode: str = "raw_logprobs"

    def get_tokenizer(self):
        return AutoTokenizer.from_pretrained(self.model)

    def generate(self, prompts, sampling):
        model = AutoModelForCausalLM.from_pretrained(self.model).eval()
        return [self.output(model, prompt["prompt_token_ids"], sampling) for prompt in prompts]

    def output(self, model, prompt_ids, sampling):
        outputs = [self.completion(model, prompt_ids, sampling) for _ in range(sampling.n)]
        return types.SimpleNamespace(prompt_token_ids=prompt_ids, outputs=outputs)

    @torch.no_grad()
    def completion(self, model, prompt_ids, sampling):
        ids, logprobs = [], []
        while len(ids) < sampling.max_tokens and ids[-1:] != [2]:
            raw = model(torch.tensor([prompt_ids + ids])).logits[0, -1].log_softmax(-1)  # [vocab]
            processed = (raw / sampling.temperature).log_softmax(-1)  # [vocab]
            token = torch.multinomial(processed.exp(), 1).item()
            shown = raw if self.logprobs_mode == "raw_logprobs" else processed
            ids.append(token)
            logprobs.append({token: types.SimpleNamespace(logprob=shown[token].item())})
        text = self.get_tokenizer().decode(ids, skip_special_tokens=True)
        return types.SimpleNamespace(token_ids=ids, logprobs=logprobs, text=text,
                                     finish_reason="stop" if ids[-1:] == [2] else "length")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vllm_rollouts_fit_the_model(temperature, tiny, tmp_path, monkeypatch):
    """Guards against log mu of another distribution than pi's (train.py compares it with the
    starting weights), against tokens made again from the text and against a lost end token.
    vLLM cannot run here: a stand-in takes its place."""
    import train

    class SamplingParams(types.SimpleNamespace):
        def __init__(self, **settings):
            super().__init__(**settings | {"temperature": temperature})

    stand_in = types.SimpleNamespace(LLM=StandIn, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    torch.manual_seed(0)
    questions = [{"id": str(number), "question": row["question"], "gold": row["gold"]}
                 for number, row in zip(range(4), apples.questions("train"))]
    write_rollouts(tmp_path / "questions.jsonl", questions)
    monkeypatch.delitem(sys.modules, "vllm_rollouts", raising=False)
    path = tmp_path / "rollouts.jsonl"
    recipe("vllm_rollouts").main(tiny, tmp_path / "questions.jsonl", path, samples=4, max_tokens=10)
    rows = read_rollouts(path)
    assert len(rows) == 16 and {row["finish"] for row in rows} == {"stop", "length"}
    assert all((row["completion_ids"][-1] == 2) == (row["finish"] == "stop") for row in rows)
    log = train.train(train.Settings(model=tiny, rollouts=str(path), out=str(tmp_path / "out"),
                                     sequences=8, mu_tolerance=1e-3))
    assert abs(log[0]["d_min"]) < 1e-3 and abs(log[0]["d_max"]) < 1e-3


def test_vllm_grade():
    """Guards against a reward of 0, which weighs nothing, and against a guess without the words."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=None, SamplingParams=None))
    grade = recipe("vllm_rollouts").grade
    monkeypatch.undo()
    question = {"id": "a", "gold": "18"}
    assert grade(question, "6 * 3 = 18. The answer is 18.") == ("18", 1.0)
    assert grade(question, "The answer is 17 .") == ("17", -1.0)
    assert grade(question, "18") == (None, -1.0)
