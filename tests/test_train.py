"""The training loop, by its own command line where that matters, at tiny size."""

import dataclasses
import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import topr
import train
from conftest import ROOT, furthest, in_process, torchrun, train_settings, weights_of
from engine import batches, losses, optim, packing, run_folder, sampler
from engine.common import Problem, read_json, write_json
from engine.rollouts import read_rollouts, write_rollouts


def read(model, rollouts, **changes):
    """read_data as train.py calls it."""
    settings = train_settings(model, rollouts, "", **changes)
    model, tokenizer = sampler.load_model(model, settings, "cpu")
    return batches.read_data(settings, model, tokenizer)


TWO_RANKS = """
import sys, train
from conftest import train_settings
tiny, rollouts, sparse, out = sys.argv[1:]
train.train(train_settings(tiny, rollouts, out + "/whole", epochs=2, tokens_per_pass=100))
train.train(train_settings(tiny, sparse, out + "/sparse", loss="sft", sequences=10))
train.run_main(lambda: None)
"""


@pytest.fixture(scope="module")
def two_ranks(tiny, rollouts, tmp_path_factory):
    """A folder with what two ranks trained, and a rollout file with one positive."""
    folder = tmp_path_factory.mktemp("two-ranks")
    rows = read_rollouts(rollouts)
    for number, row in enumerate(rows):
        row["reward"] = 1.0 if number == 7 else -1.0
    write_rollouts(folder / "sparse.jsonl", rows)
    (folder / "script.py").write_text(TWO_RANKS)
    result = torchrun(
        2,
        folder / "script.py",
        tiny,
        rollouts,
        folder / "sparse.jsonl",
        folder,
        PYTHONPATH=f"{ROOT}:{ROOT}/tests",
    )
    assert result.returncode == 0, result.stdout
    return folder


# ---- the same update, however it is computed ----


def test_the_same_update_for_any_number_of_ranks_and_passes(
    tiny, rollouts, two_ranks, tmp_path, monkeypatch
):
    """The most reported bug of the field: a normaliser that changes with micro-batch, rank or
    padding. And speed-ups that change something: prompts read once, the fused AdamW, the own
    backward pass of the log-softmax."""

    def run(name, **changes):
        train.train(train_settings(tiny, rollouts, tmp_path / name, epochs=2, **changes))
        return tmp_path / name

    whole, *others = run("whole"), run("passes", tokens_per_pass=100), two_ranks / "whole"
    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim,
        "AdamW",
        lambda *given, fused, **options: adamw(*given, foreach=False, **options),
    )
    monkeypatch.setattr(
        topr.TokenLogProbs,
        "apply",
        lambda logits, targets: (
            -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        ),
    )
    for known in (True, False):
        monkeypatch.setattr(packing, "abilities", lambda *_: (known, False))
        others.append(run(f"slow {known}"))

    log = run_folder.read_log(whole)
    assert [entry["sequences"] for entry in log] == [12, 12, 12, 12, 2] * 2
    assert furthest(tiny, whole) > 1e-3
    for folder in others:
        assert furthest(whole, folder) < 1e-4, folder
        for entry, other in zip(log, run_folder.read_log(folder), strict=True):
            for key in entry.keys() - {"seconds"}:  # of all ranks
                assert other[key] == pytest.approx(entry[key], abs=2e-4), (folder, key)


