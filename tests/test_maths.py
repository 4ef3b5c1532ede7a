"""GSM8K, MATH and SVAMP: downloads, layouts, grades; then the published files."""

import hashlib
import json

import pytest

from conftest import ROOT, in_process
from data import apples, maths
from engine.common import Problem
from experiments import pretrained

DATA = ROOT.parent / "shared" / "data"
GSM8K_ROW = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\u2028.\n#### 5"}
GSM8K_LINE = json.dumps(GSM8K_ROW, ensure_ascii=False) + "\n"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Two published files of two and one GSM8K questions at addresses of this machine."""
    for split, count in (("train", 2), ("test", 1)):
        path = tmp_path / f"published-{split}.jsonl"
        path.write_text(GSM8K_LINE * count, encoding="utf-8")
        source = (path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setitem(maths.PUBLISHED["gsm8k"], split, source)
    return tmp_path / "published-train.jsonl"


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_download(published, tmp_path):
    """A line separator inside a JSON string is no end of line; ids are unique and count from 1."""
    maths.main(["gsm8k", "--out", str(tmp_path)])
    rows = read_lines(tmp_path / "gsm8k/train.jsonl")
    assert [row["id"] for row in rows] == ["gsm8k-train-0001", "gsm8k-train-0002"]
    assert rows[0]["question"] == "What is 2 + 3?" and rows[0]["gold"] == "5"
    assert "#### 5" in rows[0]["solution"]
    assert len(read_lines(tmp_path / "gsm8k/test.jsonl")) == 1


@pytest.mark.parametrize(
    "address, words",
    [
        (None, "is not the published file"),
        ("file:///nowhere/train.jsonl", "pass it with --train FILE: .*No such file"),
        ("http://127.0.0.1:1/train.jsonl", "pass it with --train FILE: .*refused"),
    ],
)
def test_a_bad_download_is_one_line_and_leaves_no_file(
    published, tmp_path, monkeypatch, address, words
):
    """A truncated or exchanged file must not become a data set that looks complete."""
    published.write_text("something else")
    if address:
        monkeypatch.setitem(maths.PUBLISHED["gsm8k"], "train", (address, ""))
    with pytest.raises(Problem, match=words) as problem:
        maths.main(["gsm8k", "--out", str(tmp_path)])
    assert "\n" not in str(problem.value) and not (tmp_path / "gsm8k").exists()


def test_math(tmp_path):
    """The published file holds questions of both splits: only those of the split are taken."""
    path = tmp_path / "math.jsonl"
    row = {"problem": "What is $\\frac12$ of 3?", "answer": " \\frac{3}{2}", "solution": "It is."}
    names = ["train/algebra/1.json", "test/algebra/3.json", "train/geometry/2.json"]
    path.write_text("\n".join(json.dumps({**row, "unique_id": name}) for name in names))
    maths.main(["math", "--train", str(path), "--test", str(path), "--out", str(tmp_path)])
    first, second = read_lines(tmp_path / "math/train.jsonl")
    assert first == {
        "id": "math-train-0001",
        "question": row["problem"],
        "gold": "\\frac{3}{2}",
        "solution": "It is.",
    }
    assert second["id"] == "math-train-0002" and len(read_lines(tmp_path / "math/test.jsonl")) == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("{]\n", "line 1"),
        ('{"question": "q", "answer": "#### 5"}\n{"half\n', "line 2"),
        ("[1]\n", "question 1 is not as published"),
        (GSM8K_LINE + '{"question": "q"}\n', "question 2 is not as published in gsm8k: KeyError"),
        ('{"question": "q", "answer": "5"}\n', "question 1 is not as published"),
        ('{"question": "q", "answer": 5}\n', "question 1 is not as published"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_local_file_is_one_line(tmp_path, text, words):
    path = tmp_path / "mine.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(Problem, match=words) as problem:
        maths.main(["gsm8k", "--train", str(path), "--out", str(tmp_path)])
    assert "\n" not in str(problem.value)


def test_missing_questions_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(maths, "HERE", tmp_path)
    with pytest.raises(Problem, match="run python data/maths.py math"):
        maths.task("math").questions("test")


SVAMP_TEST = [
    {
        "Body": "Tom had 5 pens.",
        "Question": "He got 2. How many?",
        "Answer": 7.0,
        "Equation": "( 5.0 + 2.0 )",
    }
]
SVAMP_TRAIN = """Question,Numbers,Equation,Answer
"Ann has number0 by number1 , less number2 . How many ?",9.0 2.5 3,- * number0 number1 number2,19.5
"ann has number0 by number1 less number2. How many?",9 2.5 3.0,- * number0 number1 number2,19.5
"Eva eats number0 pie and number0 pie.",0.16666666666666666,+ number0 number0,0.3333333333333333
"Max has number0 pens. How many?",4,number0,5
"""


def test_svamp(tmp_path, monkeypatch):
    """Numbers stand in the text; an experiment takes what has a right equation, each once."""
    monkeypatch.setattr(maths, "HERE", tmp_path)
    train, test = tmp_path / "train.csv", tmp_path / "SVAMP.json"
    train.write_text(SVAMP_TRAIN)
    test.write_text(json.dumps(SVAMP_TEST))
    maths.main(["svamp", "--train", str(train), "--test", str(test), "--out", str(tmp_path)])
    rows = maths.task("svamp").questions("train")
    assert rows[0] == {
        "id": "svamp-train-0001",
        "gold": "19.5",
        "equation": "- * 9 2.5 3",
        "question": "Ann has 9 by 2.5 , less 3 . How many ?",
    }
    ann, eva = pretrained.with_solutions(rows)
    assert ann["solution"] == "9 * 2.5 = 22.5. 22.5 - 3 = 19.5. The answer is 19.5."
    assert eva["solution"] == "1/6 + 1/6 = 1/3. The answer is 1/3." and "1/6 pie" in eva["question"]
    (tom,) = maths.task("svamp").questions("test")
    assert tom["question"] == "Tom had 5 pens. He got 2. How many?" and tom["gold"] == "7"


def test_command_line(tmp_path):
    """Run as a script it finds the package data; a user's error is one line with exit code 2."""
    mine = tmp_path / "mine.jsonl"
    mine.write_text(GSM8K_LINE, encoding="utf-8")
    for options, code, words in (
        (["gsm8k", "--train", mine, "--test", mine, "--out", tmp_path], 0, ": 1 questions\n"),
        (["gsm9k"], 2, "error: which data set? python data/maths.py gsm8k, math or svamp\n"),
        (["--help"], 0, "folder for gsm8k/"),
    ):
        result = in_process(ROOT / "data/maths.py", *options)
        assert result.returncode == code and words in result.stdout, result.stdout


