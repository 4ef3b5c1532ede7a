"""A task: its questions, its grader, and the prompt of each question, made in this one place.

    questions(split) -> dicts with "id" and one of "question", "messages", "prompt"
    grade(question, completion) -> (the answer or None, the reward)

A task that generates its questions takes questions(split, seed). Optional names: STOP (strings that
end a completion), same_answer(a, b) (which answers vote together), ASK (an instruction below the
question in a chat), EXAMPLES (solved questions above it in a plain prompt).
"""

import contextlib
import datetime
import functools
import importlib.util
import inspect
import itertools
import json
import math
import numbers
import operator
import re
import sys
import types

from engine.common import Problem, first_line

OURS = ("apples", "gsm8k", "math", "svamp")
OPTIONAL = {"STOP": [], "same_answer": operator.eq, "ASK": "", "EXAMPLES": ""}


def load_task(name, **grade_options):
    """One of ours by its name, or the user's own by the path of its .py file."""
    if name == "apples":
        from data import apples as task
    elif name in OURS:
        from data import maths

        task = maths.task(name)
    elif name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(f"task {name}", name)
        task = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        with one_line(f"{name}: cannot be imported"):
            spec.loader.exec_module(task)
    else:
        raise Problem(f"--task {name}: it is none of {', '.join(OURS)} and no path of a .py file")
    for function in ("questions", "grade"):
        if not callable(getattr(task, function, None)):
            raise Problem(f"{name}: has no function {function}; a task needs questions and grade")
    optional = {key: getattr(task, key, default) for key, default in OPTIONAL.items()}
    grade = functools.partial(grade_checked, name, functools.partial(task.grade, **grade_options))
    return types.SimpleNamespace(name=name, questions=task.questions, grade=grade, **optional)


@contextlib.contextmanager
def one_line(what):
    """An error in the code of a task becomes one line."""
    try:
        yield
    except Problem:
        raise
    except (Exception, SystemExit) as error:
        raise Problem(f"{what}: {type(error).__name__}: {first_line(error)}")


def grade_checked(name, grade, question, completion):
    what = f"{name}: grade of question {question['id']!r}"
    with one_line(what):
        graded = grade(question, completion)
    match graded:
        case (None | str(), numbers.Real()) if math.isfinite(graded[1]):
            return graded[0], float(graded[1])
    raise Problem(f"{what} returned {graded!r:.60}, not (a string or None, a finite number)")


def load_questions(task, split, count, seed, tokenizer, settings):
    """The first `count` (0: all, or 250 of a generated task), each with prompt, split and stop."""
    generated = len(inspect.signature(task.questions).parameters) > 1
    with one_line(f"{task.name}: questions of split {split!r}"):
        rows = task.questions(split, seed) if generated else task.questions(split)
        rows = list(itertools.islice(rows, count or (250 if generated else None)))
    if not rows:
        raise Problem(f"{task.name}: there are no questions in split {split!r}")
    questions = {}
    for number, row in enumerate(rows, 1):
        match row:
            case {"id": str(own_id)} if own_id not in questions:
                what = f"{task.name}: question {own_id!r}"
            case _:
                raise Problem(f'{task.name}: question {number} of split {split!r} needs an "id", '
                              f"a string that no other question has: {row!r:.60}")
        with one_line(what):
            prompt = make_prompt(task, row, tokenizer, settings)
        if not isinstance(prompt, str):
            raise Problem(f'{what} needs a "question" or "prompt", a string, or "messages" and a '
                          "model with a chat template")
        questions[own_id] = {"stop": task.STOP, **row, "prompt": prompt, "split": split}
    return list(questions.values())


def make_prompt(task, row, tokenizer, settings):
    if "prompt" in row:
        return row["prompt"]
    if "messages" in row:
        return render_prompt(row["messages"], None, tokenizer, settings)
    question = without_marks(row["question"], tokenizer)
    one_paragraph = re.sub(r"\s*\n\s*(?=(?:Question|Answer):)", " ", question)
    plain = f"{task.EXAMPLES}\n\nQuestion: {one_paragraph}\nAnswer:".lstrip()
    return render_prompt(f"{question}\n\n{task.ASK}".rstrip(), plain, tokenizer, settings)


def render_prompt(message, plain, tokenizer, settings):
    """A message, or a list of them, in the chat template; `plain` when there is no template.

    A chat prompt already holds its begin token, so it is tokenized with add_special_tokens=False.
    """
    if settings.plain_prompt or not getattr(tokenizer, "chat_template", None):
        return f"{settings.system}\n\n{plain}" if plain and settings.system else plain
    messages = [{"role": "user", "content": message}] if isinstance(message, str) else message
    if settings.system:
        messages = [{"role": "system", "content": settings.system}, *messages]
    dated = re.compile(r"""strftime_now\((['"])(.*?)\1\)""")
    with one_line("--template-arguments needs a JSON object, or does not suit the chat template"):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True,
            chat_template=dated.sub(same_date, tokenizer.get_chat_template()),
            **json.loads(settings.template_arguments))


def same_date(match):
    """Instead of today's date in a template: a prompt must not change overnight."""
    return repr(datetime.date(2024, 7, 26).strftime(match[2]))


def without_marks(text, tokenizer):
    """A question cannot end its own turn: special tokens in it get a space, <|eot|> is < |eot|>.

    A template whose marks are ordinary text, such as [INST] in some, cannot be protected so.
    """
    for mark in marks_of(tokenizer):
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


latest_marks = {}  # {id of the tokenizer: (it, so that the id stays its own; its marks)}


def marks_of(tokenizer):
    """Its special tokens, the longest first; collected once, because there may be thousands."""
    if id(tokenizer) not in latest_marks:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        marks = {str(token) for token in [*added, *getattr(tokenizer, "all_special_tokens", [])]}
        marks = [m for m in marks if len(m) > 1 and not m.isspace() and not m.isalnum()]
        latest_marks.clear()
        latest_marks[id(tokenizer)] = tokenizer, sorted(marks, key=len, reverse=True)
    return latest_marks[id(tokenizer)][1]
