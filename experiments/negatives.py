"""Figure 4: what the negatives add to the positives, and on which questions."""

import numpy as np

from experiments.common import (
    MEASURES,
    SAMPLES,
    bars,
    best_arm,
    by_arm,
    compare,
    each_base,
    picture,
    run_again,
    run_arm,
    show_arms,
    spread,
    table,
    verdict,
)

SHARES = {
    "TOPR, as sampled": {"loss": "topr"},
    "TOPR, share 0.33": {"loss": "topr", "positive_share": 0.33},
    "TOPR, share 0.5": {"loss": "topr", "positive_share": 0.5},
    "TOPR, share 0.75": {"loss": "topr", "positive_share": 0.75},
}
GROUPS = {"none": (0, 0), "1 to 4": (1, 4), "5 to 16": (5, 16)}  # right answers of 16


def run(settings, each):
    arms = {"positives only": {"loss": "sft"}, **SHARES}
    arms = compare(settings, each, run_arm, arms, "negatives")
    best = best_arm(arms, ["TOPR, share 0.33", *SHARES])
    runs = {"base": each_base(settings, each)}
    for name, arm in {"positives only": arms["positives only"], "TOPR": arms[best]}.items():
        runs[name] = run_again(each, run_arm, arm, f"negatives: {name} by question")
    count, passed = {}, {}
    base = np.array([one["right"] for one in runs["base"]])  # [seeds, questions]
    for name in runs:
        right = np.array([one["right"] for one in runs[name]])  # [seeds, questions]
        count[name] = {group: inside(right, group).mean(1).tolist() for group in GROUPS}
        passed[name] = {group: pass_where(right, inside(base, group)) for group in GROUPS}
    return {"arms": arms, "best": best, "share of questions": count,
            "pass@1 by the base policy": passed}


def inside(right, group):
    """Questions whose number of right answers is in the group. [seeds, questions]"""
    low, high = GROUPS[group]
    return (right >= low) & (right <= high)


def pass_where(right, chosen):
    """pass@1 on the chosen questions by seed; None where a seed has no such question."""
    return [float(row[mask].mean() / SAMPLES) if mask.any() else None
            for row, mask in zip(right, chosen)]


def gains_by_group(before, after):
    """{group: mean gain over the seeds that have such questions}; both as pass_where's, by group"""
    gains = {}
    for group in GROUPS:
        gain = np.array(after[group], float) - np.array(before[group], float)  # [seeds], or NaN
        if not np.isnan(gain).all():
            gains[group] = np.nanmean(gain)
    return gains


def show(result):
    tables = [show_arms(result["arms"], MEASURES, f"best: {result['best']}")]
    for part in ("share of questions", "pass@1 by the base policy"):
        rows = [(name, *map(spread, groups.values())) for name, groups in result[part].items()]
        tables.append(table((f"{part} with so many right answers of 16", *GROUPS), rows))
    return "\n\n".join(tables)


def draw(result, path):
    names = {"positives only": "positives only", "TOPR": result["best"]}
    arms = {name: result["arms"][arm] for name, arm in names.items()}
    with picture(path, 1, 2) as (left, right):
        bars(left, result["share of questions"], GROUPS)
        left.set(xlabel="right answers of 16", ylabel="share of questions")
        bars(right, arms, ("pass@1", "maj@16"))
        right.set(ylabel="share right", ylim=(0, 1))


def claims(result):
    best, passed, votes = result["best"], by_arm(result, "pass@1"), by_arm(result, "maj@16")
    gain = passed[best] - passed["positives only"]
    more_votes = votes[best] - votes["positives only"]
    yield ("Positives only is stable and lower (Figure 4)",
           f"pass@1 {spread(passed['positives only'])}, {best} (the best of {len(SHARES)} on the "
           f"validation questions) {spread(passed[best])}: {spread(gain, '+')}, on the worst "
           f"seed {gain.min():+.3f}; maj@16 {spread(more_votes, '+')}",
           verdict(gain.min() > 0 and more_votes.mean() >= 0, gain.mean() > 0))

    groups = result["pass@1 by the base policy"]
    gains = gains_by_group(groups["positives only"], groups["TOPR"])
    many = max(gains.get("5 to 16", 0), 0)
    more = [gains[group] > many for group in ("none", "1 to 4") if group in gains]
    none = {name: counts["none"] for name, counts in result["share of questions"].items()}
    fewer = np.mean(none["TOPR"]) < np.mean(none["positives only"])
    yield ("What negatives add is on questions with few or no solutions (Figure 4)",
           "pass@1 gained over positives only, by the base policy's right answers of 16: "
           + ", ".join(f"{group} {gain:+.3f}" for group, gain in gains.items())
           + f"; questions without any right answer: positives only "
           f"{spread(none['positives only'])}, TOPR {spread(none['TOPR'])}",
           verdict(all(more) and any(more) and fewer, any(more)))
