"""The recipes of docs/recipes: each takes the same steps as a plain loop over the same rollouts.

    python -m pytest -q tests/recipes.py      in an environment that also has trl and peft
"""

import dataclasses
import importlib
import sys
import types

import pytest
import torch
from conftest import ROOT, shell, torchrun
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel,
                          TrainingArguments)

import topr
from data import apples
from engine.rollouts import read_rollouts, write_rollouts

RECIPES = ROOT / "docs/recipes"
sys.path.insert(0, str(RECIPES))
RATE, STEP = 0.3, 8  # learning rate, and sequences of an optimizer step
# SGD: Adam makes whole steps out of gradients that are 0 but for rounding, GPT-2's key biases
TRAINER = {"use_cpu": True, "optim": "sgd", "learning_rate": RATE, "disable_tqdm": True,
           "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
           "train_sampling_strategy": "sequential"}
TRAINERS = ["hf_trainer", "trl_trainer"]


def recipe(name):
    for package in {"trl_trainer": ["trl"], "peft_lora": ["peft"]}.get(name, []):
        pytest.importorskip(package, reason=f"the recipe {name}.py needs {package}")
    return importlib.import_module(name)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def policy(request, tiny, tmp_path_factory):
    """A model with dropout, in a directory: Llama's is no nn.Dropout layer, GPT-2's is."""
    folder = str(tmp_path_factory.mktemp(request.param))
    model = AutoModelForCausalLM.from_pretrained(tiny)
    if request.param == "gpt2":
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(
            model.config.vocab_size, n_positions=256, n_embd=32, n_layer=2, n_head=2,
            bos_token_id=1, eos_token_id=2))
    else:
        model.config.attention_dropout = 0.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def rows_of(rollouts, count):
    """The first rollouts, cut off, so that neither the text nor an end token gives the tokens."""
    return [row | {"completion_ids": row["completion_ids"][:5], "logprobs": None}
            for row in read_rollouts(rollouts)[:count]]


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


@pytest.mark.parametrize("name, labels", [(TRAINERS[0], False), (TRAINERS[0], True),
                                          (TRAINERS[1], False)])
def test_trainers_take_the_steps_of_the_plain_loop(name, labels, policy, rollouts, tmp_path):
    """Guards against a gradient that is four times too large where the batch has labels; dropout,
    which each step switches on; a wrong N in a shorter last step (21 rollouts are steps of 8, 8 and
    5); and TRL's own loss, tokens and end tokens."""
    module, path, rows = recipe(name), tmp_path / "rollouts.jsonl", rows_of(rollouts, 21)
    write_rollouts(path, rows)
    more = {"collate": lambda rows: (batch := module.collate(rows))
            | {"labels": batch["input_ids"]}} if labels else {}
    kind = getattr(module, "KTOConfig", TrainingArguments)
    arguments = kind(str(tmp_path / "out"), **module.DEFAULTS | TRAINER)
    trainer = module.main(policy, path, arguments, **more)
    log, weights = plain_loop(policy, rows)
    taken = [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history
             if "grad_norm" in entry]
    torch.testing.assert_close(torch.tensor(taken), torch.tensor(log), rtol=1e-5, atol=1e-5)
    assert_saved(tmp_path / "out", weights)


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_on_two_ranks(name, policy, rollouts, tmp_path):
    """Guards against ranks that each train a model of their own, as they do when the loss calls the
    model past its DDP wrapper, and against a mean over ranks where the loss is a sum."""
    recipe(name)
    path, rows = tmp_path / "rollouts.jsonl", rows_of(rollouts, 20)
    write_rollouts(path, rows)
    options = TRAINER | {"gradient_accumulation_steps": 2, "output_dir": tmp_path / "out"}
    result = torchrun(2, RECIPES / f"{name}.py", policy, path, HF_HOME=str(tmp_path / "cache"),
                      *[f"--{option}={value}" for option, value in options.items()])
    assert result.returncode == 0, result.stdout
    assert_saved(tmp_path / "out", plain_loop(policy, rows)[1])


