"""Figures 1 and 3: every loss along a training run, and the collapse of naive REINFORCE."""

import itertools

import numpy as np

from experiments.common import (
    MEASURES,
    WORKING_RATE,
    by_arm,
    compare,
    line,
    measure_once,
    picture,
    rows_of,
    run_arms,
    show_arms,
    spread,
    train_arm,
    verdict,
)

ARMS = {
    "TOPR": {"loss": "topr"},
    "positives only": {"loss": "sft"},
    "DPO": {"loss": "dpo"},
    "PPO": {"loss": "ppo"},
    "naive REINFORCE": {"loss": "reinforce"},
    # Not in the paper: arXiv 2506.20520. The best of -0.7, -0.8, -0.9 on validation questions.
    "AsymRE": {"loss": "reinforce", "baseline": -0.9},
}
LOW_RATE = 1e-4  # here naive REINFORCE rises before it falls


def run(settings, each):
    result = run_arms(settings, each, ARMS, "collapse")
    result["along"] = {}
    for rate in (LOW_RATE, WORKING_RATE):
        what = f"collapse at {rate:g}"
        result["along"][f"{rate:g}"] = compare(settings, each, run_along, ARMS, what, [rate])
    return result


def run_along(seed, arm, rate, split):
    """The measures at the end, and the curve along the training."""
    settings, curve = train_arm(seed, arm, rate)
    return {**measure_once(settings.out, seed, split), "curve": curve}


def curve(arm, measure):
    """(steps, values [seeds, steps]): those that all seeds have, and the last.

    The last step differs between seeds for DPO, whose steps are pairs.
    """
    shared = min(map(len, arm["curve"])) - 1
    curves = [points[:shared] + points[-1:] for points in arm["curve"]]
    steps = np.mean([[point["step"] for point in points] for points in curves], 0)
    return steps, np.array([[point[measure] for point in points] for points in curves])


def show(result):
    tables = [show_arms(rows_of(result), MEASURES, "each at its best rate")]
    for rate, arms in result["along"].items():
        tables.append(show_arms(arms, MEASURES, f"all at {rate}"))
    return "\n\n".join(tables)


def draw(result, path):
    panels = itertools.product(("pass@1", "invalid"), result["along"].items())
    with picture(path, 2, 2) as axes:
        for ax, (measure, (rate, arms)) in zip(axes, panels):
            for name, arm in arms.items():
                line(ax, *curve(arm, measure), name)
            ax.set(title=f"learning rate {rate}", xlabel="optimizer step", ylabel=measure,
                   ylim=(-0.03, 1.03))


def claims(result):
    passed, invalid = by_arm(result, "pass@1"), by_arm(result, "invalid")
    before = passed["base"].mean()
    low, working = (arms["naive REINFORCE"] for arms in result["along"].values())
    steps, values = curve(low, "pass@1")
    mean = values.mean(0)  # [steps]
    rises = mean.max() > before + 0.05 and np.mean(low["pass@1"]) < 0.5 * before
    collapses = np.mean(working["pass@1"]) < 0.02 and np.mean(working["invalid"]) > 0.9
    yield ("Naive REINFORCE rises, then collapses into invalid text (Figures 1, 3)",
           f"pass@1 {before:.3f} at first; at rate {LOW_RATE:g} up to {mean.max():.3f} (step "
           f"{steps[mean.argmax()]:.0f}), in the end {spread(low['pass@1'])}; at rate "
           f"{WORKING_RATE:g} {spread(working['pass@1'])}, invalid {spread(working['invalid'])}",
           verdict(rises, collapses))

    moved = passed["PPO"] - passed["base"]
    yield ("PPO hardly moves (Figures 1, 3)",
           f"pass@1 {spread(moved, '+')} at its best rate (held to reproduce within 0.1 of "
           "the base)",
           verdict(abs(moved.mean()) < 0.1))

    ahead = {name: passed["TOPR"] - passed[name]
             for name in ("DPO", "positives only", "PPO", "naive REINFORCE")}
    best = all(gain.mean() > 2 * gain.std() / len(gain) ** 0.5 for gain in ahead.values())
    well = passed["DPO"].mean() > passed["positives only"].mean()
    yield ("DPO does well, TOPR is best (Figures 1, 3)",
           f"pass@1 at the best rate of each: TOPR {spread(passed['TOPR'])}, DPO "
           f"{spread(passed['DPO'])}, positives only {spread(passed['positives only'])} (TOPR "
           f"without a baseline); TOPR minus DPO {spread(ahead['DPO'], '+')} (best if beyond "
           f"two standard errors); AsymRE, not in the paper, {spread(passed['AsymRE'])}",
           verdict(well, best))

    left = invalid["TOPR"].mean() / invalid["base"].mean()
    yield ("TOPR nearly ends invalid answers (Figures 1, 3)",
           f"invalid {spread(invalid['base'])} to {spread(invalid['TOPR'])}",
           verdict(left < 0.1, left < 1))
