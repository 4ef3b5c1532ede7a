"""What the README and its fellows say is run or checked here: code blocks, commands, names, links,
quoted lines, numbers."""

import contextlib
import importlib
import inspect
import io
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from test_mutants import MUTANTS, load
from test_topr import A, F, tensors

import eval as evaluation
import search
import topr
import train
import verifier
from conftest import ROOT, shell
from data import maths, load_task
from engine import rollouts, tasks
from engine.common import parse
from experiments import run as experiments

PAGES = ("README.md", "CONTRIBUTING.md", "data/README.md", "experiments/README.md",
         "docs/pitfalls.md", "docs/log.md", "docs/tasks.md", "docs/performance.md")
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
README = TEXTS["README.md"]
PROSE = {page: re.sub(r"```.*?```", "", text, flags=re.DOTALL) for page, text in TEXTS.items()}
SETTINGS = {"train.py": train.Settings, "eval.py": evaluation.Settings,
            "verifier.py": verifier.Settings, "search.py": search.Settings,
            "experiments/run.py": experiments.Settings, "data/maths.py": maths.Settings,
            "data/rollouts.py": rollouts.ExportSettings}
WORDS = {"experiments/run.py": set(experiments.ALL), "data/maths.py": set(maths.TASKS) | {"NAME"}}
MODULES = [importlib.import_module(name) for name in (
    "topr", "train", "eval", "verifier", "search", "experiments.run", "experiments.common",
    "experiments.shares", "engine.batches", "engine.optim", "engine.bm25", "data.maths",
    "engine.tasks", "engine.rollouts")]
OF_OTHERS = {"json.loads", "generate", "--max-restarts 3", "--nproc-per-node 8", "chosen",
             "rejected", "label", "features", "detach", "model.train()",
             'datasets.load_dataset("json", data_files=...)',
             "corpus.jsonl", "queries.jsonl", "qrels/*.tsv"}
FILES = {"log.jsonl", "run.json", "before.json", "after.json", "results.json"}  # of a run
OF_THE_READER = ("runs/", "FILE.mu-", "data/mine/", "data/NAME/", "my_task.py", "answers.jsonl",
                 "loop.py")


# ---- commands, options, names, links ----


def commands():
    """(page, command) of every command line, indented or in backticks."""
    for page, text in PROSE.items():
        lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
        for command in lines + re.findall(r"`([^`\n]+)`", text):
            if re.match(r"(torchrun|python) ", command):
                yield page, command


@pytest.mark.parametrize("page, command", sorted(set(commands())))
def test_every_command_is_understood(page, command):
    """A renamed script or option stayed in the text."""
    words = shlex.split(command)
    if words[1] == "-c":
        return  # test_the_exercises_have_answers runs these
    place = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    if place is None:
        assert words[1:3] == ["-m", "pytest"], command
        return
    script, rest = words[place], words[place + 1 :]
    assert (ROOT / script).exists(), script
    for word in words[1:place]:
        assert not word.startswith("-") or word.startswith(("--n", "--rdzv", "-m")), command
    if rest[:1] in (["ask"], ["solutions"], ["export"]):
        return  # no options: test_search, test_maths and test_data run them
    if script in SETTINGS:
        while rest and rest[0] in WORDS.get(script, ()):
            rest.pop(0)
        parse(SETTINGS[script], rest)
    else:  # a test's own script or test file names its words and options
        text = (ROOT / script).read_text()
        for word in rest:
            assert word.strip("-").replace("-", "_") in text.replace("-", "_"), command


def test_the_two_commands_of_the_beginning_stay():
    assert "\n    torchrun train.py\n" in README
    assert "\n    pip install -r requirements.txt\n    python -m pytest -q\n" in README


@pytest.mark.parametrize("page", PAGES)
def test_every_name_in_backticks_exists(page):
    """A file, option, function, setting, task, logged number or field, or a line quoted above."""
    folder, text = (ROOT / page).parent, PROSE[page]
    lines = {line for _, line in quotes(text)}
    options = {name for kind in [*SETTINGS.values(), search.Ask] for name in fields_of(kind)}
    known = {*options, *fields_of(topr.Taper), *inspect.signature(topr.topr_loss).parameters,
             *topr.TAPERS, *tasks.OURS, *experiments.ALL, *tasks.OPTIONAL, "questions", "grade"}
    known |= {"vllm", "measured", "messages", "half", "stop", "length"} | FILES
    for file in ("train.py", "eval.py", "data/rollouts.py", "data/maths.py"):
        known |= set(re.findall(r'"(\w+)"', (ROOT / file).read_text()))
    for token in set(re.findall(r"`([^`\n]+)`", text)) - lines - OF_OTHERS:
        first = token.split()[0]
        if first in ("python", "torchrun") or first in known:
            continue
        if first.startswith("--"):
            for word in re.findall(r"(?<!\S)--([\w-]+)", token):
                assert word.replace("-", "_").removeprefix("no_") in options | {"help"}, token
            continue
        exists = (folder / first).exists() or (ROOT / first).exists()
        assert exists or first.startswith(OF_THE_READER) or function_named(first), token