@pytest.mark.parametrize(
    "loss, changes",
    [("sft", {}), ("nsr", {}), ("topr", {"baseline": 1.0}), ("is", {"baseline": -1.0})],
)
def test_rows_without_a_gradient_count_in_n_alone(
    tiny, rollouts, tmp_path, monkeypatch, loss, changes
):
    """They cost a forward pass each; and left out of N, too, the others would count for more."""
    changes |= {"loss": loss, "optimizer": "adafactor"}
    own_passes, own_loss, seen = batches.micro_batches, losses.make_loss, []

    def micro_batches(*given):
        passes = own_passes(*given)
        seen.extend(batch.reward.tolist() for batch in passes)
        return passes

    monkeypatch.setattr(batches, "micro_batches", micro_batches)
    log = train.train(train_settings(tiny, rollouts, tmp_path / "without", **changes))
    assert len(set(itertools.chain(*seen))) == 1
    monkeypatch.setattr(
        losses,
        "make_loss",
        lambda settings, data: (*own_loss(settings, data)[:2], np.zeros(len(data.rows), bool)),
    )
    other = train.train(train_settings(tiny, rollouts, tmp_path / "with", **changes))
    assert len(set(itertools.chain(*seen))) == 2
    assert furthest(tmp_path / "without", tmp_path / "with") < 1e-6
    expected = [entry["loss"] for entry in other]
    assert [entry["loss"] for entry in log] == pytest.approx(expected, rel=1e-5)


def test_a_step_without_any_gradient(tiny, two_ranks, tmp_path):
    """Positives only, and a single one: most steps, and most ranks, have nothing to do."""
    log = train.train(
        train_settings(tiny, two_ranks / "sparse.jsonl", tmp_path, loss="sft", sequences=10)
    )
    assert sorted(entry["gradient_norm"] > 0 for entry in log) == [False] * 4 + [True]
    assert [entry["sequences"] for entry in log] == [10] * 5
    assert furthest(tmp_path, two_ranks / "sparse") < 1e-6 < furthest(tiny, tmp_path)


# ---- what a step takes ----


def test_completions_of_a_prompt_stand_together():
    """Each unit once an epoch, in a random order of groups of one prompt."""
    rows = [SimpleNamespace(prompt=(number % 50,)) for number in range(600)]
    data = batches.Data(rows, np.arange(600)[:, None], 0)
    orders = [
        batches.epoch_units(data, *seeds)[:, 0].tolist() for seeds in ((0, 0), (0, 1), (1, 0))
    ]
    for order in orders:
        assert sorted(order) == list(range(600))
        assert all(len({unit % 50 for unit in order[i : i + 4]}) == 1 for i in range(0, 600, 4))
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_prompts_are_compared_and_not_their_hashes(tiny, rollouts):
    """Two prompts with the same hash would have been packed as one."""
    rows = [SimpleNamespace(prompt=(token,)) for token in (-1, -2, -1, -2)]
    assert hash(rows[0].prompt) == hash(rows[1].prompt)
    groups = batches.by_prompt(SimpleNamespace(rows=rows), np.arange(4)[:, None])
    assert sorted(group[:, 0].tolist() for group in groups) == [[0, 2], [1, 3]]
    prompts = [row.prompt for row in read(tiny, rollouts).rows]
    assert len(set(map(id, prompts))) == len(set(prompts)) == 10


def test_a_question_is_its_id_and_its_prompt(tiny, rollouts, tmp_path):
    """With one id for several prompts: answers to different prompts make no pair for DPO, and
    Anna Karenina keeps a correct one of each."""
    rows = [{**row, "id": "the same"} for row in read_rollouts(rollouts)]
    write_rollouts(tmp_path / "one.jsonl", rows)
    data = read(tiny, tmp_path / "one.jsonl", loss="dpo")
    assert len(data.units) > 5
    assert all(data.rows[better].prompt is data.rows[worse].prompt for better, worse in data.units)
    for path in (rollouts, tmp_path / "one.jsonl"):
        kept = read(tiny, path, anna_karenina=True).units
        assert len(kept) == len(topr.anna_karenina(read_rollouts(rollouts))) < len(rows)


# ---- log mu ----


