"""The embedded task: generated word problems, a tokenizer and a small Llama, all made from a seed.

    Tom has 7 apples . He finds 4 . Ann buys 3 . He doubles them . How many ?
    7 + 4 = 11 . 11 * 2 = 22 . The answer is 22 .

The base policy imitates demonstrations with a few bad habits (HABITS): systematic mistakes, guesses
without working, answers that never come. It is right about a fifth of the time, so that TOPR has
something to improve. Nothing is downloaded.
"""

import random
import re
import zlib
from itertools import islice

from data.grade import read_answer
from engine.common import Problem
from engine.rollouts import write_rollouts

LARGEST = 40  # numbers 0..40 are one token each: digits would cost accuracy in the same time
ADD, TIMES = ("finds", "buys", "gets"), {"doubles": 2, "triples": 3}
VERBS = {"+": ADD, "-": ("loses", "gives", "sells"), "*": tuple(TIMES), "friend": ADD}
NAMES, FRIENDS = ("Tom", "Max", "Leo"), ("Ann", "Eva", "Mia")
GUESS = "Let us see ."  # stands in the place of the working
HABITS = {  # how often a demonstration ...
    "doubling_as_addition": 0.3,  # treats "doubles" as + 2
    "counts_friend": 0.3,  # adds what the friend got
    "wrong_sign": 0.03,
    "slip": 0.03,  # is off by one or two in a result
    "guess": 0.45,  # gives no working, and a lucky guess at best
    "invalid": 0.17,  # never says "The answer is" (and 0.03 more for each event past two)
}
CHECKING = {  # how often a verifier's demonstration ...
    "slip": 0.03,
    "wrong_sign": 0.03,
    "flipped": 0.2,  # says the opposite of what it found
    "missing": 0.3,  # gives no verdict
}


# ---- the problems ----


LENGTHS = (2, 2, 3, 3)  # events of a problem, each number as often as it stands here


def questions(split, seed=0, lengths=LENGTHS):
    """Different problems, one after another. The text decides the split: no problem is in both."""
    rng, seen, drawn = random.Random(f"{seed} {split}"), set(), 0
    while drawn < 10_000 + 100 * len(seen):
        drawn += 1
        problem = make_problem(rng, lengths)
        question = problem["question"]
        own_split = "train" if zlib.crc32(question.encode()) % 4 else "test"
        if own_split == split and question not in seen:
            yield {"id": f"apples-{split}-{seed}-{len(seen)}", "prompt": question, **problem}
            seen.add(question)
    raise Problem(f"apples: no more than {len(seen)} different {split} questions: ask for fewer")


def make_problem(rng, lengths):
    """A dict with question, start, gold, and events: pairs of a kind (see VERBS) and an amount."""
    while True:
        name, friend = rng.choice(NAMES), rng.choice(FRIENDS)
        start = value = rng.randint(2, 12)
        question, events, values = f"{name} has {start} apples .", [], []
        for _ in range(rng.choice(lengths)):
            (kind,) = rng.choices(list(VERBS), (4, 4, 2, 1.5))
            amount, verb = rng.randint(1, 4), rng.choice(VERBS[kind])
            amount = TIMES.get(verb, amount)
            value = calculate(value, kind, amount)
            who = friend if kind == "friend" else "He"
            question += f" {who} {verb} {'them' if verb in TIMES else amount} ."
            events.append((kind, amount))
            values.append(value)
        if set(values) != {start} and 1 <= min(values) <= max(values) <= 30:
            question += " How many ?"
            return {"question": question, "start": start, "events": events, "gold": str(value)}


def calculate(a, sign, b, slip=0):
    """The result, within the numbers that have a token."""
    result = {"+": a + b, "-": a - b, "*": a * b, "friend": a}[sign] + slip
    return min(max(result, 0), LARGEST)


