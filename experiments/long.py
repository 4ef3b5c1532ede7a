"""Answers of 60 to 130 tokens: what the short ones did not show, and what the logs say of why."""

import dataclasses

import numpy as np

from engine import run_folder
from engine.common import table
from experiments.common import (
    MEASURES,
    bars,
    best_arm,
    by_arm,
    by_seed,
    compare,
    each_base,
    folder_of,
    name_of,
    picture,
    rows_of,
    run_again,
    run_arm,
    show_arms,
    spread,
    verdict,
)
from experiments.negatives import GROUPS, gains_by_group, inside, pass_where

SEEDS, RATES = 2, (3e-4, 1e-3)
SHARES = {f"TOPR, share {share}": share for share in (0.1, 0.2, 0.33)}
LOOSE = {"base": "long", "grad_clip": 100.0}
ARMS = {
    "TOPR": {"base": "long", "loss": "topr"},
    **{name: {"base": "long", "loss": "topr", "positive_share": SHARES[name]} for name in SHARES},
    "positives only": {"base": "long", "loss": "sft"},
    "DPO": {"base": "long", "loss": "dpo"},
    "TOPR, Anna Karenina": {"base": "long", "loss": "topr", "anna_karenina": True},
    "importance sampling": {"base": "long", "loss": "is"},
    "truncated importance sampling": {"base": "long", "loss": "tis"},
    "TOPR, cut at 100": {**LOOSE, "loss": "topr"},
    "importance sampling, cut at 100": {**LOOSE, "loss": "is"},
}
LOGGED = {"d_min": min, "d_max": max, "gradient_norm": max}  # over all steps of a run
LAST = ("d_mean", "negative_weight")  # of the last step


def run(settings, each):
    settings = dataclasses.replace(settings, seeds=min(SEEDS, settings.seeds))
    base = each_base(settings, each, "long")
    arms = compare(settings, each, run_arm, ARMS, "long answers", RATES[settings.quick :], 1)
    best = best_arm(arms, ["TOPR", *SHARES])
    right = {"base": np.array([one["right"] for one in base])}  # each [seeds, questions]
    for name in ("positives only", best):
        runs = run_again(each, run_arm, arms[name], f"long answers: {name} by question")
        right[name] = np.array([one["right"] for one in runs])
    by_group = {name: {group: pass_where(values, inside(right["base"], group)) for group in GROUPS}
                for name, values in right.items()}
    logs = {name: [read_log(seed, arm) for seed in range(settings.seeds)]
            for name, arm in arms.items()}
    return {"base": by_seed(base), "arms": arms, "best": best, "by group": by_group,
            "logs": {name: by_seed(values) for name, values in logs.items()}}


def read_log(seed, arm):
    folder = f"{folder_of(seed, 'long')}/experiments"
    log = run_folder.read_log(f"{folder}/{name_of(arm['settings'], arm['learning_rate'])}")
    found = {field: pick(entry[field] for entry in log if field in entry)
             for field, pick in LOGGED.items() if field in log[-1]}
    return {**found, **{field: log[-1][field] for field in LAST if field in log[-1]}}


def show(result):
    tables = [show_arms(rows_of(result), (*MEASURES, "guesses"), f"best: {result['best']}")]
    rows = [(name, *map(spread, groups.values())) for name, groups in result["by group"].items()]
    tables.append(table(("pass@1 by the base policy's right answers of 16", *GROUPS), rows))
    fields = (*LOGGED, *LAST)
    rows = [(name, *(spread(log.get(field, [])) for field in fields))
            for name, log in result["logs"].items()]
    names = [f"{'lowest' if pick is min else 'highest'} {field}" for field, pick in LOGGED.items()]
    tables.append(table(("log", *names, *(f"last {field}" for field in LAST)), rows))
    return "\n\n".join(tables)


def draw(result, path):
    names, values = ("TOPR", "importance sampling"), rows_of(result)
    arms = {name: {"cut at 1": values[name]["pass@1"],
                   "cut at 100": values[f"{name}, cut at 100"]["pass@1"]} for name in names}
    shares = {"positives only": 1.0, "TOPR": None, **SHARES}
    with picture(path, 1, 2) as (left, right):
        bars(left, arms, ("cut at 1", "cut at 100"))
        left.axhline(np.mean(values["base"]["pass@1"]), color="black", linestyle="--", label="base")
        left.set(ylabel="pass@1", xlabel="gradients")
        passed = by_arm(result, "pass@1")
        shown = sorted((share, name) for name, share in shares.items() if share)
        x, points = [share for share, _ in shown], [passed[name] for _, name in shown]
        right.errorbar(x, np.mean(points, 1), np.std(points, 1), marker="o", color="#1f4e9c")
        right.set(xlabel="effective share of positives", ylabel="pass@1")


def claims(result):
    passed, _, invalid = (by_arm(result, measure) for measure in MEASURES)
    plain, base = passed["importance sampling, cut at 100"], passed["base"]
    spoilt = invalid["importance sampling, cut at 100"].mean() > invalid["base"].mean()
    harmed = plain.mean() < base.mean() or spoilt
    ahead = passed["TOPR, cut at 100"] - plain
    yield ("Untruncated importance sampling harms the model where gradients are cut at 100 "
           "(Figure 7, long answers)",
           f"pass@1 {spread(base)} to {spread(plain)}, invalid {spread(invalid['base'])} to "
           f"{spread(invalid['importance sampling, cut at 100'])}; TOPR minus that "
           f"{spread(ahead, '+')}",
           verdict(harmed, harmed or ahead.min() > 0))

    shares = {**SHARES, "positives only": 1.0}
    best = max(shares, key=lambda name: passed[name].mean())
    falls = shares[best] <= 0.5 and passed[best].mean() > passed["positives only"].mean() + 0.02
    yield ("Best at an effective share of 0.1 to 0.2, less above 0.5 (Figure 5, long answers)",
           ", ".join(f"{share}: {spread(passed[name])}" for name, share in shares.items())
           + f"; as sampled {spread(passed['TOPR'])}",
           verdict(falls, falls and shares[best] <= 0.2))

    gain = passed["TOPR, Anna Karenina"] - passed["TOPR"]
    yield ("Keeping one right answer of each question and all wrong ones (Anna Karenina) beats "
           "keeping all (one round, long answers)",
           f"{spread(passed['TOPR'])} with all, Anna Karenina "
           f"{spread(passed['TOPR, Anna Karenina'])}: {spread(gain, '+')}",
           verdict(gain.min() > 0, gain.mean() > 0))

    best, groups = result["best"], result["by group"]
    gains = gains_by_group(groups["positives only"], groups[best])
    many = max(gains.get("5 to 16", 0), 0)
    more = [gain > many for group, gain in gains.items() if group != "5 to 16"]
    yield ("What negatives add is on questions with few or no solutions (Figure 4, long answers)",
           f"pass@1 of {best} over positives only, by the base policy's right answers of 16: "
           + ", ".join(f"{group} {gain:+.3f}" for group, gain in gains.items()),
           verdict(all(more) and any(more), any(more)))

    ahead = passed[best] - passed["DPO"]
    yield ("DPO does well, TOPR is best (Figures 1, 3, long answers)",
           f"{best} {spread(passed[best])}, DPO {spread(passed['DPO'])}, positives only "
           f"{spread(passed['positives only'])}: TOPR minus DPO {spread(ahead, '+')}",
           verdict(passed["DPO"].mean() > passed["positives only"].mean(),
                   ahead.mean() > 2 * ahead.std() / len(ahead) ** 0.5))
