"""What completions say of their policy: pass@k, maj@k, and how sure that is."""

import collections
import math
import operator
import random

import numpy as np

from engine.common import table

Z = 1.96  # standard errors on either side of a 95% interval


def measure(rows, seed=0, draws=100, same_answer=operator.eq):
    """{name: [a value for each question]}, in the order of the questions.

    A question's value is the mean over its completions, so a mean over questions weighs them alike,
    however many completions each has. What the rows do not tell (where a completion was cut off,
    its tokens) is left out.
    """
    groups, values = collections.defaultdict(list), collections.defaultdict(list)
    for row in rows:
        groups[row["id"]].append(row)
    rng, fewest = random.Random(seed), min(map(len, groups.values()))
    known = set.intersection(*map(set, rows))  # the fields that every row has
    for group in groups.values():
        right = [row["reward"] > 0 for row in group]
        votes = group_answers([row.get("answer") for row in group], same_answer)
        found = {"pass@1": right, "invalid": [vote is None for vote in votes]}
        if "finish" in known:
            found["cut off"] = [row["finish"] == "length" for row in group]
        if "completion_ids" in known:
            found["tokens"] = [len(row["completion_ids"]) for row in group]
        for k in (2**e for e in range(1, fewest.bit_length())):
            found[f"pass@{k}"] = pass_at_k(len(right), sum(right), k)
            found[f"maj@{k}"] = majority_at_k(votes, right, k, rng, draws)
        for name, value in found.items():
            values[name].append(float(np.mean(value)))
    return dict(values)


def group_answers(answers, same_answer=operator.eq):
    """The number of each answer's group, None for None: 18 and 18.00 vote together."""
    known, numbers = [], {None: None}  # the first answer of each group; the group of each spelling
    for answer in answers:
        if answer not in numbers:
            alike = (number for number, other in enumerate(known) if same_answer(other, answer))
            numbers[answer] = next(alike, len(known))
            if numbers[answer] == len(known):
                known.append(answer)
    return [numbers[answer] for answer in answers]


def interval(values):
    """Mean and 95% interval over questions: Wilson's, within [0, 1], when all values are shares.

    The mean of several completions varies less than one completion: then Wilson's number of
    questions is the number of single completions that would vary as much. The variance is mixed
    with the largest that is possible, p (1 - p), as if 10 more questions had shown it: few
    questions with a small p underestimate it. Of single completions this is Wilson's own interval.
    """
    values = np.asarray(values, float)  # [questions]
    if not are_shares(values):
        return normal_interval(values)
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
    gains = np.asarray(after, float) - np.asarray(before, float)  # [questions]
    if not are_shares([*before, *after]):
        return normal_interval(gains)
    n = len(gains) + 2
    center = gains.sum() / n
    half = Z * math.sqrt((((gains**2).sum() + 1) / n - center**2) / n)
    return {"mean": gains.mean(), "low": max(-1.0, center - half), "high": min(1.0, center + half)}


def are_shares(values):
    return min(values) >= 0 and max(values) <= 1


def normal_interval(values):
    mean, half = values.mean(), Z * math.sqrt(values.var() / max(1, len(values) - 1))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def pass_at_k(n, right, k):
    """The chance that k of n completions, drawn without replacement, include a right one.

        1 - C(n-c, k) / C(n, k)
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_at_k(answers, right, k, rng, draws):
    """How often the most frequent valid answer of k drawn completions is right; ties share.

    answers: grouped by value without a look at the reference, see group_answers; None has no vote.
    """
    correct, draws = dict(zip(answers, right)), draws if k < len(answers) else 1
    score = 0.0
    for _ in range(draws):
        votes = collections.Counter(rng.sample(answers, k))
        del votes[None]
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        score += sum(correct[answer] for answer in winners) / max(1, len(winners))
    return score / draws


def interval_text(interval, sign=""):
    """0.598 (0.571 to 0.625); with "+" as sign +0.598 (+0.571 to +0.625)"""
    return "{mean:{0}.3f} ({low:{0}.3f} to {high:{0}.3f})".format(sign, **interval)


def summary(values):
    """{name: [a value for each question]} as what is written: means with their intervals."""
    questions = len(next(iter(values.values())))
    return {"questions": questions, **{name: interval(each) for name, each in values.items()}}


def report(values, title):
    """The measures as a table, one row each."""
    rows = [(name, each["mean"], f"{each['low']:.3f} to {each['high']:.3f}")
            for name, each in summary(values).items() if name != "questions"]
    return table((title, "mean", "95% interval"), rows)
