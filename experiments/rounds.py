"""Iterations: three rounds of sample-then-train, and a model five times larger for comparison."""

import numpy as np

import train
from experiments.common import (STYLES, by_seed, compare, difference, line, measured, picture, run_arm, run_base, settings_of,
                                show_arms, spread, verdict)

ROUNDS = 3
SHARE = 0.33  # the best effective share that shares.py found
ARMS = {"TOPR": dict(loss="topr", positive_share=SHARE),
        "TOPR, Anna Karenina": dict(loss="topr", positive_share=SHARE, anna_karenina=True),
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
    settings = settings_of(seed, arm, rate)
    settings.out, settings.rounds, settings.eval_every = f"{settings.out}-{ROUNDS}-rounds", ROUNDS, 0
    measures = [measured(policy, seed, split) for policy, _ in train.rounds(settings)]
    return {**measures[-1], "rounds": [one["pass@1"] for one in measures]}


def show(result):
    first = {"base": result["base"], "five times larger, base": result["five times larger, base"]}
    title = f"after {ROUNDS} rounds (the larger model: 1)"
    return show_arms({**first, **result["arms"]}, ("pass@1", "maj@16", "invalid"), title)


def draw(result, path):
    with picture(path) as (axes,):
        for name in ARMS:
            runs = zip(result["base"]["pass@1"], result["arms"][name]["rounds"])
            values = np.array([[before, *after] for before, after in runs])
            other = dict(linestyle=":", markerfacecolor="white") if "Karenina" in name else {}
            line(axes, range(ROUNDS + 1), values, name.partition(",")[0], name, **other)
        for name, dash in (("five times larger, base", "--"), (*LARGER, ":")):
            runs = result["arms"].get(name, result.get(name))
            axes.axhline(np.mean(runs["pass@1"]), color=STYLES["base"][0], linestyle=dash, label=name)
        axes.set(xlabel="rounds of sample-then-train", ylabel="pass@1", ylim=(0, 1), xticks=range(ROUNDS + 1))
        axes.legend(fontsize=9, loc="lower right")


def claims(result):
    arms = result["arms"]
    last = {name: arms[name]["pass@1"] for name in arms}
    path = " ".join(f"{np.mean(values):.3f}" for values in (result["base"]["pass@1"], *np.array(arms["TOPR"]["rounds"]).T))
    rise = difference(np.array(arms["TOPR"]["rounds"])[:, -1], np.array(arms["TOPR"]["rounds"])[:, 0])
    ahead = difference(last["TOPR"], last["positives only"])
    karenina = difference(last["TOPR, Anna Karenina"], last["TOPR"])
    large, supervised = result["five times larger, base"]["pass@1"], last["five times larger, positives only"]
    best = max(("TOPR", "TOPR, Anna Karenina"), key=lambda name: np.mean(last[name]))
    yield ("Sampling again and training again keeps helping (iterations)",
           f"pass@1 {path} over {ROUNDS} rounds; TOPR ahead of positives only by {spread(ahead, sign=True)}",
           verdict(min(rise) > 0 and min(ahead) > 0, np.mean(rise) > 0))
    yield ("Anna Karenina sampling beats uniform sampling (iterations)",
           f"TOPR {spread(last['TOPR'])}, with it {spread(last['TOPR, Anna Karenina'])}: {spread(karenina, sign=True)}",
           verdict(min(karenina) > 0, np.mean(karenina) > 0))
    yield ("A small model with TOPR reaches one several times larger (iterations)",
           f"{best} {spread(last[best])}; five times larger, imitating the same demonstrations {spread(large)}, and one round "
           f"of positives only on top {spread(supervised)}",
           verdict(np.mean(last[best]) >= np.mean(supervised), np.mean(last[best]) >= np.mean(large)))
