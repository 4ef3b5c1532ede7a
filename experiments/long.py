"""Answers of 60 to 130 tokens: what the short ones did not show, and what the logs say of why."""

import operator

import numpy as np

from experiments import collapse, importance, negatives, rounds, shares
from experiments.common import bars, by_arm, compare, line, methods, train_arm

SEEDS = 2
RATE, HIGH = 3e-4, 1e-3  # TOPR does as well with either
SHARES = {f"TOPR, share {share}": share for share in (0.1, 0.2, 0.33)}
ARMS = {
    **methods("base", "TOPR"),
    **{name: {"loss": "topr", "positive_share": SHARES[name]} for name in SHARES},
    **methods("positives only", "DPO", "TOPR, Anna Karenina"),
    **methods("importance sampling", "truncated importance sampling"),
}
CUT = {  # at the high rate
    f"{name}, high rate, cut at {norm:g}": {**arm, "grad_clip": norm}
    for norm in (1.0, 100.0)
    for name, arm in methods("TOPR", "importance sampling").items()
}
LOGGED = {
    "d_min": min,
    "d_max": max,
    "gradient_norm": max,
    "positive_share": np.mean,
    "d_mean": operator.itemgetter(-1),
    "negative_weight": operator.itemgetter(-1),
}
MEASURES = ("pass@1", "maj@16", "invalid", "d_mean", "negative_weight")
PANELS = 2


def run(settings):
    arms = compare(settings, run_logged, ARMS, [RATE], SEEDS)
    return {"arms": arms | compare(settings, run_logged, CUT, [HIGH], SEEDS)}


def run_logged(seed, arm, rate, split):
    """The measures, and of the log the extremes, the mean share, and the last d and weight."""
    arm = {"base": "long", **arm}
    measures, (_, log) = negatives.run_by_group(seed, arm, rate, split), train_arm(seed, arm, rate)
    for field, pick in LOGGED.items():
        values = [entry[field] for entry in log if entry.get(field) is not None]
        if values:
            measures[field] = pick(values)
    return measures


def draw(result, left, right):
    passed, cuts, points = by_arm(result, "pass@1"), ("cut at 1", "cut at 100"), all_shares(result)
    arms = {
        name: {cut: passed[f"{name}, high rate, {cut}"] for cut in cuts}
        for name in ("TOPR", "importance sampling")
    }
    bars(left, arms, cuts, ylabel="pass@1", xlabel="gradients")
    left.axhline(passed["base"].mean(), color="black", linestyle="--", label="base")
    line(right, list(points.values()), [passed[name] for name in points], "TOPR")
    right.set(xlabel="effective share of positives", ylabel="pass@1")


def all_shares(result):
    """{arm: effective share of positives}, in ascending order"""
    as_sampled = np.mean(result["arms"]["TOPR"]["positive_share"])
    return {**SHARES, "TOPR": as_sampled, "positives only": 1.0}


def claims(result):
    passed, invalid = by_arm(result, "pass@1"), by_arm(result, "invalid")
    yield importance.harm_claim(
        passed,
        invalid,
        "TOPR, high rate, cut at 100",
        "importance sampling, high rate, cut at 100",
        "importance sampling, high rate, cut at 1",
        f"Figure 7, long answers, rate {HIGH:g}",
    )
    by_share = {share: passed[name] for name, share in all_shares(result).items()}
    yield shares.share_claim(by_share, "Figure 5, long answers")
    yield rounds.karenina_claim(passed, "one round, long answers")
    yield negatives.group_claim(result, "TOPR", "Figure 4, long answers")
    yield collapse.dpo_claim(passed, "Figures 1, 3, long answers")
