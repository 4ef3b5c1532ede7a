"""A pretrained model of 135 million weights on word problems: what each loss does there.

    python data/maths.py svamp                      fetches the questions
    python tools/smollm2.py                         makes the model
    python experiments/run.py pretrained            more than 6 hours on two cores

SmolLM2 learns from demonstrations how to write an answer: that is the base policy. All arms learn
from the same answers of the base policy to other training questions; a second round has further
questions. Learning rates are chosen on validation questions; all is measured on SVAMP and on
held-out questions of the training distribution. Keeps about 15 GB of policies in runs/smollm2.
On a GPU add --processes 1.
"""

import operator
import random
import re

import numpy as np
from filelock import FileLock

import eval as evaluation
import train
from data import load_task
from data.maths import exact, shown
from engine.measures import interval_text
from engine.rollouts import write_rollouts
from experiments.common import (
    bars_of,
    compare,
    differences,
    methods,
    name_of,
    spread,
    sure,
    verdict,
)

FOLDER = "runs/smollm2/full"
SEEDS = 3  # of the rollouts and of their order in training
QUESTIONS = {
    "demonstrations": slice(0, 1000),
    "round 1": slice(1000, 1300),
    "round 2": slice(1300, 1600),
    "validation": slice(2300, 2400),
    "held out": slice(2400, 2650),
    "SVAMP": slice(0, 500),
}
TRAINING = {
    "optimizer": "adamw",
    "sequences": 16,
    "warmup": 10,
    "schedule": "cosine",
    "precision": "bfloat16",
}  # twice as fast as float32 where the processor has it
RATES = (6e-6, 2e-5)
ARMS = {
    **methods("base", "TOPR", "naive REINFORCE", "DPO", "truncated importance sampling", "AsymRE"),
    "AsymRE, baseline -0.7": {"loss": "reinforce", "baseline": -0.7},  # the mean reward: -0.62
}
BEST, TWICE = "TOPR, share 0.5", "TOPR, share 0.5, two rounds"  # where four of five are wrong
OTHER, OTHER_TWICE = "positives only", "positives only, two rounds"
MAIN = methods(BEST, OTHER)  # with more seeds
MAIN |= {f"{name}, two rounds": {**arm, "rounds": 2} for name, arm in MAIN.items()}
PAIRS = (
    (BEST, OTHER),
    (TWICE, OTHER_TWICE),
    (TWICE, BEST),
    (BEST, "DPO"),
    ("TOPR", "truncated importance sampling"),
)
MEASURES = ("SVAMP", "SVAMP, greedy", "held out", "held out, greedy", "invalid")
PARTS = ("SVAMP", "held out")


def run(settings):
    prepare(settings)
    arms = compare(settings, run_arm, ARMS, RATES, seeds=1)
    arms |= compare(settings, run_arm, MAIN, RATES, SEEDS)
    pairs = [(name, "base") for name in arms if name != "base"]
    return {"arms": arms, "paired": differences(arms, PARTS, [*pairs, *PAIRS])}


# ---- the questions ----


def read_questions(part):
    """SVAMP is the test set; the other parts are slices of the shuffled training set."""
    questions = load_task("svamp").questions
    rows = list(questions("test")) if part == "SVAMP" else with_solutions(questions("train"))
    random.Random(0).shuffle(rows)
    return [
        {**row, "prompt": f"Q: {row['question']}\nA:", "stop": ["\nQ:"]}
        for row in rows[QUESTIONS[part]]
    ]


def with_solutions(rows):
    """The questions whose equation gives the answer, each once, with the equation worked out.

    Of the 3,138 published questions 14 have another answer, 409 repeat the words of another.
    """
    kept = {}
    for row in rows:
        steps, result = work_out(row["equation"])
        if result == row["gold"]:
            solution = " ".join([*steps, f"The answer is {result}."])
            words = tuple(re.findall(r"\w+", row["question"].lower()))
            kept.setdefault(words, {**row, "solution": solution})
    return list(kept.values())


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def work_out(equation):
    """'- 9 * 2 3' -> ['2 * 3 = 6.', '9 - 6 = 3.'], '3': exact, and nothing is evaluated as code."""
    stack, steps = [], []
    for token in reversed(equation.split()):
        if token in OPERATIONS:
            left, right = stack.pop(), stack.pop()
            stack.append(OPERATIONS[token](left, right))
            steps.append(f"{shown(left)} {token} {shown(right)} = {shown(stack[-1])}.")
        else:
            stack.append(exact(token))
    (result,) = stack
    return steps, shown(result)


# ---- policies, their answers, their measures ----


