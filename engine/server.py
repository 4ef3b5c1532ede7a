"""Completions from a server with OpenAI's completions API, such as vLLM or llama.cpp's server.

It is asked for text and for what ended it, and nothing that it sends is trusted in size or kind.
"""

import collections
import contextlib
import functools
import http.client
import itertools
import json
import os
import random
import time
import urllib.parse
from multiprocessing.pool import ThreadPool

from engine.common import Problem
from engine.rollouts import short_hash
from engine.tokens import end_token_of, stop_position

REQUESTS = 16  # at the same time
TIMEOUT = 600  # seconds without a byte of an answer
PAUSES = (0.5, 1, 2, 4, 8, 16, None)  # seconds after each failure; after the last it is over
LARGEST = 64 * 2**20  # bytes; a longer answer is not read to its end
# No connection, no answer, no JSON, no choices: what may pass.
PASSING = (OSError, http.client.HTTPException, ValueError, RecursionError)


def complete(tokenizer, questions, todo, settings, bar):
    """Yields (question number, the fields of its completions), each question when it is done."""
    parts, finished = address(settings.server), collections.defaultdict(dict)
    ask = functools.partial(ask_for, parts, settings, tokenizer, questions)
    # Not an executor, whose threads would hold up Ctrl-C until the server answers.
    with ThreadPool(REQUESTS) as pool:
        jobs = itertools.product(todo, range(settings.samples))
        for number, copy, row in pool.imap_unordered(ask, jobs):
            finished[number][copy] = row
            bar.update()
            if len(finished[number]) == settings.samples:
                yield number, [row for _, row in sorted(finished.pop(number).items())]


def address(url):
    """The parts of the URL of completions; one that cannot work is refused at once."""
    try:
        parts = urllib.parse.urlsplit(url.rstrip("/").removesuffix("/completions") + "/completions")
        fine = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
        parts.port  # reading it raises ValueError when it is no port
    except ValueError:
        fine = False
    if not fine:
        raise Problem("--server needs an address such as http://localhost:8000/v1 "
                      "(a key goes in OPENAI_API_KEY)")
    return parts


def ask_for(parts, settings, tokenizer, questions, job):
    """(question number, copy, the fields of that completion); each has a seed of its own."""
    number, copy = job
    question = questions[number]
    name = f"{settings.seed}\0{question['id']}\0{question['prompt']}\0{copy}"
    body = {"model": settings.model, "prompt": as_text(question, tokenizer),
            "max_tokens": settings.max_new_tokens, "temperature": settings.temperature,
            "top_p": settings.top_p, "seed": short_hash(name) % 2**31}
    if settings.top_k:
        body["top_k"] = settings.top_k
    if question["stop"]:
        body["stop"] = question["stop"]
    try:
        choice = patiently(parts, body)
    except Problem as problem:
        raise Problem(f"question {question['id']!r}: {problem}. What is finished is kept in the "
                      "files of --out: rerun the same command for the rest")
    return number, copy, to_row(choice, question, tokenizer)


def as_text(question, tokenizer):
    """The prompt without a start token of its own, when the server adds one itself."""
    text = question["prompt"]
    if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(tokenizer.bos_token)
    return text


def to_row(choice, question, tokenizer):
    """The rollout's own fields. Where a text ends at a stop string no end token was sampled, which
    the text does not say: the trainer then teaches one there, by the rule for rows of text."""
    text = choice["text"].encode("utf-8", "replace").decode()
    cut = text[: stop_position(text, question["stop"])]
    row = {"completion": cut, "finish": "stop" if cut != text else choice["finish_reason"]}
    if not cut:  # nothing but the end token was written; no text could say that
        row |= {"prompt_ids": question["prompt_ids"],
                "completion_ids": [end_token_of(None, tokenizer)]}
    return row


def patiently(parts, body):
    """The answer; PASSING errors are retried, refusals are not."""
    for pause in PAUSES:
        try:
            return post(parts, body)
        except PASSING as error:
            if pause is None:
                raise Problem(f"{parts.geturl()} does not answer: {plain(error)}: is the server "
                              "up, and --server right?")
        time.sleep(pause * random.uniform(0.5, 1.5))


def post(parts, body):
    """The first choice of the answer. Redirects are not followed, so the key stays with its host."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        headers["Authorization"] = f"Bearer {key}"
    is_safe = parts.scheme == "https"
    connect = http.client.HTTPSConnection if is_safe else http.client.HTTPConnection
    with contextlib.closing(connect(parts.netloc, timeout=TIMEOUT)) as connection:
        connection.request("POST", parts.path, json.dumps(body), headers)
        response = connection.getresponse()
        content = response.read(LARGEST)
    message = f"HTTP {response.status}: {plain(content.decode('utf-8', 'replace'))}"
    if response.status in (408, 409, 425, 429) or response.status >= 500:
        raise OSError(message)
    if response.status != 200:
        advice = {401: ": the key goes in OPENAI_API_KEY",
                  404: ": does --server end in /v1, does the server know --model?"}
        raise Problem(f"{parts.geturl()} refuses: {message}{advice.get(response.status, '')}")
    match json.loads(content):
        case {"choices": [{"text": str(), "finish_reason": "stop" | "length"} as choice, *_]}:
            return choice
    raise ValueError("an answer without text and finish_reason stop or length")


def plain(words):
    """One short line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(words)[:2000]).split())[:300]
