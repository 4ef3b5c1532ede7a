"""Figure 4: what the negatives add to the positives, and on which questions."""

import numpy as np

from experiments.common import bars, by_arm, compare, methods, run_arm, spread, verdict

TOPR = {  # --quick validates nothing and takes the first
    f"TOPR, share {share}": {"loss": "topr", "positive_share": share} for share in (0.33, 0.5, 0.75)
}
TOPR["TOPR, as sampled"] = {"loss": "topr"}
GROUPS = {"none": [0], "1 to 4": range(1, 5), "5 to 16": range(5, 17)}  # right answers of 16
MEASURES = ("pass@1", "maj@16", "invalid", *(f"pass@1 where {group}" for group in GROUPS))
PANELS = 2


def run(settings):
    arms = {**methods("base", "positives only"), **TOPR}
    arms = compare(settings, run_by_group, arms)
    scores = {name: max(map(sum, arms[name]["validation"].values())) for name in TOPR}
    return {"arms": arms, "best": max(TOPR, key=scores.get)}


def run_by_group(seed, arm, rate, split):
    """Also pass@1 where the base policy had so many right answers; how many questions now have."""
    measures = run_arm(seed, arm, rate, split)
    base = run_arm(seed, arm, 0, split)
    now, before = (16 * np.array(one["right"]) for one in (measures, base))  # [questions]
    for group, counts in GROUPS.items():
        chosen = np.isin(before, counts)
        measures[f"pass@1 where {group}"] = now[chosen].mean() / 16 if chosen.any() else None
        measures[f"share with {group}"] = np.isin(now, counts).mean()
    return measures


def draw(result, left, right):
    names = {"base": "base", "positives only": "positives only", "TOPR": result["best"]}
    shown = {name: result["arms"][arm] for name, arm in names.items()}
    groups = {
        name: {group: arm[f"share with {group}"] for group in GROUPS} for name, arm in shown.items()
    }
    bars(left, groups, GROUPS, xlabel="right answers of 16", ylabel="share of questions")
    bars(right, shown, ("pass@1", "maj@16"), ylabel="share right", ylim=(0, 1))


def claims(result):
    best, passed, votes = result["best"], by_arm(result, "pass@1"), by_arm(result, "maj@16")
    gain = passed[best] - passed["positives only"]
    more_votes = votes[best] - votes["positives only"]
    yield (
        "Positives only is stable and lower (Figure 4)",
        f"pass@1 {spread(passed['positives only'])}, {best} (the best of {len(TOPR)} on the "
        f"validation questions) {spread(passed[best])}: {spread(gain, '+')}, on the worst "
        f"seed {gain.min():+.3f}; maj@16 {spread(more_votes, '+')}",
        verdict(gain.min() > 0 and more_votes.mean() >= 0, gain.mean() > 0),
    )

    claim, measured, holds = group_claim(result, best, "Figure 4")
    none = by_arm(result, "share with none")
    yield (
        claim,
        f"{measured}; questions without any right answer: positives only "
        f"{spread(none['positives only'])}, TOPR {spread(none[best])}",
        holds,
    )


def group_claim(result, topr, where):
    """The gain of each group is the mean over the seeds that have such questions."""
    gains = {}
    for group in GROUPS:
        passed = by_arm(result, f"pass@1 where {group}")
        gain = passed[topr] - passed["positives only"]  # [seeds]
        if not np.isnan(gain).all():
            gains[group] = np.nanmean(gain)
    shown = ", ".join(f"{group} {gain:+.3f}" for group, gain in gains.items())
    many = max(gains.pop("5 to 16", 0), 0)
    more = [gain > many for gain in gains.values()]
    return (
        f"What negatives add is on questions with few or no solutions ({where})",
        f"pass@1 of {topr} over positives only, by the base policy's right answers of 16: {shown}",
        verdict(all(more) and any(more), any(more)),
    )
