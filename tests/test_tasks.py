"""A task of the user's own, one file with questions(split) and grade(question, completion); and how
every question gets its prompt."""

import json
import time
from types import SimpleNamespace

import pytest

import eval as evaluation
from conftest import ROOT, in_process
from data import load_task
from engine import tasks
from engine.common import Problem
from engine.rollouts import read_rollouts, write_rollouts

TASK = '''
"""How many apples are left after some were found: small sums in the embedded policy's words."""

NAMES = {"train": ("Tom", "Max"), "test": ("Leo",)}


def questions(split):
    return [{"id": f"{split}-{name}-{a}-{b}", "gold": str(a + b),
             "prompt": f"{name} has {a} apples . He finds {b} . How many ?"}
            for name in NAMES[split] for a in range(2, 6) for b in (1, 2)]


def grade(question, completion):
    words = completion.split()
    answer = words[-2] if len(words) > 1 and words[-1] == "." else None
    return answer, 1.0 if answer == question["gold"] else -1.0
'''
MEASURE = """
def measure(rows):
    return {"even answers": [row["answer"] in ("2", "4", "6") for row in rows[::4]]}
"""
GRADE = "def grade(question, completion): return "
QUESTIONS = GRADE + "None, 0\ndef questions(split): "


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "my_task.py").write_text(text)
        return str(tmp_path / "my_task.py")

    return write


def run(script, *options):
    return in_process(ROOT / script, *options, "--samples", 4, "--max-new-tokens", 25)


def test_sampled_trained_and_measured(tiny, write, tmp_path):
    """The same measures, the same rollout file, the same rounds as for a task of ours; or measures
    of its own."""
    task, out = write(TASK), tmp_path / "rollouts.jsonl"
    result = run("eval.py", "--model", tiny, "--task", task, "--split", "train", "--out", out)
    assert result.returncode == 0 and "maj@4" in result.stdout, result.stdout
    rows = read_rollouts(out)
    assert len(rows) == 16 * 4 and {row["split"] for row in rows} == {"train"}
    assert {row["reward"] for row in rows} == {1.0, -1.0}
    write_rollouts(out, [{**rows[0], "id": "test-Leo-2-1"}])  # figures would not be held out
    result = run("train.py", "--model", tiny, "--rollouts", out, "--task", task)
    assert result.returncode == 2 and "--split train" in result.stdout, result.stdout
    command = (
        "train.py",
        "--model",
        tiny,
        "--task",
        write(TASK + MEASURE),
        "--rounds",
        2,
        "--eval-every",
        3,
        "--sequences",
        16,
        "--out",
        tmp_path / "out",
    )
    result = run(*command)
    assert result.returncode == 0 and "8 held-out questions" in result.stdout, result.stdout
    assert "even answers" in result.stdout and "maj@4" not in result.stdout
    first, second = (read_rollouts(tmp_path / f"out/rollouts-{number}.jsonl") for number in (1, 2))
    same = sum(a["completion"] == b["completion"] for a, b in zip(first, second))
    assert same < len(first) / 2  # every round has random numbers of its own
    assert first[0]["sampling"]["weights"] != second[0]["sampling"]["weights"]
    assert run(*command).stdout.count("trained before, reusing it") == 2


def prompts(task, tokenizer=None, count=0, **changes):
    """Of its test questions; load_questions as every script calls it."""
    settings = evaluation.Settings(seed=3, **changes)
    return [
        question["prompt"]
        for question in tasks.load_questions(task, "test", count, tokenizer, settings)
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        ("x = 1", "has no function questions"),
        ("def questions(split): return []", "function grade"),
        *(
            (f"STOP = {stop}\n{TASK}{GRADE}'5', 1.0", f"STOP is {stop}, not a list")
            for stop in ("5", "[5]", "None", "{'a': 1}")
        ),
        ("def (", "cannot be imported: SyntaxError"),
        ("import nothing_like_this", "nothing_like"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit"),
        (QUESTIONS + "return []", "no questions in split 'test'"),
        (QUESTIONS + "return 5", "questions of split 'test': TypeError"),
        (QUESTIONS + "yield {}; 1 / 0", "ZeroDivisionError"),
        (QUESTIONS + "return ['a']", "question 1 of split 'test' needs an \"id\""),
        (QUESTIONS + "return [{'id': 3, 'prompt': ''}]", 'needs an "id"'),
        (QUESTIONS + "return [{'id': 'a', 'prompt': 'x'}] * 2", "question 2 of"),
        (QUESTIONS + "return [{'id': 'a'}]", "question 'a'"),
        (QUESTIONS + "return [{'id': 'a', 'question': 7}]", "question 'a'"),
        (QUESTIONS + "return [{'id': 'a', 'prompt': 7}]", "question 'a' needs a"),
        (QUESTIONS + "return [{'id': 'a', 'messages': []}]", "a chat template"),
        *(
            (TASK + GRADE + returned, "grade of question 'test-Leo-2-1'")
            for returned in (
                "1 / 0",
                "None",
                "1.0",
                "(5, 1.0)",
                "('5', None)",
                "('5', float('nan'))",
                "('5', 'x')",
                "('a', 1, 2)",
            )
        ),
    ],
)
def test_a_broken_task_is_one_line(write, text, words):
    path = write(text)
    with pytest.raises(Problem) as problem:
        task = load_task(path)
        prompts(task)
        task.grade({"id": "test-Leo-2-1"}, "text")
    message = str(problem.value)
    assert path in message and words in message and not set("\n<>") & set(message)