@pytest.mark.parametrize("name", [*TRAINERS, "peft_lora"])
def test_four_fields_are_enough(name, tiny, rollouts, tmp_path):
    """KeyError prompt_ids, for a file of the fields that suffice elsewhere; and rates that could not
    be given. LoRA: the adapter was not in the model that is saved."""
    recipe(name)
    path = tmp_path / "rollouts.jsonl"
    rows = read_rollouts(rollouts)
    write_rollouts(path, [{field: row[field] for field in ("id", "prompt", "completion", "reward")}
                          for row in rows])
    options = [f"--output_dir={tmp_path}/out", "--learning_rate=3e-3", "--use_cpu"]
    if name == "peft_lora":
        options = [tmp_path / "out", "3e-3", "16"]
    result = shell(sys.executable, RECIPES / f"{name}.py", tiny, path, *options,
                   HF_HOME=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stdout
    AutoTokenizer.from_pretrained(tmp_path / "out")
    before, after = (AutoModelForCausalLM.from_pretrained(folder)
                     for folder in (tiny, tmp_path / "out"))
    gains = [(log_pi(after, row)[0] - log_pi(before, row)[0]).sum().item() * row["reward"]
             for row in rows]
    assert sum(gains) > 0.1


def test_lora_takes_the_gradient_of_the_plain_loop(tiny, rollouts):
    """Guards against a mu that moves with the policy."""
    peft_lora = recipe("peft_lora")
    torch.manual_seed(0)
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
    (logp, mask), (mu_logp, _) = log_pi(model, rows[-1]), log_pi(mu, rows[-1])
    assert (logp - mu_logp)[mask].sum().abs() > 0.1  # the policy has moved away from mu


def test_gru_takes_the_gradient_of_whole_sequences_and_learns(capsys):
    """Guards against a mask that takes the prompt in or leaves the end token out, micro-batches that
    change the gradient, and a recipe that trains nothing."""
    gru = recipe("plain_pytorch")
    torch.manual_seed(0)
    model = gru.GRU()
    ids, mask, reward = gru.sample(model, 20)
    with torch.no_grad():
        mu_logp = topr.token_logprobs(model(ids), ids)  # [batch, time]
        model.head.weight.mul_(1.2)  # the policy has moved: weights of negatives are not 1
    expected = 0.0
    for row in range(20):
        written = ids[row, 1:].tolist()
        length = written.index(0) + 1 if 0 in written else len(written)
        logp = topr.token_logprobs(model(ids[row : row + 1]), ids[row : row + 1])[0, 1 : length + 1]
        d = (logp - mu_logp[row, 1 : length + 1]).sum().detach()
        right = written[:length].count(ids[row, 0].item()) >= 2
        assert reward[row] == (1 if right else -1) and mask[row].sum() == length
        weight = 1.0 if right else d.exp().clamp(max=1)
        expected = expected - reward[row] * weight * logp.mean() / 20
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = gru.backward(model, ids, mask, reward, mu_logp, micro_batch=6)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-5)
    gru.main()
    _, before, _, after, _ = capsys.readouterr().out.split()
    assert float(after) > float(before) + 0.1


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
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            yield types.SimpleNamespace(prompt_token_ids=ids, outputs=[
                self.completion(model, ids, sampling) for _ in range(sampling.n)])

    @torch.no_grad()
    def completion(self, model, prompt_ids, sampling):
        ids, logprobs = [], []
        while len(ids) < sampling.max_tokens and ids[-1:] != [2]:
            raw = model(torch.tensor([prompt_ids + ids])).logits[0, -1].log_softmax(-1)  # [vocab]
            processed = (raw / 0.7).log_softmax(-1)  # [vocab]
            token = torch.multinomial(processed.exp(), 1).item()
            shown = raw if self.logprobs_mode == "raw_logprobs" else processed
            ids.append(token)
            logprobs.append({token: types.SimpleNamespace(logprob=shown[token].item())})
        text = self.get_tokenizer().decode(ids, skip_special_tokens=True)
        return types.SimpleNamespace(token_ids=ids, logprobs=logprobs, text=text,
                                     finish_reason="stop" if ids[-1:] == [2] else "length")


def test_vllm_rollouts_fit_the_model(tiny, tmp_path, monkeypatch):
    """Guards against log mu of another distribution than pi's (here the temperature is 0.7), tokens
    made again from the text, a lost end token, and a reward of 0. vLLM cannot run here: a stand-in
    takes its place."""
    import train

    stand_in = types.SimpleNamespace(LLM=StandIn, SamplingParams=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    vllm_rollouts = recipe("vllm_rollouts")
    torch.manual_seed(0)
    questions = [{"id": str(number), "question": row["question"], "gold": row["gold"]}
                 for number, row in zip(range(4), apples.questions("train"))]
    write_rollouts(tmp_path / "questions.jsonl", questions)
    path = tmp_path / "rollouts.jsonl"
    vllm_rollouts.main(tiny, tmp_path / "questions.jsonl", path, samples=4, max_tokens=10)
    rows = read_rollouts(path)
    assert len(rows) == 16 and {row["finish"] for row in rows} == {"stop", "length"}
    assert all((row["completion_ids"][-1] == 2) == (row["finish"] == "stop") for row in rows)
    log = train.train(train.Settings(model=tiny, rollouts=str(path), out=str(tmp_path / "out"),
                                     sequences=8))
    assert abs(log[0]["d_min"]) < 1e-3 and abs(log[0]["d_max"]) < 1e-3
    question = {"id": "a", "gold": "18"}
    for text, graded in (("6 * 3 = 18. The answer is 18.", ("18", 1.0)), ("18", (None, -1.0)),
                         ("The answer is 17 .", ("17", -1.0))):
        assert vllm_rollouts.grade(question, text) == graded