# ---- the tasks ----


@pytest.mark.parametrize("name", maths.TASKS)
def test_the_instruction_holds_no_answer_to_copy(name):
    """Small models copied "The answer is N." from the instruction, letter by letter."""
    ask = maths.task(name).ASK
    assert '"The answer is"' in ask and ask.count("answer is") == 1


@pytest.mark.parametrize(
    "name, golds", [("gsm8k", ["9", "14", "12"]), ("math", ["\\frac{5}{6}", "3", "(3,1)"])]
)
def test_worked_examples_are_graded_right(name, golds):
    """The examples teach the form that the grader reads; each reads back as the answer it shows."""
    task = maths.task(name)
    for text, gold in zip(task.EXAMPLES.split("\n\n"), golds, strict=True):
        assert task.grade({"gold": gold}, text)[1] == 1.0


MORE = " 18 it is. The answer is 18.\n\nQuestion: And 2 + 2?\nAnswer: The answer is 4."


@pytest.mark.parametrize(
    "name, completion, gold, graded",
    [
        ("gsm8k", " 9 * 2 = 18. The answer is $18.", "18", ("$18", 1.0)),
        ("gsm8k", "The answer is 17.", "18", ("17", -1.0)),
        ("gsm8k", "It is 18.", "18", (None, -1.0)),
        ("math", "The answer is $x = \\frac12$.", "0.5", ("x = \\frac12", 1.0)),
        ("gsm8k", MORE, "18", ("18", 1.0)),
        ("gsm8k", MORE, "4", ("18", -1.0)),
        ("gsm8k", " 18.\nQuestion: x\nAnswer: The answer is 18.", "18", (None, -1.0)),
    ],
)
def test_grade(name, completion, gold, graded):
    """A plain model writes on: the answer to a question of its own is not the answer to ours."""
    task = maths.task(name)
    assert task.grade({"gold": gold}, completion) == graded and task.STOP == ["\nQuestion:"]


