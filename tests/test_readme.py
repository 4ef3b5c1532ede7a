"""What the README says is run or checked here: its code blocks, its options, its paths."""

import re
import sys

import pytest

import train
from conftest import ROOT, shell

TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", ROOT / "data/README.md")}


def test_python_blocks_print_what_they_say():
    blocks = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    assert blocks
    for block in blocks:
        result = shell(sys.executable, "-c", block)
        assert result.returncode == 0, result.stdout
        assert result.stdout.split("\n")[:-1] == re.findall(r"print\(.*\)  # (.*)", block)


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_files_exist(name):
    folder = (ROOT / name).parent
    for link in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]):
        assert (folder / link).exists(), link
    for script in re.findall(r"(?:torchrun|python)(?: --\S+ \d+)* (\S+\.py)", TEXTS[name]):
        assert (ROOT / script).exists(), script


def test_options_exist():
    """README flags that do not exist: every --option in a command line is asked of the script's own --help."""
    helps = {}
    for line in TEXTS["README.md"].splitlines():
        found = re.match(r" {4}(?:torchrun|python)(?: --nproc-per-node \d+)? (\w+\.py)(.*)", line)
        if found:
            script, options = found.groups()
            helps[script] = helps.get(script) or shell(sys.executable, ROOT / script, "--help").stdout
            for option in re.findall(r"--[a-z-]+", options):
                assert re.search(rf"{option}\b", helps[script]), (script, option)
    assert "train.py" in helps


def test_every_logged_number_is_explained():
    explained = set(re.findall(r"`(\w+)`", TEXTS["README.md"].split("## What is logged")[1].split("##")[0]))
    parts = [{"loss": 0.5, "log_ratio": [0.1, -0.2], "weight": [1.0, 0.8], "advantage": [1.0, -1.0]}]
    assert set(train.step_metrics(parts)) <= explained