def test_mu_is_that_of_the_start_and_stays(tiny, rollouts, tmp_path, capsys):
    """ "Old" log-probs that are not the sampler's: d at step 0 shows it. Re-anchoring mu on the
    current weights turns TOPR into naive REINFORCE unnoticed. Kept log-probs of another policy, or
    of the same text under another end token, would be taken for these."""
    plain, fields = tmp_path / "plain.jsonl", ("id", "prompt", "completion", "reward")
    write_rollouts(plain, [{name: row[name] for name in fields} for row in read_rollouts(rollouts)])
    model, tokenizer = sampler.load_model(tiny, train.Settings(), "cpu")
    model.save_pretrained(tmp_path / "other")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.save_pretrained(tmp_path / "other")
    kept, losses = {}, []
    for number, (policy, path) in enumerate(
        (
            (tiny, rollouts),
            (tiny, plain),
            (tiny, plain),
            (tmp_path / "0", plain),
            (tmp_path / "other", plain),
        )
    ):
        log = train.train(train_settings(policy, path, tmp_path / f"{number}", epochs=3))
        assert abs(log[0]["negative_weight"] - 1) < 1e-3
        assert max(-log[0]["d_min"], log[0]["d_max"]) < 1e-3
        assert max(-log[-1]["d_min"], log[-1]["d_max"]) > 0.1  # the policy moves away from mu
        files = {file: file.read_bytes() for file in tmp_path.glob("plain.jsonl.mu-*")}
        assert kept.items() <= files.items() and len(files) == (0, 1, 1, 2, 3)[number]
        kept = files
        losses.append(log[-1]["loss"])
    assert losses[1] == losses[2] and "largest |log pi/mu|" in capsys.readouterr().out


def test_logprobs_that_do_not_fit_are_refused(tiny, rollouts, tmp_path):
    """Sampled at another temperature; or two files joined, of which the first lines fit."""
    rows = read_rollouts(rollouts)
    halved = [{**row, "logprobs": [value / 2 for value in row["logprobs"]]} for row in rows]
    path, words = tmp_path / "bad.jsonl", r"\|log pi/mu\| is [0-9.]+ .*--mu file.*--mu start"
    for content in (rows * 2 + halved, halved):
        write_rollouts(path, content)
        with pytest.raises(Problem, match=words):
            train.train(train_settings(tiny, path, tmp_path / "out"))
        assert not (tmp_path / "out/model.safetensors").exists()
    for changes in ({"mu": "file"}, {"mu": "start"}, {"loss": "sft"}):  # it needs no mu
        train.train(train_settings(tiny, path, f"{tmp_path}/{changes}", **changes))


# ---- settings ----


@pytest.mark.parametrize(
    "options, words",
    [
        ("--epochs 0", "--epochs 0: 1 or more"),
        ("--grad-clip nan", "--grad-clip nan"),
        ("--rounds 2", "--rounds and --eval-every need --task"),
        ("--loss dpo --baseline 0.5", "no place in --loss dpo"),
        ("--baseline 2", "--baseline 2.0"),
        ("--positive-share 1.5", "--positive-share 1.5: 0 to 1"),
        ("--shard", "more than one process"),
        ("--positive-share 0.1 --baseline 0.1", "no --baseline"),
        ("--map-rewards=-1,1", "only 0 and"),
        ("--rollouts nowhere.jsonl", "nowhere.jsonl"),
        ("--model nothing", "cannot be loaded"),
        ("--model= ", "need --model"),
        ("--rollouts= ", "nothing to learn from"),
        ("--task nothing", "--task nothing"),
        ("--mod x", "unrecognized arguments"),
        ("--out {tiny}", "is the starting model"),
        ("--model {tiny}/../random --out {tiny}/../random", "would be overwritten"),
    ],
)
def test_mistakes_are_one_line(tiny, rollouts, tmp_path, options, words):
    """Found before a weight moves."""
    before = weights_of(tiny)
    options = [option.strip().format(tiny=tiny) for option in options.split(" ")]
    result = in_process(
        ROOT / "train.py",
        "--model",
        tiny,
        "--rollouts",
        rollouts,
        "--out",
        tmp_path / "out",
        *filter(None, options),
    )
    assert result.returncode == 2 and words in result.stdout, result.stdout
    lines = [line for line in result.stdout.splitlines() if "/s" not in line]  # progress bars
    assert "Traceback" not in result.stdout and len(lines) <= 2  # argparse adds its usage
    assert not (tmp_path / "out/model.safetensors").exists() and furthest(before, tiny) == 0


