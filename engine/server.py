"""Completions from a server with OpenAI's completions API: vLLM, SGLang, `transformers serve`.

Many requests run at once, failed ones are repeated, and nothing that a server sends is trusted in
size or kind.
"""

import dataclasses
import functools
import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

from engine.rollouts import short_hash
from engine.tokens import end_token_of, stop_position, until_stop
from engine.common import Problem

LARGEST = 64 * 2**20  # bytes; a longer answer is not read to its end
# No connection, no answer, no JSON, no choices: what may pass.
PASSING = (OSError, http.client.HTTPException, ValueError, RecursionError)


class Refused(Problem):
    """An answer that asking again would not change."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def complete(tokenizer, questions, settings, first, kept, todo, bar):
    """Yields (question number, its new completions), each question of todo when it is finished.

    first: how many completions of each question there are already; kept: in a file.
    """
    if not todo:
        return
    url, ended = address(settings), threading.Event()
    ask = functools.partial(patiently, url, ended)
    prompt_for, fields, at_once = agree(ask, settings, questions[todo[0]], tokenizer)
    prompts = {number: prompt_for(questions[number], tokenizer) for number in todo}

    def choices_of(number):
        """Never more than asked for, and the missing ones again when a server gives fewer."""
        question, choices, size = questions[number], [], settings.samples - first
        body = request(settings, prompts[number]) | fields
        if question["stop"]:
            body["stop"] = question["stop"]
        while len(choices) < size:
            name = f"{settings.seed}\0{question['id']}\0{question['prompt']}"
            body["seed"] = short_hash(f"{name}\0{first + len(choices)}") % 2**31
            body["n"] = min(at_once, size - len(choices))
            choices += ask(settings, body)["choices"]
        return choices[:size]

    finished = side_by_side(choices_of, todo, settings.requests, ended)
    for done, (number, choices) in enumerate(finished):
        question = questions[number]
        if isinstance(choices, Problem):
            so_far = (f"; {done} of {len(todo)} questions are finished and kept, "
                      "rerun the same command for the rest") if kept else ""
            raise Problem(f"question {question['id']!r}: {choices}{so_far}")
        bar.update(len(choices))
        longest = settings.max_new_tokens
        yield number, [to_row(choice, question, tokenizer, longest) for choice in choices]


def side_by_side(do, items, threads, ended):
    """Yields (item, do(item)), or (item, the Problem), in the order in which they are finished."""
    waiting, finished = queue.SimpleQueue(), queue.SimpleQueue()

    def work():
        while not ended.is_set() and (item := waiting.get()) is not None:
            try:
                finished.put((item, do(item)))
            except Exception as error:
                finished.put((item, error))
                return  # whoever reads it ends the run: nothing more is asked

    for item in [*items, *[None] * threads]:
        waiting.put(item)
    for _ in range(threads):
        # A daemon thread, so that Ctrl-C does not wait for the server.
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            item, result = finished.get()
            if isinstance(result, Exception) and not isinstance(result, Problem):
                raise result
            yield item, result
    finally:
        ended.set()


def address(settings):
    """The URL of completions; settings that cannot work are refused before anything is sent."""
    try:
        parts = urllib.parse.urlsplit(settings.server)
        fine = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
        parts.port  # reading it raises ValueError when it is no port
    except ValueError:
        fine = False
    if not fine:
        raise Problem("--server needs an address such as http://localhost:8000/v1 "
                      "(a key goes in OPENAI_API_KEY)")
    if settings.requests < 1 or not settings.timeout > 0:
        raise Problem("--requests must be 1 or more, and --timeout above 0")
    return settings.server.rstrip("/").removesuffix("/completions") + "/completions"


def request(settings, prompt):
    return dict(model=settings.model, prompt=prompt, max_tokens=settings.max_new_tokens,
                temperature=settings.temperature, top_p=settings.top_p)


# ---- what the server understands ----


def agree(ask, settings, question, tokenizer):
    """(prompt_for, further fields, completions in a request), found by asking for a few tokens.

    Servers refuse fields that they do not know, so the fullest request comes first. vLLM and SGLang
    take the prompt as tokens and give the completion's tokens; unless told otherwise they apply the
    top-k and the penalties of the model's generation_config.json. `transformers serve` takes only
    text, and is greedy at any temperature unless generation_config says do_sample.
    """
    neutral = {"min_p": 0.0, "repetition_penalty": 1.0}
    config = json.dumps({"do_sample": settings.temperature > 0, "top_k": settings.top_k, **neutral})
    dialects = [(as_ids, {"top_k": settings.top_k or -1, **neutral, "return_token_ids": True}),
                (as_text, {"generation_config": config})]
    if not settings.top_k:
        dialects += [(as_ids, {}), (as_text, {})]
    probe = dataclasses.replace(
        settings, max_new_tokens=min(16, settings.max_new_tokens),
        temperature=2.0 if settings.temperature else 0.0, patience=min(5, settings.patience))
    for prompt_for, fields in dialects:
        body = request(probe, prompt_for(question, tokenizer)) | fields
        try:
            answer = ask(probe, {**body, "seed": 1, "n": min(4, settings.samples)})
            break
        except Refused as refusal:
            if refusal.status not in (400, 422) or (prompt_for, fields) == dialects[-1]:
                raise
    length = len(question["prompt_ids"])
    match answer:
        case {"usage": {"prompt_tokens": int(counted)}} if prompt_for is as_text:
            if counted != length:
                raise Problem(f"{settings.server} reads {counted} tokens in a prompt that has "
                              f"{length} by the tokenizer of "
                              f"{settings.tokenizer or settings.model!r}: name the served model's "
                              "own with --tokenizer")
    different = len({choice["text"] for choice in answer["choices"]}) > 1
    # Some servers write n times the same for one seed: they are asked for one at a time.
    return prompt_for, fields, settings.samples if different else 1


def as_ids(question, tokenizer):
    return question["prompt_ids"]


def as_text(question, tokenizer):
    """The text that a server turns into these tokens: it adds the start token itself."""
    text = question["prompt"]
    for shorter in (text, text.removeprefix(tokenizer.bos_token or "")):
        if tokenizer(shorter).input_ids == question["prompt_ids"]:
            return shorter
    raise Problem("the server takes prompts as text only, and would read other tokens than ours in "
                  f"{text[:60]!r}: use a server that takes tokens, such as vLLM or SGLang")


def to_row(choice, question, tokenizer, longest):
    """The rollout's own fields, with tokens when the server gives all, the end token included.

    Of a text alone that ends at a stop string the server does not tell that no end token was
    sampled: the trainer then teaches one there, by the rule for rows of text.
    """
    ids, finish = choice.get("token_ids"), choice["finish_reason"]
    prompt, stop = {"prompt_ids": question["prompt_ids"]}, question["stop"]
    text = choice["text"].encode("utf-8", "replace").decode()
    if isinstance(ids, list) and 0 < len(ids) <= longest and all(
            type(token) is int and 0 <= token < len(tokenizer) for token in ids):
        last = tokenizer.decode(ids[-1:], skip_special_tokens=True)
        row = until_stop(ids, finish == "stop" and not last, stop, tokenizer)
        if row["finish"] == finish:
            return {**prompt, **row}
    cut = text[: stop_position(text, stop)]
    row = {"completion": cut, "finish": "stop" if cut != text else finish}
    if not cut:  # nothing but the end token was written; no text could say that
        return {**row, **prompt, "completion_ids": [end_token_of(None, tokenizer)]}
    return row


# ---- asking ----


def patiently(url, ended, settings, body):
    """The answer; PASSING errors are retried until `patience` seconds after the first one."""
    first, tries = None, 0
    while True:
        try:
            return post(url, body, settings.timeout)
        except PASSING as error:
            now, tries = time.monotonic(), tries + 1
            first = first or now
            if now - first >= settings.patience or ended.is_set():
                reason = plain(getattr(error, "reason", None) or error)
                raise Problem(f"{url} does not answer: {reason} (tried {tries} times in "
                              f"{now - first:.0f} s): is the server up, and --server right?")
        pause = min(30, 0.25 * 2 ** min(tries, 10)) * random.uniform(0.5, 1.5)  # seconds
        ended.wait(min(first + settings.patience - now, pause))


def post(url, body, timeout):
    """The answer's JSON, with at least one whole choice in it."""
    headers = {"Content-Type": "application/json"}
    question = urllib.request.Request(url, json.dumps(body).encode(), headers)
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        question.add_unredirected_header("Authorization", f"Bearer {key}")
    deadline = time.monotonic() + timeout
    try:
        with urllib.request.urlopen(question, timeout=timeout) as response:
            answer = json.loads(read(response, deadline))
    except urllib.error.HTTPError as error:
        with error:
            words = plain(read(error, deadline).decode("utf-8", "replace"))
        message = f"HTTP {error.code}: {words}"
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            raise OSError(message)
        advice = {401: ": the key goes in OPENAI_API_KEY",
                  404: ": does --server end in /v1, does the server know --model?"}
        raise Refused(f"{url} refuses: {message}{advice.get(error.code, '')}", error.code)
    match answer:
        case {"choices": [_, *_] as choices} if all(map(is_whole, choices)):
            return answer
    raise ValueError("an answer without choices that have text and finish_reason stop or length")


def is_whole(choice):
    match choice:
        case {"text": str(), "finish_reason": "stop" | "length"}:
            return True
    return False


def read(response, deadline):
    """The whole body before the deadline: the timeout of a connection is for each piece alone."""
    body = bytearray()
    while piece := response.read1(2**16):
        body += piece
        if len(body) > LARGEST:
            raise ValueError(f"an answer of more than {LARGEST:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer does not end")
    return bytes(body)


def plain(words):
    """One short line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(words)[:2000]).split())[:300]
