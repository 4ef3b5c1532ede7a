"""The paper's findings in miniature, on the embedded tasks, from nothing.

    python experiments/run.py                       all of them: an hour or so on two cores
    python experiments/run.py collapse shares       some of them
    python experiments/run.py --quick               one seed, one pass: ten minutes, to see it go
    python experiments/run.py --show                tables and pictures of the results that are kept
"""

import importlib.util
import itertools
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script: find the scripts beside the folder

from data.common import Problem, parse, read_json, run_main, say, whole_file, write_json
from experiments import collapse, importance, negatives, queries, rounds, shares, verdicts
from experiments.common import Settings, prepare, workers

FINDINGS = {"collapse": collapse, "negatives": negatives, "shares": shares, "importance": importance, "rounds": rounds,
            "verdicts": verdicts, "queries": queries}


def main():
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    settings, start = parse(Settings, sys.argv[1 + len(names):], description=__doc__), time.time()
    for name in names:
        if name not in FINDINGS:
            raise Problem(f"{name}: no such finding; there are {', '.join(FINDINGS)}")
    settings.seeds = 1 if settings.quick else settings.seeds
    settings.out = settings.out or ("runs/quick" if settings.quick else "experiments/results")
    names = names or [name for name in FINDINGS if not settings.show or os.path.exists(f"{settings.out}/{name}.json")]
    with workers(settings) as each:
        if not settings.show:
            jobs = [(seed, larger) for larger in (True, False) for seed in range(settings.seeds)
                    if ("rounds" in names if larger else set(names) - {"queries"})]
            each(prepare, jobs, "base policies")
        for name in names:
            if not settings.show:
                began = time.time()
                result = FINDINGS[name].run(settings, each)
                write_json(f"{settings.out}/{name}.json", {"seeds": settings.seeds, "quick": settings.quick, **result,
                                                           "seconds": round(time.time() - began)})
            report(name, settings.out)
    rows = claims(settings.out)
    with whole_file(f"{settings.out}/claims.md") as file:
        file.write(as_markdown(rows))
    for claim, measured, verdict, _ in rows:
        say(f"\n{claim}\n    {measured}\n    {verdict}")
    say(f"\n{time.time() - start:.0f} s; the claims are in {settings.out}/claims.md")


def report(name, folder):
    """Table and picture of what is kept."""
    finding, result = FINDINGS[name], read_json(f"{folder}/{name}.json")
    say(f"\n{name}: {finding.__doc__.splitlines()[0]}\n\n{finding.show(result)}\n")
    if importlib.util.find_spec("matplotlib"):
        finding.draw(result, f"{folder}/{name}.png")
    say(f"{result['seconds']} s; {folder}/{name}.json, and {name}.png where matplotlib is installed")


def claims(folder):
    """(claim, what was measured, verdict, command) for every finding that has results in the folder."""
    return [(*claim, f"`python experiments/run.py {name}`") for name, finding in FINDINGS.items()
            if os.path.exists(f"{folder}/{name}.json") for claim in finding.claims(read_json(f"{folder}/{name}.json"))]


def as_markdown(rows):
    return "\n".join(["| claim of the paper | measured here | verdict | command |", "|---|---|---|---|",
                      *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


if __name__ == "__main__":
    run_main(main)
