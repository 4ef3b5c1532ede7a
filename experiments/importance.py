"""Figure 7: importance sampling with and without truncation, gradients clipped at 1 or at 100."""

from experiments.common import (
    MEASURES,
    STYLES,
    bars,
    by_arm,
    harmed,
    picture,
    rows_of,
    run_arms,
    show_arms,
    spread,
    verdict,
)

LOSSES = {"TOPR": "topr", "truncated importance sampling": "tis", "importance sampling": "is"}
CLIPS = {"loose": 100.0, "at 1": 1.0}


def run(settings, each):
    arms = {}
    for clip, norm in CLIPS.items():
        for name, loss in LOSSES.items():
            arm = {"loss": loss, "positives": 0.4, "grad_clip": norm}
            arms[f"{name}, clipped {clip}"] = arm
    return run_arms(settings, each, arms, "importance")


def show(result):
    return show_arms(rows_of(result), MEASURES, "60% negatives")


def draw(result, path):
    with picture(path, 1, 2) as axes:
        for ax, measure in zip(axes, ("pass@1", "invalid")):
            values = by_arm(result, measure)
            clipped = {name: {f"clipped at {norm:g}": values[f"{name}, clipped {clip}"]
                              for clip, norm in CLIPS.items()} for name in LOSSES}
            bars(ax, clipped, [f"clipped at {norm:g}" for norm in CLIPS.values()])
            ax.axhline(values["base"].mean(), color=STYLES["base"][0], linestyle="--", label="base")
            ax.set(ylabel=measure)


def claims(result):
    passed, votes, invalid = (by_arm(result, measure) for measure in MEASURES)
    topr, truncated, plain = (f"{name}, clipped loose" for name in LOSSES)
    topr_at_1, plain_at_1 = "TOPR, clipped at 1", "importance sampling, clipped at 1"
    harm, harm_at_1 = (harmed(passed, invalid, name) for name in (plain, plain_at_1))
    ahead, ahead_at_1 = passed[topr] - passed[plain], passed[topr_at_1] - passed[plain_at_1]
    yield ("Untruncated importance sampling harms the model where gradients are cut at 100 "
           "(Figure 7, 60% negatives)",
           f"invalid {spread(invalid['base'])} to {spread(invalid[plain])}; pass@1 "
           f"{spread(passed['base'])} to {spread(passed[plain])}; TOPR minus that "
           f"{spread(ahead, '+')}, with gradients cut at 1 {spread(ahead_at_1, '+')}",
           verdict(harm and not harm_at_1, harm or ahead.min() > 0))

    better = passed[topr] - passed["base"]
    yield ("TOPR improves the model in the same setting (Figure 7)",
           f"pass@1 {spread(better, '+')}, to {spread(passed[topr])}; truncated importance "
           "sampling, which also weighs positives by min(1, pi/mu), "
           f"{spread(passed[truncated])}; maj@16 {spread(votes[topr])} and "
           f"{spread(votes[truncated])}",
           verdict(better.min() > 0, better.mean() > 0))
