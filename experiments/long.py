"""Answers of 60 to 130 tokens: what the short ones did not show, and what the logs say of why."""

import dataclasses

import numpy as np

from engine import run_folder
from engine.common import table
from experiments.common import (
    MEASURES,
    bars,
    by_arm,
    by_seed,
    compare,
    each_base,
    folder_of_arm,
    harmed,
    line,
    picture,
    rows_of,
    run_again,
    run_arm,
    show_arms,
    spread,
    verdict,
)
from experiments.negatives import GROUPS, gains_by_group, inside, pass_where

SEEDS = 2
RATE, HIGH = 3e-4, 1e-3  # TOPR does as well with either
SHARES = {f"TOPR, share {share}": share for share in (0.1, 0.2, 0.33)}
ARMS = {
    "TOPR": {"base": "long", "loss": "topr"},
    **{name: {"base": "long", "loss": "topr", "positive_share": SHARES[name]} for name in SHARES},
    "positives only": {"base": "long", "loss": "sft"},
    "DPO": {"base": "long", "loss": "dpo"},
    "TOPR, Anna Karenina": {"base": "long", "loss": "topr", "anna_karenina": True},
    "importance sampling": {"base": "long", "loss": "is"},
    "truncated importance sampling": {"base": "long", "loss": "tis"},
}
CUT = {  # at the high rate
    f"{name}, high rate, cut at {norm:g}": {"base": "long", "loss": loss, "grad_clip": norm}
    for norm in (1.0, 100.0) for name, loss in (("TOPR", "topr"), ("importance sampling", "is"))}
LOGGED = {"d_min": min, "d_max": max, "gradient_norm": max, "positive_share": np.mean}
LAST = ("d_mean", "negative_weight")  # of the last step; those above are of all steps


def run(settings, each):
    settings = dataclasses.replace(settings, seeds=min(SEEDS, settings.seeds))
    base = each_base(settings, each, "long")
    arms = compare(settings, each, run_arm, ARMS, "long answers", [RATE])
    arms |= compare(settings, each, run_arm, CUT, "long answers, high rate", [HIGH])
    right = {"base": np.array([one["right"] for one in base])}  # each [seeds, questions]
    for name in ("positives only", "TOPR"):
        runs = run_again(each, run_arm, arms[name], f"long answers: {name} by question")
        right[name] = np.array([one["right"] for one in runs])
    by_group = {name: {group: pass_where(values, inside(right["base"], group)) for group in GROUPS}
                for name, values in right.items()}
    logs = {name: [read_log(seed, arm) for seed in range(settings.seeds)]
            for name, arm in arms.items()}
    return {"base": by_seed(base), "arms": arms, "by group": by_group,
            "logs": {name: by_seed(values) for name, values in logs.items()}}


def read_log(seed, arm):
    log = run_folder.read_log(folder_of_arm(seed, arm["settings"], arm["learning_rate"]))
    found = {field: float(pick([entry[field] for entry in log]))
             for field, pick in LOGGED.items() if log[-1].get(field) is not None}
    return {**found, **{field: log[-1][field] for field in LAST if field in log[-1]}}


def show(result):
    tables = [show_arms(rows_of(result), (*MEASURES, "guesses"), "long answers")]
    rows = [(name, *map(spread, groups.values())) for name, groups in result["by group"].items()]
    tables.append(table(("pass@1 by the base policy's right answers of 16", *GROUPS), rows))
    fields = (*LOGGED, *LAST)
    rows = [(name, *(spread(log.get(field, [])) for field in fields))
            for name, log in result["logs"].items()]
    names = [f"{pick.__name__} {field}" for field, pick in LOGGED.items()]
    tables.append(table(("log", *names, *(f"last {field}" for field in LAST)), rows))
    return "\n\n".join(tables)


