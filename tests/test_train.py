"""The training loop by its own command line, at tiny size."""

import dataclasses
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import topr
import train
from conftest import ROOT, in_process, shell, torchrun
from engine.rollouts import read_rollouts, write_rollouts
from engine import batches, optim, run_folder, sampler
from engine.common import Problem

RUN = ["--optimizer", "adamw", "--learning-rate", "1e-3", "--sequences", "12", "--epochs", "2"]  # 5 steps an epoch, the last of 2


def trained(tiny, rollouts, out, *options, ranks=0):
    """Runs the command; returns (weights, log, first gradient)."""
    gradient = f"{out}-gradient.pt"
    code = (
        "import sys, torch, train\nfrom engine import parallel\n"
        "own, seen = torch.nn.utils.clip_grad_norm_, []\n"
        "def record(parameters, limit):\n"
        "    parameters = list(parameters)\n"
        "    if not seen and parallel.rank() == 0:\n"
        f"        torch.save([p.grad.clone() for p in parameters], {str(gradient)!r})\n"
        "    seen.append(1)\n"
        "    return own(parameters, limit)\n"
        "torch.nn.utils.clip_grad_norm_ = record\n"
        "try:\n"
        "    train.run_main(train.main)\n"
        "finally:\n"
        "    torch.nn.utils.clip_grad_norm_ = own\n")
    script = out.parent / f"{out.name}.py"
    script.write_text(code)
    command = [script, "--model", tiny, "--rollouts", rollouts, "--out", out, *RUN, *options]
    result = torchrun(ranks, *command) if ranks else in_process(*command)
    assert result.returncode == 0, result.stdout
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    return load_file(out / "model.safetensors"), log, torch.load(gradient)


def furthest(a, b):
    pairs = zip(a.values(), b.values()) if isinstance(a, dict) else zip(a, b)
    return max((x - y).abs().max().item() for x, y in pairs)


def test_the_same_update_for_any_number_of_ranks_and_micro_batches(tiny, rollouts, tmp_path):
    """The most reported bug of the field: a normaliser that changes with micro-batch, rank or padding."""
    weights, log, gradient = trained(tiny, rollouts, tmp_path / "one", "--micro-batch", 12)
    assert [entry["sequences"] for entry in log] == [12, 12, 12, 12, 2] * 2
    start = load_file(f"{tiny}/model.safetensors")
    assert furthest(weights, start) > 1e-3
    for name, ranks, options in (("micro1", 0, ["--micro-batch", 1]), ("micro3", 0, ["--micro-batch", 3]),
                                 ("apart", 0, ["--no-pack-prompts", "--tokens-per-pass", 100]),
                                 ("ranks2", 2, ["--micro-batch", 3])):
        other_weights, other_log, other_gradient = trained(tiny, rollouts, tmp_path / name, *options, ranks=ranks)
        assert furthest(gradient, other_gradient) < 1e-6, name
        assert furthest(weights, other_weights) < 1e-4, name
        for entry, other in zip(log[5:], other_log[5:]):  # the metrics too are of the whole step and all ranks
            for key in ("loss", "gradient_norm", "negative_weight", "negatives_liked", "d_mean", "d_positive", "d_min", "d_90", "positive_share"):
                assert other[key] == pytest.approx(entry[key], abs=2e-4), (name, key)


def test_speed_ups_change_nothing(tiny, rollouts, tmp_path, monkeypatch):
    """Ten steps with and without: prompts read once, the fused AdamW, the own backward pass of the log-softmax."""
    run = lambda name, **changes: (train.train(settings(tiny, rollouts, tmp_path / name, epochs=2, sequences=10, **changes)),
                                   load_file(tmp_path / name / "model.safetensors"))
    log, weights = run("fast")
    plain = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *given, fused, **options: plain(*given, foreach=False, **options))
    monkeypatch.setattr(topr.TokenLogProbs, "apply", lambda logits, targets: -torch.nn.functional.cross_entropy(
        logits, targets, reduction="none"))
    slow_log, slow_weights = run("slow", pack_prompts=False)
    assert len(log) == 10 and furthest(weights, slow_weights) < 1e-4
    assert log[0]["gradient_norm"] == pytest.approx(slow_log[0]["gradient_norm"], abs=1e-5)


