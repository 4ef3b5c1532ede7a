"""Figure 7: importance sampling with and without truncation, 60% negatives, gradients clipped at 1 or hardly."""

import numpy as np

from experiments.common import (STYLES, bars, by_seed, compare, difference, picture, run_arm, run_base, show_arms, spread,
                                verdict)

LOSSES = {"TOPR": "topr", "truncated importance sampling": "tis", "importance sampling": "is"}
CLIPS = {"loose": 100.0, "at 1": 1.0}


def run(settings, each):
    seeds = range(settings.seeds)
    base = each(run_base, [(seed,) for seed in seeds], "base policies: test")
    arms = {f"{name}, clipped {clip}": dict(loss=loss, positives=0.4, grad_clip=norm)
            for clip, norm in CLIPS.items() for name, loss in LOSSES.items()}
    arms = compare(settings, each, run_arm, arms, "importance")
    return {"base": by_seed(base), "arms": arms}


def show(result):
    return show_arms({"base": result["base"], **result["arms"]}, ("pass@1", "maj@16", "invalid"), "60% negatives")


def draw(result, path):
    of = lambda name, measure: np.array([result["arms"][f"{name}, clipped {clip}"][measure] for clip in CLIPS]).T
    with picture(path, 1, 2) as axes:
        for ax, measure in zip(axes, ("pass@1", "invalid")):
            bars(ax, [f"clipped {clip}" for clip in CLIPS], {name: of(name, measure) for name in LOSSES})
            ax.axhline(np.mean(result["base"][measure]), color=STYLES["base"][0], linestyle="--", label="base")
            ax.set(ylabel=measure)
        axes[0].set_ylim(top=1.5 * axes[0].get_ylim()[1])  # room for the names
        axes[0].legend(loc="upper left")


def claims(result):
    arms, base = result["arms"], result["base"]
    of = lambda name, measure, clip="loose": arms[f"{name}, clipped {clip}"][measure]
    worse = difference(of("importance sampling", "invalid"), base["invalid"])
    lower = difference(of("TOPR", "pass@1"), of("importance sampling", "pass@1"))
    better = difference(of("TOPR", "pass@1"), base["pass@1"])
    yield ("Untruncated importance sampling harms the model when gradients are hardly clipped (Figure 7)",
           f"invalid {spread(base['invalid'])} to {spread(of('importance sampling', 'invalid'))}, pass@1 "
           f"{spread(base['pass@1'])} to {spread(of('importance sampling', 'pass@1'))}; TOPR is ahead by "
           f"{spread(lower, sign=True)} (clipped at 1: "
           f"{spread(difference(of('TOPR', 'pass@1', 'at 1'), of('importance sampling', 'pass@1', 'at 1')), sign=True)})",
           verdict(np.mean(worse) > 0, min(lower) > 0))
    yield ("TOPR still improves there (Figure 7)",
           f"{spread(better, sign=True)} pass@1, invalid {spread(of('TOPR', 'invalid'))}",
           verdict(min(better) > 0, np.mean(better) > 0))
