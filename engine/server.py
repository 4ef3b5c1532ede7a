"""Completions from a server with OpenAI's completions API: vLLM, SGLang, `transformers serve`.

Many requests run at once, failed ones are repeated, and nothing that a server sends is trusted in
size or kind.
"""

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

from data.rollouts import short_hash
from data.tokens import end_token_of, stop_position, until_stop
from engine.common import Problem

LARGEST = 64 * 2**20  # bytes; a longer answer is not read to its end
# No connection, no answer, no JSON, no choices: what may pass.
PASSING = (OSError, http.client.HTTPException, ValueError, RecursionError)


class Refused(Problem):
    """An answer that asking again would not change."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def writer(settings, questions, prompts, tokenizer, first, kept):
    """write(todo, bar) for collect: (question number, completions), each question when finished.

    first: how many completions of each question there are already.
    """
    url = address(settings)

    def write(todo, bar):
        if not todo:
            return
        ended = threading.Event()

        def ask(body, patience=settings.patience):
            return patiently(url, body, settings.timeout, patience, ended)

        example = todo[0]
        prompt_for, fields, at_once = agree(
            ask, settings, questions[example]["prompt"], prompts[example], tokenizer)
        bodies = {}
        for q in todo:
            stop = {"stop": questions[q]["stop"]} if questions[q].get("stop") else {}
            prompt = prompt_for(questions[q]["prompt"], prompts[q])
            bodies[q] = {**request(settings, prompt), **stop, **fields}

        def complete(q):
            """Never more than asked for, and the missing ones again when a server gives fewer."""
            name, number = f"{settings.seed}\0{questions[q]['id']}\0{questions[q]['prompt']}", first
            choices = []
            while number < settings.samples:
                body = {**bodies[q], "n": min(at_once, settings.samples - number),
                        "seed": short_hash(f"{name}\0{number}") % 2**31}
                choices += ask(body)["choices"][: settings.samples - number]
                number = first + len(choices)
            return choices

        finished = side_by_side(complete, todo, settings.requests, ended)
        for done, (q, choices) in enumerate(finished):
            if isinstance(choices, Problem):
                so_far = (f"; {done} of {len(todo)} questions are finished and kept, "
                          "rerun the same command for the rest") if kept else ""
                raise Problem(f"question {questions[q]['id']!r}: {choices}{so_far}")
            stop = questions[q].get("stop") or []
            bar.update(len(choices))
            yield q, [to_row(choice, prompts[q], stop, tokenizer, settings.max_new_tokens)
                      for choice in choices]

    return write


def side_by_side(do, items, threads, stop):
    """Yields (item, do(item)), or (item, the Problem), in the order in which they are finished."""
    waiting, finished = queue.SimpleQueue(), queue.SimpleQueue()

    def work():
        while not stop.is_set() and (item := waiting.get()) is not None:
            try:
                finished.put((item, do(item)))
            except Exception as error:
                finished.put((item, error))

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
        stop.set()


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
    return {"model": settings.model, "prompt": prompt, "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature, "top_p": settings.top_p}


# ---- what the server understands ----


def agree(ask, settings, text, ids, tokenizer):
    """(prompt_for, further fields, completions in a request), found by asking for a few tokens.

    Servers refuse fields that they do not know, so the fullest request comes first. vLLM and SGLang
    take the prompt as tokens and give the completion's tokens; unless told otherwise they apply the
    top-k and the penalties of the model's generation_config.json. `transformers serve` takes only
    text, and is greedy at any temperature unless generation_config says do_sample.
    """
    def as_ids(text, ids):
        return ids

    def as_text(text, ids):
        return text_for(text, ids, tokenizer)

    neutral = {"min_p": 0.0, "repetition_penalty": 1.0}
    config = json.dumps({"do_sample": settings.temperature > 0, "top_k": settings.top_k, **neutral})
    dialects = [(as_ids, {"top_k": settings.top_k or -1, **neutral, "return_token_ids": True}),
                (as_text, {"generation_config": config})]
    dialects += [] if settings.top_k else [(as_ids, {}), (as_text, {})]
    for prompt_for, extras in dialects:
        probe = {**request(settings, prompt_for(text, ids)), **extras, "seed": 1,
                 "n": min(4, settings.samples), "max_tokens": min(16, settings.max_new_tokens),
                 "temperature": 2.0 if settings.temperature else 0.0}
        try:
            answer = ask(probe, min(5, settings.patience))
            break
        except Refused as refusal:
            if refusal.status not in (400, 422) or (prompt_for, extras) == dialects[-1]:
                raise
    usage = answer.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if prompt_for is as_text and isinstance(counted, int) and counted != len(ids):
        raise Problem(f"{settings.server} reads {counted} tokens in a prompt that has {len(ids)} "
                      f"by the tokenizer of {settings.tokenizer or settings.model!r}: name the "
                      "served model's own with --tokenizer")
    different = len({choice["text"] for choice in answer["choices"]}) > 1
    # Some servers write n times the same for one seed: they are asked for one at a time.
    return prompt_for, extras, settings.samples if different else 1


def text_for(text, ids, tokenizer):
    """The text that a server turns into these tokens: it adds the start token itself."""
    for shorter in (text, text.removeprefix(tokenizer.bos_token or "")):
        if tokenizer(shorter).input_ids == ids:
            return shorter
    raise Problem("the server takes prompts as text only, and would read other tokens than ours in "
                  f"{text[:60]!r}: use a server that takes tokens, such as vLLM or SGLang")


def to_row(choice, prompt, stop, tokenizer, longest):
    """The rollout's own fields, with tokens when the server gives all, the end token included.

    Of a text alone that ends at a stop string the server does not tell that no end token was
    sampled: the trainer then teaches one there, by the rule for rows of text.
    """
    ids, ended = choice.get("token_ids"), choice["finish_reason"] == "stop"
    text = choice["text"].encode("utf-8", "replace").decode()
    valid = isinstance(ids, list) and 0 < len(ids) <= longest and all(
        type(i) is int and 0 <= i < len(tokenizer) for i in ids)
    if valid:
        by_end_token = ended and not tokenizer.decode(ids[-1:], skip_special_tokens=True)
        row = until_stop(ids, by_end_token, stop, tokenizer)
        if row["finish"] == choice["finish_reason"]:
            return {"prompt_ids": prompt, **row}
    cut = text[: stop_position(text, stop)]
    row = {"completion": cut, "finish": "stop" if cut != text else choice["finish_reason"]}
    if not cut:  # nothing but the end token was written; no text could say that
        return {**row, "prompt_ids": prompt, "completion_ids": [end_token_of(None, tokenizer)]}
    return row


# ---- asking ----


def patiently(url, body, timeout, patience, stop):
    """The answer; PASSING errors are retried until `patience` seconds after the first one."""
    first, tries = None, 0
    while True:
        try:
            return post(url, body, timeout)
        except PASSING as error:
            now, tries = time.monotonic(), tries + 1
            first = first or now
            if now - first >= patience or stop.is_set():
                reason = plain(getattr(error, "reason", None) or error)
                raise Problem(f"{url} does not answer: {reason} (tried {tries} times in "
                              f"{now - first:.0f} s): is the server up, and --server right?")
        pause = min(30, 0.25 * 2 ** min(tries, 10)) * random.uniform(0.5, 1.5)  # seconds
        stop.wait(min(first + patience - now, pause))


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
            message = f"HTTP {error.code}: {said(read(error, deadline))}"
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            raise OSError(message)
        advice = {401: ": the key goes in OPENAI_API_KEY",
                  404: ": does --server end in /v1, does the server know --model?"}
        raise Refused(f"{url} refuses: {message}{advice.get(error.code, '')}", error.code)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        raise ValueError("an answer without choices")
    for choice in choices:
        if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
            raise ValueError("a choice without text")
        if choice.get("finish_reason") not in ("stop", "length"):
            raise ValueError(f"a choice with finish_reason {choice.get('finish_reason')!r:.40}")
    return answer


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


def said(body):
    """The server's own words about an error."""
    try:
        answer = json.loads(body)
        answer = answer.get("error") or answer
        if not isinstance(answer, str):
            answer = answer.get("message") or answer.get("detail") or answer
        return plain(answer)
    except (ValueError, AttributeError, RecursionError):
        return plain(body.decode("utf-8", "replace"))


def plain(words):
    """One short line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(words)[:2000]).split())[:300]
