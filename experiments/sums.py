"""Sums and products: a pretrained model whose answers are buried in chatter, and every loss.

    python tools/smollm2.py                         makes the model
    python experiments/run.py sums

SmolLM2 as it is, without fine-tuning, is asked "What is 7 + 5?" and "Reply with the number alone.".
Its likeliest answer is often right, a sampled one seldom. All arms learn from the same completions;
a seed has its own. This file is the task, too: train.py --task experiments/sums.py
"""

import functools
import random
import re
from itertools import product

import numpy as np

import train
from data import load_task
from engine.measures import interval_text
from experiments.common import (
    bars_of,
    by_arm,
    compare,
    differences,
    measure_arm,
    methods,
    spread,
    verdict,
    with_rollouts,
)

FOLDER = "runs/smollm2/sums"
SEEDS = 3  # of the rollouts and of their order in training
RATES = (3e-6, 1e-5)
ARMS = methods(
    "base",
    "TOPR",
    "positives only",
    "truncated importance sampling",
    "DPO",
    "naive REINFORCE",
    "TOPR, mean ratio",
    "TOPR, token ratio",
)
CLAIMS = {  # (which is ahead, of which): what the paper says
    ("TOPR", "base"): "TOPR improves a pretrained model (Figures 1, 3)",
    ("TOPR", "positives only"): "TOPR improves it more than positives only (Figure 4)",
    ("base", "naive REINFORCE"): "Naive REINFORCE harms a pretrained model (Figures 1, 3)",
    ("TOPR", "DPO"): "TOPR is ahead of DPO (Figures 1, 3)",
    (
        "TOPR",
        "truncated importance sampling",
    ): "Right answers at full weight are better than all of them fading (Figure 7)",
    ("TOPR", "TOPR, mean ratio"): "A ratio of the whole sequence, not its mean",
    ("TOPR", "TOPR, token ratio"): "A ratio of the whole sequence, not each token's",
}
MEASURES = ("pass@1", "greedy", "invalid")
PART = "held out"


# ---- the task ----

SPLITS = {"train": slice(0, 128), "validation": slice(128, 188), "test": slice(188, 400)}
ASK = "Reply with the number alone."


def questions(split):
    """256 sums and 144 products, in an order that is always the same."""
    golds = {f"{a} + {b}": a + b for a, b in product(range(1, 17), repeat=2)}
    golds |= {f"{a} times {b}": a * b for a, b in product(range(1, 13), repeat=2)}
    rows = [
        {"id": text, "question": f"What is {text}?", "gold": str(gold)}
        for text, gold in golds.items()
    ]
    random.Random(0).shuffle(rows)
    return rows[SPLITS[split]]


def grade(question, completion):
    """The last number of the completion counts."""
    answer = next(reversed(re.findall("[0-9]+", completion)), None)
    return answer, 1.0 if answer == question["gold"] else -1.0


# ---- the finding ----


def run(settings):
    run = functools.partial(run_arm, settings.pretrained)
    arms = compare(settings, run, ARMS, RATES, SEEDS)
    return {"model": settings.pretrained, "arms": arms, "paired": differences(arms, [PART], CLAIMS)}


def run_arm(model, seed, arm, rate, split):
    """The measures of an arm; its completions are kept in its folder."""
    task, out = load_task(__file__), f"{FOLDER}/seed{seed}"
    settings = train.Settings(model=model, out=out, seed=seed, samples=8, max_new_tokens=24)
    settings = with_rollouts(settings, task)
    task.questions = lambda _: questions(split)
    values = measure_arm(settings, task, arm, rate, split)
    measures = {name: np.mean(values[name]) for name in MEASURES}
    return {**measures, "score": measures["pass@1"], f"by question, {PART}": values["pass@1"]}


draw = bars_of(MEASURES, ylabel="mean over questions")


def claims(result):
    passed = by_arm(result, "pass@1")
    for (one, other), claim in CLAIMS.items():
        gain = result["paired"][PART][f"{one} minus {other}"]
        least = (passed[one] - passed[other]).min()  # of the seeds
        yield (
            f"{claim}: sums, 135 million weights",
            f"pass@1 on held-out questions: {one} {spread(passed[one])}, {other} "
            f"{spread(passed[other])}: {interval_text(gain, '+')}, with each seed at least "
            f"{least:+.3f}",
            verdict(gain["low"] > 0, least > 0),
        )
