"""GSM8K and MATH: fetches the questions, writes the prompts, judges the completions.

    python data/maths.py gsm8k
    python data/maths.py math --train FILE     a file that you have, instead of the download
    python data/maths.py solutions FILE OUT    OpenAI's graded GSM8K solutions of real models, as a rollout file

Writes train.jsonl and test.jsonl into data/gsm8k or data/math, a row for each question: id, question, gold,
solution, and for MATH level and subject. The test set of MATH is MATH-500.
"""

import dataclasses
import hashlib
import http.client
import json
import re
import sys
import tarfile
import types
import urllib.request
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script: find the package data
from data.grade import last_boxed, read_answer, same_maths, same_number
from data.tasks import render_prompt, without_marks
from engine.common import Problem, parse, progress, run_main, say, setting, whole_file

# name and split -> home, SHA-256, questions. The MATH checksums are those of the Git LFS pointers in openai/prm800k;
# its train.jsonl holds all of MATH but MATH-500, of which only the questions of MATH's own training set are taken.
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
MATH = "https://media.githubusercontent.com/media/openai/prm800k/main/prm800k/math_splits/"
PUBLISHED = {
    ("gsm8k", "train"):
        (GSM8K + "train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", 7473),
    ("gsm8k", "test"):
        (GSM8K + "test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", 1319),
    ("math", "train"):
        (MATH + "train.jsonl", "90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076", 7500),
    ("math", "test"):
        (MATH + "test.jsonl", "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132", 500),
}
SECURE, TIMEOUT, LARGEST = "https://", 30, 100 * 2**20
HERE = Path(__file__).resolve().parent


@dataclasses.dataclass
class Settings:
    train: str | None = setting(None, "the training questions: a .jsonl file, or MATH's folder or .tar file")
    test: str | None = setting(None, "the test questions, likewise")
    out: str = setting(str(HERE), "the folder to write gsm8k/ or math/ into")


def main(argv=None):
    name, *options = (sys.argv[1:] if argv is None else argv) or [""]
    if name == "solutions" and len(options) == 2:
        return write_solutions(*options)
    known = {known for known, _ in PUBLISHED}
    if name not in known and name not in ("-h", "--help"):
        raise Problem("which one? python data/maths.py gsm8k, or python data/maths.py math")
    settings = parse(Settings, options if name in known else [name], __doc__)
    for split in ("train", "test"):
        prepare(name, split, getattr(settings, split), settings.out)


def prepare(name, split, source, out):
    home, checksum, count = PUBLISHED[name, split]
    if source:
        raw = read_local(Path(source))
    else:
        raw = read_lines(fetch(home, checksum, split).decode(), home)
    own = [row for row in raw if f"{split}/" in str(row.get("unique_id", ""))]
    rows = [as_row(name, split, number, row, source or home) for number, row in enumerate(own or raw, 1)]
    if not rows or not source and len(rows) != count:
        raise Problem(f"{source or home}: {len(rows)} questions for {name} {split}, {count} are published")
    path = Path(out, name, f"{split}.jsonl")
    with whole_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    say(f"{path}: {len(rows)} questions" + (f" ({count} are published)" if len(rows) != count else ""))


def write_solutions(source, out):
    """Rows of question, gold, model, solution and is_correct become rollouts; their answers follow "A:"."""
    rows = read_local(Path(source))
    try:
        rollouts = [{"id": f"gsm8k-test-{row['idx'] + 1:04}", "prompt": row["question"], "completion": row["solution"],
                     "reward": 1.0 if row["is_correct"] else -1.0, "gold": row["gold"], "model": row["model"],
                     "answer": read_answer(row["solution"], "A:")} for row in rows]
    except (KeyError, TypeError) as error:
        raise Problem(f"{source}: not a file of graded solutions: {error} is missing or of another type")
    with whole_file(out) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rollouts)
    say(f"{out}: {len(rollouts)} solutions, {sum(row['reward'] > 0 for row in rollouts)} of them right")


