"""The experiments at tiny size, and what the pages say against the committed results."""

import importlib.util
import os
import shutil
import sys
import textwrap
import types

import pytest

import search
import train
import verifier
from conftest import ROOT, in_process, shell
from data import library, load_task
from engine import tasks
from engine.common import Problem, read_json, write_json
from engine.rollouts import read_rollouts, write_rollouts
from experiments import (
    common,
    long_apples,
    pretrained,
    queries,
    rates,
    run,
    scifact,
    shares,
    sums,
    verdicts,
)

RESULTS = str(ROOT / "experiments/results")
PAGE = (ROOT / "experiments/README.md").read_text()
VERDICTS = ("reproduces", "in part", "does not at this size")


@pytest.fixture
def tiny_world(tiny, rollouts, tmp_path, monkeypatch):
    """The tiny policy and its 50 rollouts for every base policy; ten questions, two rates."""
    monkeypatch.chdir(tmp_path)

    def prepare(seed, base):
        path = f"{common.folder_of(seed, base)}/rollouts.jsonl"
        rows = read_rollouts(rollouts)
        for number, row in enumerate(rows):  # DPO then has other pairs and steps for each seed
            row["reward"] = 1.0 if number % (3 + 6 * seed) == 0 else -1.0
        write_rollouts(path, rows)
        if not os.path.exists(f"{common.folder_of(seed, base)}/base"):
            shutil.copytree(tiny, f"{common.folder_of(seed, base)}/base")
        return f"{common.folder_of(seed, base)}/base", path

    small = {
        "sequences": 8,
        "questions": 4,
        "test_questions": 4,
        "max_new_tokens": 6,
        "eval_every": 1,
    }
    monkeypatch.setattr(train, "EMBEDDED", {**train.EMBEDDED, **small})
    monkeypatch.setattr(common, "LONG", {"task": long_apples.__file__})
    monkeypatch.setattr(common, "prepare", prepare)
    monkeypatch.setattr(common, "QUESTIONS", {"test": slice(0, 6), "validation": slice(6, 10)})
    monkeypatch.setattr(common, "PART", 10)
    in_this_process(monkeypatch)
    return tmp_path


def in_this_process(monkeypatch):
    def submit(settings, function, *job):
        value = function(*job)
        return types.SimpleNamespace(result=lambda: value)

    monkeypatch.setattr(common, "submit", submit)
    monkeypatch.setattr(common.compare, "__defaults__", ((1e-4, 1e-3), None))


def check(name, settings):
    """A result must survive JSON, which turns rates into strings; returns what came back."""
    finding = run.load(name)
    write_json(f"results/{name}.json", finding.run(settings))
    run.show(name, "results")
    if importlib.util.find_spec("matplotlib"):
        assert os.path.getsize(f"results/{name}.png") > 5000
    for _, measured, verdict, _ in run.claims("results"):
        assert verdict in VERDICTS and "nan" not in measured, measured
    return read_json(f"results/{name}.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, seeds",
    [
        ("collapse", 2),
        ("negatives", 1),
        ("shares", 2),
        ("importance", 1),
        ("rounds", 1),
        ("long", 2),
        ("rates", 1),
    ],
)
def test_a_finding_from_its_arms_to_its_claims(name, seeds, tiny_world, monkeypatch):
    monkeypatch.setattr(shares, "SHARES", (0.1, 0.5, 1.0))
    monkeypatch.setattr(rates, "GRIDS", {"10 million": ("largest", (1e-4, 1e-3))})
    monkeypatch.setattr(rates, "SHOWN", 1)
    for arm in check(name, common.Settings(seeds=seeds))["arms"].values():
        assert len(arm["pass@1"]) == seeds and all(0 <= value <= 1 for value in arm["pass@1"])
        scores = {rate: sum(scores) for rate, scores in arm.get("validation", {}).items()}
        assert not scores or scores[f"{arm['learning_rate']:g}"] == max(scores.values())


