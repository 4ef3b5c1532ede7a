"""What the README and its fellows say is run or checked here: commands, options, links, quoted
lines, code blocks, numbers."""

import dataclasses
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import topr
import train
from conftest import ROOT, eval_settings, shell
from data import load_task, maths
from engine import tasks
from engine.common import option_name, parse
from experiments import run as experiments
from test_mutants import MUTANTS, load
from test_topr import A, F, tensors

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "data/README.md",
    "experiments/README.md",
    "docs/pitfalls.md",
    "docs/log.md",
    "docs/tasks.md",
    "docs/performance.md",
    "docs/versions.md",
    "docs/recipes/README.md",
)
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
README = TEXTS["README.md"]
PROSE = {page: re.sub(r"```.*?```", "", text, flags=re.DOTALL) for page, text in TEXTS.items()}
WORDS = {
    "train.py": (),
    "eval.py": (),
    "verifier.py": (),
    "search.py": (),  # beside the options
    "experiments/run.py": experiments.ALL,
    "data/maths.py": [*maths.TASKS, "NAME"],
}
SETTINGS = {
    script: importlib.import_module(script[:-3].replace("/", ".")).Settings for script in WORDS
}
OF_OTHERS = set(
    "nproc-per-node nnodes rdzv-backend rdzv-endpoint max-restarts deps output_dir "
    "learning_rate".split()
)


def section(title):
    return README.split(title)[1].split("\n## ")[0]


# ---- commands, options, links ----


def commands():
    for page, text in PROSE.items():
        lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
        for command in lines + re.findall(r"`([^`\n]+)`", text):
            if re.match(r"(torchrun|python) .*\.py", command):
                yield page, command


@pytest.mark.parametrize("page, command", sorted(set(commands())))
def test_every_command_is_understood(page, command, monkeypatch):
    """A renamed script or option stayed in the text."""
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).exists()
    if script in SETTINGS:
        rest = words[words.index(script) :]
        monkeypatch.setattr(sys, "argv", [word for word in rest if word not in WORDS[script]])
        parse(SETTINGS[script])


@pytest.mark.parametrize("page", PAGES)
def test_every_option_exists(page):
    known = {
        option_name(field).strip("-")
        for kind in SETTINGS.values()
        for field in dataclasses.fields(kind)
    }
    found = set(re.findall(r"(?<![\w-])--(?:no-)?([a-z][\w-]*)", PROSE[page]))
    assert found <= known | OF_OTHERS


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_exist(page):
    for link, anchor in re.findall(r"\]\((?!https:)([^)#\s]*)(?:#([^)\s]*))?\)", PROSE[page]):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text().lower(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]


def test_the_readme_is_short_and_its_first_commands_stay():
    assert len(README.split()) <= 2500
    assert "\n    torchrun train.py\n" in README
    assert "\n    pip install -r requirements.txt\n    python -m pytest -q\n" in README


# ---- quoted lines, code blocks ----


@pytest.mark.parametrize("page", ["README.md", "docs/pitfalls.md"])
def test_functions_hold_the_lines_quoted_from_them(page):
    """`function`: `line`, or two cells of a table: functions keep their names, lines move."""
    quotes = re.findall(r"`(\w[\w.]*)\.(\w+)`(?:: | \| )`([^`]+)`", PROSE[page])
    assert len(quotes) >= 9
    for module, name, line in quotes:
        function = getattr(importlib.import_module(module), name)
        assert line in inspect.getsource(function), f"{name} does not hold {line!r}"


TASK, *EXAMPLES = sorted(re.findall(r"```python\n(.*?)```", README, re.DOTALL))


@pytest.mark.parametrize("block", EXAMPLES)
def test_python_blocks_print_what_they_say(block):
    result = shell(sys.executable, "-c", block)
    assert result.stdout.splitlines() == re.findall(r"print\(.*\)  # (.*)", block)