def fetch(url, checksum, split):
    """The bytes behind an address, which must have the checksum."""
    instead = f"fetch it in another way and pass it with --{split} FILE"
    data = bytearray()
    try:
        if not url.startswith(SECURE):
            raise OSError("not an https address")
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            if not answer.url.startswith(SECURE):
                raise OSError("it leads away from https")
            size = int(answer.headers.get("Content-Length") or 0)
            with progress(total=size or None, what=f"{url.rpartition('/')[2]} (bytes)") as bar:
                while chunk := answer.read(2**16):
                    data += chunk
                    bar.update(len(chunk))
                    if len(data) > LARGEST:
                        raise OSError(f"more than {LARGEST} bytes")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Problem(f"cannot download {url}: {error}; {instead}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != checksum:
        raise Problem(f"{url} is not the published file ({len(data)} bytes, SHA-256 {found}, not {checksum}): "
                      f"try again, or {instead}")
    return bytes(data)


def read_lines(text, source):
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [dict(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError) as error:
            raise Problem(f"{source}, line {number}: not a JSON object: {error}") from error
    return rows


def read_local(path):
    """The rows of a .jsonl file, or of MATH as first published: a folder or .tar with one .json file a question."""
    try:
        if path.is_dir():
            files = [(file.relative_to(path.resolve().parent).as_posix(), file.read_bytes())
                     for file in path.resolve().rglob("*.json")]
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as tar:  # read where it is: nothing is unpacked onto the disk
                files = [(member.name, tar.extractfile(member).read()) for member in tar
                         if member.isfile() and member.name.endswith(".json") and member.size < 2**20]
        else:
            return read_lines(path.read_text(encoding="utf-8"), path)
        return [{"unique_id": name} | json.loads(data) for name, data in sorted(files)]
    except (OSError, ValueError, TypeError, tarfile.TarError) as error:
        raise Problem(f"{path}: cannot be read: {error}") from error


def as_row(name, split, number, raw, source):
    row = {"id": f"{name}-{split}-{number:04d}"}
    try:
        if name == "gsm8k":
            solution, mark, gold = raw["answer"].rpartition("####")
            if not mark:
                raise Problem(f"{source}: question {number} has no #### before its answer")
            return row | {"question": raw["question"], "gold": gold.strip(), "solution": raw["answer"]}
        gold = raw.get("answer") or last_boxed(raw["solution"]) or "0"  # two solutions box nothing: they count 0 primes
        level = re.search("[0-9]", str(raw.get("level")))
        return row | {"question": raw["problem"], "gold": gold.strip(), "solution": raw["solution"],
                      "level": int(level[0]) if level else None, "subject": raw.get("subject") or raw.get("type")}
    except (KeyError, AttributeError, TypeError) as error:
        raise Problem(f"{source}: question {number} is not laid out as {name} is published: {error!r}") from error


def load_questions(name, split, folder=None):
    """The rows that `python data/maths.py NAME` wrote: id, question, gold, solution, ..."""
    path = Path(folder or HERE, name, f"{split}.jsonl")
    if not path.is_file():
        raise Problem(f"{path} is not there: run python data/maths.py {name}" + (f" --out {folder}" if folder else ""))
    return read_local(path)


# ---- what the model sees ----

ASK = {
    "gsm8k": 'Think step by step. End with "The answer is N." where N is the number that was asked for.',
    "math": 'Think step by step. End with "The answer is $...$." with the final answer in place of the dots.',
}
EXAMPLES = {
    "gsm8k": """Question: A baker makes 4 trays of 6 rolls and sells 15 of the rolls. How many rolls are left?
Answer: The baker makes 4 * 6 = 24 rolls. After the sale 24 - 15 = 9 are left. The answer is 9.

Question: Mia reads 12 pages on Monday and twice as many on Tuesday. The book has 50 pages. How many are left to read?
Answer: On Tuesday she reads 2 * 12 = 24 pages, so by then 12 + 24 = 36. That leaves 50 - 36 = 14. The answer is 14.

Question: Three pens cost $4.50. How many dollars do eight pens cost?
Answer: One pen costs 4.50 / 3 = 1.50 dollars. Eight pens cost 8 * 1.50 = 12 dollars. The answer is 12.""",
    "math": r"""Question: What is $\frac{2}{3} + \frac{1}{6}$?
Answer: With the denominator 6 this is $\frac{4}{6} + \frac{1}{6} = \frac{5}{6}$. The answer is $\frac{5}{6}$.

Question: What is the larger solution of $x^2 - 5x + 6 = 0$?
Answer: Since $x^2 - 5x + 6 = (x - 2)(x - 3)$, the solutions are $2$ and $3$. The answer is $3$.

Question: What is the midpoint of the segment from $(1, 4)$ to $(5, -2)$?
Answer: Its coordinates are the means $\frac{1 + 5}{2} = 3$ and $\frac{4 - 2}{2} = 1$. The answer is $(3, 1)$.""",
}
STOP = "\nQuestion:"  # a plain model runs on to a question of its own


def make_prompt(name, question, tokenizer):
    """Exactly what the model sees: the chat template where the tokenizer has one, else three worked examples.

    A chat prompt already holds its begin token, so it is tokenized with add_special_tokens=False.
    """
    question = without_marks(question, tokenizer)
    one_line = re.sub(r"\s*\n\s*(?=(?:Question|Answer):)", " ", question)
    plain = f"{EXAMPLES[name]}\n\nQuestion: {one_line}\nAnswer:"
    plain_settings = types.SimpleNamespace(plain_prompt=False, system="", template_arguments="{}")
    return render_prompt(f"{question}\n\n{ASK[name]}", plain, tokenizer, plain_settings)


# ---- what the model is told ----

SAME = {"gsm8k": same_number, "math": same_maths}


def grade(name, completion, gold, marker="The answer is"):
    """(the answer read from the completion, or None where it names none; +1.0 where it is right, else -1.0)"""
    answer = read_answer(completion.partition(STOP)[0], marker)
    return answer, 1.0 if answer is not None and SAME[name](answer, gold) else -1.0


def task(name):
    def questions(split):
        return load_questions(name, split)

    def graded(question, completion, marker="The answer is"):
        return grade(name, completion, question["gold"], marker)

    return types.SimpleNamespace(questions=questions, grade=graded, STOP=[STOP], ASK=ASK[name], EXAMPLES=EXAMPLES[name],
                                 same_answer=SAME[name])


if __name__ == "__main__":
    run_main(main)
