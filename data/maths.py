"""GSM8K, MATH and SVAMP: downloads the questions; says how to ask them and grades the answers.

    python data/maths.py gsm8k
    python data/maths.py math --train FILE     reads your own file instead of the download
    python data/maths.py svamp
    python data/maths.py solutions FILE OUT    OpenAI's graded GSM8K solutions, as a rollout file

Writes train.jsonl and test.jsonl into data/NAME, one row per question: id, question, gold,
solution, and for MATH level and subject. The test set of MATH is MATH-500. SVAMP is a test set; its
training questions are those of MAWPS and ASDiv-A, their solutions the equations, worked out.
"""

import csv
import dataclasses
import functools
import hashlib
import http.client
import json
import re
import sys
import tarfile
import types
import urllib.request
from fractions import Fraction
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find data/
from data.grade import combine, last_boxed, read_answer, same_maths, same_number
from engine.rollouts import write_rollouts
from engine.common import Problem, parse, run_main, say, setting

# Name -> split -> address, SHA-256, questions. The MATH checksums are those of the Git LFS pointers
# in openai/prm800k, whose train.jsonl holds all of MATH but MATH-500: only MATH's own training
# questions are taken from it.
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
MATH = "https://media.githubusercontent.com/media/openai/prm800k/main/prm800k/math_splits/"
SVAMP = "https://raw.githubusercontent.com/arkilpatel/SVAMP/main/"
PUBLISHED = {
    "gsm8k": {
        "train": (
            GSM8K + "train.jsonl",
            "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", 7473),
        "test": (
            GSM8K + "test.jsonl",
            "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", 1319),
    },
    "math": {
        "train": (
            MATH + "train.jsonl",
            "90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076", 7500),
        "test": (
            MATH + "test.jsonl",
            "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132", 500),
    },
    "svamp": {
        "train": (
            SVAMP + "data/mawps-asdiv-a_svamp/train.csv",
            "c761cdc6390a67a285c6c346a2931f61bc8f47430eceaeb123cc3d0263efa821", 3138),
        "test": (
            SVAMP + "SVAMP.json",
            "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e", 1000),
    },
}
SECURE, LARGEST = "https://", 100 * 2**20
HERE = Path(__file__).resolve().parent  # load_questions reads here


@dataclasses.dataclass
class Settings:
    train: str = setting(
        "", "training questions: the published file (for MATH also its folder or .tar file)")
    test: str = setting("", "test questions, likewise")
    out: str = setting(str(HERE), "folder for gsm8k/, math/ or svamp/")


def main(argv=None):
    name, *options = (sys.argv[1:] if argv is None else argv) or [""]
    if name == "solutions" and len(options) == 2:
        return write_solutions(*options)
    if name in ("-h", "--help"):
        options = [name]
    elif name not in PUBLISHED:
        raise Problem("which data set? python data/maths.py gsm8k, math or svamp")
    prepare(name, parse(Settings, options, __doc__))


def prepare(name, settings):
    """Writes both splits, from the user's own files if they are given."""
    rows = {}
    for split, (source, checksum, _) in PUBLISHED[name].items():
        file = getattr(settings, split)
        if file:
            source, raw = file, read_local(Path(file))
        else:
            raw = parse_rows(fetch(source, checksum, split).decode(), source)
        own = [row for row in raw if f"{split}/" in str(row.get("unique_id"))] or raw
        if not own:
            raise Problem(f"{source}: 0 questions for {name} {split}")
        rows[split] = [as_row(name, split, n, row, source) for n, row in enumerate(own, 1)]
    if name == "svamp":
        rows["train"] = without_repeats(rows["train"], rows["test"])
    for split, kept in rows.items():
        path = f"{settings.out}/{name}/{split}.jsonl"
        write_rollouts(path, kept)
        say(f"{path}: {len(kept)} questions ({PUBLISHED[name][split][2]} are published)")


def without_repeats(train, test):
    """The questions whose equation gives the answer, each once, without those of the test set."""
    def words(row):
        return tuple(re.findall(r"\w+", row["question"].lower()))

    correct, kept = [row for row in train if row["solution"]], {}
    for row in correct:
        kept.setdefault(words(row), row)
    repeated = len(correct) - len(kept)
    tested = [kept.pop(words(row)) for row in test if words(row) in kept]
    say(f"left out: {len(train) - len(correct)} questions whose equation gives another answer, "
        f"{repeated} asked twice, {len(tested)} of the test set")
    return list(kept.values())


def write_solutions(source, out):
    """Rows of question, gold, model, solution and is_correct become rollouts."""
    try:
        rollouts = [{
            "id": f"gsm8k-test-{row['idx'] + 1:04}", "prompt": row["question"],
            "completion": row["solution"], "reward": 1.0 if row["is_correct"] else -1.0,
            "gold": row["gold"], "model": row["model"],
            "answer": read_answer(row["solution"], "A:"),
        } for row in read_local(Path(source))]
    except (KeyError, TypeError) as error:
        raise Problem(f"{source}: not a file of graded solutions: {error} is missing or wrong")
    write_rollouts(out, rollouts)
    correct = sum(row["reward"] > 0 for row in rollouts)
    say(f"{out}: {len(rollouts)} solutions, {correct} of them correct")


