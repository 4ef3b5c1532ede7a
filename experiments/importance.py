"""Figure 7: importance sampling with and without truncation, 60% negatives, gradients clipped at 1 or hardly."""

import numpy as np

from experiments.common import (
    STYLES,
    bars,
    by_seed,
    compare,
    difference,
    picture,
    run_arm,
    run_base,
    show_arms,
    spread,
    verdict,
)

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
            bars(ax, [f"clipped at {norm:g}" for norm in CLIPS.values()], {name: of(name, measure) for name in LOSSES})
            ax.axhline(np.mean(result["base"][measure]), color=STYLES["base"][0], linestyle="--", label="base")
            ax.set(ylabel=measure)


def claims(result):
    arms, base = result["arms"], result["base"]
    of = lambda name, measure, clip="loose": arms[f"{name}, clipped {clip}"][measure]
    name = "importance sampling"
    harmed = {clip: np.mean(of(name, "pass@1", clip)) < np.mean(base["pass@1"])
              or np.mean(of(name, "invalid", clip)) > np.mean(base["invalid"]) for clip in CLIPS}
    ahead = {clip: difference(of("TOPR", "pass@1", clip), of("importance sampling", "pass@1", clip)) for clip in CLIPS}
    better = difference(of("TOPR", "pass@1"), base["pass@1"])
    yield ("Untruncated importance sampling harms the model where gradients are cut at 100 (Figure 7, 60% negatives)",
           f"invalid {spread(base['invalid'])} to {spread(of('importance sampling', 'invalid'))}; pass@1 "
           f"{spread(base['pass@1'])} to {spread(of('importance sampling', 'pass@1'))}; TOPR minus that "
           f"{spread(ahead['loose'], sign=True)}, with gradients cut at 1 {spread(ahead['at 1'], sign=True)}",
           verdict(harmed["loose"] and not harmed["at 1"], harmed["loose"] or min(ahead["loose"]) > 0))
    yield ("TOPR improves the model in the same setting (Figure 7)",
           f"pass@1 {spread(better, sign=True)}, to {spread(of('TOPR', 'pass@1'))}; truncated importance sampling, which also "
           f"weighs positives by min(1, pi/mu), {spread(of('truncated importance sampling', 'pass@1'))}; maj@16 "
           f"{spread(of('TOPR', 'maj@16'))} and {spread(of('truncated importance sampling', 'maj@16'))}",
           verdict(min(better) > 0, np.mean(better) > 0))
