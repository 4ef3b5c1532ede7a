"""Iterations: three rounds of sample-then-train, and a model five times larger for comparison."""

import dataclasses

import numpy as np

import train
from experiments.common import (
    STYLES,
    by_seed,
    compare,
    difference,
    line,
    measured,
    picture,
    run_arm,
    run_base,
    show_arms,
    spread,
    train_arm,
    verdict,
)

ROUNDS = 3
ARMS = {"TOPR": dict(loss="topr"), "TOPR, Anna Karenina": dict(loss="topr", anna_karenina=True),
        "positives only": dict(loss="sft"), "positives only, Anna Karenina": dict(loss="sft", anna_karenina=True)}
LARGER = {"five times larger, positives only": dict(loss="sft", larger=True)}


def run(settings, each):
    seeds = range(settings.seeds)
    base, large = (each(run_base, [(seed, larger) for seed in seeds], "base policies: test") for larger in (False, True))
    arms = compare(settings, each, run_rounds, ARMS, "rounds")
    larger = compare(settings, each, run_arm, LARGER, "rounds, the larger model")
    return {"base": by_seed(base), "five times larger, base": by_seed(large), "arms": {**arms, **larger}}


def run_rounds(seed, arm, rate, split):
    """The rate is chosen in the first round; on the test questions the policies of all rounds are measured."""
    if split == "validation":
        return run_arm(seed, arm, rate, split)
    first, _ = train_arm(seed, arm, rate)
    rest = dataclasses.replace(first, model=first.out, rollouts="", rounds=ROUNDS - 1, eval_every=0,
                               out=f"{first.out}-rounds")
    measures = [measured(policy, seed, split) for policy in (first.out, *(policy for policy, _ in train.rounds(rest)))]
    return {**measures[-1], "rounds": [one["pass@1"] for one in measures]}


def show(result):
    first = {"base": result["base"], "five times larger, base": result["five times larger, base"]}
    title = f"after {ROUNDS} rounds (the larger model: 1)"
    return show_arms({**first, **result["arms"]}, ("pass@1", "maj@16", "invalid"), title)


def draw(result, path):
    with picture(path, 1, 1) as (axes,):
        for name in ARMS:
            runs = zip(result["base"]["pass@1"], result["arms"][name]["rounds"])
            values = np.array([[before, *after] for before, after in runs])
            other = dict(linestyle=":", markerfacecolor="white") if "Karenina" in name else {}
            line(axes, range(ROUNDS + 1), values, name.partition(",")[0], name, **other)
        for name, dash in (("five times larger, base", "--"), (*LARGER, ":")):
            runs = result["arms"].get(name, result.get(name))
            axes.axhline(np.mean(runs["pass@1"]), color=STYLES["base"][0], linestyle=dash, label=name)
        axes.set(xlabel="rounds of sample-then-train", ylabel="pass@1", ylim=(0, 1), xticks=range(ROUNDS + 1))


def claims(result):
    last = {name: arm["pass@1"] for name, arm in result["arms"].items()}
    path = np.array([[before, *after] for before, after in zip(result["base"]["pass@1"], result["arms"]["TOPR"]["rounds"])])
    rises = (np.diff(path.mean(0)) > 0).all()
    ahead = difference(last["TOPR"], last["positives only"])
    karenina = difference(last["TOPR, Anna Karenina"], last["TOPR"])
    large, small = last["five times larger, positives only"], np.array(result["arms"]["positives only"]["rounds"])[:, 0]
    yield ("Sampling again and training again keeps helping (iterations)",
           f"TOPR's pass@1 at first and after each round {' '.join(f'{mean:.3f}' for mean in path.mean(0))}; ahead of positives "
           f"only in the end by {spread(ahead, sign=True)}",
           verdict(rises and min(ahead) > 0, rises))
    yield ("Keeping one right answer of each question and all wrong ones (Anna Karenina) beats keeping all (iterations)",
           f"TOPR after {ROUNDS} rounds: all {spread(last['TOPR'])}, Anna Karenina {spread(last['TOPR, Anna Karenina'])}: "
           f"{spread(karenina, sign=True)}",
           verdict(min(karenina) > 0, np.mean(karenina) > 0))
    yield ("A small model with TOPR reaches one several times larger that had supervision alone (iterations)",
           f"TOPR after {ROUNDS} rounds {spread(last['TOPR'])}; five times larger, imitating the same demonstrations "
           f"{spread(result['five times larger, base']['pass@1'])} (the small one {spread(result['base']['pass@1'])}), and after "
           f"a round of positives only {spread(large)} (the small one {spread(small)})",
           verdict(np.mean(last["TOPR"]) >= np.mean(large) > np.mean(small), np.mean(last["TOPR"]) >= np.mean(large)))
