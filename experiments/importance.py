"""Figure 7: importance sampling with and without truncation, gradients clipped at 1 or at 100."""

from experiments.common import MEASURES, bars, by_arm, compare, methods, run_arm, spread, verdict

LOSSES = methods("TOPR", "truncated importance sampling", "importance sampling")
CLIPS = {"loose": 100.0, "at 1": 1.0}
PANELS = 2


def run(settings):
    arms = {
        f"{name}, clipped {clip}": {**LOSSES[name], "positives": 0.4, "grad_clip": CLIPS[clip]}
        for clip in CLIPS
        for name in LOSSES
    }
    return {"arms": compare(settings, run_arm, {"base": {}, **arms})}


def draw(result, *axes):
    for ax, measure in zip(axes, ("pass@1", "invalid")):
        values = by_arm(result, measure)
        arms = {
            name: {clip: values[f"{name}, clipped {clip}"] for clip in CLIPS} for name in LOSSES
        }
        bars(ax, arms, CLIPS, ylabel=measure, xlabel="gradients clipped")
        ax.axhline(values["base"].mean(), color="grey", linestyle="--", label="base")


def claims(result):
    passed, votes, invalid = (by_arm(result, measure) for measure in MEASURES)
    topr, truncated, plain = (f"{name}, clipped loose" for name in LOSSES)
    yield harm_claim(
        passed, invalid, topr, plain, "importance sampling, clipped at 1", "Figure 7, 60% negatives"
    )

    better = passed[topr] - passed["base"]
    yield (
        "TOPR improves the model in the same setting (Figure 7)",
        f"pass@1 {spread(better, '+')}, to {spread(passed[topr])}; truncated importance "
        "sampling, which also weighs positives by min(1, pi/mu), "
        f"{spread(passed[truncated])}; maj@16 {spread(votes[topr])} and "
        f"{spread(votes[truncated])}",
        verdict(better.min() > 0, better.mean() > 0),
    )


def harm_claim(passed, invalid, topr, loose, tight, where):
    """Harm: in the mean of the seeds pass@1 is lower than at first, or more answers invalid."""
    harm, harm_at_1 = (
        passed[name].mean() < passed["base"].mean() or invalid[name].mean() > invalid["base"].mean()
        for name in (loose, tight)
    )
    return (
        f"Untruncated importance sampling harms the model where gradients are cut at 100 ({where})",
        f"pass@1 {spread(passed['base'])} to {spread(passed[loose])}, invalid "
        f"{spread(invalid['base'])} to {spread(invalid[loose])}, with gradients cut at 1 "
        f"pass@1 {spread(passed[tight])}; TOPR, cut at 100, {spread(passed[topr])}",
        verdict(harm and min(passed[topr] - passed[loose]) > 0, harm and not harm_at_1),
    )
