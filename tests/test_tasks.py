"""A task of the user's own, and how every question gets its prompt."""

import json
import time
import types

import pytest

import eval as evaluation
from conftest import ROOT, in_process
from data import load_task
from engine import tasks, tokens
from engine.rollouts import read_rollouts
from engine.common import Problem

SQUARES = """
def questions(split):
    for n in range(2, 7):
        yield {"id": f"{split}-{n}", "prompt": f"Tom has {n} apples .", "gold": str(n * n)}

def grade(question, completion):
    answer = completion.split()[-1] if completion.split() else None
    return answer, 1.0 if answer == question["gold"] else -1.0

STOP = [" 7"]
"""


class Chat:
    """A tokenizer whose template writes what it was given."""

    chat_template, all_special_tokens = "yes", ["<|end|>"]

    def get_chat_template(self):
        return self.chat_template

    def apply_chat_template(
        self, messages, chat_template, tokenize, add_generation_prompt, **arguments
    ):
        return json.dumps([messages, arguments])


class Plain(Chat):
    chat_template = None


PLAIN = Plain()


def own_task(tmp_path, text):
    path = tmp_path / "my_task.py"
    path.write_text(text)
    return str(path)


def prompts(task, tokenizer, count=0, **changes):
    settings = evaluation.Settings(**changes)
    return [
        question["prompt"]
        for question in tasks.load_questions(task, "test", count, 0, tokenizer, settings)
    ]


@pytest.mark.slow
def test_a_task_of_ones_own_is_sampled_and_measured(tiny, tmp_path):
    """--task took our names only."""
    path = own_task(tmp_path, SQUARES)
    command = [
        ROOT / "eval.py",
        "--model",
        tiny,
        "--task",
        path,
        "--samples",
        2,
        "--max-new-tokens",
        20,
    ]
    result = in_process(*command, "--out", tmp_path / "r.jsonl")
    assert result.returncode == 0 and "pass@2" in result.stdout, result.stdout
    rows = read_rollouts(tmp_path / "r.jsonl")
    assert len(rows) == 10 and rows[0]["id"] == "test-2" and rows[0]["split"] == "test"
    assert not any(" 7" in row["completion"] for row in rows)
    result = in_process(ROOT / "eval.py", "--grade", tmp_path / "r.jsonl", "--task", path)
    assert result.returncode == 0 and "pass@1" in result.stdout, result.stdout