def grade(question, completion):
    """(answer or None, reward): an answer counts only after the words "The answer is"."""
    answer = read_answer(completion)
    if not re.fullmatch("[0-9]+", answer or ""):
        answer = None
    return answer, 1.0 if answer == question["gold"] else -1.0


# ---- what the first policy imitates ----


def demonstrate(problem, rng, habits):
    """One solution with the given habits; with habits = {} it is right."""

    def does(habit):
        return rng.random() < habits.get(habit, 0)

    value, solution = problem["start"], ""
    for kind, amount in problem["events"]:
        if kind == "friend" and not does("counts_friend"):
            continue
        sign = "+" if kind == "friend" or kind == "*" and does("doubling_as_addition") else kind
        if sign != "*" and does("wrong_sign"):
            sign = "-" if sign == "+" else "+"
        slip = rng.choice((-2, -1, 1, 2)) if does("slip") else 0
        result = calculate(value, sign, amount, slip)
        solution += f"{value} {sign} {amount} = {result} . "
        value = result
    if does("guess"):
        solution, value = f"{GUESS} ", calculate(value, "+", rng.randint(-2, 2))
    solution += f"The answer is {value} ."
    more_events = len(problem["events"]) - 2
    if "invalid" in habits and rng.random() < habits["invalid"] + 0.03 * more_events:
        words = -5 if rng.random() < 0.5 else rng.randint(2, 6)  # without the answer, or a few
        return " ".join(solution.split()[:words])
    return solution


def demonstrations(count, seed):
    """Rollout rows to imitate, with reward +1 whether right or wrong."""
    rng = random.Random(f"{seed} demonstrations")
    return [
        {
            "id": problem["id"],
            "prompt": problem["prompt"],
            "completion": demonstrate(problem, rng, HABITS),
            "reward": 1.0,
        }
        for problem in islice(questions("train", seed), count)
    ]


def verdict_demonstrations(count, seed, make_prompt):
    """The same for a verifier, which solves the problem again and compares the two answers.

    Half of the solutions are right. make_prompt(question, solution) is what the verifier sees.
    """
    rng = random.Random(f"{seed} verdicts")
    for problem in islice(questions("train", seed), count):
        wanted, reward = rng.choice((1.0, -1.0)), None
        while reward != wanted:
            solution = demonstrate(problem, rng, HABITS)
            answer, reward = grade(problem, solution)
        check = demonstrate(problem, rng, CHECKING)
        agrees = read_answer(check) == answer
        says_correct = agrees != (rng.random() < CHECKING["flipped"])
        if rng.random() >= CHECKING["missing"]:
            check += f" Verdict : {'correct' if says_correct else 'incorrect'}"
        prompt = make_prompt(problem["question"], solution)
        yield {"id": problem["id"], "prompt": prompt, "completion": check, "reward": 1.0}


# ---- the tokenizer and the model, both from nothing ----


def make_tokenizer(words):
    """One token for each word; as transformers holds it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *sorted(words)]
    numbers = {token: number for number, token in enumerate(tokens)}
    fast = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def vocabulary():
    """Every word that a problem, a solution or a check of a solution can hold."""
    words = """Let us see . The answer is + - * = Solution Check Verdict : correct incorrect ...
        has apples He them How many ?""".split()
    numbers = map(str, range(LARGEST + 1))
    return set(words).union(NAMES, FRIENDS, numbers, *VERBS.values())


def make_model(tokenizer, seed, width=64, layers=3):
    """A Llama with random weights, 0.14 million of them by default."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def write_beginner(folder, task, count, seed, **size):
    """What a base policy starts from: a random model in folder/random, and demonstrations."""
    tokenizer = make_tokenizer(task.vocabulary())
    tokenizer.save_pretrained(f"{folder}/random")
    make_model(tokenizer, seed, **size).save_pretrained(f"{folder}/random")
    write_rollouts(f"{folder}/demonstrations.jsonl", task.demonstrations(count, seed))
