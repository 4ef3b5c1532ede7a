"""A task: its questions, its grader, and the prompt of each question, made in this one place.

    questions(split) -> dicts with "id" and one of "question", "messages", "prompt"
    grade(question, completion) -> (the answer or None, the reward)

A task that generates its questions takes questions(split, seed). `question` in grade is the dict
with the fields of its completion added ("finish" is "length" where it was cut off). Optional names:
STOP (strings that end a completion), same_answer(a, b) (which answers vote together), ASK (an
instruction below the question in a chat), EXAMPLES (solved questions above it in a plain prompt),
measure(rows) -> {name: [a value from 0 to 1 for each question]} (to report in place of pass@k).
"""

import contextlib
import datetime
import functools
import inspect
import itertools
import json
import math
import numbers
import operator
import os
import re
import runpy
import traceback
import types

from engine.common import Problem, first_line

OPTIONAL = {"STOP": [], "same_answer": operator.eq, "ASK": "", "EXAMPLES": "", "measure": None}
DATED = re.compile(r"""strftime_now\((['"])(.*?)\1\)""")  # in a chat template


def make_task(name, source):
    """The parts of a task from a module, or from any object that has them."""
    for function in ("questions", "grade"):
        if not callable(getattr(source, function, None)):
            raise Problem(f"{name}: has no function {function}; a task needs questions and grade")
    optional = {key: getattr(source, key, default) for key, default in OPTIONAL.items()}
    if isinstance(optional["STOP"], str):
        optional["STOP"] = [optional["STOP"]]
    stop = optional["STOP"]
    if not isinstance(stop, list | tuple) or not all(isinstance(mark, str) for mark in stop):
        raise Problem(f"{name}: STOP is {stop!r}, not a list of strings")
    grade = functools.partial(grade_checked, name, source.grade)
    return types.SimpleNamespace(name=name, questions=source.questions, grade=grade, **optional)


def import_file(path):
    with one_line(f"{path}: cannot be imported"):
        return types.SimpleNamespace(**runpy.run_path(path))


@contextlib.contextmanager
def one_line(what):
    """An error in the code of a task becomes one line."""
    try:
        yield
    except Problem:
        raise
    except (Exception, SystemExit) as error:
        *_, place = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if not frame.filename.startswith("<")
        ]  # not Python's own importer
        raise Problem(
            f"{what}: {type(error).__name__}: {first_line(error)} "
            f"({os.path.basename(place.filename)}, line {place.lineno})"
        )


def grade_checked(name, grade, question, completion):
    what = f"{name}: grade of question {question['id']!r}"
    with one_line(what):
        graded = grade(question, completion)
    match graded:
        case (None | str(), numbers.Real()) if math.isfinite(graded[1]):
            return graded[0], float(graded[1])
    raise Problem(f"{what} returned {graded!r:.60}, not (a string or None, a finite number)")


def list_questions(task, split, count, seed):
    """{id: row} of the first `count` questions (0: all, or 250 of a generated task)."""
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
                questions[own_id] = row
            case _:
                raise Problem(
                    f'{task.name}: question {number} of split {split!r} needs an "id", '
                    f"a string that no other question has: {row!r:.60}"
                )
        if not isinstance(row.get("gold", ""), str | None):
            raise Problem(f'{task.name}: question {own_id!r}: "gold" is not a string')
    return questions


def load_questions(task, split, count, tokenizer, settings):
    """The same as a list, each with its prompt, split and stop."""
    questions = []
    for own_id, row in list_questions(task, split, count, settings.seed).items():
        what = f"{task.name}: question {own_id!r}"
        with one_line(what):
            prompt = make_prompt(task, row, tokenizer, settings)
        if not isinstance(prompt, str):
            raise Problem(
                f'{what} needs a "question" or "prompt", a string, or "messages" and a '
                "model with a chat template"
            )
        questions.append({"stop": task.STOP, **row, "prompt": prompt, "split": split})
    return questions


def make_prompt(task, row, tokenizer, settings):
    """A row's "prompt" as it is; or its "messages", or else its "question", in the chat template.

    A row with both prompt and messages has a form for either kind of model: the messages for one
    with a chat template, the prompt for one without.
    """
    match row:
        case {"messages": messages} if messages is not None:
            plain = row.get("prompt")
        case {"prompt": prompt} if prompt is not None:
            return prompt
        case {"question": str(question)}:
            messages = f"{question}\n\n{task.ASK}".rstrip()
            one_paragraph = re.sub(r"\s*\n\s*(?=(?:Question|Answer):)", " ", question)
            plain = f"{task.EXAMPLES}\n\nQuestion: {one_paragraph}\nAnswer:".lstrip()
        case _:
            return None
    if settings.plain_prompt or not getattr(tokenizer, "chat_template", None):
        return plain and without_marks(plain, tokenizer)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": without_marks(messages, tokenizer)}]
    with one_line("--template-arguments needs a JSON object, or does not suit the chat template"):
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            chat_template=DATED.sub(same_date, tokenizer.get_chat_template()),
            **json.loads(settings.template_arguments),
        )


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


@functools.lru_cache(maxsize=1)
def marks_of(tokenizer):
    """Its special tokens, the longest first; collected once, because there may be thousands."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    marks = {str(token) for token in [*added, *getattr(tokenizer, "all_special_tokens", [])]}
    marks = [m for m in marks if len(m) > 1 and not m.isspace() and not m.isalnum()]
    return sorted(marks, key=len, reverse=True)
