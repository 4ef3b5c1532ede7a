"""GSM8K, MATH and SVAMP: downloads the questions; says how to ask them and grades the answers.

    python data/maths.py gsm8k
    python data/maths.py math --train FILE     reads your own file instead of the download
    python data/maths.py svamp

Writes train.jsonl and test.jsonl into data/NAME, one row per question: id, question, gold, and the
published solution or equation. The test set of MATH is MATH-500. SVAMP is a test set; its training
questions are those of MAWPS and ASDiv-A.
"""

import csv
import dataclasses
import hashlib
import json
import re
import sys
import types
import urllib.request
from fractions import Fraction
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:
    sys.path.insert(0, str(HERE.parent))  # run as a script: find data/ and engine/
from data.grade import read_answer, same_maths, same_number
from engine.common import Problem, parse, run_main, say, setting
from engine.rollouts import write_rollouts
from engine.tasks import one_line

# Name -> split -> address, SHA-256. The MATH checksums are those of the Git LFS pointers
# in openai/prm800k, whose train.jsonl holds all of MATH but MATH-500: only MATH's own training
# questions are taken from it.
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
MATH = "https://media.githubusercontent.com/media/openai/prm800k/main/prm800k/math_splits/"
SVAMP = "https://raw.githubusercontent.com/arkilpatel/SVAMP/main/"
PUBLISHED = {
    "gsm8k": {
        "train": (
            f"{GSM8K}train.jsonl",
            "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        ),
        "test": (
            f"{GSM8K}test.jsonl",
            "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        ),
    },
    "math": {
        "train": (
            f"{MATH}train.jsonl",
            "90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076",
        ),
        "test": (
            f"{MATH}test.jsonl",
            "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
        ),
    },
    "svamp": {
        "train": (
            f"{SVAMP}data/mawps-asdiv-a_svamp/train.csv",
            "c761cdc6390a67a285c6c346a2931f61bc8f47430eceaeb123cc3d0263efa821",
        ),
        "test": (
            f"{SVAMP}SVAMP.json",
            "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
        ),
    },
}


@dataclasses.dataclass
class Settings:
    train: str = setting("", "training questions: your copy of the published file")
    test: str = setting("", "test questions, likewise")
    out: str = setting(str(HERE), "folder for gsm8k/, math/ or svamp/")


def main(argv=None):
    """Writes both splits, from the user's own files if they are given."""
    name, *options = argv or sys.argv[1:] or [""]
    if name == "--help":
        options = [name]
    elif name not in PUBLISHED:
        raise Problem("which data set? python data/maths.py gsm8k, math or svamp")
    settings = parse(Settings, __doc__, argv=options)
    for split, (url, checksum) in PUBLISHED[name].items():
        rows, source = [], getattr(settings, split) or url
        with one_line(f"{source}: cannot be read; get a copy and pass it with --{split} FILE"):
            data = fetch(url, checksum) if source == url else Path(source).read_bytes()
            published = parse_rows(data, source)
        for number, row in enumerate(published, 1):
            with one_line(f"{source}: question {number} is not as published in {name}"):
                if row.get("unique_id", split).startswith(split):
                    rows.append({"id": f"{name}-{split}-{len(rows) + 1:04d}", **FIELDS[name](row)})
        if not rows:
            raise Problem(f"{source}: 0 questions for {name} {split}")
        path = f"{settings.out}/{name}/{split}.jsonl"
        write_rollouts(path, rows)
        say(f"{path}: {len(rows)} questions")


def fetch(url, checksum):
    """The bytes at an address; they must have the checksum."""
    say(f"downloading {url}")
    with urllib.request.urlopen(url, timeout=30) as answer:
        data = answer.read(100 * 2**20)  # an endless one must end
    if hashlib.sha256(data).hexdigest() != checksum:
        raise ValueError(f"it is not the published file: {len(data)} bytes, SHA-256 not {checksum}")
    return data


def parse_rows(data, source):
    """A published file as dicts: .csv with a header, .json with one list, otherwise JSON lines."""
    text = data.decode()
    if source.endswith(".csv"):
        return list(csv.DictReader(text.splitlines()))
    if not source.endswith(".json"):
        text = "[" + text.strip().replace("\n", ",\n") + "]"  # an error still names its line
    return json.loads(text)


# ---- from the published layouts to rows ----


def gsm8k_fields(raw):
    _, gold = raw["answer"].split("####")
    return {"question": raw["question"], "gold": gold.strip(), "solution": raw["answer"]}


def math_fields(raw):
    gold = raw["answer"].strip() or "0"  # two have none: they count 0
    return {"question": raw["problem"], "gold": gold, "solution": raw["solution"]}


def svamp_fields(raw):
    """Training questions hold number0, number1, ... in their text and in a prefix equation."""
    numbers = [shown(exact(number)) for number in raw.get("Numbers", "").split()]

    def filled(text):
        return re.sub("number([0-9]+)", lambda name: numbers[int(name[1])], text)

    question = raw["Question"] if numbers else f"{raw['Body']} {raw['Question']}"
    return {
        "question": filled(question),
        "gold": shown(exact(raw["Answer"])),
        "equation": filled(raw["Equation"]),
    }


FIELDS = {"gsm8k": gsm8k_fields, "math": math_fields, "svamp": svamp_fields}


def exact(text):
    """'0.75' -> 3/4, and 1/6 for the 0.16666666666666666 to which the publishers rounded it."""
    return Fraction(text).limit_denominator(1000)


def shown(number):
    """A decimal if that is exact, otherwise a fraction: 3, 0.75, 1/6."""
    decimal = f"{float(number):.12g}"
    return decimal if Fraction(decimal) == number else str(number)


# ---- the tasks ----

STOP = "\nQuestion:"  # a model without a chat template goes on with a question of its own
NUMBER = {
    "same_answer": same_number,
    "ASK": 'Think step by step. Finish with the words "The answer is" and the number.',
    "EXAMPLES": """\
Question: A baker makes 4 trays of 6 rolls and sells 15 of the rolls. How many rolls are left?
Answer: The baker makes 4 * 6 = 24 rolls. After the sale 24 - 15 = 9 are left. The answer is 9.

Question: Mia reads 12 pages on Monday and twice as many on Tuesday. The book has 50 pages. \
How many are left to read?
Answer: On Tuesday she reads 2 * 12 = 24 pages, so by then 12 + 24 = 36. \
That leaves 50 - 36 = 14. The answer is 14.

Question: Three pens cost $4.50. How many dollars do eight pens cost?
Answer: One pen costs 4.50 / 3 = 1.50 dollars. Eight pens cost 8 * 1.50 = 12 dollars. \
The answer is 12.""",
}
MATHS = {
    "same_answer": same_maths,
    "ASK": 'Think step by step. Finish with the words "The answer is" and the answer in $...$.',
    "EXAMPLES": """\
Question: What is $\\frac{2}{3} + \\frac{1}{6}$?
Answer: With the denominator 6 this is $\\frac{4}{6} + \\frac{1}{6} = \\frac{5}{6}$. \
The answer is $\\frac{5}{6}$.

Question: What is the larger solution of $x^2 - 5x + 6 = 0$?
Answer: Since $x^2 - 5x + 6 = (x - 2)(x - 3)$, the solutions are $2$ and $3$. The answer is $3$.

Question: What is the midpoint of the segment from $(1, 4)$ to $(5, -2)$?
Answer: Its coordinates are the means $\\frac{1 + 5}{2} = 3$ and $\\frac{4 - 2}{2} = 1$. \
The answer is $(3, 1)$.""",
}
TASKS = {"gsm8k": NUMBER, "math": MATHS, "svamp": NUMBER}


def task(name):
    """What eval.py and train.py need of "gsm8k", "math" or "svamp"."""

    def questions(split):
        """The rows that `python data/maths.py NAME` wrote."""
        path = f"{HERE}/{name}/{split}.jsonl"
        if not Path(path).is_file():
            raise Problem(f"{path} does not exist: run python data/maths.py {name}")
        return parse_rows(Path(path).read_bytes(), path)

    def grade(question, completion):
        """(answer or None, reward +1 or -1)"""
        answer = read_answer(completion.partition(STOP)[0])
        return answer, 1.0 if parts.same_answer(answer, question["gold"]) else -1.0

    parts = types.SimpleNamespace(questions=questions, grade=grade, STOP=[STOP], **TASKS[name])
    return parts


if __name__ == "__main__":
    run_main(main)
