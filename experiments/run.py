"""The paper's findings in miniature, on the embedded tasks, from nothing.

    python experiments/run.py                       all of them: some 90 minutes on two cores
    python experiments/run.py collapse shares       some of them
    python experiments/run.py --quick               one seed, one pass: some 12 minutes, to see it go
    python experiments/run.py --show                tables and pictures of the results that are kept
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script: find the scripts beside the folder

from engine.common import Problem, parse, read_json, run_main, say, whole_file, write_json
from experiments import collapse, importance, negatives, queries, rounds, shares, verdicts
from experiments.common import Settings, prepare, workers

FINDINGS = {"collapse": collapse, "negatives": negatives, "shares": shares, "importance": importance, "rounds": rounds,
            "verdicts": verdicts, "queries": queries}


def main():
    names, options = [word for word in sys.argv[1:] if word in FINDINGS], [word for word in sys.argv[1:] if word not in FINDINGS]
    if options and not options[0].startswith("-"):
        raise Problem(f"{options[0]}: no such finding; there are {', '.join(FINDINGS)}")
    settings, start = parse(Settings, options, description=__doc__), time.time()
    if "RANK" in os.environ:
        raise Problem("start it with python, not with torchrun: it has processes of its own")
    usual = settings.seeds in (None, 5) and not settings.quick
    settings.out = os.path.abspath(settings.out) if settings.out else "experiments/results" if usual else "runs/results"
    os.chdir(Path(__file__).resolve().parents[1])  # runs/ and experiments/results are the repository's
    settings.seeds = settings.seeds or (1 if settings.quick else 5)
    if settings.show:
        names = names or [name for name in FINDINGS if os.path.exists(f"{settings.out}/{name}.json")]
        if not names:
            raise Problem(f"{settings.out}: there are no results; without --show they are made")
        for name in names:
            report(name, settings.out)
    else:
        make(names or list(FINDINGS), settings)
    rows = claims(settings.out)
    with whole_file(f"{settings.out}/claims.md") as file:
        file.write(as_markdown(rows))
    for claim, measured, verdict, _ in rows:
        say(f"\n{claim}\n    {measured}\n    {verdict}")
    say(f"\n{(time.time() - start) / 60:.1f} minutes; the claims are in {settings.out}/claims.md")


def make(names, settings):
    """Runs the findings, each result as soon as it is there."""
    jobs = [(seed, larger) for larger in (True, False) for seed in range(settings.seeds)
            if ("rounds" in names if larger else set(names) - {"queries"})]
    with workers(settings) as each:
        each(prepare, jobs, "base policies")
        for name in names:
            began = time.time()
            result = FINDINGS[name].run(settings, each)
            write_json(f"{settings.out}/{name}.json", {"seeds": settings.seeds, "quick": settings.quick, **result})
            report(name, settings.out)
            say(f"{name}: {(time.time() - began) / 60:.1f} minutes")


def report(name, folder):
    """Table and picture of what is kept."""
    finding, result = FINDINGS[name], read_json(f"{folder}/{name}.json")
    say(f"\n{name}: {finding.__doc__.splitlines()[0]}\n\n{finding.show(result)}\n")
    if importlib.util.find_spec("matplotlib"):
        finding.draw(result, f"{folder}/{name}.png")
        say(f"{folder}/{name}.json and {name}.png")
    else:
        say(f"{folder}/{name}.json; no picture, for matplotlib is not installed")


def claims(folder):
    """(claim, what was measured, verdict, command) for every finding that has results in the folder."""
    results = {name: read_json(f"{folder}/{name}.json") for name in FINDINGS if os.path.exists(f"{folder}/{name}.json")}
    if len({(result["seeds"], result["quick"]) for result in results.values()}) > 1:
        raise Problem(f"{folder}: its results are of different numbers of seeds, or quick ones among others: make them again")
    return [(*claim, f"`python experiments/run.py {name}`") for name, result in results.items()
            for claim in FINDINGS[name].claims(result)]


def as_markdown(rows):
    return "\n".join(["| claim of the paper | measured here | verdict | command |", "|---|---|---|---|",
                      *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


if __name__ == "__main__":
    run_main(main)
