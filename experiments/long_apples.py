"""The embedded task with long answers: more events, each of them told again and worked out.

    Tom has 7 apples . He finds 4 . Ann buys 3 . He doubles them . How many ?
    He finds 4 . 7 + 4 = 11 . Tom has 11 apples . Ann buys 3 . Tom has 11 apples . He doubles them .
    11 * 2 = 22 . Tom has 22 apples . The answer is 22 .

With 6 to 8 events an answer has 60 to 130 tokens. The first policy is right more often than in
apples.py. The experiments use it; --task experiments/long_apples.py does so for any policy.
"""

import random
from itertools import islice

from data import apples
from data.apples import GUESS, calculate, grade, vocabulary  # noqa: F401  (a task has them, too)

LENGTHS = (6, 7, 8)  # events of a problem
HABITS = {
    "doubling_as_addition": 0.15,
    "counts_friend": 0.1,
    "slip": 0.01,
    # The loss is a mean over an answer's tokens: a short one teaches more in each of them,
    # and the first policy will guess and break off several times as often as shown.
    "guess": 0.03,
    "invalid": 0.03,
}


def questions(split, seed=0):
    return apples.questions(split, seed, LENGTHS)


def demonstrate(problem, rng):
    """One solution, with the habits."""

    def does(habit):
        return rng.random() < HABITS[habit]

    start, *told, _ = problem["question"].split(" . ")
    name, value, words = start.split()[0], problem["start"], []
    for sentence, (kind, amount) in zip(told, problem["events"]):
        words += [sentence, "."]
        if kind != "friend" or does("counts_friend"):
            adds = kind == "friend" or kind == "*" and does("doubling_as_addition")
            sign = "+" if adds else kind
            result = calculate(value, sign, amount, does("slip"))
            words += [f"{value} {sign} {amount} = {result} ."]
            value = result
        words += [f"{name} has {value} apples ."]
    if does("guess"):
        words, value = [GUESS], calculate(value, "+", rng.randint(-2, 2))
    solution = " ".join([*words, f"The answer is {value} ."])
    if does("invalid"):  # it ends somewhere
        solution = " ".join(solution.split()[: rng.randint(2, 60)])
    return solution


def demonstrations(count, seed):
    """Rollout rows to imitate, with reward +1 whether right or wrong."""
    rng = random.Random(f"{seed} long demonstrations")
    return [
        {
            "id": problem["id"],
            "prompt": problem["prompt"],
            "completion": demonstrate(problem, rng),
            "reward": 1.0,
        }
        for problem in islice(questions("train", seed), count)
    ]