def test_help_shows_a_scripts_own_options_first():
    """Python 3.14 keeps annotations elsewhere: all options would have been those of others."""
    text = in_process(ROOT / "train.py", "--help").stdout
    assert re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)[:2] == ["--task", "--samples"]


@pytest.mark.parametrize("rewards, map_rewards", [((2.5, -0.3), ""), ((1, 0), "-1,1")])
def test_a_file_made_by_hand(tiny, tmp_path, rewards, map_rewards):
    """Four fields, any rewards, no ids, no logprobs."""
    write_rollouts(
        tmp_path / "hand.jsonl",
        [
            dict(
                id=str(number),
                prompt="Tom has 3 apples . He finds 2 . How many ?",
                completion=f"The answer is {5 + number % 2} .",
                reward=rewards[number % 2],
            )
            for number in range(6)
        ],
    )
    log = train.train(
        train_settings(
            tiny, tmp_path / "hand.jsonl", tmp_path / "out", sequences=4, map_rewards=map_rewards
        )
    )
    assert len(log) == 2 and all(math.isfinite(entry["loss"]) for entry in log)
    assert map_rewards == "" or log[0]["positive_share"] == 0.5


@pytest.mark.parametrize(
    "changes",
    [
        *({"loss": loss} for loss in (*topr.TAPERS, "ppo", "dpo")),
        {"weights": "bfloat16", "precision": "bfloat16"},
        {"positive_share": 0.1},
    ],
)
def test_every_loss_trains(tiny, rollouts, tmp_path, changes):
    log = train.train(train_settings(tiny, rollouts, tmp_path, sequences=50, epochs=2, **changes))
    assert len(log) == 2 and all(math.isfinite(entry["loss"]) for entry in log)
    if "positive_share" in changes:
        assert log[0]["positive_share"] == pytest.approx(0.1)


# ---- resuming ----


def test_a_first_look_at_a_run(tiny, rollouts, tmp_path, capsys):
    """--max-steps takes the first steps alone. A folder from before an option existed, of whose
    name run.json holds nothing, is no other run."""
    settings = train_settings(tiny, rollouts, tmp_path, max_steps=2)
    log, path = train.train(settings), tmp_path / "run.json"
    assert [entry["step"] for entry in log] == [0, 1]
    with pytest.raises(Problem, match="another run: max_steps was 2 and is 0"):
        train.train_once(dataclasses.replace(settings, max_steps=0))
    older = read_json(path)
    del older["ratio"]
    write_json(path, older)
    assert train.train_once(settings) == log and "reusing" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_exactly(tiny, rollouts, tmp_path, monkeypatch):
    """Resume that restores the weights and not the optimizer, the position or the random state;
    two runs that share a folder and silently continue each other."""
    whole = train_settings(
        tiny, rollouts, tmp_path / "whole", epochs=2, optimizer="adafactor", checkpoint_every=2
    )
    broken = dataclasses.replace(whole, out=str(tmp_path / "broken"))
    log, own, calls = train.train(whole), train.backward, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return own(*arguments)

    monkeypatch.setattr(train, "backward", fail)
    with pytest.raises(KeyboardInterrupt):
        train.train(broken)
    (path,) = run_folder.checkpoints(broken.out)
    assert path.endswith("checkpoint-00000004")
    monkeypatch.setattr(train, "backward", own)
    for name, value in (("learning_rate", 2e-3), ("seed", 1), ("loss", "tis"), ("grad_clip", 2.0)):
        with pytest.raises(Problem, match=f"another run: {name} was .* and is {value!r}"):
            train.train(dataclasses.replace(broken, **{name: value}))
    # what is `free`, memory and speed alone, may differ: who ran out of it resumes with less
    again = train.train(dataclasses.replace(broken, gradient_checkpointing=True))
    assert furthest(tmp_path / "whole", tmp_path / "broken") == 0
    for entry, other in zip(again, log, strict=True):
        same = entry.keys() - {"seconds"}
        assert [entry[name] for name in same] == [other[name] for name in same]
    assert run_folder.read_log(broken.out) == again
    for name, value in (("rounds", 2), ("model", str(tmp_path / "whole"))):  # it has finished
        with pytest.raises(Problem, match=f"another run: .*{name} was"):
            train.train_once(dataclasses.replace(broken, **{name: value}))


