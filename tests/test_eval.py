"""The rollout file that eval.py writes, and the measures against independent computations."""

import dataclasses
import itertools
import json
import math
import random
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock

import eval as evaluation
from conftest import ROOT, apples_questions, in_process, shell, torchrun
from data import load_task
from engine import measures, sampler, tasks
from engine.common import Problem
from engine.measures import measure
from engine.rollouts import read_rollouts

APPLES = load_task("apples")


@pytest.fixture(scope="module")
def policy(tiny):
    return sampler.load_model(tiny, evaluation.Settings(), "cpu")


def sample(policy, tiny, out="", questions=6, grade=APPLES.grade, **changes):
    settings = evaluation.Settings(**{**dict(model=tiny, samples=2, max_new_tokens=20), **changes})
    questions = apples_questions(policy[1], settings, questions)
    return evaluation.sample_rollouts(*policy, questions, grade, settings, str(out))


# ---- the file ----


def eval_command(tiny, out, *options):
    return [
        ROOT / "eval.py",
        "--model",
        tiny,
        "--task",
        "apples",
        "--questions",
        13,
        "--samples",
        4,
        "--max-new-tokens",
        30,
        "--out",
        out,
        *options,
    ]


@pytest.mark.slow
def test_the_file_is_the_same_for_any_batch_size_and_number_of_ranks(tiny, tmp_path):
    """Byte for byte, for here rounding moves no token; the shape in which log mu is computed
    depends on the question alone."""
    files = []
    for name, ranks, size in (("a", 0, 64), ("b", 0, 1), ("c", 2, 7)):
        command = eval_command(tiny, tmp_path / f"{name}.jsonl", "--batch-size", size)
        result = torchrun(ranks, *command) if ranks else shell(sys.executable, *command)
        assert result.returncode == 0 and "pass@4" in result.stdout, result.stdout
        assert result.stdout.count("--- apples-test") == 3
        files.append((tmp_path / f"{name}.jsonl").read_bytes())
        assert json.loads((tmp_path / f"{name}.json").read_text())["questions"] == 13
    assert files[0] == files[1] == files[2] and files[0].count(b"\n") == 52
    assert not list(tmp_path.glob("*.part-*"))


RANKS = """
import sys
import eval as evaluation
from data import load_task
from engine import parallel, sampler, tasks
from engine.common import run_main
folder, out, seed = sys.argv[1:]

def main():
    parallel.start_ranks()
    settings = evaluation.Settings(samples=3, seed=int(seed), max_new_tokens=8)
    task = load_task("apples")
    model, tokenizer = sampler.load_model(folder, settings, "cpu")
    questions = tasks.load_questions(task, "train", 5, tokenizer, settings)
    rows = evaluation.sample_rollouts(model, tokenizer, questions, task.grade, settings, out)
    held = parallel.gather((len(rows), len(set(row["id"] for row in rows))))
    if parallel.rank() == 0:  # two ranks that print at once write into each other's line
        print(f"rows {held}")

run_main(main)
"""


@pytest.mark.slow
def test_only_the_first_rank_holds_the_rows(tiny, tmp_path):
    """Each of 8 ranks held all rows of MATH x 32: 8 GiB of each. Those of a finished file, too."""
    script, out = tmp_path / "rows.py", tmp_path / "rows.jsonl"
    script.write_text(RANKS)
    for _ in ("made", "read"):
        result = torchrun(2, script, tiny, out, 0)
        assert "rows [(15, 5), (0, 0)]" in result.stdout, result.stdout
    result = torchrun(2, script, tiny, out, 1)  # another seed: the first rank alone finds it
    assert "seed was 0 and is 1" in result.stdout, result.stdout
    assert result.returncode != 0 and "has died" not in result.stdout, result.stdout


def test_logprobs_are_those_of_the_plain_softmax(policy, tiny, tmp_path):
    """Whatever temperature, top-k and top-p chose the tokens; the end token counts when it was
    sampled. The row holds what its question has, and its split."""
    model, tokenizer = policy
    rows = sample(policy, tiny, tmp_path / "r.jsonl", temperature=0.5, top_k=10, top_p=0.9)
    assert rows == read_rollouts(tmp_path / "r.jsonl") and {r["split"] for r in rows} == {"test"}
    for row in rows:
        ids, start = row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"])
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [logp[t - 1, ids[t]].item() for t in range(start, len(ids))]
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4)
        assert (row["finish"] == "stop") == (ids[-1] == tokenizer.eos_token_id)
        text = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert text == row["completion"]
        assert row["question"] and "stop" not in row and "key" not in row


