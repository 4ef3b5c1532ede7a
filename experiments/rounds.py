"""Iterations: three rounds of sample-then-train, compared with a model five times larger."""

import dataclasses

import numpy as np

import train
from data import load_task
from experiments.common import (
    arm_settings,
    by_arm,
    compare,
    line,
    measure_once,
    methods,
    run_arm,
    spread,
    train_arm,
    verdict,
)

ROUNDS = 3
ARMS = {
    **methods("TOPR", "TOPR, Anna Karenina", "positives only"),
    "positives only, Anna Karenina": {"loss": "sft", "anna_karenina": True},
}
LARGER_BASE, LARGER = "five times larger, base", "five times larger, positives only"
OTHERS = {"base": {}, LARGER_BASE: {"base": "larger"}, LARGER: {"loss": "sft", "base": "larger"}}


def run(settings):
    others = compare(settings, run_arm, OTHERS)
    return {"arms": compare(settings, run_rounds, ARMS) | others}


def run_rounds(seed, arm, rate, split):
    """The rate is chosen by the first round; the test questions measure every round's policy."""
    if split == "validation":
        return run_arm(seed, arm, rate, split)
    first, _ = train_arm(seed, arm, rate)
    rest = dataclasses.replace(
        arm_settings(seed, arm, rate),
        model=first,
        rollouts="",
        rounds=ROUNDS - 1,
        out=f"{first}-rounds",
    )
    policies = [first] + [policy for policy, _ in train.rounds(rest, load_task(rest.task))]
    measures = [measure_once(policy, seed, split) for policy in policies]
    return {**measures[-1], "rounds": [one["pass@1"] for one in measures]}


def passed_by_round(result, name):
    """pass@1 of the base policy and after each round. [1 + rounds, seeds]"""
    arms = result["arms"]
    return np.vstack([arms["base"]["pass@1"], np.transpose(arms[name]["rounds"])])


def draw(result, ax):
    for name in ARMS:
        method, _, karenina = name.partition(",")
        line(
            ax,
            range(ROUNDS + 1),
            passed_by_round(result, name),
            method,
            name,
            markerfacecolor="white" if karenina else None,
        )
    for name, dashes in ((LARGER_BASE, "--"), (LARGER, ":")):
        height = np.mean(result["arms"][name]["pass@1"])
        ax.axhline(height, color="grey", linestyle=dashes, label=name)
    ax.set(
        xlabel="rounds of sample-then-train", ylabel="pass@1", ylim=(0, 1), xticks=range(ROUNDS + 1)
    )


def karenina_claim(passed, where):
    topr, karenina = passed["TOPR"], passed["TOPR, Anna Karenina"]
    gain = karenina - topr
    return (
        "Keeping one right answer of each question and all wrong ones (Anna Karenina) beats "
        f"keeping all ({where})",
        f"TOPR {spread(topr)} with all, Anna Karenina {spread(karenina)}: {spread(gain, '+')}",
        verdict(gain.min() > 0, gain.mean() > 0),
    )


def claims(result):
    last = by_arm(result, "pass@1")
    topr = last["TOPR"]
    means = passed_by_round(result, "TOPR").mean(1)  # [1 + rounds]
    ahead, rises = topr - last["positives only"], (np.diff(means) > 0).all()
    yield (
        "Sampling again and training again keeps helping (iterations)",
        "TOPR's pass@1 at first and after each round "
        f"{' '.join(f'{mean:.3f}' for mean in means)}; ahead of positives only in the end by "
        f"{spread(ahead, '+')}",
        verdict(rises, rises and ahead.min() > 0),
    )

    yield karenina_claim(last, f"iterations, after {ROUNDS} rounds")

    large, small = last[LARGER], passed_by_round(result, "positives only")[1]
    yield (
        "A small model with TOPR reaches one several times larger that had supervision alone "
        "(iterations)",
        f"TOPR after {ROUNDS} rounds {spread(topr)}; five times larger, imitating the same "
        f"demonstrations {spread(last[LARGER_BASE])} (the small one {spread(last['base'])}), "
        f"and after a round of positives only {spread(large)} (the small one {spread(small)})",
        verdict(topr.mean() >= large.mean(), topr.mean() >= large.mean() > small.mean()),
    )
