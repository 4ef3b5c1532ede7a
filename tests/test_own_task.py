"""A task of one's own: one file with questions(split) and grade(question, completion)."""

import json
from types import SimpleNamespace

import pytest

from conftest import ROOT, in_process
from data import load_task
from engine import tasks
from engine.common import Problem

TASK = '''
"""How many apples are left after some were found: small sums in the embedded policy's words."""

NAMES = {"train": ("Tom", "Max"), "test": ("Leo",)}


def questions(split):
    return [{"id": f"{split}-{name}-{a}-{b}", "gold": str(a + b),
             "prompt": f"{name} has {a} apples . He finds {b} . How many ?"}
            for name in NAMES[split] for a in range(2, 6) for b in (1, 2)]


def grade(question, completion):
    words = completion.split()
    answer = words[-2] if len(words) > 1 and words[-1] == "." else None
    return answer, 1.0 if answer == question["gold"] else -1.0
'''


def run(script, *options):
    return in_process(ROOT / script, *options)


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "my_task.py"
    path.write_text(TASK)
    return path


def test_sampled_trained_and_measured(tiny, task, tmp_path):
    """The same measures, the same rollout file, the same rounds as for a task of ours."""
    out = tmp_path / "rollouts.jsonl"
    result = run("eval.py", "--model", tiny, "--task", task, "--split", "train", "--samples", 4,
                 "--max-new-tokens", 25, "--out", out)
    assert result.returncode == 0 and "maj@4" in result.stdout, result.stdout
    rows = [json.loads(line) for line in open(out)]
    assert len(rows) == 16 * 4 and {row["split"] for row in rows} == {"train"}
    assert {row["reward"] for row in rows} == {1.0, -1.0}
    result = run("train.py", "--model", tiny, "--task", task, "--samples", 4, "--rounds", 2,
                 "--max-new-tokens", 25, "--optimizer", "adamw", "--learning-rate", "1e-3",
                 "--sequences", 16, "--out", tmp_path / "out")
    assert result.returncode == 0 and "8 held-out questions" in result.stdout, result.stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["after"]["questions"] == 8
    first, second = ([json.loads(line) for line in open(tmp_path / f"out/rollouts-{number}.jsonl")]
                     for number in (1, 2))
    same = sum(a["completion"] == b["completion"] for a, b in zip(first, second))
    assert same < len(first)  # every round has random numbers of its own


@pytest.mark.slow
def test_test_questions_are_not_trained_on(tiny, task, tmp_path):
    """eval.py's default split is the test split: figures of it would not be held out."""
    out = tmp_path / "rollouts.jsonl"
    run("eval.py", "--model", tiny, "--task", task, "--samples", 2, "--max-new-tokens", 25,
        "--out", out)
    result = run("train.py", "--model", tiny, "--rollouts", out, "--task", task, "--out",
                 tmp_path / "out")
    assert result.returncode == 2 and "--split train" in result.stdout, result.stdout
    assert "Traceback" not in result.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken, words", [
    (TASK.replace("def grade", "def graded"), "has no function grade"),
    (TASK.replace("def questions", "def asked"), "has no function questions"),
    (TASK.replace("words[-1]", "words[99]"), "'test-Leo-2-1'"),
    (TASK.replace("return answer, 1.0", "return 1.0"), "'test-Leo-2-1'"),
    (TASK.replace('"id"', '"name"'), 'needs an "id"'),
    ("import nothing_like_this", "nothing_like_this"), ("def :", "my_task.py")])
def test_a_broken_task_is_one_line(task, broken, words):
    task.write_text(broken)
    with pytest.raises(Problem) as error:
        ours = load_task(str(task))
        settings = SimpleNamespace(plain_prompt=True, system="", template_arguments="{}")
        for question in tasks.load_questions(ours, "test", 0, 0, None, settings):
            ours.grade(question, "The answer is 5 .")
    assert words in str(error.value) and len(str(error.value).splitlines()) == 1