def test_a_broken_off_run_goes_on(policy, tiny, tmp_path):
    """Finished questions are kept, a torn line is dropped, nothing is sampled twice. The grader
    sees the row that is to be: whether it was cut off, too."""
    out, whole, graded, later = tmp_path / "r.jsonl", tmp_path / "whole.jsonl", [], []

    def dying(row, text):
        assert row["finish"] in ("stop", "length") and row["completion"] == text and row["gold"]
        graded.append(row["id"])
        if len(graded) == 9:
            raise KeyboardInterrupt
        return APPLES.grade(row, text)

    def counting(row, text):
        later.append(row["id"])
        return APPLES.grade(row, text)

    with pytest.raises(KeyboardInterrupt):
        sample(policy, tiny, out, 9, dying, batch_size=4)
    assert not out.exists()
    (part,) = tmp_path.glob("*.part-*")
    part.write_bytes(part.read_bytes()[:-10])  # and the machine lost power
    rows = sample(policy, tiny, out, 9, counting, batch_size=4)
    assert len(later) == 2 * 9 and len(rows) == 18  # the kept ones are graded again
    assert rows == sample(policy, tiny, whole, 9, batch_size=4)
    assert out.read_bytes() == whole.read_bytes() and not list(tmp_path.glob("*.part-*"))


def test_a_finished_file_is_reused_and_never_overwritten(policy, tiny, tmp_path, capsys):
    """The same command again costs nothing; other settings under its name are refused, in a line
    that says what differs. A grader that was mended grades the file again."""
    out = tmp_path / "r.jsonl"
    first, stamp = sample(policy, tiny, out), out.read_bytes()
    for same in ({}, dict(model=tiny + "/")):
        assert sample(policy, tiny, out, **same) == first
        assert "reusing" in capsys.readouterr().out
    for changes, named in (
        (dict(temperature=0.5), "temperature was 1.0 and is 0.5; questions was "),
        (dict(samples=4), "completions was 12 and is 24"),
        (dict(questions=5), "completions was 12 and is 10"),
        (dict(questions=4, samples=3), "questions was "),
        (dict(seed=3), "seed was 0 and is 3"),
    ):
        with pytest.raises(Problem, match=f"holds other rollouts: {named}"):
            sample(policy, tiny, out, **changes)
    assert out.read_bytes() == stamp
    again = sample(policy, tiny, out, grade=lambda *_: ("7", 1.0))
    assert again == [{**row, "answer": "7", "reward": 1.0} for row in first] == read_rollouts(out)


def test_a_prompt_without_room_is_named(policy, tiny):
    with pytest.raises(Problem, match="apples-test-0-0.*--max-new-tokens"):
        sample(policy, tiny, max_new_tokens=250)


def test_questions_that_no_file_can_hold_are_refused_first(policy):
    for own, words in (({1, 2}, "set"), ("\ud800", "surrogates")):
        question = dict(id="a", prompt="b", own=own)
        with pytest.raises(Problem, match=f"cannot be written as JSON: .*{words}"):
            evaluation.sample_rollouts(*policy, [question], APPLES.grade, evaluation.Settings())


# ---- the command ----


TASK = """
STOP = "."

def questions(split):
    return [{"id": str(n), "prompt": f"{n} + 1 ="} for n in range(4)]

def grade(row, completion):
    return completion, 1.0 if row.get("finish") == "length" else -1.0

def measure(rows):
    return {"long": [float(len(row["completion"]) > 3) for row in rows], "points": [0.5, 1.0]}
"""


def test_a_second_process_with_the_same_out_is_refused(tiny, tmp_path):
    """Both would do all of the work."""
    with FileLock(tmp_path / ".r.jsonl.lock"):
        result = in_process(
            ROOT / "eval.py", "--model", tiny, "--task", "apples", "--out", tmp_path / "r.jsonl"
        )
    assert result.returncode == 2 and "another process is at work there" in result.stdout


def test_measures_of_the_tasks_own(tiny, tmp_path):
    """They take the place of pass@k; STOP is one string; the completions are kept."""
    (tmp_path / "task.py").write_text(TASK)
    out = tmp_path / "r.jsonl"
    result = in_process(
        ROOT / "eval.py",
        "--model",
        tiny,
        "--task",
        tmp_path / "task.py",
        "--samples",
        2,
        "--max-new-tokens",
        9,
        "--out",
        out,
    )
    written = json.loads((tmp_path / "r.json").read_text())
    assert list(written) == ["settings", "questions", "long", "points", "greedy"], result.stdout
    assert written["points"]["mean"] == 0.75 and "pass@1" not in result.stdout
    assert len(read_rollouts(tmp_path / "r-greedy.jsonl")) == 4
    assert all("." not in row["completion"] for row in read_rollouts(out))
    in_process(
        ROOT / "eval.py",
        "--model",
        tiny,
        "--task",
        tmp_path / "task.py",
        "--samples",
        2,
        "--max-new-tokens",
        9,
        "--split",
        "train",
        "--out",
        tmp_path / "train.jsonl",
    )
    assert not (tmp_path / "train-greedy.jsonl").exists()  # nobody measures questions to train on
    broken = tasks.make_task("t", load_task(str(tmp_path / "task.py")))
    for value, named in (
        ("x", "t: measure or same_answer: ValueError"),
        (2.0, "from 0 to 1"),
        (math.nan, "from 0 to 1"),
    ):
        broken.measure = lambda rows: {"long": [value]}
        with pytest.raises(Problem, match=named):
            evaluation.measured(broken, [{}], 0)