def test_a_non_finite_step_stops_the_run(tiny, rollouts, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    with pytest.raises(Problem, match="step 0: .*gradient norm is nan.*lines [0-9]+, "):
        train.train(train_settings(tiny, rollouts, tmp_path / "out"))


# ---- the optimizer and the model ----


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_reaches_what_was_asked_for(schedule, tiny, rollouts, tmp_path):
    """A cosine that began with the warm-up was below the stated rate at the warm-up's end."""
    changes = {"epochs": 20, "warmup": 4, "schedule": schedule, "learning_rate": 1e-3}
    log = train.train(train_settings(tiny, rollouts, tmp_path / "out", max_steps=12, **changes))
    rates = [entry["learning_rate"] for entry in log]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    after = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates[4:] == pytest.approx(
        [1e-3 * (each if schedule == "cosine" else 1) for each in after]
    )


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_small_updates_are_not_lost_in_bfloat16(optimizer):
    """300 steps at 5e-7 with a constant gradient: bfloat16 weights move in the mean as float32
    weights do, where rounding to nearest would lose all of it."""
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = torch.nn.Linear(256, 256, bias=False)
        start = (torch.randn(256, 256) * 0.02).bfloat16()
        model.weight.data, gradient = start.to(dtype, copy=True), torch.rand(256, 256) + 0.5
        run = train.Settings(optimizer=optimizer, learning_rate=5e-7)
        steps = optim.make_optimizer(run, model)
        for step in range(300):
            model.weight.grad = gradient.to(dtype)
            optim.update(run, steps, step, 300)
        moved.append((model.weight.detach().float() - start.float()).mean().item())
    assert moved[1] == pytest.approx(moved[0], rel=0.1) and moved[0] < -1e-5


def test_the_curve_does_not_end_checkpointing(tiny, rollouts, tmp_path, monkeypatch):
    """Sampling calls eval(), which switches gradient checkpointing off, without a word."""
    own, checkpointed = train.backward, []

    def backward(settings, policy, *rest):
        checkpointed.append(any(module.training for module in policy.model.modules()))
        return own(settings, policy, *rest)

    monkeypatch.setattr(train, "backward", backward)
    train.train(
        train_settings(tiny, rollouts, tmp_path / "out", gradient_checkpointing=True, eval_every=2),
        lambda model: {"training": model.eval().training},
    )
    assert len(checkpointed) > 3 and all(checkpointed)


# ---- what a review found ----


def test_a_setting_that_is_none_is_compared(tiny, rollouts, tmp_path):
    """A run with a share was taken for one without."""
    run = train_settings(tiny, rollouts, tmp_path, positive_share=0.5, max_steps=1)
    train.train_once(run)
    with pytest.raises(Problem, match="positive_share was 0.5 and is None"):
        train.train_once(train_settings(tiny, rollouts, tmp_path, max_steps=1))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"loss": "dpo", "ratio": "mean"}, "--ratio has no place"),
        ({"loss": "sft", "ratio": "token"}, "--ratio has no place"),
        ({"model": "same", "out": "same"}, "is the starting model"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused_at_once(changes, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.jsonl").touch()
    with pytest.raises(Problem, match=words):
        train.job(train.Settings(**{"model": "m", "out": "o", "rollouts": "r.jsonl", **changes}))
