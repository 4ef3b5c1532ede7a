"""What a rollout file says of its policy: pass@k, maj@k, and how sure that is."""

import collections
import math
import random

import numpy as np

from engine.common import table


def measure(rows, seed=0, draws=100):
    """Every measure as {"mean", "low", "high"}: the mean over questions with its 95% interval."""
    questions = collections.defaultdict(list)
    for row in rows:
        questions[row["id"]].append(row)
    groups, fewest, rng = list(questions.values()), min(map(len, questions.values())), random.Random(seed)
    over = lambda value: interval([value(group) for group in groups])
    share = lambda holds: over(lambda group: sum(map(holds, group)) / len(group))
    right = lambda row: row["reward"] > 0
    measures = {"pass@1": share(right), "invalid": share(lambda row: row.get("answer") is None),
                "cut off": share(lambda row: row.get("finish") == "length")}
    if all("completion_ids" in row for row in rows):
        measures["tokens"] = share(lambda row: len(row["completion_ids"]))
    for k in (2**e for e in range(1, fewest.bit_length())):
        measures[f"pass@{k}"] = over(lambda group: pass_at_k(len(group), sum(map(right, group)), k))
        measures[f"maj@{k}"] = over(lambda group: majority_at_k(
            [row.get("answer") for row in group], list(map(right, group)), k, rng, draws))
    return {"questions": len(groups), "completions": len(rows), **measures}


def interval(values):
    """Mean and 95% interval over questions (normal approximation)."""
    values = np.asarray(values, float)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": values.mean(), "low": values.mean() - half, "high": values.mean() + half}


def pass_at_k(n, right, k):
    """The chance that k of the n completions, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k)"""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_at_k(answers, right, k, rng, draws):
    """How often the most frequent valid answer among k drawn completions is right; a tie counts its share."""
    score, draws = 0.0, draws if k < len(answers) else 1
    answers = [True if yes else answer for yes, answer in zip(right, answers)]  # 18 and 18.00 are one answer where right
    for _ in range(draws):
        votes = collections.Counter(answer for answer in rng.sample(answers, k) if answer is not None)
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        score += (True in winners) / max(1, len(winners))
    return score / draws


def report(measures, title="all"):
    """The measures as a table, one row each."""
    rows = [(name, value["mean"], f"{value['low']:.3f} to {value['high']:.3f}") if isinstance(value, dict) else (name, value, "")
            for name, value in measures.items()]
    return table((title, "mean", "95% interval"), rows)