def test_grading_an_existing_file(tmp_path):
    """Of any origin: without rewards, without what nobody knows of it."""
    rows = [
        dict(id="a", prompt="?", completion="so\nThe answer is 5 .", gold="5"),
        dict(id="b", prompt="?", completion="no idea", reward=1.0, gold="5"),
    ]
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [ROOT / "eval.py", "--grade", old, "--out", new]
    result = in_process(*command, "--task", "apples")
    assert result.returncode == 0 and "cut off" not in result.stdout, result.stdout
    graded = [(row["answer"], row["reward"]) for row in read_rollouts(new)]
    assert graded == [("5", 1.0), (None, -1.0)]
    assert json.loads((tmp_path / "new.json").read_text())["pass@1"]["mean"] == 0.5
    result = in_process(*command)
    assert result.returncode == 2 and "--task is needed" in result.stdout
    without_gold = json.dumps(dict(id="c", prompt="?", completion="The answer is 5 ."))
    for line, named in (
        ("{", "old.jsonl:1: not a JSON object"),
        ("{}", '"id" is missing'),
        (without_gold, "KeyError: 'gold'"),
    ):
        old.write_text(line)
        with pytest.raises(Problem, match=named):
            evaluation.regrade(read_rollouts(old, need_reward=False), APPLES)


# ---- what train.py measures ----


def test_before_and_after(policy, tiny, tmp_path, capsys):
    """The completions that were measured are kept and reused; a change has a paired interval."""
    import train

    settings = train.Settings(
        model=tiny, task="apples", out=str(tmp_path), samples=2, max_new_tokens=12, test_questions=5
    )
    before = evaluation.measure_once(settings, APPLES, tiny, "before")
    assert set(map(len, before.values())) == {5} and before["greedy"] != []
    rows = read_rollouts(tmp_path / "before.jsonl")
    assert len(rows) == 10 and "logprobs" not in rows[0] and rows[0]["sampling"]["seed"] == 1
    assert len(read_rollouts(tmp_path / "before-greedy.jsonl")) == 5
    capsys.readouterr()
    assert evaluation.measure_once(settings, APPLES, tiny, "before") == before
    assert capsys.readouterr().out.count("reusing") == 2
    other = dataclasses.replace(settings, max_new_tokens=6)
    with pytest.raises(Problem, match="before.jsonl holds other rollouts: max_new_tokens was 12"):
        evaluation.measure_once(other, APPLES, tiny, "before")
    point = evaluation.curve_point(settings, APPLES)(policy[0])
    assert list(point) == ["pass@1", "invalid"]
    after = {**before, "pass@1": [1.0] * 5}
    evaluation.report_change(settings, before, after, [[{"step": 0, "measured": point}]], 1.0)
    gain = measures.interval_text(measures.paired_interval(before["pass@1"], [1.0] * 5), "+")
    assert gain in capsys.readouterr().out


def test_questions_of_training_are_none_of_the_measurement(rollouts):
    """A task with one list for both splits reported what the model had seen."""
    import train

    def questions(split):
        return [{"id": f"{split}-{n}", "prompt": "?"} for n in range(3)] + shared

    task = SimpleNamespace(name="own", questions=questions)
    shared = [{"id": "both", "prompt": "?"}]
    with pytest.raises(Problem, match="own: 1 training questions are test questions .*'both'"):
        evaluation.check_overlap(train.Settings(), task)
    evaluation.check_overlap(train.Settings(questions=3), task)
    shared = [{"id": read_rollouts(rollouts)[0]["id"], "prompt": "?"}]
    with pytest.raises(Problem, match=f"{rollouts}: 1 training questions .*--split train"):
        evaluation.check_overlap(train.Settings(rollouts=rollouts), task)
    shared = []
    evaluation.check_overlap(train.Settings(), task)


# ---- measures ----


