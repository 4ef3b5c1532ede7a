"""The paper's findings in miniature, on the embedded tasks, from nothing.

    python experiments/run.py                       all of them: about 90 minutes on two cores
    python experiments/run.py collapse shares       some of them
    python experiments/run.py --quick               one seed, one pass: about 12 minutes
    python experiments/run.py --show                tables and pictures of existing results
    python experiments/run.py long rates pretrained scifact     four more that take hours, on long
                                                    answers and with a pretrained model
"""

import importlib.util
import itertools
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # started as a script: find the scripts beside the folder

from engine.common import Problem, parse, read_json, run_main, say, whole_file, write_json
from experiments import collapse, importance, long, negatives, pretrained, queries
from experiments import rates, rounds, scifact, shares, verdicts
from experiments.common import Settings, prepare, workers

FINDINGS = {"collapse": collapse, "negatives": negatives, "shares": shares,
            "importance": importance, "rounds": rounds, "verdicts": verdicts, "queries": queries}
MORE = {"long": long, "rates": rates, "pretrained": pretrained, "scifact": scifact}
ALL = {**FINDINGS, **MORE}
# The base policies that a finding starts from, where these are not the small ones alone.
STARTS = {"rounds": ["small", "larger"], "long": ["long"], "rates": ["small", "larger", "largest"],
          "queries": [], "pretrained": [], "scifact": []}


def main():
    start = time.time()
    names = [word for word in sys.argv[1:] if word in ALL]
    options = [word for word in sys.argv[1:] if word not in ALL]
    if options and not options[0].startswith("-"):
        raise Problem(f"{options[0]}: no such finding; there are {', '.join(ALL)}")
    settings = parse(Settings, options, description=__doc__)
    if "RANK" in os.environ:
        raise Problem("start this with python, not with torchrun: it starts its own processes")
    settings.seeds = settings.seeds or (1 if settings.quick else 5)
    is_full = settings.seeds == 5 and not settings.quick
    settings.out = settings.out or (f"{ROOT}/experiments/results" if is_full else "runs/results")
    if settings.show:
        show(names or list(read_results(settings.out)), settings.out)
    else:
        make(names or list(FINDINGS), settings)
    rows = claims(settings.out)
    with whole_file(f"{settings.out}/claims.md") as file:
        file.write(as_markdown(rows))
    for claim, measured, verdict, _ in rows:
        say(f"\n{claim}\n    {measured}\n    {verdict}")
    minutes = (time.time() - start) / 60
    say(f"\n{minutes:.1f} minutes; the claims are in {settings.out}/claims.md")


def make(names, settings):
    """Runs the findings and shows each result as soon as it is complete."""
    jobs = set()
    for name in names:
        seeds = min(settings.seeds, getattr(ALL[name], "SEEDS", settings.seeds))
        jobs |= set(itertools.product(range(seeds), STARTS.get(name, ["small"])))
    with workers(settings) as each:
        each(prepare, sorted(jobs), "base policies")
        for name in names:
            began = time.time()
            result = ALL[name].run(settings, each)
            kept = {"seeds": settings.seeds, "quick": settings.quick, **result}
            write_json(f"{settings.out}/{name}.json", kept)
            show([name], settings.out)
            say(f"{name}: {(time.time() - began) / 60:.1f} minutes")


def show(names, folder):
    """Prints the tables of existing results and draws their pictures."""
    if not names:
        raise Problem(f"{folder}: there are no results; without --show they are made")
    for name in names:
        path = f"{folder}/{name}.json"
        finding, result = ALL[name], read_json(path)
        title = finding.__doc__.splitlines()[0]
        say(f"\n{name}: {title}\n\n{finding.show(result)}\n")
        if importlib.util.find_spec("matplotlib"):
            finding.draw(result, f"{folder}/{name}.png")
            say(f"{path} and {name}.png")
        else:
            say(f"{path}; no picture: matplotlib is not installed")


def read_results(folder):
    return {name: read_json(f"{folder}/{name}.json") for name in ALL
            if os.path.exists(f"{folder}/{name}.json")}


def claims(folder):
    """(claim, what was measured, verdict, command) of every finding with results in the folder."""
    results = read_results(folder)
    if len({(result["seeds"], result["quick"]) for result in results.values()}) > 1:
        raise Problem(f"{folder}: results with different numbers of seeds, or quick and full ones, "
                      "do not belong in one folder: use another --out")
    return [(*claim, f"`python experiments/run.py {name}`") for name, result in results.items()
            for claim in ALL[name].claims(result)]


def as_markdown(rows):
    lines = ["| claim of the paper | measured here | verdict | command |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


if __name__ == "__main__":
    run_main(main)