@pytest.mark.slow
def test_the_verifier_from_its_rates_to_its_claims(tiny, rollouts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_this_process(monkeypatch)
    monkeypatch.setattr(
        verdicts,
        "first_verifier",
        lambda seed: verifier.Settings(
            model=tiny,
            solutions=rollouts,
            test_solutions=rollouts + ".other",
            seed=seed,
            samples=2,
            out=f"seed{seed}",
            optimizer="adamw",
            max_new_tokens=6,
        ),
    )
    other = [{**row, "question": f"{row['question']} ?"} for row in read_rollouts(rollouts)]
    write_rollouts(rollouts + ".other", other)
    result = check("verdicts", common.Settings(seeds=2))
    assert len(result["arms"]["TOPR"]["accuracy"]) == len(result["arms"]["base"]["majority"]) == 2


@pytest.mark.slow
def test_the_search_task_from_its_rates_to_its_claims(tmp_path, monkeypatch):
    """No query that is measured may have been learned."""
    base_policy, read_splits = train.base_policy, search.read_splits
    monkeypatch.chdir(tmp_path)
    in_this_process(monkeypatch)
    monkeypatch.setattr(
        train,
        "base_policy",
        lambda folder, seed, task, **_: base_policy(folder, seed, task, steps=5, layers=1),
    )
    monkeypatch.setattr(
        search,
        "read_splits",
        lambda *given: {
            split: dict(list(topics.items())[:12]) for split, topics in read_splits(*given).items()
        },
    )
    monkeypatch.setattr(queries, "HELD_OUT", 6)
    result = check("queries", common.Settings(seeds=1))
    assert len(result["arms"]["TOPR"]["sampled"]) == 1
    _, task = queries.make_job(0, "validation")
    learned, measured = (
        {row["id"] for row in task.questions(split)} for split in ("train", "test")
    )
    assert len(learned) == len(measured) == 6 and not learned & measured


@pytest.mark.slow
def test_scifact_from_its_rollouts_to_its_claims(tiny, tmp_path, monkeypatch):
    """The classical expansion must help, and what is trained are the arms."""
    monkeypatch.chdir(tmp_path)
    in_this_process(monkeypatch)
    library.write_collection("library")
    monkeypatch.setattr(scifact, "LEARN", 6)
    monkeypatch.setattr(
        scifact,
        "ARMS",
        {  # the tiny policy earns nothing; a share needs positives
            name: {"loss": "topr"} if "loss" in arm else arm for name, arm in scifact.ARMS.items()
        },
    )
    with pytest.raises(Problem, match="--corpus DIR"):
        scifact.run(common.Settings())
    settings = common.Settings(pretrained=tiny, corpus="library", quick=True)
    result = check("scifact", settings)
    assert result["paired"]["recall@100"]["Rocchio minus no expansion"]["mean"] > 0
    monkeypatch.setattr(train, "train", None)
    assert check("scifact", settings) == result


def word_problems(name):
    """A task like svamp, whose grader finds a third of all completions right."""

    def questions(split):
        return [
            {
                "id": f"{split}-{number}",
                "question": f"Tom has {number} apples . How many ?",
                "gold": f"{number + 1}",
                "equation": f"+ {number} 1",
            }
            for number in range(30)
        ]

    def grade(question, completion):
        return ("1", 1.0) if len(completion) % 3 == 0 else (None, -1.0)

    return tasks.make_task(name, types.SimpleNamespace(questions=questions, grade=grade))


@pytest.mark.slow
def test_the_pretrained_model_from_its_demonstrations_to_its_claims(tiny, tmp_path, monkeypatch):
    """Demonstrations, validation and held-out questions must not overlap, and all of it resumes."""
    monkeypatch.chdir(tmp_path)
    in_this_process(monkeypatch)
    monkeypatch.setattr(pretrained, "load_task", word_problems)
    monkeypatch.setattr(pretrained, "SEEDS", 2)
    parts = {
        "demonstrations": slice(0, 14),
        "round 1": slice(14, 18),
        "round 2": slice(18, 22),
        "held out": slice(22, 26),
        "validation": slice(26, 30),
        "SVAMP": slice(0, 4),
    }
    monkeypatch.setattr(pretrained, "QUESTIONS", parts)
    settings = common.Settings(seeds=5, pretrained=tiny)
    ids = [row["id"] for part in parts for row in pretrained.read_questions(part)]
    assert len(ids) == len(set(ids)) == 34
    result = check("pretrained", settings)
    assert len(result["arms"][pretrained.TWICE]["SVAMP"]) == 2
    monkeypatch.setattr(train, "train", None)
    assert check("pretrained", settings) == result


@pytest.mark.slow
def test_the_sums_from_their_rollouts_to_their_claims(tiny, tmp_path, monkeypatch):
    """No question that is measured may have been learned, and all of it resumes."""
    monkeypatch.chdir(tmp_path)
    in_this_process(monkeypatch)
    ids = [row["id"] for split in sums.SPLITS for row in sums.questions(split)]
    assert len(ids) == len(set(ids)) == 400
    assert sums.grade({"gold": "12"}, "7 + 5 = 12.") == ("12", 1.0)
    assert sums.grade({"gold": "12"}, "12, or 13") == ("13", -1.0)
    assert sums.grade({"gold": "12"}, "a dozen") == (None, -1.0)
    monkeypatch.setattr(sums, "load_task", word_problems)
    monkeypatch.setattr(sums, "SEEDS", 2)
    monkeypatch.setattr(sums, "SPLITS", {"validation": slice(0, 4), "test": slice(4, 10)})
    settings = common.Settings(seeds=5, pretrained=tiny)
    result = check("sums", settings)
    assert len(result["arms"]["TOPR"]["pass@1"]) == 2
    monkeypatch.setattr(train, "train", None)
    assert check("sums", settings) == result


def test_arms_are_trained_once(tiny_world, monkeypatch):
    """A rerun that trains again would take its hour and a half again."""
    first = common.run_arm(0, {"loss": "topr"}, 1e-3, "test")
    monkeypatch.setattr(train, "train", None)
    assert common.run_arm(0, {"loss": "topr"}, 1e-3, "test") == first
    with pytest.raises(TypeError):
        common.run_arm(1, {"loss": "topr"}, 1e-3, "test")


def test_the_rate_comes_from_validation_questions_and_the_report_from_test_questions(monkeypatch):
    """A rate chosen on the test questions would flatter every arm."""
    in_this_process(monkeypatch)
    asked = []

    def arm_of(seed, arm, rate, split):
        asked.append((seed, split))
        return {"score": rate * (split == "validation"), "pass@1": 0.1 * seed, "right": [1, 2]}

    one = common.compare(common.Settings(seeds=3), arm_of, {"one": {"loss": "topr"}})["one"]
    assert one["learning_rate"] == 1e-3 and one["pass@1"] == [0.0, 0.1, 0.2] and "right" not in one
    assert {seed for seed, split in asked if split == "validation"} == {0, 1}
    asked.clear()
    quick = common.Settings(seeds=1, quick=True)
    one = common.compare(quick, arm_of, {"one": {"loss": "topr"}}, common.RATES)["one"]
    assert asked == [(0, "test")] and one["learning_rate"] == common.WORKING_RATE
    assert one["settings"] == {"loss": "topr", "epochs": 1}


def test_test_and_validation_and_training_questions_are_different():
    """What was trained on must not be measured."""

    def questions(split, count, seed):
        rows = tasks.load_questions(
            load_task("apples"), split, count, None, train.Settings(seed=seed)
        )
        return [row["question"] for row in rows]

    held_out = questions("test", common.QUESTIONS["validation"].stop, 1)
    assert len(held_out[common.QUESTIONS["test"]]) == 500 and len(set(held_out)) == 750
    assert not set(questions("train", 512, 0)) & set(held_out)


def test_a_data_set_has_its_share_of_positives(tiny_world):
    rows = read_rollouts(common.data_set(common.prepare(0, "small")[1], 0, 0.3))
    assert len(rows) == 10 and sum(row["reward"] > 0 for row in rows) == 3


def test_two_processes_work_through_the_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [common.submit(common.Settings(processes=2), divmod, *pair) for pair in ((7, 2), (9, 0))]
    assert jobs[0].result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        jobs[1].result()
    common.pool(2).shutdown()
    common.pool.cache_clear()


@pytest.mark.parametrize(
    "words, message",
    [
        (["colapse"], "unrecognized arguments: colapse"),
        (["shares", "--show"], "nowhere"),
        (["--show"], "there are no results"),
    ],
)
def test_a_mistake_is_one_line(words, message, tmp_path):
    result = in_process(ROOT / "experiments/run.py", *words, "--out", tmp_path / "nowhere")
    assert result.returncode == 2 and message in result.stdout, result.stdout
    assert "Traceback" not in result.stdout and not (tmp_path / "nowhere").exists()


# ---- the committed results, and what the pages say of them ----


def result_of(name):
    return read_json(f"{RESULTS}/{name}.json")


def test_the_page_has_the_tables_and_claims_of_the_results():
    rows = run.claims(RESULTS)
    assert run.as_markdown(rows) == open(f"{RESULTS}/claims.md").read()
    for claim, measured, verdict, _ in rows:
        assert f"\n| {claim} | {measured} | {verdict} |\n" in PAGE, claim
    for name in run.there(RESULTS):
        result = result_of(name)
        shown = textwrap.indent(run.tables(run.load(name), result).split("\n\n")[0], "    ")
        assert shown in PAGE or name == "rates", name
    for arm in result_of("rates")["arms"].values():
        assert f"{arm['pass@1'][0]:.3f}" in PAGE and f"({arm['negative_weight'][0]:.2f})" in PAGE


def test_the_tables_can_be_shown_again(tmp_path):
    kept = tmp_path / "kept"
    shutil.copytree(RESULTS, kept)
    (kept / "claims.md").unlink()
    result = shell(sys.executable, ROOT / "experiments/run.py", "--show", "--out", kept)
    assert result.returncode == 0 and "reproduces" in result.stdout, result.stdout
    assert (kept / "claims.md").read_text() == open(f"{RESULTS}/claims.md").read()


def peak(best):
    """pass@1 of all data sets and shares, highest at a share."""
    return {
        f"arms/{data}, share {share}/pass@1": 0.6 - abs(share - best)
        for data in shares.DATA
        for share in shares.SHARES
    }


YES, PART, NO = VERDICTS
LOW, WORKING = "along/0.0001/naive REINFORCE", "along/0.001/naive REINFORCE"
LOOSE = "arms/importance sampling, clipped loose"


@pytest.mark.parametrize(
    "name, number, expected, values",
    [
        (
            "collapse",
            0,
            YES,
            {f"{WORKING}/pass@1": 0.0, f"{WORKING}/invalid": 1.0, f"{LOW}/pass@1": 0.0},
        ),
        ("collapse", 0, NO, {f"{WORKING}/pass@1": 0.3, f"{LOW}/pass@1": 0.4}),
        ("collapse", 1, NO, {"arms/PPO/pass@1": 0.5}),
        ("collapse", 2, PART, {"arms/DPO/pass@1": 0.9}),  # DPO does well, TOPR is not best
        ("collapse", 3, NO, {"arms/TOPR/invalid": 0.9}),
        ("negatives", 0, NO, {"arms/positives only/pass@1": 0.9}),
        ("shares", 0, YES, peak(0.1)),
        ("shares", 1, PART, peak(0.33)),
        ("shares", 0, NO, peak(1.0)),
        ("importance", 0, YES, {f"{LOOSE}/pass@1": 0.05}),
        ("importance", 0, NO, {f"{LOOSE}/pass@1": 0.99, f"{LOOSE}/invalid": 0.0}),
        ("rounds", 1, YES, {"arms/TOPR, Anna Karenina/pass@1": 0.99}),
        ("rounds", 2, NO, {"arms/five times larger, positives only/pass@1": 0.99}),
        ("verdicts", 0, NO, {"arms/TOPR/accuracy": 0.1}),
        ("queries", 0, NO, {"arms/TOPR/sampled": 0.0}),
    ],
)
def test_verdicts_follow_from_the_numbers(name, number, expected, values):
    """A verdict that does not depend on the numbers would say "reproduces" for ever."""
    result = result_of(name)
    for path, value in values.items():
        *way, last = path.split("/")
        part = result
        for step in way:
            part = part[step]
        part[last] = [value] * 5
    _, _, verdict = list(run.load(name).claims(result))[number]
    assert verdict == expected


def test_the_lesson_has_the_numbers_of_figure_5():
    passed = common.by_arm(result_of("shares"), "pass@1")
    at = {share: f"{passed[f'10%, share {share}'].mean():.3f}" for share in (0.1, 0.33, 1.0)}
    assert (
        f"reaches a pass@1 of {at[0.1]}, positives only {at[1.0]}, and TOPR with share 0.33 "
        f"{at[0.33]}"
    ) in " ".join((ROOT / "README.md").read_text().split())
