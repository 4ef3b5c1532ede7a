"""The paper's findings in miniature, on the embedded tasks, from nothing.

python experiments/run.py                       all of them: about 90 minutes on two cores
python experiments/run.py collapse shares       some of them
python experiments/run.py --quick               one seed, one pass: about 12 minutes
python experiments/run.py --show                tables and pictures of existing results
python experiments/run.py sums                  a pretrained model: an hour and a half
python experiments/run.py long rates pretrained scifact     four more that take hours, on long
                                                answers and with a pretrained model
"""

import importlib
import multiprocessing
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # started as a script: find the scripts beside the folder

from engine.common import Problem, parse, read_json, run_main, say, whole_file, write_json
from experiments.common import MEASURES, Settings, picture, pool, show_arms

FINDINGS = (
    "collapse",
    "ratio",
    "negatives",
    "shares",
    "importance",
    "rounds",
    "verdicts",
    "queries",
)
ALL = (*FINDINGS, "sums", "long", "rates", "pretrained", "scifact")


def main():
    names = [word for word in sys.argv if word in ALL]
    sys.argv = [word for word in sys.argv if word not in ALL]
    settings = parse(Settings, __doc__)
    if "RANK" in os.environ:
        raise Problem("start this with python, not with torchrun: it starts its own processes")
    if settings.quick:
        settings.seeds = 1
    folder = settings.out or (
        f"{ROOT}/experiments/results" if settings.seeds == 5 else "runs/results"
    )
    if settings.show:
        for name in names or there(folder):
            show(name, folder)
    else:
        make(names or FINDINGS, settings, folder)
    rows = claims(folder)
    with whole_file(f"{folder}/claims.md") as file:
        file.write(as_markdown(rows))
    for claim, measured, verdict, _ in rows:
        say(f"\n{claim}\n    {measured}\n    {verdict}")
    say(f"\nthe claims are in {folder}/claims.md")


def make(names, settings, folder):
    """Runs the findings and shows each result as soon as it is complete."""
    try:
        for name in names:
            size = {"seeds": settings.seeds, "quick": settings.quick}
            write_json(f"{folder}/{name}.json", {**size, **load(name).run(settings)})
            show(name, folder)
        pool(settings.processes).shutdown()
    except BrokenProcessPool:
        raise Problem(
            "a process died, perhaps out of memory (--processes 1 needs less); its last output is "
            "in runs/experiments.log. Rerun the same command: it keeps what is finished"
        )
    finally:
        for process in multiprocessing.active_children():
            process.kill()  # what it has not finished goes on with the next call


def load(name):
    return importlib.import_module(f"experiments.{name}")


def show(name, folder):
    """Prints the tables of an existing result and draws its picture."""
    finding, result = load(name), read_json(f"{folder}/{name}.json")
    say(f"\n{name}: {finding.__doc__.splitlines()[0]}\n\n{tables(finding, result)}\n")
    try:
        with picture(f"{folder}/{name}.png", getattr(finding, "PANELS", 1)) as axes:
            finding.draw(result, *axes)
    except ImportError:
        say("no picture: matplotlib is not installed")


def tables(finding, result):
    if hasattr(finding, "show"):
        return finding.show(result)
    return show_arms(result, getattr(finding, "MEASURES", MEASURES))


def there(folder):
    """The findings with results in a folder."""
    names = [name for name in ALL if os.path.exists(f"{folder}/{name}.json")]
    if not names:
        raise Problem(f"{folder}: there are no results; without --show they are made")
    return names


def claims(folder):
    """(claim, what was measured, verdict, command) of every finding with results in the folder."""
    return [
        (*claim, f"`python experiments/run.py {name}`")
        for name in there(folder)
        for claim in load(name).claims(read_json(f"{folder}/{name}.json"))
    ]


def as_markdown(rows):
    lines = ["| claim of the paper | measured here | verdict | command |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


if __name__ == "__main__":
    run_main(main)
