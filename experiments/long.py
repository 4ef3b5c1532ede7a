"""Answers of 60 to 130 tokens: what the short ones did not show, and what the logs say of why."""

import dataclasses
import operator

import numpy as np

from experiments.common import (MEASURES, bars, beyond_noise, by_arm, compare, harmed, line,
                                show_arms, spread, train_arm, verdict)
from experiments.negatives import GROUPS, gains_by_group, run_by_group

SEEDS = 2
RATE, HIGH = 3e-4, 1e-3  # TOPR does as well with either
SHARES = {f"TOPR, share {share}": share for share in (0.1, 0.2, 0.33)}
ARMS = {
    "base": {},
    "TOPR": {"loss": "topr"},
    **{name: {"loss": "topr", "positive_share": SHARES[name]} for name in SHARES},
    "positives only": {"loss": "sft"},
    "DPO": {"loss": "dpo"},
    "TOPR, Anna Karenina": {"loss": "topr", "anna_karenina": True},
    "importance sampling": {"loss": "is"},
    "truncated importance sampling": {"loss": "tis"},
}
CUT = {  # at the high rate
    f"{name}, high rate, cut at {norm:g}": {"loss": loss, "grad_clip": norm}
    for norm in (1.0, 100.0) for name, loss in (("TOPR", "topr"), ("importance sampling", "is"))}
LOGGED = {"d_min": min, "d_max": max, "gradient_norm": max, "positive_share": np.mean,
          "d_mean": operator.itemgetter(-1), "negative_weight": operator.itemgetter(-1)}
PANELS = 2


def run(settings):
    settings = dataclasses.replace(settings, seeds=min(SEEDS, settings.seeds))
    return {"arms": {**compare(settings, run_logged, ARMS, [RATE]),
                     **compare(settings, run_logged, CUT, [HIGH])}}


def run_logged(seed, arm, rate, split):
    """The measures, and of the log the extremes, the mean share, and the last d and weight."""
    arm = {"base": "long", **arm}
    measures, (_, log) = run_by_group(seed, arm, rate, split), train_arm(seed, arm, rate)
    for field, pick in LOGGED.items():
        values = [entry[field] for entry in log if entry.get(field) is not None]
        if values:
            measures[field] = pick(values)
    return measures


def show(result):
    groups = [f"pass@1 where {group}" for group in GROUPS]
    return "\n\n".join(show_arms(result, names) for names in (MEASURES, groups, LOGGED))


def draw(result, left, right):
    passed, cuts, shares = by_arm(result, "pass@1"), ("cut at 1", "cut at 100"), all_shares(result)
    arms = {name: {cut: passed[f"{name}, high rate, {cut}"] for cut in cuts}
            for name in ("TOPR", "importance sampling")}
    bars(left, arms, cuts, ylabel="pass@1", xlabel="gradients")
    left.axhline(passed["base"].mean(), color="black", linestyle="--", label="base")
    points = np.transpose([passed[name] for name in shares])
    line(right, list(shares.values()), points, "TOPR")
    right.set(xlabel="effective share of positives", ylabel="pass@1")


def all_shares(result):
    """{arm: effective share of positives}, in ascending order"""
    as_sampled = np.mean(result["arms"]["TOPR"]["positive_share"])
    return {**SHARES, "TOPR": as_sampled, "positives only": 1.0}


def claims(result):
    passed, _, invalid = (by_arm(result, measure) for measure in MEASURES)
    loose, tight = (f"importance sampling, high rate, cut at {norm}" for norm in (100, 1))
    harm, harm_at_1 = (harmed(passed, invalid, name) for name in (loose, tight))
    topr, topr_cut = passed["TOPR"], passed["TOPR, high rate, cut at 100"]
    yield ("Untruncated importance sampling harms the model where gradients are cut at 100 "
           "(Figure 7, long answers)",
           f"at rate {HIGH:g}: pass@1 {spread(passed['base'])} to {spread(passed[loose])}, invalid "
           f"{spread(invalid['base'])} to {spread(invalid[loose])}, with gradients cut at 1 pass@1 "
           f"{spread(passed[tight])}; TOPR, cut at 100, {spread(topr_cut)}",
           verdict(harm and min(topr_cut - passed[loose]) > 0, harm and not harm_at_1))

    shares = all_shares(result)
    best = max(shares, key=lambda name: passed[name].mean())
    falls = shares[best] < 0.6 and passed[best].mean() > passed["positives only"].mean() + 0.02
    yield ("Best at an effective share of 0.1 to 0.2, less above 0.5 (Figure 5, long answers)",
           "pass@1 at " + ", ".join(f"{share:.2f} {spread(passed[name])}"
                                    for name, share in shares.items()),
           verdict(falls, falls and shares[best] <= 0.2))

    karenina = passed["TOPR, Anna Karenina"]
    gain = karenina - topr
    yield ("Keeping one right answer of each question and all wrong ones (Anna Karenina) beats "
           "keeping all (one round, long answers)",
           f"{spread(topr)} with all, Anna Karenina {spread(karenina)}: {spread(gain, '+')}",
           verdict(gain.min() > 0, gain.mean() > 0))

    gains = gains_by_group(result, "TOPR")
    many = max(gains.get("5 to 16", 0), 0)
    more = [gain > many for group, gain in gains.items() if group != "5 to 16"]
    yield ("What negatives add is on questions with few or no solutions (Figure 4, long answers)",
           "pass@1 of TOPR over positives only, by the base policy's right answers of 16: "
           + ", ".join(f"{group} {gain:+.3f}" for group, gain in gains.items()),
           verdict(all(more) and any(more), any(more)))

    dpo, positives = passed["DPO"], passed["positives only"]
    yield ("DPO does well, TOPR is best (Figures 1, 3, long answers)",
           f"pass@1 TOPR {spread(topr)}, DPO {spread(dpo)}, positives only {spread(positives)}: "
           f"TOPR minus DPO {spread(topr - dpo, '+')}",
           verdict(dpo.mean() > positives.mean(), beyond_noise(topr - dpo)))
