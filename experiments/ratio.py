"""Which ratio weights a wrong answer: the sequence's, its mean over tokens, or each token's?

The paper's is the sequence's. Other public versions divide the log-ratio by the length, or take a
ratio for each token (docs/versions.md). Beside these TOPR's rivals, on the same rollouts.
"""

import numpy as np

from experiments.common import (
    MEASURES,
    RATES,
    WORKING_RATE,
    beyond_noise,
    by_arm,
    compare,
    line,
    methods,
    run_arm,
    show_arms,
    spread,
    table,
    train_arm,
    verdict,
)

VERSIONS = methods("TOPR", "TOPR, mean ratio", "TOPR, token ratio")  # TOPR's is the sequence's
RIVALS = methods(
    "positives only",
    "DPO",
    "AsymRE",
    "truncated importance sampling",
    "CISPO",
    "GSPO",
    "PPO",
    "negatives only",
)
LONG_SEEDS, LONG_RATES = 2, (3e-4, 1e-3)
STEPS = (16, 64, 120, -1)  # of which the log is shown
LOGGED = ("negative_weight", "d_negative", "d_positive")
PANELS = 2


def run(settings):
    rates = [WORKING_RATE] if settings.quick else RATES
    long = {"base": {"base": "long"}}
    long |= {name: {"base": "long", **arm} for name, arm in VERSIONS.items()}
    return {
        "arms": compare(settings, run_arm, {"base": {}, **VERSIONS, **RIVALS}),
        "rates": {f"{rate:g}": compare(settings, run_logged, VERSIONS, [rate]) for rate in rates},
        "long": compare(settings, run_arm, long, LONG_RATES, LONG_SEEDS),
    }


def run_logged(seed, arm, rate, split):
    """The measures, and some numbers of the log at some steps."""
    _, log = train_arm(seed, arm, rate)
    log = [entry for entry in log if "loss" in entry]
    return {
        **run_arm(seed, arm, rate, split),
        "log": [[log[step][name] for name in LOGGED] for step in STEPS],
    }


def show(result):
    rows, logs = [], []
    for name in VERSIONS:
        for rate, arms in result["rates"].items():
            rows.append([name, rate, *(spread(arms[name][measure]) for measure in MEASURES)])
        log = np.mean(result["rates"][f"{WORKING_RATE:g}"][name]["log"], 0)  # [steps, numbers]
        logs += [
            [name, "last" if step < 0 else step, *values.tolist()]
            for step, values in zip(STEPS, log)
        ]
    parts = (
        show_arms(result),
        f"long answers\n{show_arms({'arms': result['long']})}",
        table(("each at all rates", "rate", *MEASURES), rows),
        table((f"the log at rate {WORKING_RATE:g}", "step", *LOGGED), logs),
    )
    return "\n\n".join(parts)


def draw(result, *axes):
    rates = list(map(float, result["rates"]))
    for ax, measure in zip(axes, ("pass@1", "invalid")):
        for name in VERSIONS:
            values = [arms[name][measure] for arms in result["rates"].values()]  # [rates, seeds]
            line(ax, rates, values, name)
        ax.axhline(
            np.mean(result["arms"]["base"][measure]), color="black", linestyle="--", label="base"
        )
        ax.set(xscale="log", xlabel="learning rate", ylabel=measure, ylim=(-0.03, 1.03))


def claims(result):
    sequence, mean, token = VERSIONS
    for where, arms in (("", result["arms"]), (", long answers", result["long"])):
        passed = by_arm({"arms": arms}, "pass@1")
        ahead = [passed[sequence] - passed[other] for other in (mean, token)]
        yield (
            f"A ratio of the whole sequence, not its mean and not each token's (the paper's "
            f"choice{where})",
            f"pass@1 of TOPR, each ratio at its best rate: base {spread(passed['base'])}, "
            f"sequence {spread(passed[sequence])}, mean {spread(passed[mean])}, token "
            f"{spread(passed[token])}: sequence over mean {spread(ahead[0], '+')}, over token "
            f"{spread(ahead[1], '+')}",
            verdict(*(beyond_noise(gain) for gain in ahead)),
        )

    passed = by_arm(result, "pass@1")
    ahead = {name: passed[sequence] - passed[name] for name in RIVALS}
    yield (
        "TOPR is best on the same file (rivals that the paper does not have among them)",
        f"pass@1 at the best rate of each: TOPR {spread(passed[sequence])}, "
        + ", ".join(f"{name} {spread(passed[name])}" for name in RIVALS)
        + " (best if beyond two standard errors of each)",
        verdict(*(beyond_noise(gain) for gain in ahead.values())),
    )
