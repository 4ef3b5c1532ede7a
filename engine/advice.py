"""What the log of a run says: one line for each thing that looks wrong, and what helps."""

import dataclasses

import numpy as np

LOOK_AT = 20  # steps, after which the log is read, as at the end


def before_the_first_step(settings, data):
    rewards = data.rewards[data.units]  # [units, 1 or 2]
    positive_share, silent = (rewards > 0).mean(), data.silent[data.units].sum()
    yield (
        f"{settings.rollouts}: {rewards.size:,} completions, {positive_share:.1%} positive, "
        f"{silent:,} without a gradient in this loss"
    )
    if rewards.max() <= 0 or rewards.min() >= 0 and settings.loss != "sft":
        yield "all rewards have the same sign: there is nothing to tell right from wrong"
    is_chosen = settings.baseline or settings.positive_share is not None
    if settings.loss == "topr" and positive_share < 1 / 3 and not is_chosen:
        yield (
            f"only {positive_share:.0%} of the completions are positive: if right answers lose "
            "probability, too (d_positive below 0), try --positive-share 0.5"
        )


def differing(settings):
    """The settings that differ from the defaults: "out=runs/first, seed=1"."""
    values = dataclasses.asdict(settings).items()
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    return ", ".join(f"{name}={value}" for name, value in values if value != defaults[name])


def of_log(log):
    """log: the entries of the steps so far."""
    latest = [entry for entry in log if "loss" in entry][-5:]

    def mean(name):
        values = [entry[name] for entry in latest if entry.get(name) is not None]
        return np.mean(values) if values else np.nan  # NaN: every comparison with it is false

    weight = mean("negative_weight")
    if weight > 0.95 and mean("d_negative") > -0.1 and len(log) >= LOOK_AT:
        yield (
            f"nothing moves: the mean weight of a negative is still {weight:.2f}: triple "
            "--learning-rate"
        )
    if mean("d_positive") < -0.5 and mean("d_negative") < -0.5:
        yield (
            f"right answers fall with the wrong ones (d_positive {mean('d_positive'):.1f}): "
            "--positive-share 0.5, or a third of the --learning-rate"
        )
    if mean("negatives_gone") > 0.9:
        yield (
            f"{mean('negatives_gone'):.0%} of the negatives are gone (their weight is below "
            "0.001): little is left to learn from this file: --rounds samples again"
        )
