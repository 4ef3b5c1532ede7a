"""Figures 1 and 3: what each loss does along a training run, naive REINFORCE's collapse among it."""

import numpy as np

from experiments.common import (WORKING_RATE, by_seed, compare, difference, line, measured, picture, run_arm, run_base,
                                show_arms, spread, train_arm, verdict)

ARMS = {"TOPR": dict(loss="topr"), "positives only": dict(loss="sft"), "DPO": dict(loss="dpo"), "PPO": dict(loss="ppo"),
        "naive REINFORCE": dict(loss="reinforce")}
LOW_RATE = 1e-4  # here naive REINFORCE rises before it falls


def run(settings, each):
    seeds = range(settings.seeds)
    base = each(run_base, [(seed,) for seed in seeds], "base policies: test")
    arms = compare(settings, each, run_arm, ARMS, "collapse")
    jobs = [(seed, arm["settings"], rate) for rate in (LOW_RATE, WORKING_RATE) for arm in arms.values() for seed in seeds]
    ends = iter(each(run_to_the_end, jobs, "collapse: curves"))
    along = {f"{rate:g}": {name: by_seed([next(ends) for _ in seeds]) for name in ARMS} for rate in (LOW_RATE, WORKING_RATE)}
    return {"base": by_seed(base), "arms": arms, "along": along}


def run_to_the_end(seed, arm, rate):
    """The measures at the end, and the curve along the training."""
    settings, curve = train_arm(seed, arm, rate)
    return {**measured(settings.out, seed, "test"), "curve": curve}


def highest(result, name, rate):
    """Along the mean curve: (its highest pass@1, the step)"""
    curves = result["along"][f"{rate:g}"][name]["curve"]
    mean = np.mean([[point["pass@1"] for point in curve] for curve in curves], 0)
    return mean.max(), curves[0][mean.argmax()]["step"]


def show(result):
    measures = ("pass@1", "maj@16", "invalid")
    text = [show_arms({"base": result["base"], **result["arms"]}, measures, "each at its best rate")]
    return "\n\n".join(text + [show_arms(arms, measures, f"all at {rate}") for rate, arms in result["along"].items()])


def draw(result, path):
    with picture(path, 2, 2) as axes:
        panels = [(measure, rate) for measure in ("pass@1", "invalid") for rate in (LOW_RATE, WORKING_RATE)]
        for ax, (measure, rate) in zip(axes, panels):
            for name, runs in result["along"][f"{rate:g}"].items():
                steps = [point["step"] for point in runs["curve"][0]]
                line(ax, steps, [[point[measure] for point in curve] for curve in runs["curve"]], name)
            ax.set(title=f"learning rate {rate:g}", xlabel="optimizer step", ylabel=measure, ylim=(-0.03, 1.03))
        axes[0].legend(loc="upper left")


def claims(result):
    base, arms = result["base"], result["arms"]
    low, working = (result["along"][f"{rate:g}"]["naive REINFORCE"] for rate in (LOW_RATE, WORKING_RATE))
    collapsed, (top, step) = np.mean(working["pass@1"]) < 0.02, highest(result, "naive REINFORCE", LOW_RATE)
    rises = top > np.mean(base["pass@1"]) + 0.05
    ppo = difference(arms["PPO"]["pass@1"], base["pass@1"])
    topr, dpo, positives = (np.mean(arms[name]["pass@1"]) for name in ("TOPR", "DPO", "positives only"))
    yield ("Naive REINFORCE rises, then collapses into invalid text (Figures 1, 3)",
           f"pass@1 {np.mean(base['pass@1']):.3f} at first; at rate {LOW_RATE:g} up to {top:.3f} (step {step}), in the end "
           f"{spread(low['pass@1'])}; at rate {WORKING_RATE:g} {spread(working['pass@1'])}, invalid "
           f"{spread(working['invalid'])}",
           verdict(collapsed and rises and np.mean(working["invalid"]) > 0.9, collapsed))
    yield ("PPO hardly moves (Figures 1, 3)", f"{spread(ppo, sign=True)} pass@1 at its best rate",
           verdict(abs(np.mean(ppo)) < 0.1, False))
    yield ("DPO does well, TOPR is best (Figures 1, 3)", "pass@1 at the best rate of each: " + ", ".join(
        f"{name} {spread(arms[name]['pass@1'])}" for name in ("TOPR", "DPO", "positives only")),
        verdict(topr > dpo > positives, topr > positives))
    yield ("TOPR nearly ends invalid answers (Figures 1, 3)",
           f"{spread(base['invalid'])} to {spread(arms['TOPR']['invalid'])}",
           verdict(np.mean(arms["TOPR"]["invalid"]) < 0.1 * np.mean(base["invalid"]), True))