def fetch(url, checksum, split):
    """The bytes at an address; they must have the checksum."""
    instead = f"get the file in another way and pass it with --{split} FILE"
    say(f"downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            if not answer.url.startswith(SECURE):
                raise OSError("not an https address")
            data = answer.read(LARGEST)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Problem(f"cannot download {url}: {error}; {instead}")
    found = hashlib.sha256(data).hexdigest()
    if found != checksum:
        raise Problem(f"{url} is not the published file: {len(data)} bytes, SHA-256 {found}, "
                      f"not {checksum}: try again, or {instead}")
    return data


def parse_rows(text, source):
    """A published file as dicts: .csv with a header, .json with one list, otherwise JSON lines."""
    suffix = Path(source).suffix
    if suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if suffix != ".json":
        text = "[" + text.strip().replace("\n", ",\n") + "]"  # an error still names its line
    rows = json.loads(text)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("JSON objects are needed, one for each question")
    return rows


def read_local(path):
    """A file's rows. MATH as first published is a folder or .tar file, one .json a question."""
    try:
        if path.is_dir():
            top = path.resolve()
            files = [(file.relative_to(top.parent).as_posix(), file.read_bytes())
                     for file in top.rglob("*.json")]
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as tar:  # nothing is unpacked onto the disk
                files = [(member.name, tar.extractfile(member).read()) for member in tar
                         if member.isfile() and member.name.endswith(".json")
                         and member.size < 2**20]
        else:
            return parse_rows(path.read_text(encoding="utf-8"), path)
        return [{"unique_id": name} | json.loads(data) for name, data in sorted(files)]
    except (OSError, ValueError, TypeError, csv.Error, tarfile.TarError) as error:
        raise Problem(f"{path}: cannot be read: {error}")


# ---- from the published layouts to rows ----


def as_row(name, split, number, raw, source):
    try:
        fields = {"gsm8k": gsm8k_fields, "math": math_fields, "svamp": svamp_fields}[name](raw)
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise Problem(f"{source}: question {number} does not have the published layout of {name}: "
                      f"{error!r}")
    return {"id": f"{name}-{split}-{number:04d}", **fields}


def gsm8k_fields(raw):
    _, mark, gold = raw["answer"].rpartition("####")
    if not mark:
        raise ValueError("no #### before the answer")
    return {"question": raw["question"], "gold": gold.strip(), "solution": raw["answer"]}


def math_fields(raw):
    gold = raw.get("answer") or last_boxed(raw["solution"]) or "0"  # two box nothing: they count 0
    level = re.search("[0-9]", str(raw.get("level")))
    return {"question": raw["problem"], "gold": gold.strip(), "solution": raw["solution"],
            "level": int(level[0]) if level else None,
            "subject": raw.get("subject") or raw.get("type")}


def svamp_fields(raw):
    """Training questions hold number0, number1, ... in their text and in a prefix equation.

    The solution is None if the equation does not give the answer.
    """
    gold = shown(exact(raw["Answer"]))
    if "Numbers" not in raw:  # the test set
        question = f"{raw['Body']} {raw['Question']}"
        return {"question": question, "gold": gold, "solution": raw["Equation"]}
    numbers = [shown(exact(number)) for number in raw["Numbers"].split()]

    def filled(text):
        return re.sub("number([0-9]+)", lambda name: numbers[int(name[1])], text)

    steps, result = work_out(filled(raw["Equation"]))
    solution = " ".join([*steps, f"The answer is {gold}."]) if result == gold else None
    return {"question": filled(raw["Question"]), "gold": gold, "solution": solution}


def exact(text):
    """'0.75' -> 3/4, and 1/6 for the 0.16666666666666666 to which the publishers rounded it."""
    return Fraction(str(text)).limit_denominator(1000)


def shown(number):
    """A decimal if that is exact, otherwise a fraction: 3, 0.75, 1/6."""
    decimal = f"{float(number):.12g}"
    return decimal if Fraction(decimal) == number else str(number)


def work_out(equation):
    """'- 9 * 2 3' -> ['2 * 3 = 6.', '9 - 6 = 3.'], '3': exact, and nothing is evaluated as code."""
    stack, steps = [], []
    for token in reversed(equation.split()):
        if token in ("+", "-", "*", "/"):
            left, right = stack.pop(), stack.pop()
            stack.append(combine(left, token, right))
            steps.append(f"{shown(left)} {token} {shown(right)} = {shown(stack[-1])}.")
        else:
            stack.append(exact(token))
    (result,) = stack
    return steps, shown(result)


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
TASKS = {"gsm8k": NUMBER, "math": MATHS, "svamp": NUMBER}  # engine/tasks.py makes the prompts


def task(name):
    """What eval.py and train.py need of "gsm8k", "math" or "svamp"."""
    parts = types.SimpleNamespace(**TASKS[name], STOP=[STOP])
    parts.questions = functools.partial(load_questions, name)

    def grade(question, completion):
        """(answer or None, reward +1 or -1)"""
        answer = read_answer(completion.partition(STOP)[0])
        return answer, 1.0 if parts.same_answer(answer, question["gold"]) else -1.0

    parts.grade = grade
    return parts


def load_questions(name, split):
    """The rows that `python data/maths.py NAME` wrote."""
    path = HERE / name / f"{split}.jsonl"
    if not path.is_file():
        raise Problem(f"{path} does not exist: run python data/maths.py {name}")
    return read_local(path)


if __name__ == "__main__":
    run_main(main)