def test_unknown_names_are_one_line(tmp_path):
    with pytest.raises(Problem, match="--task gsm9k.*apples, gsm8k"):
        load_task("gsm9k")
    with pytest.raises(Problem, match="missing.py: cannot be imported"):
        load_task(str(tmp_path / "missing.py"))


@pytest.mark.parametrize(
    "text, numbers",
    [
        (TASK, (8, 3, 8)),
        (
            GRADE + "None, 0\ndef questions(split, seed):\n    assert seed == 3\n    "
            "yield from ({'id': str(n), 'prompt': ''} for n in range(10**9))",
            (250, 3, 300),
        ),
    ],
)
def test_how_many_questions(write, text, numbers):
    """0 is all, or 250 of a generated task, which may go on for ever."""
    task = load_task(write(text))
    assert tuple(len(prompts(task, count=count)) for count in (0, 3, 300)) == numbers


class Chat:
    """A tokenizer whose template writes what it was given."""

    chat_template, all_special_tokens = "yes", ["<|end|>"]

    def get_chat_template(self):
        return self.chat_template

    def apply_chat_template(
        self, messages, tokenize, add_generation_prompt, chat_template, **arguments
    ):
        return json.dumps([messages, arguments])


def test_the_prompt_of_a_question():
    """Its own prompt, its messages, one of both by the kind of model, or a default one."""
    hi, marked = [{"role": "user", "content": "hi"}], "How many <|end|>?\nAnswer: 4"
    rows = [
        {"id": "a", "prompt": "exactly <|end|>"},
        {"id": "b", "question": marked},
        {"id": "c", "messages": hi, "prompt": "plain"},
        {"id": "d", "messages": hi},
    ]
    task = tasks.make_task(
        "t",
        SimpleNamespace(
            questions=lambda split: rows,
            grade=print,
            ASK="End with a number.",
            EXAMPLES="Question: 1 + 1?\nAnswer: 2",
        ),
    )
    exactly, *chats = prompts(task, Chat(), template_arguments='{"enable_thinking": false}')
    asked = "How many < |end|>?\nAnswer: 4\n\nEnd with a number."
    thinking = {"enable_thinking": False}
    assert exactly == "exactly <|end|>" and list(map(json.loads, chats)) == [
        [[{"role": "user", "content": asked}], thinking],
        [hi, thinking],
        [hi, thinking],
    ]
    for wrong in ("{", "[1]", '{"tokenize": true}'):
        with pytest.raises(Problem, match="--template-arguments"):
            prompts(task, Chat(), template_arguments=wrong)
    rows.pop()
    plain = "Question: 1 + 1?\nAnswer: 2\n\nQuestion: How many < |end|>? Answer: 4\nAnswer:"
    assert prompts(task, Chat(), plain_prompt=True)[1:] == [plain, "plain"]


def test_a_dated_template_gives_the_same_prompt_tomorrow():
    """The day after, a finished file was refused and a run that was broken off began anew."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y\") }} {{ messages[0]['content'] }}"
    )
    task = SimpleNamespace(
        name="t",
        questions=lambda split: [{"id": "a", "question": "hi"}],
        ASK="",
        EXAMPLES="",
        STOP=[],
    )
    assert prompts(task, tokenizer) == ["26 Jul 2024 2024 hi"]


def test_special_tokens_are_collected_once():
    """For each prompt anew it took 41 ms with a large tokenizer: minutes before the first
    completion."""

    class Tokenizer:
        all_special_tokens, asked = ["<|a|>"], 0

        @property
        def added_tokens_decoder(self):
            self.asked += 1
            return {i: f"<|mark{i}|>" for i in range(6000)}

    tokenizer, start = Tokenizer(), time.time()
    for _ in range(100):
        assert tasks.without_marks("x <|mark7|> <|a|>", tokenizer) == "x < |mark7|> < |a|>"
    assert tokenizer.asked == 1 and time.time() - start < 3