def fields_of(kind):
    return set(vars(kind).get("__dataclass_fields__", {}))


def function_named(name):
    """`topr.topr_loss`, `engine.batches.make_mu`, `batches.pack`, or a name in one of MODULES."""
    module, _, last = name.rpartition(".")
    for candidate in MODULES:
        names = ("", candidate.__name__, candidate.__name__.rpartition(".")[2])
        if module in names and hasattr(candidate, last):
            return getattr(candidate, last)
    with contextlib.suppress(ImportError, ValueError):
        return getattr(importlib.import_module(module), last, None)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_exist(page):
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", PROSE[page]):
        if link.startswith("https://"):
            continue
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert anchor in [heading(title) for title in titles], anchor


def heading(title):
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# ---- functions, and the lines quoted from them ----


def quotes(text):
    """(function, quoted line) of every `function`: `line`, or of two cells of a table."""
    return re.findall(r"`(\w+[\w.]*\.\w+)`(?:: | \| )`([^`]+)`", text)


@pytest.mark.parametrize("page", PAGES)
def test_functions_hold_the_lines_quoted_from_them(page):
    """Line numbers moved with every change; a function keeps its name."""
    assert "#L" not in TEXTS[page]
    for name, line in quotes(PROSE[page]):
        function = function_named(name)
        assert function, name
        assert line in inspect.getsource(function), f"{name} does not hold {line!r}"


def test_the_equation_and_the_pitfalls_are_quoted():
    assert len(quotes(README)) >= 12 and len(quotes(TEXTS["docs/pitfalls.md"])) >= 9


# ---- code blocks ----

BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LOOP = next(block for block in BLOCKS if "DistributedDataParallel" in block)
TASK = next(block for block in BLOCKS if "def questions(split)" in block)
EXAMPLES = [block for block in BLOCKS if "print(" in block and block != LOOP]


@pytest.mark.parametrize("block", EXAMPLES)
def test_python_blocks_print_what_they_say(block):
    result = shell(sys.executable, "-c", block)
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines() == re.findall(r"print\(.*\)  # (.*)", block)


def test_there_are_four_blocks():
    assert len(BLOCKS) == 4 and len(EXAMPLES) == 2
    assert len(LOOP.splitlines()) <= 60 and len(TASK.splitlines()) <= 25


@pytest.fixture
def my_task(tmp_path):
    path = tmp_path / "my_task.py"
    path.write_text(TASK)
    return path


def test_the_task_is_one(my_task):
    """Its questions get prompts, no question is in both splits, and its grader tells right from
    wrong from invalid."""
    task, settings = load_task(str(my_task)), evaluation.Settings()
    splits = [tasks.load_questions(task, split, 0, 0, None, settings)
              for split in ("train", "test")]
    assert [len(split) for split in splits] == [1000, 250]
    assert not {row["id"] for row in splits[0]} & {row["id"] for row in splits[1]}
    question = splits[1][0]
    assert question["prompt"].startswith(task.EXAMPLES)
    assert question["prompt"].endswith(f"Question: {question['question']}\nAnswer:")
    gold = question["gold"]
    assert task.grade(question, f"The answer is {gold}.") == (gold, 1.0)
    assert task.grade(question, "The answer is apple.") == ("apple", -1.0)
    assert task.grade(question, gold) == (None, -1.0)


def test_the_exercise_with_the_task_has_the_result_that_it_says(my_task, tmp_path):
    backwards = TASK.replace("sorted(words)", "sorted(words, reverse=True)")
    assert backwards != TASK
    my_task.write_text(backwards)
    answers = tmp_path / "answers.jsonl"
    row = {"id": "a", "prompt": "?", "gold": "engine door apple", "reward": -1}
    texts = ("The answer is engine door apple.", "The answer is apple.", "apple")
    answers.write_text("".join(json.dumps({**row, "completion": text}) + "\n" for text in texts))
    result = shell(sys.executable, ROOT / "eval.py", "--grade", answers, "--task", my_task)
    measures = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines()
                if len(line.split()) > 1}
    assert measures["pass@1"] == measures["invalid"] == "0.333", result.stdout


def test_the_exercises_have_answers():
    exercises = README.split("## Exercises")[1]
    assert len(re.findall(r"^[0-9]\. ", exercises, re.MULTILINE)) == 6
    printed = []
    for code in re.findall(r'`python -c "([^`]*)"`', exercises):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code.replace("YOURS", "0,1"), {})
        printed.append(out.getvalue().strip())
    weight, baseline, taper = printed
    assert weight == "tensor([0.1353])" and float(baseline) == pytest.approx(-0.8)
    assert taper == str(topr.Taper(pos=(0.0, 1.0), neg=topr.TAPERS["tis"].neg))
    for word in re.findall(r"test_mutants.py -s -k ([\w-]+)", exercises):
        assert [name for name in MUTANTS if word in name], word


# ---- numbers ----


