"""What the log of a run says: one line for each thing that looks wrong, and what helps."""

import numpy as np

LOOK_AT = 20  # the step after which the log is read, as at the end


def before_the_first_step(settings, positive_share):
    is_chosen = settings.baseline or settings.positive_share is not None
    if settings.loss == "topr" and positive_share < 1 / 3 and not is_chosen:
        yield (f"only {positive_share:.0%} of the completions are positive: if right answers fall, "
               "too (d_positive below 0), try --positive-share 0.5")


def of_log(log):
    """log: the entries of the steps so far."""
    log = [entry for entry in log if "loss" in entry]
    first, latest = log[0], log[-5:]

    def mean(name):
        values = [entry[name] for entry in latest if entry.get(name) is not None]
        return np.mean(values) if values else np.nan  # greater or less than nothing

    distance = max(-first.get("d_min", 0), first.get("d_max", 0))
    if distance > 0.5:
        yield (f"the largest |log pi/mu| before the first step was {distance:.2g}, not 0: other "
               "weights, another template or precision wrote the logprobs. If this model wrote "
               "the text: --mu start")
    weight = mean("negative_weight")
    if weight > 0.95 and mean("d_negative") > -0.1:
        yield (f"nothing moves: the mean weight of a negative is still {weight:.2f}: triple "
               "--learning-rate")
    if mean("d_positive") < -0.5 and mean("d_negative") < -0.5:
        yield (f"right answers fall with the wrong ones (d_positive {mean('d_positive'):.1f}): "
               "--positive-share 0.5, or a third of the --learning-rate")
    if mean("negatives_gone") > 0.9:
        yield (f"{mean('negatives_gone'):.0%} of the negatives are gone (their weight is below "
               "0.001): little is left to learn from this file: --rounds samples again")