def draw(result, path):
    names, values = ("TOPR", "importance sampling"), rows_of(result)
    cuts = ("cut at 1", "cut at 100")
    arms = {name: {cut: values[f"{name}, high rate, {cut}"]["pass@1"] for cut in cuts}
            for name in names}
    shares = all_shares(result)
    with picture(path, 1, 2) as (left, right):
        bars(left, arms, cuts)
        left.axhline(np.mean(values["base"]["pass@1"]), color="black", linestyle="--", label="base")
        left.set(ylabel="pass@1", xlabel="gradients")
        passed = by_arm(result, "pass@1")
        points = np.transpose([passed[name] for name in shares])
        line(right, list(shares.values()), points, "TOPR")
        right.set(xlabel="effective share of positives", ylabel="pass@1")


def all_shares(result):
    """{arm: effective share of positives}, in ascending order"""
    as_sampled = np.mean(result["logs"]["TOPR"]["positive_share"])
    return {**SHARES, "TOPR": as_sampled, "positives only": 1.0}


def claims(result):
    passed, _, invalid = (by_arm(result, measure) for measure in MEASURES)
    loose, tight = (f"importance sampling, high rate, cut at {norm}" for norm in (100, 1))
    harm, harm_at_1 = (harmed(passed, invalid, name) for name in (loose, tight))
    ahead = passed["TOPR, high rate, cut at 100"] - passed[loose]
    yield ("Untruncated importance sampling harms the model where gradients are cut at 100 "
           "(Figure 7, long answers)",
           f"at rate {HIGH:g}: pass@1 {spread(passed['base'])} to {spread(passed[loose])}, invalid "
           f"{spread(invalid['base'])} to {spread(invalid[loose])}, with gradients cut at 1 pass@1 "
           f"{spread(passed[tight])}; TOPR, cut at 100, "
           f"{spread(passed['TOPR, high rate, cut at 100'])}",
           verdict(harm and ahead.min() > 0, harm and not harm_at_1))

    shares = all_shares(result)
    best = max(shares, key=lambda name: passed[name].mean())
    falls = shares[best] < 0.6 and passed[best].mean() > passed["positives only"].mean() + 0.02
    yield ("Best at an effective share of 0.1 to 0.2, less above 0.5 (Figure 5, long answers)",
           "pass@1 at " + ", ".join(f"{share:.2f} {spread(passed[name])}"
                                    for name, share in shares.items()),
           verdict(falls, falls and shares[best] <= 0.2))

    gain = passed["TOPR, Anna Karenina"] - passed["TOPR"]
    yield ("Keeping one right answer of each question and all wrong ones (Anna Karenina) beats "
           "keeping all (one round, long answers)",
           f"{spread(passed['TOPR'])} with all, Anna Karenina "
           f"{spread(passed['TOPR, Anna Karenina'])}: {spread(gain, '+')}",
           verdict(gain.min() > 0, gain.mean() > 0))

    groups = result["by group"]
    gains = gains_by_group(groups["positives only"], groups["TOPR"])
    many = max(gains.get("5 to 16", 0), 0)
    more = [gain > many for group, gain in gains.items() if group != "5 to 16"]
    yield ("What negatives add is on questions with few or no solutions (Figure 4, long answers)",
           "pass@1 of TOPR over positives only, by the base policy's right answers of 16: "
           + ", ".join(f"{group} {gain:+.3f}" for group, gain in gains.items()),
           verdict(all(more) and any(more), any(more)))

    ahead = passed["TOPR"] - passed["DPO"]
    yield ("DPO does well, TOPR is best (Figures 1, 3, long answers)",
           f"pass@1 TOPR {spread(passed['TOPR'])}, DPO {spread(passed['DPO'])}, positives only "
           f"{spread(passed['positives only'])}: TOPR minus DPO {spread(ahead, '+')}",
           verdict(passed["DPO"].mean() > passed["positives only"].mean(),
                   ahead.mean() > 2 * ahead.std() / len(ahead) ** 0.5))