def test_every_logged_number_is_explained():
    """docs/log.md forgot a number, or explained one that is gone."""
    explained = set(re.findall(r"`(\w+)`", TEXTS["docs/log.md"]))
    sequences = {"log_ratio": [0.1, -0.2], "weight": [1.0, 0.8], "advantage": [1.0, -1.0]}
    logged = set(train.step_metrics([[{"loss": 0.5, **sequences}]]))
    written = inspect.getsource(train.train)
    logged |= set(re.findall(r'"(\w+)": ', written))
    logged |= set(re.findall(r'metrics\["(\w+)"\]', written))
    assert logged <= explained, logged - explained
    table = TEXTS["docs/log.md"].split("| name |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert logged == {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_the_wrong_numbers_are_what_one_gets():
    """The pitfalls' numbers, from the right loss and from the broken ones of test_mutants."""
    text = README.split("## 5. Five common pitfalls")[1].split("\n# ")[0] + TEXTS["docs/pitfalls.md"]

    def run(example, mutant=None):
        logp, mu_logp, reward, mask = tensors(example, padding=0.0)
        module = load(MUTANTS[mutant]) if mutant else topr
        loss, stats = module.topr_loss(logp, mu_logp, reward, mask)
        gradient = torch.autograd.grad(loss, logp)[0][-1, 0].item()
        return loss.item(), stats["weight"][-1].item(), gradient

    long = {"rewards": [-1], "logps": [[-1.01] * 400], "mus": [[-1.0] * 400]}
    logp, mu_logp, reward, mask = tensors(F)
    parts = []
    for part in (slice(0, 3), slice(3, 4)):
        loss, _ = topr.topr_loss(logp[part], mu_logp[part], reward[part], mask[part])
        parts.append(loss.item())
    attached = run(A, "weights not detached")
    numbers = [run(long)[1], run(long, "ratio divided by length")[1], *run(A), attached[0],
               attached[2], run(A, "mu re-anchored on the current weights")[1], sum(parts) / 2,
               run(F)[0], run(A, "mean over tokens of the batch")[0]]
    for number in numbers:
        shown = f"{number:.6f}"
        assert shown in text or shown.rstrip("0").rstrip(".") in text, shown


@pytest.mark.parametrize("d", [200.0, -300.0])
def test_the_order_of_clip_and_exp_matters_only_with_an_attached_weight(d):
    """The README claimed that the wrong order gives NaN for any weight."""
    gradients = {}
    for order in ("clip first", "exp first"):
        for constant in (True, False):
            logp = torch.tensor(d, requires_grad=True)
            log_ratio = logp.detach() if constant else logp
            weight = log_ratio.clamp(max=0.0).exp() if order == "clip first" else None
            weight = log_ratio.exp().clamp(0, 1) if weight is None else weight
            gradients[order, constant], = torch.autograd.grad(weight * logp, logp)
    assert torch.equal(gradients["clip first", True], gradients["exp first", True])
    assert gradients["clip first", False].isfinite()
    assert gradients["exp first", False].isnan() == (d > 0)


def test_all_fifteen_pitfalls_are_told_once():
    here = re.findall(r"^\*\*(\d+)\. ", README, re.MULTILINE)
    there = re.findall(r"^## (\d+)\. ", TEXTS["docs/pitfalls.md"], re.MULTILINE)
    assert sorted(map(int, here + there)) == list(range(1, 16)) and len(here) == 5


def test_the_claims_are_those_of_the_results():
    claims = (ROOT / "experiments/results/claims.md").read_text()
    section = README.split("## 4. ")[1].split("\n## ")[0]
    for row in re.findall(r"^\| [A-Z].*", section, re.MULTILINE):
        claim, measured, verdict = [cell.strip() for cell in row.strip("|").split("|")]
        whole = next(line for line in claims.splitlines() if line.startswith(f"| {claim}"))
        assert f"| {verdict} |" in whole, claim
        for number in re.findall(r"[+-]?\d\.\d{3}(?: ± \d\.\d{3})?", measured):
            assert number in claims, number
    idea = README.split("## 2. ")[1].split("\n## ")[0]
    assert all(number in claims for number in re.findall(r"0\.\d{3}", idea))


# ---- CONTRIBUTING ----

DIFFS = re.findall(r"```diff\n(.*?)```", TEXTS["CONTRIBUTING.md"], re.DOTALL)
CHECKS = (
    "import train; print(train.make_taper(train.Settings(loss='half')).neg == (0, 0.5))",
    "from data import tasks; task = load_task('mine'); "
    "print(task.grade(next(iter(task.questions('test'))), 'The answer is 7.') == ('7', 1.0))")


@pytest.mark.parametrize("diff, check", list(zip(DIFFS, CHECKS, strict=True)))
def test_the_diffs_of_contributing_apply_and_work(diff, check, tmp_path):
    for pattern in ("*.py", "data/*.py", "engine/*.py"):
        for file in ROOT.glob(pattern):
            (tmp_path / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / file.relative_to(ROOT))
    (tmp_path / "data/mine").mkdir()
    row = {"id": "mine-1", "question": "3 + 4 = ?", "gold": "7"}
    (tmp_path / "data/mine/test.jsonl").write_text(json.dumps(row) + "\n")
    done = subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    result = shell(sys.executable, "-c", check, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.stdout.strip() == "True", result.stdout