def test_completions_of_a_prompt_stand_together():
    """Each unit once an epoch, prompts in random order, `together` of one prompt in a row and no more by design."""
    data = type("Data", (), dict(units=np.arange(600)[:, None], prompt_keys=np.arange(600) % 50))
    orders = [batches.epoch_order(data, seed, epoch, 4).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order) == list(range(600))
        assert all(len({unit % 50 for unit in order[i : i + 4]}) == 1 for i in range(0, 600, 4))
    assert orders[0] != orders[1] and orders[0] != orders[2]
    neighbours = sum(a % 50 == b % 50 for a, b in itertools.pairwise(batches.epoch_order(data, 0, 0, 1)))
    assert neighbours < 40


def test_dropout_does_not_touch_the_ratio(tmp_path):
    """GPT-2 has dropout: log pi of the untrained policy would not be log mu, and every weight be noise."""
    from test_eval import random_model

    model = random_model("gpt2")
    assert model.config.resid_pdrop > 0
    optim.prepare_model(train.Settings(gradient_checkpointing=True), model)
    packed = batches.pack([([1, 2, 3], [[4, 5, 6]])])
    assert topr.completion_logprobs(model, **packed).equal(topr.completion_logprobs(model, **packed))
    assert any(module.training for module in model.modules())


def test_left_padding_gives_the_same_gradient(tiny, rollouts):
    model, tokenizer = sampler.load_model(tiny, train.Settings(), "cpu")
    rows = read_rollouts(rollouts)[:6]
    gradients = []
    for left in (False, True):
        longest = max(len(row["prompt_ids"] + row["completion_ids"]) for row in rows) + 3
        place = lambda values, fill: ([fill] * (longest - len(values)) + values) if left else values + [fill] * (longest - len(values))
        tokens = [row["prompt_ids"] + row["completion_ids"] for row in rows]
        ids = torch.tensor([place(t, 5) for t in tokens])
        attention = torch.tensor([place([1] * len(t), 0) for t in tokens])
        mask = torch.tensor([place([0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"]), 0) for row in rows]).bool()
        mu = torch.zeros(ids.shape).masked_scatter(mask, torch.tensor([x for row in rows for x in row["logprobs"]]))
        logp = topr.completion_logprobs(model, ids, mask, attention_mask=attention)
        loss, stats = topr.topr_loss(logp, mu, torch.tensor([row["reward"] for row in rows]), mask)
        assert stats["log_ratio"].abs().max() < 1e-4
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert furthest(*gradients) < 1e-6


def settings(tiny, rollouts, out, **changes):
    return train.Settings(**{**dict(model=tiny, rollouts=str(rollouts), out=str(out), optimizer="adamw", learning_rate=1e-3,
                                    sequences=12), **changes})


def test_before_the_first_step_every_weight_is_one(tiny, rollouts, tmp_path, capsys):
    """"Old" log-probs that are not the sampler's: d at step 0 shows it."""
    log = train.train(settings(tiny, rollouts, tmp_path / "out", epochs=3))
    assert abs(log[0]["negative_weight"] - 1) < 1e-3 and max(-log[0]["d_min"], log[0]["d_max"]) < 1e-3
    assert "largest |log pi/mu|" in capsys.readouterr().out
    assert max(abs(log[-1]["d_min"]), abs(log[-1]["d_max"])) > 0.1  # mu stays where it was: the policy moves away from it


def test_logprobs_that_do_not_fit_are_refused(tiny, rollouts, tmp_path):
    rows = read_rollouts(rollouts)
    for row in rows:
        row["logprobs"] = [value / 2 for value in row["logprobs"]]  # as if sampled at another temperature
    write_rollouts(tmp_path / "bad.jsonl", rows)
    before = load_file(f"{tiny}/model.safetensors")
    with pytest.raises(Problem, match=r"\|log pi/mu\| is [0-9.]+ .*--mu file.*--mu start.*--mu-tolerance"):
        train.train(settings(tiny, tmp_path / "bad.jsonl", tmp_path / "out"))
    assert furthest(before, load_file(f"{tiny}/model.safetensors")) == 0
    for mu in ("file", "start"):
        train.train(settings(tiny, tmp_path / "bad.jsonl", tmp_path / mu, mu=mu))


def test_logprobs_of_another_policy_at_the_end_of_the_file(tiny, rollouts, tmp_path):
    """Two files joined: the first lines fit, the last do not."""
    rows = read_rollouts(rollouts) * 3
    for row in rows[-30:]:
        row["logprobs"] = [value - 2 for value in row["logprobs"]]
    write_rollouts(tmp_path / "joined.jsonl", rows)
    with pytest.raises(Problem, match="do not fit"):
        train.train(settings(tiny, tmp_path / "joined.jsonl", tmp_path / "out"))
    log = train.train(settings(tiny, tmp_path / "joined.jsonl", tmp_path / "sft", loss="sft"))  # it does not look at them
    assert log[0]["negative_weight"] == 0


def test_another_tokenizer_has_its_own_mu(tiny, rollouts, tmp_path):
    """The same text under another end token: kept log-probs of other tokens would be taken for these."""
    rows = [{name: row[name] for name in ("id", "prompt", "completion", "reward")} for row in read_rollouts(rollouts)]
    write_rollouts(tmp_path / "plain.jsonl", rows)
    model, tokenizer = sampler.load_model(tiny, train.Settings(), "cpu")
    model.save_pretrained(tmp_path / "other")
    tokenizer.eos_token = "▁Tom"
    tokenizer.save_pretrained(tmp_path / "other")
    for number, policy in enumerate((tiny, str(tmp_path / "other"))):
        log = train.train(settings(policy, tmp_path / "plain.jsonl", tmp_path / f"out{number}"))
        assert max(abs(log[0]["d_min"]), abs(log[0]["d_max"])) < 1e-4
    assert len(list(tmp_path.glob("plain.jsonl.mu-*"))) == 2


def read(model, rollouts, **changes):
    """read_data as train.py calls it."""
    model, tokenizer = sampler.load_model(model, train.Settings(), "cpu")
    settings = train.Settings(rollouts=str(rollouts), **changes)
    return batches.read_data(settings, model, tokenizer, torch.device("cpu"))


def test_pairs_have_one_prompt(tiny, rollouts, tmp_path):
    """DPO on a file in which one id has several prompts: answers to different prompts make no pair."""
    rows = [{**row, "id": "the same"} for row in read_rollouts(rollouts)]
    write_rollouts(tmp_path / "one.jsonl", rows)
    data = read(tiny, tmp_path / "one.jsonl", loss="dpo")
    better, worse = data.prompt_keys[data.units].T
    assert len(data.units) > 5 and (better == worse).all()


def test_many_ranks_share_prompts_too(tiny, rollouts, tmp_path):
    """Rows of completions must not shrink to one only because there are many ranks."""
    data = read(tiny, rollouts)
    data.pack, sizes = True, []
    for ranks in (1, 4):
        data.ranks = ranks
        bundles = batches.make_bundles(settings(tiny, rollouts, tmp_path), data, data.units)
        sizes.append(max(len(rows) for _, _, rows in bundles))
    assert sizes[0] == sizes[1] > 1


@pytest.mark.parametrize("options, words", [
    (["--epochs", "0"], "--epochs 0: 1 or more"), (["--learning-rate", "-1"], "--learning-rate -1.0: 0 or more"),
    (["--warmup", "-1"], "--warmup -1"), (["--grad-clip", "nan"], "--grad-clip nan"), (["--rounds", "2"], "--rounds needs --task"),
    (["--eval-every", "5"], "--eval-every needs --task"), (["--neg-limits", "1"], "two numbers are required"),
    (["--loss", "dpo", "--baseline", "0.5"], "no place in --loss dpo"), (["--shard"], "more than one process")])
def test_settings_that_cannot_work(tiny, rollouts, tmp_path, monkeypatch, options, words):
    """Found before anything is loaded, or at least before a weight moves."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", tiny, "--rollouts", rollouts, "--out", str(tmp_path / "out"), *options])
    with pytest.raises(Problem, match=words):
        train.main()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_mu_is_computed_once_and_stays(tiny, rollouts, tmp_path):
    """Re-anchoring mu on the current weights turns TOPR into naive REINFORCE unnoticed."""
    rows = [{name: row[name] for name in ("id", "prompt", "completion", "reward")} for row in read_rollouts(rollouts)]
    write_rollouts(tmp_path / "plain.jsonl", rows)
    log = train.train(settings(tiny, tmp_path / "plain.jsonl", tmp_path / "out", epochs=2))
    (kept,) = tmp_path.glob("plain.jsonl.mu-*")
    assert abs(log[0]["d_mean"]) < 1e-4 and max(abs(log[-1]["d_min"]), abs(log[-1]["d_max"])) > 0.1
    stamp = kept.read_bytes()
    again = train.train(settings(tiny, tmp_path / "plain.jsonl", tmp_path / "again", epochs=2))
    assert kept.read_bytes() == stamp and again[-1]["loss"] == log[-1]["loss"]
    train.train(settings(str(tmp_path / "out"), tmp_path / "plain.jsonl", tmp_path / "further"))  # another start, another mu
    assert len(list(tmp_path.glob("plain.jsonl.mu-*"))) == 2 and kept.read_bytes() == stamp


def test_a_file_made_by_hand(tiny, tmp_path):
    """Four fields, graded rewards, no ids, no logprobs."""
    lines = [dict(id=str(i), prompt="Tom has 3 apples . He finds 2 . How many ?", completion=f"The answer is {5 + i % 2} .",
                  reward=-0.3 if i % 2 else 2.5) for i in range(6)]
    (tmp_path / "hand.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = train.train(settings(tiny, tmp_path / "hand.jsonl", tmp_path / "out", sequences=3))
    assert len(log) == 2 and all(math.isfinite(entry["loss"]) for entry in log)


def test_rewards_of_zero_and_one_are_refused(tiny, tmp_path):
    lines = [dict(id=str(i), prompt="How many ?", completion="The answer is 5 .", reward=i % 2) for i in range(4)]
    (tmp_path / "zero.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(Problem, match="--map-rewards"):
        train.train(settings(tiny, tmp_path / "zero.jsonl", tmp_path / "out"))
    log = train.train(settings(tiny, tmp_path / "zero.jsonl", tmp_path / "out", map_rewards="-1,1"))
    assert log[0]["positive_share"] == 0.5


@pytest.mark.parametrize("loss", [*topr.TAPERS, "ppo", "dpo"])
def test_every_loss_trains(tiny, rollouts, tmp_path, loss):
    log = train.train(settings(tiny, rollouts, tmp_path / loss, loss=loss))
    assert log and all(math.isfinite(entry["loss"]) for entry in log)


def test_options_of_the_data_and_the_loss(tiny, rollouts, tmp_path, capsys):
    rewards = [row["reward"] for row in read_rollouts(rollouts)]
    log = train.train(settings(tiny, rollouts, tmp_path / "share", positive_share=0.1, sequences=len(rewards)))
    assert log[0]["positive_share"] == pytest.approx(0.1)
    log = train.train(settings(tiny, rollouts, tmp_path / "anna", anna_karenina=True, sequences=100))
    assert log[0]["sequences"] == len(topr.anna_karenina(read_rollouts(rollouts)))
    log = train.train(settings(tiny, rollouts, tmp_path / "limits", neg_limits="0.5,0.5"))
    assert log[-1]["negative_weight"] == pytest.approx(0.5)
    for changes, words in ((dict(baseline=2.0), "--baseline"), (dict(neg_limits="1,0"), "neg limits"),
                           (dict(positive_share=1.5), "--positive-share"), (dict(map_rewards="-1,1"), "only 0 and 1")):
        with pytest.raises(Problem, match=words):
            train.train(settings(tiny, rollouts, tmp_path / words.strip("-"), **changes))


def test_a_run_that_was_stopped_goes_on_exactly(tiny, rollouts, tmp_path, monkeypatch):
    """Resume that restores the weights and not the optimizer, the position or the random state."""
    whole = settings(tiny, rollouts, tmp_path / "whole", epochs=2, optimizer="adafactor", checkpoint_every=2)
    log = train.train(whole)
    broken = settings(tiny, rollouts, tmp_path / "broken", epochs=2, optimizer="adafactor", checkpoint_every=2)
    calls = []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return own(*arguments)

    own = train.backward
    monkeypatch.setattr(train, "backward", fail)
    with pytest.raises(KeyboardInterrupt):
        train.train(broken)
    assert [path.endswith("checkpoint-00000004") for path in run_folder.checkpoints(broken.out)] == [True]
    monkeypatch.setattr(train, "backward", own)
    with pytest.raises(Problem, match="learning_rate was 0.001 and is 0.002"):
        train.train(dataclasses.replace(broken, learning_rate=2e-3))
    # what changes only memory or speed may differ: after running out of memory one resumes with less
    broken = dataclasses.replace(broken, gradient_checkpointing=True, model=f"{tiny}/.")
    again = train.train(broken)
    assert furthest(load_file(tmp_path / "whole/model.safetensors"), load_file(tmp_path / "broken/model.safetensors")) == 0
    volatile = ("seconds", "tokens_per_second", "peak_memory_gib")
    assert [{k: v for k, v in e.items() if k not in volatile} for e in again] == \
           [{k: v for k, v in e.items() if k not in volatile} for e in log]
    assert len(open(tmp_path / "broken/log.jsonl").readlines()) == len(log)


def test_a_non_finite_step_stops_the_run(tiny, rollouts, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    with pytest.raises(Problem, match="step 0: .*gradient norm nan.*lines [0-9]+, "):
        train.train(settings(tiny, rollouts, tmp_path / "out"))


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_and_mistyped_options(script):
    result = shell(sys.executable, ROOT / script, "--help")
    assert result.returncode == 0 and "--model" in result.stdout
    result = in_process(ROOT / script, "--mod", "x")  # no abbreviations either
    assert result.returncode == 2 and "unrecognized arguments" in result.stdout


def test_user_errors_are_one_line(tiny, rollouts, tmp_path):
    for command, words in ((["--model", tiny, "--rollouts", "nowhere.jsonl"], "nowhere.jsonl"),
                           (["--model", tmp_path / "nothing", "--rollouts", rollouts], "cannot be loaded")):
        result = in_process(ROOT / "train.py", *command, "--out", tmp_path / "out")
        assert result.returncode == 2 and words in result.stdout and "Traceback" not in result.stdout, result.stdout
        assert len(result.stdout.strip().splitlines()) == 1, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2])
def test_a_signal_ends_the_step_first(tiny, rollouts, tmp_path, ranks):
    """SIGTERM: the step is finished, a checkpoint written, the exit code tells, the same command goes on."""
    script = tmp_path / "interrupted.py"
    script.write_text("import os, signal, train\nown = train.step_metrics\ncalls = []\n"
                      "def step_metrics(parts):\n    calls.append(1)\n    if len(calls) == 2 and not os.environ.get('CALM'):\n"
                      "        os.kill(os.getpid(), signal.SIGTERM)\n    return own(parts)\n"
                      "train.step_metrics = step_metrics\ntrain.run_main(train.main)\n")
    command = [script, "--model", tiny, "--rollouts", rollouts, "--out", tmp_path / "out", *RUN]
    run = lambda **calm: torchrun(ranks, *command, **calm) if ranks > 1 else shell(sys.executable, *command, **calm)
    result = run()
    assert "stopped by a signal after step 1" in result.stdout and result.returncode == (143 if ranks == 1 else 1), result.stdout
    assert (tmp_path / "out/checkpoint-00000002").is_dir()
    result = run(CALM="1")
    assert result.returncode == 0 and "going on from step 2" in result.stdout, result.stdout
    train.train(settings(tiny, rollouts, tmp_path / "whole", epochs=2))
    assert furthest(load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "whole/model.safetensors")) < 1e-5 * (ranks > 1) + 1e-9


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_small_updates_are_not_lost_in_bfloat16(optimizer):
    """300 steps at 5e-7 with a constant gradient: bfloat16 weights move in the mean as float32 weights do."""
    moved = {}
    for kind in ("float32", "bfloat16", "rounded to nearest"):
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        torch.manual_seed(0)
        model = torch.nn.Linear(256, 256, bias=False, dtype=torch.float32)
        model.weight.data = (torch.randn(256, 256) * 0.02).to(torch.bfloat16).to(dtype)
        start, gradient = model.weight.detach().float().clone(), torch.rand(256, 256) + 0.5
        run = train.Settings(optimizer=optimizer)
        steps = optim.make_optimizer(run, model)
        if kind == "rounded to nearest":
            steps.state.clear()  # as torch makes it, in the type of the weights
        for step in range(300):
            model.weight.grad = gradient.to(dtype)
            steps.step() if kind == "rounded to nearest" else optim.update(run, steps, step)
        moved[kind] = (model.weight.detach().float() - start).mean().item()
    assert moved["bfloat16"] == pytest.approx(moved["float32"], rel=0.1) and moved["float32"] < -1e-5
    assert abs(moved["rounded to nearest"]) < abs(moved["float32"]) / 10


def test_bfloat16_weights_train_and_resume(tiny, rollouts, tmp_path):
    log = train.train(settings(tiny, rollouts, tmp_path / "out", weights="bfloat16", precision="bfloat16", mu_tolerance=5.0))
    assert all(math.isfinite(entry["loss"]) for entry in log)
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.slow
def test_the_whole_job_in_rounds(tiny, tmp_path):
    """Sample, train, sample from the trained policy, train again; measured before and after; all of it reused."""
    command = [sys.executable, ROOT / "train.py", "--model", tiny, "--task", "apples", "--out", tmp_path / "job", "--rounds", 2,
               "--questions", 6, "--samples", 4, "--test-questions", 8, "--max-new-tokens", 25, "--eval-every", 1, *RUN]
    result = shell(*command)
    assert result.returncode == 0 and "maj@4" in result.stdout, result.stdout
    results = json.loads((tmp_path / "job/results.json").read_text())
    assert results["before"]["questions"] == 8 and len(results["curve"]) > 4
    weights = load_file(tmp_path / "job/model.safetensors")
    second = [json.loads(line) for line in open(tmp_path / "job/rollouts-2.jsonl")]
    first = [json.loads(line) for line in open(tmp_path / "job/rollouts-1.jsonl")]
    assert first[0]["sampling"]["weights"] != second[0]["sampling"]["weights"] and first[0]["id"].startswith("apples-train")
    result = shell(*command)
    assert result.returncode == 0 and result.stdout.count("reusing") == 4, result.stdout
    assert furthest(weights, load_file(tmp_path / "job/model.safetensors")) == 0


def test_the_curve_does_not_end_checkpointing(tiny, rollouts, tmp_path, monkeypatch):
    """Sampling calls eval(), which switches gradient checkpointing off, without a word."""
    own, checkpointed = train.backward, []

    def backward(policy, *rest):
        checkpointed.append(any(module.training for module in policy.model.modules()))
        return own(policy, *rest)

    def evaluate(model):
        model.eval()
        return {"pass@1": 0.5}

    monkeypatch.setattr(train, "backward", backward)
    train.train(settings(tiny, rollouts, tmp_path / "out", gradient_checkpointing=True,
                         eval_every=2), evaluate)
    assert len(checkpointed) > 3 and all(checkpointed)