def test_pass_at_k_by_enumeration():
    for n in (1, 3, 6):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            expected = sum(any(i < right for i in subset) for subset in subsets) / len(subsets)
            assert measures.pass_at_k(n, right, k) == pytest.approx(expected)


def test_majority_by_enumeration():
    """Over many draws of k, not the first k; a tie counts its share; invalid answers do not
    vote."""
    rng = random.Random(0)
    for _ in range(20):
        answers = [rng.choice(["5", "6", "7", None]) for _ in range(7)]
        right = [answer == "5" for answer in answers]
        for k in (1, 2, 4, 7):
            expected = []
            for subset in itertools.combinations(answers, k):
                votes = Counter(a for a in subset if a is not None).most_common()
                best = [a for a, count in votes if count == votes[0][1]]
                expected.append(("5" in best) / len(best) if best else 0.0)
            got = measures.majority_at_k(answers, right, k, random.Random(1), 4000)
            assert got == pytest.approx(np.mean(expected), abs=0.04)


def test_votes_are_counted_before_anything_looks_at_the_reference():
    """Merging only right spellings let five right "18" beat three "20" and three "20.00"."""
    same = lambda a, b: float(a) == float(b)
    answers = ["18"] * 5 + ["20"] * 3 + [None] + ["20.00"] * 3
    votes, right = measures.group_answers(answers, same), [a == "18" for a in answers]
    assert votes == [0] * 5 + [1] * 3 + [None] + [1] * 3
    assert measures.majority_at_k(votes, right, 12, random.Random(0), 1) == 0.0
    assert measures.majority_at_k(answers, right, 12, random.Random(0), 1) == 1.0
    rows = [dict(id="q", reward=1.0 if a == "18" else -1.0, answer=a) for a in answers]
    assert measure(rows + rows[1:5], same_answer=same)["maj@16"] == [1.0]
    assert measures.group_answers([None, None]) == [None, None]
    assert measures.majority_at_k([None, None], [False, False], 2, random.Random(0), 1) == 0.0


def test_measures_are_values_of_questions():
    """In the order of the questions; what the rows do not tell is left out."""
    rows = [
        dict(id="b", reward=1.0, answer="5", finish="stop"),
        dict(id="b", reward=-1.0, answer=None, finish="length"),
        dict(id="a", reward=1.0, answer="7", finish="stop"),
        dict(id="a", reward=1.0, answer="7", finish="stop"),
    ]
    assert measure(rows) == {
        "pass@1": [0.5, 1.0],
        "invalid": [0.5, 0.0],
        "cut off": [0.5, 0.0],
        "pass@2": [1.0, 1.0],
        "maj@2": [1.0, 1.0],
    }
    del rows[3]["finish"]
    assert "cut off" not in measure(rows)
    assert measures.summary(measure(rows))["questions"] == 2


def test_shares_have_wilsons_interval():
    """The normal interval of 0 of 20 was [0, 0], of 1 of 20 it began below 0."""
    for right, n in ((0, 20), (1, 20), (7, 20), (20, 20), (1, 1)):
        p, found = right / n, measures.interval([True] * right + [False] * (n - right))
        for end in (found["low"], found["high"]):  # where p is 1.96 standard errors from the end
            assert abs(p - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), abs=1e-6)
        assert 0 <= found["low"] <= p + 1e-9 and p - 1e-9 <= found["high"] <= 1


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("p", [0.02, 0.05])
@pytest.mark.parametrize("samples, alike", [(1, 0.5), (16, 0.05), (16, 0.3), (16, 0.7)])
def test_intervals_cover(n, p, samples, alike):
    """95% intervals held the truth in as little as 57% of such cases; `alike`: correlation within
    a question."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(600):
        chances = rng.beta(p * (1 / alike - 1), (1 - p) * (1 / alike - 1), n)  # [questions]
        found = measures.interval(rng.binomial(samples, chances) / samples)
        covered += found["low"] <= p <= found["high"]
    assert covered / 600 > 0.88


def test_paired_intervals():
    """Shared difficulty cancels; equal pairs are not proof of no change; it covers."""
    before = np.linspace(0, 0.8, 50)
    found = measures.paired_interval(before, before + 0.1)
    assert found["mean"] == pytest.approx(0.1) and found["low"] > 0 and found["high"] < 0.2
    same = measures.paired_interval([0, 1] * 10, [0, 1] * 10)
    assert same["mean"] == 0 and same["low"] == -same["high"] < -0.05
    rng, covered = np.random.default_rng(0), 0
    for _ in range(600):
        ability = rng.random(40)
        before, after = rng.random(40) < ability * 0.5, rng.random(40) < ability * 0.7
        found = measures.paired_interval(before, after)
        covered += found["low"] <= 0.1 <= found["high"]
    assert covered / 600 > 0.93
