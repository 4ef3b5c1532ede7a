"""Figures 1 and 3: every loss along a training run, and the collapse of naive REINFORCE."""

import itertools

import numpy as np

import eval as evaluation
from experiments.common import (
    WORKING_RATE,
    beyond_noise,
    by_arm,
    compare,
    line,
    methods,
    run_arm,
    spread,
    train_arm,
    verdict,
)

LOSSES = methods("TOPR", "positives only", "DPO", "PPO", "naive REINFORCE", "AsymRE")
LOW_RATE = 1e-4  # here naive REINFORCE rises before it falls
PANELS = 4


def run(settings):
    arms = compare(settings, run_arm, {"base": {}, **LOSSES})
    along = {
        f"{rate:g}": compare(settings, run_along, LOSSES, [rate])
        for rate in (LOW_RATE, WORKING_RATE)
    }
    return {"arms": arms, "along": along}


def run_along(seed, arm, rate, split):
    """The measures at the end, and the curve along the training."""
    _, log = train_arm(seed, arm, rate)
    return {**run_arm(seed, arm, rate, split), "curve": evaluation.curve([log])}


def curve(arm, measure):
    """(steps, values [steps, seeds]); for DPO, whose steps are pairs, the steps are means."""
    points = list(zip(*arm["curve"]))  # of all seeds
    steps, values = (
        np.array([[one[name] for one in seeds] for seeds in points]) for name in ("step", measure)
    )
    return steps.mean(1), values


def draw(result, *axes):
    panels = itertools.product(("pass@1", "invalid"), result["along"].items())
    for ax, (measure, (rate, arms)) in zip(axes, panels):
        for name, arm in arms.items():
            line(ax, *curve(arm, measure), name)
        ax.set(
            title=f"learning rate {rate}",
            xlabel="optimizer step",
            ylabel=measure,
            ylim=(-0.03, 1.03),
        )


def dpo_claim(passed, where):
    """TOPR is best if it is ahead of both by more than two standard errors."""
    topr, dpo, positives = (passed[name] for name in ("TOPR", "DPO", "positives only"))
    best = beyond_noise(topr - dpo) and beyond_noise(topr - positives)
    each = ", ".join(f"{name} {spread(passed[name])}" for name in LOSSES if name in passed)
    return (
        f"DPO does well, TOPR is best ({where})",
        f"pass@1 {each}; TOPR minus DPO {spread(topr - dpo, '+')}",
        verdict(dpo.mean() > positives.mean(), best),
    )


def claims(result):
    passed, invalid = by_arm(result, "pass@1"), by_arm(result, "invalid")
    before = passed["base"].mean()
    low, working = (arms["naive REINFORCE"] for arms in result["along"].values())
    steps, values = curve(low, "pass@1")
    mean = values.mean(1)  # [steps]
    rises = mean.max() > before + 0.05 and np.mean(low["pass@1"]) < 0.5 * before
    collapses = np.mean(working["pass@1"]) < 0.02 and np.mean(working["invalid"]) > 0.9
    yield (
        "Naive REINFORCE rises, then collapses into invalid text (Figures 1, 3)",
        f"pass@1 {before:.3f} at first; at rate {LOW_RATE:g} up to {mean.max():.3f} (step "
        f"{steps[mean.argmax()]:.0f}), in the end {spread(low['pass@1'])}; at rate "
        f"{WORKING_RATE:g} {spread(working['pass@1'])}, invalid {spread(working['invalid'])}",
        verdict(rises, collapses),
    )

    moved = passed["PPO"] - passed["base"]
    yield (
        "PPO hardly moves (Figures 1, 3)",
        f"pass@1 {spread(moved, '+')} at its best rate (held to reproduce within 0.1 of the base)",
        verdict(abs(moved.mean()) < 0.1),
    )

    yield dpo_claim(passed, "Figures 1, 3")

    left = invalid["TOPR"].mean() / invalid["base"].mean()
    yield (
        "TOPR nearly ends invalid answers (Figures 1, 3)",
        f"invalid {spread(invalid['base'])} to {spread(invalid['TOPR'])}",
        verdict(left < 0.1, left < 1),
    )
