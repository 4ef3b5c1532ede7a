"""Completions from a server with OpenAI's completions API, such as vLLM or llama.cpp's server.

It is asked for text and for what ended it, and nothing that it sends is trusted in size or kind.
"""

import collections
import contextlib
import http.client
import json
import os
import random
import time
import urllib.parse
from multiprocessing.pool import ThreadPool

from engine.common import Problem, first_line
from engine.tokens import end_token_of, start_tokens, stop_position

REQUESTS = 16  # at the same time
TIMEOUT = 600  # seconds without a byte of an answer
PAUSES = (0.5, 1, 2, 4, 8, 16, None)  # seconds after each failure; after the last it is over
LARGEST = 64 * 2**20  # bytes; a longer answer is not read to its end
# No connection, no answer, no JSON, no choices: what may pass.
PASSING = (OSError, http.client.HTTPException, ValueError, RecursionError)


def complete(tokenizer, questions, todo, settings, bar):
    """Yields (question number, the fields of its completions), each question when it is done."""
    url, finished = address(settings.server), collections.defaultdict(dict)

    def ask(job):
        question = questions[job[0]]
        try:
            return job, patiently(url, request(question, job[1], tokenizer, settings))
        except Problem as problem:
            raise Problem(
                f"question {question['id']!r}: {problem} (what is finished is kept if "
                "--out is named: the same command asks for the rest)"
            )

    # Not an executor, whose threads would hold up Ctrl-C until the server answers.
    with ThreadPool(REQUESTS) as pool:
        jobs = [(number, copy) for number in todo for copy in range(settings.samples)]
        for (number, copy), choice in pool.imap_unordered(ask, jobs):
            finished[number][copy] = to_fields(choice, questions[number], tokenizer)
            bar.update()
            if len(finished[number]) == settings.samples:
                yield number, [fields for _, fields in sorted(finished.pop(number).items())]


def address(url):
    """The URL of completions in parts; one that cannot work is refused at once."""
    try:
        parts = urllib.parse.urlsplit(url.rstrip("/").removesuffix("/completions") + "/completions")
        fine = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
        parts.port  # reading it raises ValueError when it is no port
    except ValueError:
        fine = False
    if not fine:
        raise Problem(
            "--server needs an address such as http://localhost:8000/v1 "
            "(a key goes in OPENAI_API_KEY)"
        )
    return parts


def request(question, copy, tokenizer, settings):
    """One completion, with a seed of its own, by the plain softmax.

    Unless told otherwise llama.cpp cuts by top-k and min-p, and vLLM does what the model's
    generation_config.json says. A server puts the start token before the text itself.
    """
    prompt = question["prompt"]
    if start_tokens(tokenizer):
        prompt = prompt.removeprefix(tokenizer.bos_token)
    return {
        "model": settings.model,
        "prompt": prompt,
        "stop": question["stop"] or None,
        "seed": (question["key"] + copy) % 2**31,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


def to_fields(choice, question, tokenizer):
    """Where a text ends at a stop string no end token was sampled, which the server does not say:
    the trainer then teaches one there, by the rule for rows of text."""
    text = choice["text"].encode("utf-8", "replace").decode()
    cut = text[: stop_position(text, question["stop"])]
    if not cut:  # nothing but the end token was written; no text could say that
        return {
            "completion": "",
            "finish": "stop",
            "completion_ids": [end_token_of(None, tokenizer)],
        }
    return {"completion": cut, "finish": "stop" if cut != text else choice["finish_reason"]}


def patiently(url, body):
    """The answer; PASSING errors are retried, refusals are not."""
    for pause in PAUSES:
        try:
            return post(url, body)
        except PASSING as error:
            if pause is None:
                raise Problem(
                    f"{url.geturl()} does not answer: {first_line(error)}: is the server "
                    "up, and --server right?"
                )
        time.sleep(pause * random.uniform(0.5, 1.5))


def post(url, body):
    """The first choice of the answer. Redirects are not followed: the key stays with its host."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        headers["Authorization"] = f"Bearer {key}"
    is_safe = url.scheme == "https"
    connect = http.client.HTTPSConnection if is_safe else http.client.HTTPConnection
    with contextlib.closing(connect(url.netloc, timeout=TIMEOUT)) as connection:
        connection.request("POST", url.path, json.dumps(body), headers)
        response = connection.getresponse()
        content = response.read(LARGEST)
    words = content.decode("utf-8", "replace").replace(key or "\n", " ")  # it may echo the key
    message = f"HTTP {response.status}: {' '.join(words[:300].split())}"
    if response.status in (408, 409, 425, 429) or response.status >= 500:
        raise OSError(message)
    if response.status >= 300:
        raise Problem(
            f"{url.geturl()} refuses: {message} (a key goes in OPENAI_API_KEY, --server "
            "ends in /v1, and --model is the name that the server knows)"
        )
    match json.loads(content):
        case {"choices": [{"text": str(), "finish_reason": "stop" | "length"} as choice, *_]}:
            return choice
    raise ValueError("an answer without text and finish_reason stop or length")