@pytest.mark.parametrize(
    "text, said",
    [
        ("x = 1", "no function questions"),
        ("def questions(split): return []", "no function grade"),
        ("def (", "cannot be imported: SyntaxError"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit"),
        ("def grade(q, c): pass\ndef questions(split): return []", "no questions in split 'test'"),
        (
            "def grade(q, c): pass\ndef questions(split): return 5",
            "questions of split 'test': TypeError",
        ),
        ("def grade(q, c): pass\ndef questions(split): yield {}; 1 / 0", "ZeroDivisionError"),
        (
            "def grade(q, c): pass\ndef questions(split): return ['a']",
            "question 1 of split 'test' needs an \"id\"",
        ),
        (
            "def grade(q, c): pass\ndef questions(split): return [{'id': 3, 'prompt': ''}]",
            'needs an "id"',
        ),
        (
            "def grade(q, c): pass\ndef questions(split): return [{'id': 'a', 'prompt': 'x'}] * 2",
            "question 2 of",
        ),
        ("def grade(q, c): pass\ndef questions(split): return [{'id': 'a'}]", "question 'a'"),
        (
            "def grade(q, c): pass\ndef questions(split): return [{'id': 'a', 'question': 7}]",
            "question 'a'",
        ),
        (
            "def grade(q, c): pass\ndef questions(split): return [{'id': 'a', 'prompt': 7}]",
            "question 'a' needs a",
        ),
        (
            "def grade(q, c): pass\ndef questions(split): return [{'id': 'a', 'messages': []}]",
            "a chat template",
        ),
    ],
)
def test_a_broken_task_is_one_line(tmp_path, text, said):
    path = own_task(tmp_path, text)
    with pytest.raises(Problem) as problem:
        prompts(load_task(path), PLAIN)
    assert (
        path in str(problem.value) and said in str(problem.value) and "\n" not in str(problem.value)
    )


@pytest.mark.parametrize(
    "returned",
    [
        "1 / 0",
        "None",
        "1.0",
        "(5, 1.0)",
        "('5', None)",
        "('5', float('nan'))",
        "('5', 'x')",
        "('a', 1, 2)",
    ],
)
def test_a_grade_that_is_none_is_one_line(tmp_path, returned):
    path = own_task(
        tmp_path,
        f"def questions(split): return []\ndef grade(question, completion): return {returned}",
    )
    with pytest.raises(Problem, match=f"{path}: grade of question 'q7'"):
        load_task(path).grade({"id": "q7"}, "text")
    fine = own_task(
        tmp_path, "def questions(split): return []\ndef grade(question, completion): return None, 0"
    )
    assert load_task(fine).grade({"id": "q7"}, "text") == (None, 0.0)


def test_another_marker():
    """eval.py --answer-marker."""
    question = {"id": "a", "gold": "5"}
    assert load_task("gsm8k", marker="A:").grade(question, "A: 5") == ("5", 1.0)
    assert load_task("gsm8k").grade(question, "A: 5") == (None, -1.0)


def test_unknown_names_are_one_line(tmp_path):
    with pytest.raises(Problem, match="--task gsm9k.*apples, gsm8k"):
        load_task("gsm9k")
    with pytest.raises(Problem, match="missing.py: cannot be imported"):
        load_task(str(tmp_path / "missing.py"))


def test_how_many_questions(tmp_path):
    """0 is all, or 250 of a generated task, which may go on for ever."""
    listed = load_task(own_task(tmp_path, SQUARES))
    endless = types.SimpleNamespace(
        **{
            **vars(listed),
            "questions": lambda split, seed: (
                {"id": f"{n}", "prompt": f"{seed} {n}"} for n in iter(int, None) or range(10**9)
            ),
        }
    )
    endless.questions = lambda split, seed: (
        {"id": str(n), "prompt": str(seed)} for n in range(10**9)
    )
    assert [len(prompts(listed, PLAIN, count)) for count in (0, 3, 99)] == [5, 3, 5]
    assert [len(prompts(endless, PLAIN, count)) for count in (0, 3, 300)] == [250, 3, 300]


def test_the_prompt_of_a_question():
    """Its own prompt, its messages, or a default one; in the chat template when there is one."""
    rows = [
        {"id": "a", "prompt": "exactly"},
        {"id": "b", "question": "How many <|end|>?\nAnswer: 4"},
        {"id": "c", "messages": [{"role": "user", "content": "hi"}]},
    ]
    task = types.SimpleNamespace(
        name="t",
        questions=lambda split: rows,
        STOP=[],
        ASK="End with a number.",
        EXAMPLES="Question: 1 + 1?\nAnswer: 2",
    )
    found = prompts(task, Chat())
    assert found[0] == "exactly"
    assert json.loads(found[1])[0] == [
        {"role": "user", "content": "How many < |end|>?\nAnswer: 4\n\nEnd with a number."}
    ]
    assert json.loads(found[2])[0] == rows[2]["messages"]
    rows.pop()
    plain = "Question: 1 + 1?\nAnswer: 2\n\nQuestion: How many < |end|>? Answer: 4\nAnswer:"
    assert prompts(task, PLAIN)[1] == plain == prompts(task, Chat(), plain_prompt=True)[1]
    assert prompts(task, PLAIN, system="Be brief.")[1] == "Be brief.\n\n" + plain
    task.ASK = task.EXAMPLES = ""
    assert prompts(task, PLAIN)[1].startswith("Question: How many")


def test_template_options():
    """There was no way to a system message, to enable_thinking, or past a template."""
    settings = evaluation.Settings(
        system="Be brief.", template_arguments='{"enable_thinking": false}'
    )
    messages, arguments = json.loads(tasks.render_prompt("hi", "plain", Chat(), settings))
    assert messages[0] == {"role": "system", "content": "Be brief."} and arguments == {
        "enable_thinking": False
    }
    for wrong in ("{", "[1]", '{"tokenize": true}'):
        with pytest.raises(Problem, match="--template-arguments"):
            tasks.render_prompt(
                "hi", "plain", Chat(), evaluation.Settings(template_arguments=wrong)
            )


def test_a_dated_template_gives_the_same_prompt_tomorrow():
    """The day after, a finished file was refused and a run that was broken off began anew."""
    tokenizer = pytest.importorskip("transformers").PreTrainedTokenizerFast(
        tokenizer_object=empty_tokenizer()
    )
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y\") }} {{ messages[0]['content'] }}"
    )
    assert (
        tasks.render_prompt("hi", "plain", tokenizer, evaluation.Settings())
        == "26 Jul 2024 2024 hi"
    )


def empty_tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))


def test_special_tokens_are_collected_once():
    """For each prompt anew it took 41 ms with a large tokenizer: minutes before the first
    completion."""

    class Tokenizer:
        asked = 0
        all_special_tokens = ["<|a|>"]

        @property
        def added_tokens_decoder(self):
            self.asked += 1
            return {i: f"<|mark{i}|>" for i in range(6000)}

    tokenizer, start = Tokenizer(), time.time()
    for _ in range(100):
        assert tasks.without_marks("x <|mark7|> <|a|>", tokenizer) == "x < |mark7|> < |a|>"
    assert tokenizer.asked == 1 and time.time() - start < 3


def test_a_tokenizer_need_not_be_hashable():
    """Its special tokens were kept by the tokenizer itself: "unhashable type" with some."""
    first, second = (types.SimpleNamespace(all_special_tokens=[mark]) for mark in ("<a>", "<b>"))
    assert tasks.without_marks("<a> <b>", first) == "< a> <b>"
    assert tasks.without_marks("<a> <b>", second) == "<a> < b>"

    class Unhashable(types.SimpleNamespace):
        def __call__(self, text, **options):
            return types.SimpleNamespace(input_ids=[7, 8])

    assert tokens.prompt_tokens("text", Unhashable(bos_token_id=7)) == [7, 8]
