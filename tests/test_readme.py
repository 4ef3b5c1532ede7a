"""What the README and its fellows say is run or checked here: code blocks, commands, options, names, links, line numbers."""

import importlib
import inspect
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
from conftest import ROOT, shell, torchrun
from data import bm25, maths, rollouts
from engine.common import parse
from experiments import run as experiments

TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (
    ROOT / "README.md", ROOT / "data/README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/performance.md")}
README = TEXTS["README.md"]
SCRIPTS = {"train.py": train, "eval.py": evaluation, "verifier.py": verifier, "search.py": search, "experiments/run.py": experiments,
           "data/maths.py": maths, "data/rollouts.py": rollouts}
WORDS = {"experiments/run.py": set(experiments.FINDINGS), "data/maths.py": {"gsm8k", "math"}}  # that may come before the options
LINE = re.compile(r"\[([\w/]+\.py):(\d+)\]\(([\w/]+\.py)#L(\d+)\)(?: \| | )`([^`]+)`")
OF_OTHERS = {"transformers serve", "json.loads", "generate", 'pip install "transformers[serving]"', "--max-restarts 3",
             'datasets.load_dataset("json", data_files=...)', "chosen", "rejected", "label", "features"}


def commands():
    """(file, command) for every command line, indented or in backticks."""
    for name, text in TEXTS.items():
        lines = [line.strip().split("   ")[0] for line in text.splitlines() if line.startswith("    ")]
        for command in lines + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            if re.match(r"(torchrun|python) ", command):
                yield name, command


@pytest.mark.parametrize("name, command", sorted(set(commands())))
def test_every_command_is_understood(name, command):
    """The script is there, its words are known, and its own parser takes every option with its value."""
    words = shlex.split(command.replace("...", "NAME"))
    place = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    if place is None:
        assert words[1:3] == ["-m", "pytest"], command
        return
    script, rest = words[place], words[place + 1 :]
    assert (ROOT / script).exists(), script
    before = words[1:place]
    assert all(word.startswith("--n") or word.startswith("--rdzv") or not word.startswith("-") for word in before) or before[0] == "-m"
    if script not in SCRIPTS:  # a test script: its help names its words and options
        text = (ROOT / script).read_text()
        assert all(word.strip("-").replace("-", "_") in text for word in rest), command
        return
    if rest[:1] in (["ask"], ["solutions"], ["export"]):
        return  # not options but sentences and files; test_search, test_maths and test_data run them
    while rest and rest[0] in WORDS.get(script, ()):
        rest.pop(0)
    parse(SCRIPTS[script].Settings, rest)


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_blocks_print_what_they_say():
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        result = shell(sys.executable, "-c", block)
        assert result.returncode == 0, result.stdout
        assert result.stdout.split("\n")[:-1] == re.findall(r"print\(.*\)  # (.*)", block)


def test_the_loop_for_other_trainers_does_the_same_on_two_ranks(tmp_path):
    (tmp_path / "loop.py").write_text(BLOCKS[2])
    result = torchrun(2, tmp_path / "loop.py")
    expected = re.search(r"print\(.*\)  # (.*)", BLOCKS[2])[1]
    assert result.returncode == 0 and result.stdout.count(expected) == 2, result.stdout


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_anchors_exist(name):
    heading = lambda title: re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    anchors = {heading(title) for title in re.findall(r"^#+ (.*)", TEXTS[name], re.MULTILINE)}
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", TEXTS[name]):
        assert not link or link.startswith("https://") or ((ROOT / name).parent / link).exists(), link
        assert link or anchor in anchors, anchor


def test_line_references_point_at_their_lines():
    found = LINE.findall(README)
    assert len(found) > 30 and len(found) == len(re.findall(r"\.py#L\d+", README))
    for shown, number, file, line, text in found:
        lines = (ROOT / file).read_text().splitlines()
        assert (shown, number) == (file, line) and text in lines[int(line) - 1], (
            f"{file}:{line} is not {text!r}; that stands in lines {[n for n, one in enumerate(lines, 1) if text in one]}")


