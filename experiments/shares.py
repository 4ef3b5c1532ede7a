"""Figure 5: accuracy against the effective share of positives, for data sets with 10% and 50% of them."""

import numpy as np

from experiments.common import PART, compare, line, picture, run_arm, show_arms, spread, verdict

SHARES = (0.1, 0.2, 0.33, 0.5, 0.75, 1.0)  # 1.0 is positives only
DATA = {"10%": 0.1, "50%": 0.5}
LINES = {"10%": dict(linestyle=":", marker="D"), "50%": {}}


def run(settings, each):
    arms = {f"{name}, share {share}": dict(loss="topr", positives=positives, positive_share=share)
            for name, positives in DATA.items() for share in SHARES}
    arms = compare(settings, each, run_arm, arms, "shares")
    return {"completions": PART, "arms": arms}


def of(result, data, share, measure="pass@1"):
    return result["arms"][f"{data}, share {share}"][measure]


def show(result):
    return show_arms(result["arms"], ("pass@1", "maj@16", "invalid"), "positives in the data, effective share")


def draw(result, path):
    with picture(path, 1, 2) as axes:
        for ax, measure in zip(axes, ("pass@1", "maj@16")):
            for data, style in LINES.items():
                values = np.array([of(result, data, share, measure) for share in SHARES]).T
                line(ax, SHARES, values, "TOPR", f"{data} of the data positive", **style)
            ax.set(xlabel="effective share of positives", ylabel=measure, ylim=(0, 1))


def claims(result):
    for data in DATA:
        means = {share: np.mean(of(result, data, share)) for share in SHARES}
        best = max(SHARES, key=means.get)
        falls = means[best] > means[1.0] + 0.02 and all(means[share] < means[best] for share in SHARES if share > 0.5)
        yield (f"Best at an effective share of 0.1 to 0.2, less above 0.5 (Figure 5, {data} of the data positive)",
               f"of {result['completions']:,} completions; best share {best}: pass@1 {spread(of(result, data, best))}; "
               f"at 0.1 {spread(of(result, data, 0.1))}, at 0.5 {spread(of(result, data, 0.5))}, at 1.0 "
               f"{spread(of(result, data, 1.0))}",
               verdict(falls and best <= 0.2, falls and best <= 0.5))