def prepare(settings):
    """Makes the base policy, which imitates demonstrations."""
    demonstrations = f"{FOLDER}/demonstrations.jsonl"
    rows = [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "completion": f" {row['solution']}",
            "reward": 1.0,
        }
        for row in read_questions("demonstrations")
    ]
    write_rollouts(demonstrations, rows)  # the same ones each time
    train.train_once(
        job(
            model=settings.pretrained,
            rollouts=demonstrations,
            out=f"{FOLDER}/base",
            loss="sft",
            learning_rate=5e-5,
        )
    )


def job(**changes):
    """train.py's settings"""
    return train.Settings(**{**TRAINING, "max_new_tokens": 64, "batch_size": 128, **changes})


def task_of(part):
    """SVAMP with the questions of a part alone"""
    task = load_task("svamp")
    task.questions = lambda split: read_questions(part)
    return task


def train_arm(seed, arm, rate):
    """(The folder of the policy that an arm makes in its rounds of sample-then-train, its log)"""
    policy, log, changes = f"{FOLDER}/base", [], dict(arm)
    rounds = changes.pop("rounds", 1) if rate else 0
    for number in range(1, rounds + 1):  # each has questions of its own
        rollouts = f"{policy}-rollouts-{seed}.jsonl"
        sampling = job(samples=8, seed=seed + 100 * (number - 1))
        with FileLock(f"{rollouts}.lock"):  # all arms need the first
            evaluation.sample_rollout_file(sampling, task_of(f"round {number}"), policy, rollouts)
        settings = job(model=policy, rollouts=rollouts, seed=seed, learning_rate=rate, **changes)
        settings.out = f"{FOLDER}/seed{seed}/{name_of(changes, rate)}-round{number}"
        policy, log = settings.out, train.train_once(settings)
    return policy, log


def run_arm(seed, arm, rate, split):
    """The measures of an arm; its answers are kept in its folder."""
    policy, _ = train_arm(seed, arm, rate)
    settings, measures, invalid = job(samples=4, out=policy), {}, []
    for part in PARTS if split == "test" else ["validation"]:
        values = evaluation.measure_once(settings, task_of(part), policy, part)
        measures |= {
            part: np.mean(values["pass@1"]),
            f"{part}, greedy": np.mean(values["greedy"]),
            f"by question, {part}": values["pass@1"],
        }
        invalid += values["invalid"]
    return {**measures, "invalid": np.mean(invalid), "score": measures.get("validation")}


# ---- what came of it ----


draw = bars_of(PARTS, ylabel="pass@1")


def claims(result):
    at = {name: f"{name} {spread(arm['held out'])}" for name, arm in result["arms"].items()}
    gain = result["paired"]["held out"]
    text = {pair: interval_text(interval, "+") for pair, interval in gain.items()}

    over_base, ahead = f"{BEST} minus base", f"{BEST} minus {OTHER}"
    yield (
        "TOPR improves a pretrained model, and more than positives only (Figures 1, 3, 4)",
        f"135 million weights, pass@1 on held-out questions: {at['base']}, {at[OTHER]}, "
        f"{at[BEST]}: over the base {text[over_base]}, over positives only {text[ahead]}",
        sure(gain[over_base], gain[ahead]),
    )

    again, ahead = f"{TWICE} minus {BEST}", f"{TWICE} minus {OTHER_TWICE}"
    yield (
        "Sampling again and training again keeps helping (iterations, 135 million weights)",
        f"pass@1 on held-out questions after a second round, with new questions: {at[TWICE]}, "
        f"over one round {text[again]}; {at[OTHER_TWICE]}: TOPR over that {text[ahead]}",
        sure(gain[again], gain[ahead]),
    )

    naive = "naive REINFORCE minus base"
    before, worst = (
        min(result["arms"][name]["validation"].values()) for name in ("base", "naive REINFORCE")
    )
    yield (
        "Naive REINFORCE harms a pretrained model (Figures 1, 3)",
        f"pass@1 over the base at its best rate {text[naive]}; on the validation questions "
        f"{spread(worst)} at its worst rate, the base {spread(before)}",
        verdict(gain[naive]["high"] < 0, worst < before),
    )

    over_base, ahead = "DPO minus base", f"{BEST} minus DPO"
    yield (
        "DPO does well, TOPR is best (Figures 1, 3, 135 million weights)",
        f"pass@1 on held-out questions: {at['DPO']}, over the base {text[over_base]}; "
        f"TOPR's best over DPO {text[ahead]}",
        sure(gain[over_base], gain[ahead]),
    )

    ahead = "TOPR minus truncated importance sampling"
    yield (
        "Right answers at full weight, wrong ones fading, is better than all of them fading "
        "(Figure 7, 135 million weights)",
        f"without a baseline, pass@1 on held-out questions: {at['TOPR']}, "
        f"{at['truncated importance sampling']}: {text[ahead]}",
        sure(gain[ahead]),
    )