# ---- the embedded task ----


def test_problems_end_with_one_line(monkeypatch):
    """Beyond the last different problem, making another one went on for ever."""
    few = [{"question": f"{n} apples ?", "gold": str(n)} for n in range(20)]
    monkeypatch.setattr(apples, "make_problem", lambda rng, lengths: rng.choice(few))
    found = []
    with pytest.raises(Problem, match="apples: no more than"):
        for question in apples.questions("train"):
            found.append(question["question"])
    assert 0 < len(found) == len(set(found)) < 20


def test_demonstrations_are_rows_of_text():
    """The trainer makes the tokens; a field of its own here would be in every file."""
    fields = ["id", "prompt", "completion", "reward"]
    (row,) = apples.demonstrations(1, 0)
    (check,) = apples.verdict_demonstrations(1, 0, "{} | {}".format)
    assert list(row) == list(check) == fields and row["prompt"] in check["prompt"]


# ---- the published files ----


def need(*files):
    for file in files:
        if not (DATA / file).is_file():
            pytest.skip(f"{DATA / file} is not there")
    return [str(DATA / file) for file in files]


@pytest.mark.parametrize(
    "name, train, test, counts",
    [
        ("gsm8k", "gsm8k/train.jsonl", "gsm8k/test.jsonl", [7473, 1319]),
        ("math", "math/train.jsonl", "math/math500_test.jsonl", [7500, 500]),
        ("svamp", "svamp/mawps-asdiv-a_train.csv", "svamp/SVAMP.json", [3138, 1000]),
    ],
)
def test_published_files(tmp_path, monkeypatch, name, train, test, counts):
    """No test question is trained on; every answer is right by its own gold."""
    monkeypatch.setattr(maths, "HERE", tmp_path)
    train, test = need(train, test)
    maths.main([name, "--train", train, "--test", test, "--out", str(tmp_path)])
    task = maths.task(name)
    splits = [task.questions("train"), task.questions("test")]
    assert [len(rows) for rows in splits] == counts
    texts, other_texts = ({row["question"] for row in rows} for rows in splits)
    assert not texts & other_texts
    for row in sum(splits, []):
        assert task.grade(row, f"The answer is ${row['gold']}$.")[1] == 1.0
    if name == "svamp":
        rows = pretrained.with_solutions(splits[0])
        assert len(rows) == 2715
        assert all(task.grade(row, row["solution"]) == (row["gold"], 1.0) for row in rows)


@pytest.mark.parametrize(
    "name, split, file",
    [
        ("gsm8k", "train", "gsm8k/train.jsonl"),
        ("gsm8k", "test", "gsm8k/test.jsonl"),
        ("math", "test", "math/math500_test.jsonl"),
        ("svamp", "test", "svamp/SVAMP.json"),
        ("svamp", "train", "svamp/mawps-asdiv-a_train.csv"),
    ],
)
def test_checksums(name, split, file):
    address, checksum = maths.PUBLISHED[name][split]
    (path,) = need(file)
    with open(path, "rb") as published_file:
        found = hashlib.sha256(published_file.read()).hexdigest()
    assert address.startswith("https://") and found == checksum
