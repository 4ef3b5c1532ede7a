"""Iterations: three rounds of sample-then-train, compared with a model five times larger."""

import dataclasses

import numpy as np

import train
from experiments.common import (
    MEASURES,
    STYLES,
    by_arm,
    by_seed,
    compare,
    each_base,
    line,
    measure_once,
    picture,
    rows_of,
    run_arm,
    show_arms,
    spread,
    train_arm,
    verdict,
)

ROUNDS = 3
ARMS = {
    "TOPR": {"loss": "topr"},
    "TOPR, Anna Karenina": {"loss": "topr", "anna_karenina": True},
    "positives only": {"loss": "sft"},
    "positives only, Anna Karenina": {"loss": "sft", "anna_karenina": True},
}
LARGER_BASE, LARGER = "five times larger, base", "five times larger, positives only"


def run(settings, each):
    small = each_base(settings, each)
    large = each_base(settings, each, "larger")
    arms = compare(settings, each, run_rounds, ARMS, "rounds")
    larger = {LARGER: {"loss": "sft", "base": "larger"}}
    arms.update(compare(settings, each, run_arm, larger, "rounds, the larger model"))
    return {"base": by_seed(small), LARGER_BASE: by_seed(large), "arms": arms}


def run_rounds(seed, arm, rate, split):
    """The rate is chosen by the first round; the test questions measure every round's policy."""
    if split == "validation":
        return run_arm(seed, arm, rate, split)
    first, _ = train_arm(seed, arm, rate)
    rest = dataclasses.replace(first, model=first.out, rollouts="", rounds=ROUNDS - 1,
                               eval_every=0, out=f"{first.out}-rounds")
    policies = [first.out] + [policy for policy, _ in train.rounds(rest)]
    measures = [measure_once(policy, seed, split) for policy in policies]
    return {**measures[-1], "rounds": [one["pass@1"] for one in measures]}


def passed_by_round(result, name):
    """pass@1 of the base policy and after each round. [seeds, 1 + rounds]"""
    return np.column_stack([result["base"]["pass@1"], result["arms"][name]["rounds"]])


def show(result):
    title = f"after {ROUNDS} rounds (the larger model: 1)"
    return show_arms(rows_of(result), MEASURES, title)


def draw(result, path):
    passed = by_arm(result, "pass@1")
    with picture(path, 1, 1) as (axes,):
        for name in ARMS:
            method, comma, _ = name.partition(",")
            other = {"linestyle": ":", "markerfacecolor": "white"} if comma else {}
            line(axes, range(ROUNDS + 1), passed_by_round(result, name), method, name, **other)
        for name, dashes in ((LARGER_BASE, "--"), (LARGER, ":")):
            colour = STYLES["base"][0]
            axes.axhline(passed[name].mean(), color=colour, linestyle=dashes, label=name)
        axes.set(xlabel="rounds of sample-then-train", ylabel="pass@1", ylim=(0, 1),
                 xticks=range(ROUNDS + 1))


def claims(result):
    last = by_arm(result, "pass@1")
    topr, positives = last["TOPR"], last["positives only"]
    means = passed_by_round(result, "TOPR").mean(0)  # [1 + rounds]
    ahead = topr - positives
    rises = (np.diff(means) > 0).all()
    yield ("Sampling again and training again keeps helping (iterations)",
           "TOPR's pass@1 at first and after each round "
           f"{' '.join(f'{mean:.3f}' for mean in means)}; ahead of positives only in the end by "
           f"{spread(ahead, '+')}",
           verdict(rises, rises and ahead.min() > 0))

    karenina = last["TOPR, Anna Karenina"]
    gain = karenina - topr
    yield ("Keeping one right answer of each question and all wrong ones (Anna Karenina) beats "
           "keeping all (iterations)",
           f"TOPR after {ROUNDS} rounds: all {spread(topr)}, Anna Karenina {spread(karenina)}: "
           f"{spread(gain, '+')}",
           verdict(gain.min() > 0, gain.mean() > 0))

    large, small = last[LARGER], passed_by_round(result, "positives only")[:, 1]
    yield ("A small model with TOPR reaches one several times larger that had supervision alone "
           "(iterations)",
           f"TOPR after {ROUNDS} rounds {spread(topr)}; five times larger, imitating the same "
           f"demonstrations {spread(last[LARGER_BASE])} (the small one {spread(last['base'])}), "
           f"and after a round of positives only {spread(large)} (the small one {spread(small)})",
           verdict(topr.mean() >= large.mean(), topr.mean() >= large.mean() > small.mean()))
