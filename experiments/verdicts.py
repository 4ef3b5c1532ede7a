"""Table 2: the generative verifier, before and after training, and the vote that it weighs."""

import dataclasses
import functools

from filelock import FileLock

import verifier
from engine.common import read_json
from experiments.common import (
    bars_of,
    by_arm,
    compare,
    folder_of,
    methods,
    name_of,
    prepare,
    spread,
    verdict,
)

MEASURES = ("accuracy", "invalid", "weighted", "majority", "solutions")


def run(settings):
    (arm,) = compare(settings, run_verifier, methods("TOPR")).values()
    before = {measure: arm.pop(f"{measure} before") for measure in MEASURES}
    return {"arms": {"base": {"settings": {}, "learning_rate": 0, **before}, "TOPR": arm}}


@functools.cache
def first_verifier(seed):
    """verifier.py's embedded job: the untrained verifier, the solutions to judge, the settings."""
    prepare(seed, "small")
    out = f"{folder_of(seed)}/verifier"
    with FileLock(f"{out}.lock"):
        settings = verifier.Settings(**verifier.EMBEDDED, seed=seed, out=out)
        verifier.use_embedded(settings)
        return settings


def run_verifier(seed, arm, rate, split):
    """verifier.py's job. The rate is chosen on a held-out quarter of the training questions."""
    settings = dataclasses.replace(first_verifier(seed), learning_rate=rate, **arm)
    settings.out += f"/{split}-{name_of(arm, rate)}"
    if split == "validation":
        settings.test_solutions = ""
    verifier.job(settings)
    results = read_json(f"{settings.out}/results.json")
    vote, measures = read_json(f"{settings.out}/voting.json")[-1], {}
    for time, name in (("before", " before"), ("after", "")):
        found = {**vote, "weighted": vote[f"weighted, {time}"]}
        found |= {measure: results[time][measure]["mean"] for measure in MEASURES[:2]}
        measures |= {measure + name: found[measure] for measure in MEASURES}
    return {**measures, "score": measures["accuracy"]}


draw = bars_of(MEASURES[:-1], ylabel="share of verdicts; accuracy of the vote")


def claims(result):
    accuracy, invalid, weighted, majority, solutions = (
        by_arm(result, measure) for measure in MEASURES
    )
    gains = {name: weighted[name] - majority[name] for name in ("base", "TOPR")}
    yield (
        "The verifier's accuracy rises, 32.6% to 70.9%, and invalid verdicts end, 34.2% to "
        "0.9% (Table 2)",
        f"accuracy {spread(accuracy['base'])} to {spread(accuracy['TOPR'])}, invalid "
        f"{spread(invalid['base'])} to {spread(invalid['TOPR'])} "
        "(held to reproduce above 0.65 and below 0.02)",
        verdict(
            accuracy["TOPR"].mean() > 0.65 and invalid["TOPR"].mean() < 0.02,
            accuracy["TOPR"].mean() > accuracy["base"].mean(),
        ),
    )
    yield (
        "Its verdicts improve the vote (Table 2)",
        f"majority of {solutions['TOPR'][0]:g} {spread(majority['TOPR'])}, weighted before "
        f"{spread(gains['base'], '+')}, after {spread(gains['TOPR'], '+')}",
        verdict(
            gains["TOPR"].min() > 0 and gains["TOPR"].mean() > gains["base"].mean(),
            gains["TOPR"].mean() > 0,
        ),
    )
