"""What completions say of their policy: pass@k, maj@k, and how sure that is."""

import collections
import math
import operator
import random
from statistics import fmean

import numpy as np

Z = 1.96  # standard errors on either side of a 95% interval
DRAWS = 100  # sets of completions whose votes are counted


def measure(rows, seed=0, same_answer=operator.eq):
    """{name: [a value for each question]}, in the order of the questions.

    A question's value is the mean over its completions, so a mean over questions weighs them alike,
    however many completions each has. What the rows do not tell (where a completion was cut off)
    is left out.
    """
    values, rng = collections.defaultdict(list), random.Random(seed)
    groups = grouped(rows, "id").values()
    knows_finish, k = all("finish" in row for row in rows), min(map(len, groups))
    for group in groups:
        right = [row["reward"] > 0 for row in group]
        votes = group_answers([row.get("answer") for row in group], same_answer)
        values["pass@1"].append(fmean(right))
        values["invalid"].append(votes.count(None) / len(votes))
        if knows_finish:
            values["cut off"].append(fmean(row["finish"] == "length" for row in group))
        if k > 1:
            values[f"pass@{k}"].append(pass_at_k(len(right), sum(right), k))
            values[f"maj@{k}"].append(majority_at_k(votes, right, k, rng, DRAWS))
    return dict(values)


def grouped(rows, field):
    """{value of the field: list of rows}, all in the order of the rows."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row[field]].append(row)
    return groups


def mean_by(rows, field, value):
    """{value of the field: the mean of value(row) over its rows}"""
    return {key: fmean(map(value, group)) for key, group in grouped(rows, field).items()}


def group_answers(answers, same_answer=operator.eq):
    """The number of each answer's group, None for None: 18 and 18.00 vote together."""
    known, numbers = {}, {None: None}  # the first answer of each group; the group of each spelling
    for answer in answers:
        if answer not in numbers:
            alike = (number for number, first in known.items() if same_answer(first, answer))
            numbers[answer] = next(alike, len(known))
            known.setdefault(numbers[answer], answer)
    return [numbers[answer] for answer in answers]


def interval(values):
    """Mean and 95% interval over questions: Wilson's, within [0, 1], when all values are shares.

    The mean of several completions varies less than one completion: then Wilson's number of
    questions is the number of single completions that would vary as much. The variance is mixed
    with the largest that is possible, p (1 - p), as if 10 more questions had shown it: few
    questions with a small p underestimate it. Of single completions this is Wilson's own interval.
    """
    values = np.asarray(values, float)  # [questions]
    n, p, variance = len(values), values.mean(), values.var()
    most = p * (1 - p)
    size = n * (n + 10) * most / (n * variance + 10 * most) if most else n
    center, weight = p + Z**2 / (2 * size), 1 + Z**2 / size
    half = Z * math.sqrt(most / size + (Z / (2 * size)) ** 2)
    low, high = max(0.0, center - half) / weight, min(1.0, (center + half) / weight)
    return {"mean": p, "low": low, "high": high}


def paired_interval(before, after):
    """Mean and 95% interval of the gain over the same questions.

    Of shares Agresti and Min's: half a question is added for each of the four outcomes (right or
    wrong, before and after), so that 20 equal pairs are no proof that nothing changed.
    """
    gains = np.subtract(after, before, dtype=float)  # [questions]
    n = len(gains) + 2
    center = gains.sum() / n
    half = Z * math.sqrt((((gains**2).sum() + 1) / n - center**2) / n)
    return {"mean": gains.mean(), "low": max(-1.0, center - half), "high": min(1.0, center + half)}


def pass_at_k(n, right, k):
    """The chance that k of n completions, drawn without replacement, include a right one.

    1 - C(n-c, k) / C(n, k)
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_at_k(answers, right, k, rng, draws, weights=None):
    """How often the most frequent valid answer of k drawn completions is right; ties share.

    answers: grouped by value without a look at the reference, see group_answers; None has no vote.
    weights: what each vote counts (None: all alike).
    """
    correct, draws = dict(zip(answers, right)), draws if k < len(answers) else 1
    score = 0.0
    for _ in range(draws):
        votes = collections.Counter()
        for number in rng.sample(range(len(answers)), k):
            votes[answers[number]] += weights[number] if weights else 1
        del votes[None]
        most = max(votes.values(), default=0) - 1e-9  # equal sums may differ by rounding
        winners = [correct[answer] for answer in votes if votes[answer] >= most]
        score += sum(winners) / max(1, len(winners))
    return score / draws


def interval_text(interval, sign=""):
    """0.598 (0.571 to 0.625); with "+" as sign +0.598 (+0.571 to +0.625)"""
    return "{mean:{0}.3f} ({low:{0}.3f} to {high:{0}.3f})".format(sign, **interval)


def summary(values):
    """{name: [a value for each question]} as what is written: means with their intervals."""
    questions = len(next(iter(values.values())))
    return {"questions": questions, **{name: interval(each) for name, each in values.items()}}