def test_the_files_are_as_long_as_they_are_said_to_be():
    rows = re.findall(r"^\| \[([\w/]+\.py)\]\([\w/]+\.py\) \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) >= 9
    for file, lines in rows:
        assert abs(len((ROOT / file).read_text().splitlines()) - int(lines)) <= 10, file


@pytest.mark.parametrize("name", TEXTS)
def test_every_name_in_backticks_is_there(name):
    """A file, an option, a function, a setting, a logged number, a field of the rollout file, or a line of code named above."""
    text = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    lines = {match[4] for match in LINE.findall(text)}
    modules = [topr, *SCRIPTS.values(), bm25] + [importlib.import_module(f"experiments.{one}") for one in ("shares", "common")]
    fields = {field for module in [*SCRIPTS.values(), search.Ask] for field in vars(getattr(module, "Settings", module)).get(
        "__dataclass_fields__", {})}
    fields |= {*inspect.signature(topr.topr_loss).parameters, *topr.TAPERS}
    keys = {key for file in ("train.py", "eval.py", "data/rollouts.py") for key in re.findall(r'"(\w+)"', (ROOT / file).read_text())}
    folder = (ROOT / name).parent
    for token in set(re.findall(r"`([^`\n]+)`", text)) - lines - OF_OTHERS:
        first = token.split()[0]
        if first in ("python", "torchrun"):
            continue  # test_every_command_is_understood
        if first.startswith("--"):
            option = first[2:].partition("=")[0].replace("-", "_").removeprefix("no_")
            assert option in fields | {"help"}, token
            continue
        attribute = re.match(r"[\w./-]*", first)[0]
        module, _, function = attribute.rpartition(".")
        assert ((folder / first).exists() or (ROOT / first).exists() or first.startswith(("runs/", "FILE.mu-", "data/svamp/"))
                or first in ("log.jsonl", "results.json") or attribute in fields | keys or any(hasattr(one, attribute) for one in modules)
                or any(one.__name__ == module and hasattr(one, function) for one in modules)), token


def test_every_logged_number_is_explained():
    explained = set(re.findall(r"`(\w+)`", README.split("## What is logged")[1].split("\n## ")[0]))
    parts = [{"loss": 0.5, "log_ratio": [0.1, -0.2], "weight": [1.0, 0.8], "advantage": [1.0, -1.0]}]
    assert set(train.step_metrics(parts)) <= explained


def test_the_wrong_numbers_are_what_one_gets():
    """The numbers of "What is easy to get wrong", from the right loss and from the broken ones of test_mutants."""
    section = README.split("## 5. What is easy to get wrong")[1].split("\n# ")[0]

    def run(example, mutant=None, **settings):
        logp, mu_logp, reward, mask = tensors(example, padding=0.0)
        loss, stats = (load(MUTANTS[mutant]) if mutant else topr).topr_loss(logp, mu_logp, reward, mask, **settings)
        return loss.item(), stats["weight"][-1].item(), torch.autograd.grad(loss, logp)[0][-1, 0].item()

    long = dict(rewards=[-1], logps=[[-1.01] * 400], mus=[[-1.0] * 400])
    logp, mu_logp, reward, mask = tensors(F)
    split = [topr.topr_loss(*(value[part] for value in (logp, mu_logp, reward, mask)))[0].item() for part in (slice(0, 3), slice(3, 4))]
    numbers = [run(long)[1], run(long, "ratio divided by length")[1], run(A)[0], run(A, "weights not detached")[0],
               run(A)[2], run(A, "weights not detached")[2], run(A, "mu re-anchored on the current weights")[1], run(A)[1],
               sum(split) / 2, run(F)[0], run(A, "mean over tokens of the batch")[0]]
    for number in numbers:
        text = f"{number:.6f}"
        assert any(form in section for form in (text, text.rstrip("0").rstrip("."))), text


DIFFS = re.findall(r"```diff\n(.*?)```", TEXTS["CONTRIBUTING.md"], re.DOTALL)


@pytest.mark.parametrize("diff, check", list(zip(DIFFS, (
    "import train; print(train.make_taper(train.Settings(loss='half')).neg == (0, 0.5))",
    "import eval; q = eval.load_questions(eval.Settings(task='squares'), None)[1]; print(eval.grader('squares')(q, '9 .') == ('9', 1.0))",
    "import eval; print(eval.grader('svamp')({'gold': '7'}, 'The answer is 7.') == ('7', 1.0))"))))
def test_the_diffs_of_contributing_apply_and_work(diff, check, tmp_path):
    for pattern in ("*.py", "data/*.py"):
        for file in ROOT.glob(pattern):
            (tmp_path / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / file.relative_to(ROOT))
    done = subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    result = shell(sys.executable, "-c", check, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.stdout.strip() == "True", result.stdout


def test_there_are_diffs():
    assert len(DIFFS) == 3