def test_the_task_is_one(tmp_path):
    """Its questions get prompts, no question is in both splits, and its grader tells right from
    wrong from invalid."""
    (tmp_path / "my_task.py").write_text(TASK)
    task = load_task(str(tmp_path / "my_task.py"))
    rows = [
        row
        for split in ("train", "test")
        for row in tasks.load_questions(task, split, 0, None, eval_settings())
    ]
    assert len({row["id"] for row in rows}) == 1250
    gold = rows[0]["gold"]
    assert rows[0]["prompt"].startswith(task.EXAMPLES)
    for text, graded in (
        (f"The answer is {gold}.", (gold, 1.0)),
        (gold, (None, -1.0)),
        ("The answer is apple.", ("apple", -1.0)),
    ):
        assert task.grade(rows[0], text) == graded


# ---- numbers ----


def test_every_logged_number_is_explained():
    """docs/log.md forgot a number, or explained one that is gone."""
    part = {"loss": 0, "log_ratio": [0], "weight": [1], "advantage": [1]}
    logged = set(train.step_metrics([[part]], True))
    logged |= set(re.findall(r'"(\w+)": ', inspect.getsource(train.train)))
    rows = re.findall(r"^\| (`.*?) \|", TEXTS["docs/log.md"], re.MULTILINE)
    assert logged == {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_the_table_of_losses_is_that_of_the_code():
    for name, taper in topr.TAPERS.items():
        (row,) = re.findall(rf"^    {name} .*", README, re.MULTILINE)
        assert taper.ratio in row or not taper.needs_mu
        assert row.count("pi/mu") == sum(low < high for low, high in (taper.pos, taper.neg))


def test_the_wrong_numbers_are_what_one_gets():
    """The pitfalls' numbers, from the right loss and from the broken ones of test_mutants."""

    def run(example, mutant=None, rows=slice(None)):
        logp, mu_logp, reward, mask = tensors(example, padding=0.0)
        module = load(MUTANTS[mutant]) if mutant else topr
        loss, stats = module.topr_loss(logp[rows], mu_logp[rows], reward[rows], mask[rows])
        gradient = torch.autograd.grad(loss, logp)[0][-1, 0].item()
        return loss.item(), stats["weight"][-1].item(), gradient

    long = {"rewards": [-1], "logps": [[-1.01] * 400], "mus": [[-1.0] * 400]}
    parts = run(F, rows=slice(0, 3))[0] + run(F, rows=slice(3, 4))[0]
    numbers = [
        run(long)[1],
        run(long, "ratio divided by length")[1],
        *run(A),
        run(F)[0],
        parts / 2,
        *run(A, "weights not detached")[::2],
        run(A, "mean over tokens of the batch")[0],
    ]
    text = section("## 5. ") + TEXTS["docs/pitfalls.md"]
    assert [number for number in numbers if f"{number:.6f}" not in text] == []


def test_the_claims_are_those_of_the_results():
    claims = (ROOT / "experiments/results/claims.md").read_text()
    measured = section("## 4. ")
    for claim, verdict in re.findall(r"^\| ([A-Z].*?) \|.* \| (.*) \|$", measured, re.MULTILINE):
        assert re.search(rf"\| {claim}.* \| {verdict} \|", claims), claim
    text = section("## 2. ") + measured + section("## When to use")
    numbers = re.findall(r"[+-]?\d\.\d{3}(?: ± \d\.\d{3})?", text)
    assert [number for number in numbers if number not in claims] == []


# ---- CONTRIBUTING ----

DIFFS = re.findall(r"```diff\n(.*?)```", TEXTS["CONTRIBUTING.md"], re.DOTALL)
CHECKS = (
    "import sys, train; sys.argv = ['', '--loss', 'half']; "
    "print(train.topr.TAPERS[train.parse(train.Settings).loss].neg == (0, 0.5))",
    "from data import load_task; task = load_task('mine'); "
    "print(task.grade(next(iter(task.questions('test'))), 'The answer is 7.') == ('7', 1.0))",
)


@pytest.mark.parametrize("diff, check", list(zip(DIFFS, CHECKS, strict=True)))
def test_the_diffs_of_contributing_apply_and_work(diff, check, tmp_path):
    for name in ("data", "engine"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "data/mine").mkdir()
    (tmp_path / "data/mine/test.jsonl").write_text(
        '{"id": "a", "question": "3 + 4 = ?", "gold": "7"}\n'
    )
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    result = shell(sys.executable, "-c", check, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.stdout == "True\n"
