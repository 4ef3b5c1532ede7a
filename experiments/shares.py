"""Figure 5: accuracy against the effective share of positives; data sets with 10% and 50%."""

from experiments.common import PART, by_arm, compare, line, run_arm, spread, verdict

SHARES = (0.1, 0.2, 0.33, 0.5, 0.75, 1.0)  # 1.0 is positives only
DATA = {"10%": 0.1, "50%": 0.5}
LINES = {"10%": {"linestyle": ":", "marker": "D"}, "50%": {}}
PANELS = 2


def run(settings):
    arms = {
        f"{name}, share {share}": {"loss": "topr", "positives": DATA[name], "positive_share": share}
        for name in DATA
        for share in SHARES
    }
    return {"arms": compare(settings, run_arm, arms)}


def draw(result, *axes):
    for ax, measure in zip(axes, ("pass@1", "maj@16")):
        values = by_arm(result, measure)
        for data, style in LINES.items():
            points = [values[f"{data}, share {share}"] for share in SHARES]
            line(ax, SHARES, points, "TOPR", f"{data} of the data positive", **style)
        ax.set(xlabel="effective share of positives", ylabel=measure, ylim=(0, 1))


def claims(result):
    values = by_arm(result, "pass@1")
    for data in DATA:
        passed = {share: values[f"{data}, share {share}"] for share in SHARES}
        yield share_claim(passed, f"Figure 5, {data} of {PART:,} completions positive")


def share_claim(passed, where):
    """passed: {effective share: pass@1 of all seeds}; 1.0 is positives only"""
    best = max(passed, key=lambda share: passed[share].mean())
    falls = passed[best].mean() > passed[1.0].mean() + 0.02 and best <= 0.5
    return (
        f"Best at an effective share of 0.1 to 0.2, less above 0.5 ({where})",
        "pass@1 at " + ", ".join(f"{share:.2f} {spread(passed[share])}" for share in passed),
        verdict(falls, falls and best <= 0.2),
    )
