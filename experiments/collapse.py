"""Figures 1 and 3: what each loss does along a training run, naive REINFORCE's collapse among it."""

import numpy as np

from experiments.common import (
    WORKING_RATE,
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


def along(result, name, rate, measure):
    """(steps, values [seeds, steps]): the steps that all seeds have, and the end; DPO's pairs end at another step each."""
    curves = [{point["step"]: point[measure] for point in curve} for curve in result["along"][f"{rate:g}"][name]["curve"]]
    ends = [max(curve) for curve in curves]
    steps = sorted(set.intersection(*map(set, curves)) - set(ends))
    values = [[curve[step] for step in steps] + [curve[end]] for curve, end in zip(curves, ends)]
    return [*steps, float(np.mean(ends))], np.array(values)


def show(result):
    measures = ("pass@1", "maj@16", "invalid")
    text = [show_arms({"base": result["base"], **result["arms"]}, measures, "each at its best rate")]
    return "\n\n".join(text + [show_arms(arms, measures, f"all at {rate}") for rate, arms in result["along"].items()])


def draw(result, path):
    with picture(path, 2, 2) as axes:
        panels = [(measure, rate) for measure in ("pass@1", "invalid") for rate in (LOW_RATE, WORKING_RATE)]
        for ax, (measure, rate) in zip(axes, panels):
            for name in result["along"][f"{rate:g}"]:
                line(ax, *along(result, name, rate, measure), name)
            ax.set(title=f"learning rate {rate:g}", xlabel="optimizer step", ylabel=measure, ylim=(-0.03, 1.03))


def claims(result):
    base, arms = result["base"], result["arms"]
    low, working = (result["along"][f"{rate:g}"]["naive REINFORCE"] for rate in (LOW_RATE, WORKING_RATE))
    steps, curves = along(result, "naive REINFORCE", LOW_RATE, "pass@1")
    top, step = curves.mean(0).max(), steps[curves.mean(0).argmax()]
    rises = top > np.mean(base["pass@1"]) + 0.05 and np.mean(low["pass@1"]) < 0.5 * np.mean(base["pass@1"])
    collapsed = np.mean(working["pass@1"]) < 0.02 and np.mean(working["invalid"]) > 0.9
    yield ("Naive REINFORCE rises, then collapses into invalid text (Figures 1, 3)",
           f"pass@1 {np.mean(base['pass@1']):.3f} at first; at rate {LOW_RATE:g} up to {top:.3f} (step {step:.0f}), in the end "
           f"{spread(low['pass@1'])}; at rate {WORKING_RATE:g} {spread(working['pass@1'])}, invalid "
           f"{spread(working['invalid'])}",
           verdict(rises and collapsed, rises or collapsed))
    ppo = difference(arms["PPO"]["pass@1"], base["pass@1"])
    yield ("PPO hardly moves (Figures 1, 3)",
           f"pass@1 {spread(ppo, sign=True)} at its best rate (held to reproduce within 0.1 of the base)",
           verdict(abs(np.mean(ppo)) < 0.1, False))
    ahead = {name: difference(arms["TOPR"]["pass@1"], arm["pass@1"]) for name, arm in arms.items() if name != "TOPR"}
    best = all(np.mean(values) > 2 * np.std(values) / np.sqrt(len(values)) for values in ahead.values())  # two standard errors
    well = np.mean(arms["DPO"]["pass@1"]) > np.mean(arms["positives only"]["pass@1"])
    yield ("DPO does well, TOPR is best (Figures 1, 3)",
           "pass@1 at the best rate of each: " + ", ".join(
               f"{name} {spread(arms[name]['pass@1'])}" for name in ("TOPR", "DPO", "positives only"))
           + f" (TOPR without a baseline); TOPR minus DPO {spread(ahead['DPO'], sign=True)} (best if beyond two standard errors)",
           verdict(well and best, well or best))
    yield ("TOPR nearly ends invalid answers (Figures 1, 3)",
           f"invalid {spread(base['invalid'])} to {spread(arms['TOPR']['invalid'])}",
           verdict(np.mean(arms["TOPR"]["invalid"]) < 0.1 * np.mean(base["invalid"]),
                   np.mean(arms["TOPR"]["invalid"]) < np.mean(base["invalid"])))
