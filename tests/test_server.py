"""eval.py --server: against a server that fails in every way, and against a real `transformers
serve`."""

import collections
import contextlib
import http.server
import importlib.util
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

import eval as evaluation
import train
from conftest import ROOT, apples_questions
from data import load_task
from engine import tasks
from engine.rollouts import read_rollouts
from engine.tokens import prompt_tokens
from engine import sampler, server
from engine.common import Problem, run_main


class Fake:
    """A completions server in a thread: `answer(body)` gives (status, body of the answer), or
    what else should happen."""

    def __init__(self, answer, port=0):
        self.asked, self.lock = [], threading.Lock()  # every request that is no probe

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                if body["max_tokens"] != 16:
                    with self.lock:
                        self.asked.append(body)
                status, content = answer(body)
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                handler.send_response(status)
                handler.send_header(
                    "Content-Length", str(len(content) + (status == 299))
                )  # 299: one byte never comes
                handler.end_headers()
                handler.wfile.write(content)

            def log_message(handler, *words):
                pass

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, *connection):  # a dropped connection is meant
                pass

        self.http = Server(("127.0.0.1", port), Handler)
        self.port, self.url = self.http.server_port, f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()


def choices(*texts, finish="stop", **more):
    return {"choices": [{"text": text, "finish_reason": finish, **more} for text in texts]}


numbers = itertools.count()


def good(body, more=0):
    """Completions that are all different: as many as wanted, or `more`, at least one."""
    return 200, choices(*[f"buys {next(numbers)} ." for _ in range(max(1, body["n"] + more))])


def settings_for(fake, tiny, **changes):
    defaults = dict(
        model=tiny,
        server=fake.url,
        questions=24,
        samples=4,
        max_new_tokens=30,
        requests=6,
        timeout=0.4,
        patience=20,
    )
    return evaluation.Settings(**{**defaults, **changes})


def sample(settings, out="", grade=lambda question, text: (None, -1.0)):
    tokenizer = sampler.load_tokenizer(settings.tokenizer or settings.model)
    return sampler.sample_rollouts(
        None,
        tokenizer,
        apples_questions(tokenizer, settings, settings.questions),
        grade,
        settings,
        str(out),
    )


def one_line(monkeypatch, capsys, *options):
    """The error of the whole command, which must be a single line with exit code 2."""
    monkeypatch.setattr(
        sys,
        "argv",
        ["eval.py", "--no-greedy", "--questions", "6", "--samples", "3", *map(str, options)],
    )
    with pytest.raises(SystemExit) as ended:
        run_main(evaluation.main)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py")]
    assert ended.value.code == 2 and len(line) < 700
    return line


def test_every_prompt_has_exactly_its_completions(tiny, tmp_path, capsys):
    """One request in five fails, in six ways; fewer or more choices come than asked for; the
    server is restarted half-way, and so is the sampling. No completion may be lost, kept twice,
    or asked for again once its question is finished."""
    count, failures = itertools.count(1), collections.Counter()
    ways = itertools.cycle(["status 500", "status 429", "dropped", "torn", "no choices", "hangs"])

    def failing(body):
        number = next(count)
        if number % 5:
            return good(body, more=number % 4 - 2)
        failures[way := next(ways)] += 1
        if way == "dropped":
            raise ConnectionError
        if way == "hangs":
            time.sleep(0.6)
        return {
            "status 500": (500, {"error": "busy"}),
            "status 429": (429, b"slow down"),
            "torn": (299, b'{"choices": ['),
            "no choices": (200, {"choices": []}),
            "hangs": good(body),
        }[way]

    finished, servers, out = [], [], tmp_path / "r.jsonl"

    def restarting(question, text):
        finished.append(question["id"])
        if len(finished) == 4 * 8:  # the server goes, and is back after a while
            servers[-1].stop()
            threading.Timer(0.8, lambda: servers.append(Fake(failing, servers[0].port))).start()
        if len(finished) == 4 * 16:  # the sampler goes
            raise KeyboardInterrupt
        return text, -1.0

    servers.append(Fake(failing))
    settings = settings_for(servers[0], tiny)
    with pytest.raises(KeyboardInterrupt):
        sample(settings, out, restarting)
    assert len(servers) == 2 and not out.exists() and len(set(finished)) == 16
    time.sleep(0.7)  # what the first sampler was still asking comes to its end
    servers[1].asked.clear()
    rows = sample(settings, out)
    assert rows == read_rollouts(out) and len(rows) == 24 * 4
    assert set(collections.Counter(row["id"] for row in rows).values()) == {4}
    assert len({row["completion"] for row in rows}) == 24 * 4
    assert all(
        "completion_ids" not in row and "logprobs" not in row and row["sampling"]["server"]
        for row in rows
    )
    kept = {
        tuple(prompt_tokens(row["prompt"], sampler.load_tokenizer(tiny)))
        for row in rows
        if row["id"] in finished[: 4 * 15]
    }
    assert len(kept) == 15 and not kept & {tuple(body["prompt"]) for body in servers[1].asked}
    servers[1].stop()
    assert len(failures) == 6
    with capsys.disabled():
        print(f"\n{next(count) - 1} requests, {failures.total()} failed: {dict(failures)}", end=" ")


def test_a_server_that_is_down(tiny, tmp_path, monkeypatch, capsys):
    """At the start it is said within seconds; later it is waited for, and what is finished is
    kept."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url, start = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1", time.time()
        line = one_line(monkeypatch, capsys, "--model", tiny, "--server", url, "--patience", "1")
    assert (
        url in line and "refused" in line and "is the server up" in line and time.time() - start < 6
    )

    answered = itertools.count()
    with Fake(lambda body: good(body) if next(answered) < 4 else (503, b"overloaded")) as fake:
        options = [
            "--model",
            tiny,
            "--server",
            fake.url,
            "--out",
            tmp_path / "r.jsonl",
            "--patience",
            "0.5",
            "--requests",
            1,
        ]
        line = one_line(monkeypatch, capsys, *options)
    assert "503: overloaded" in line and "3 of 6 questions are finished and kept" in line


def test_a_refusal_is_not_asked_again(tiny, tmp_path, monkeypatch, capsys):
    """A 400 is final; the server's words are shown, never its control characters or a megabyte of
    them."""
    refusal = 400, {"error": {"message": "too long\x1b[2J\n" + "x" * 10**6}}
    with Fake(lambda body: good(body) if body["max_tokens"] == 16 else refusal) as fake:
        line = one_line(
            monkeypatch, capsys, "--model", tiny, "--server", fake.url, "--requests", "1"
        )
        assert "HTTP 400: " in line and "too long" in line and "\x1b" not in line
        assert "apples-test" in line and len(fake.asked) == 1
    with Fake(lambda body: (404, {"detail": "Not Found"})) as fake:
        assert "does --server end in /v1" in one_line(
            monkeypatch, capsys, "--model", tiny, "--server", fake.url
        )
        assert "--tokenizer" in one_line(
            monkeypatch, capsys, "--model", "served-name", "--server", fake.url
        )
    for wrong in (
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "http://user:key@host/v1",
        "http://host:99999/v1",
    ):
        assert "http://localhost:8000/v1" in one_line(
            monkeypatch, capsys, "--model", tiny, "--server", wrong
        )


def test_answers_without_end_are_not_read(monkeypatch):
    """A flood would fill the memory, a drip would hold the run up for ever: the timeout of a
    socket sees neither."""
    monkeypatch.setattr(server, "LARGEST", 10**6)
    with Fake(lambda body: (200, b" " * 2 * 10**6)) as fake:
        with pytest.raises(ValueError, match="more than 1,000,000 bytes"):
            server.post(fake.url, {"max_tokens": 1}, 5)

    class Drip:
        def read1(self, size):
            time.sleep(0.05)
            return b" "

    with pytest.raises(TimeoutError):
        server.read(Drip(), time.monotonic() + 0.2)
    for answer in (
        {"choices": [{"text": 5}]},
        {"choices": [7]},
        [],
        choices("x", finish="abort"),
        b"[" * 10**5,
        b"\xff",
    ):
        with Fake(lambda body: (200, answer)) as fake, pytest.raises(server.PASSING):
            server.post(fake.url, {"max_tokens": 1}, 5)


def test_the_tokens_are_the_samplers(tiny):
    """Prompts go out as tokens; tokens that come back are kept, unless the end token that was
    sampled is missing from them."""
    tokenizer = sampler.load_tokenizer(tiny)
    word, end = tokenizer("buys", add_special_tokens=False).input_ids[0], tokenizer.eos_token_id
    for ids, finish, kept in (
        ([word, end], "stop", True),
        ([word], "length", True),
        ([word], "stop", False),
        ([word] * 31, "length", False),
        ([10**6], "length", False),
        ([True], "length", False),
    ):
        with Fake(lambda body: (200, choices("buys", finish=finish, token_ids=ids))) as fake:
            rows = sample(settings_for(fake, tiny, questions=1, samples=2))
            assert fake.asked[0]["prompt"] == prompt_tokens(rows[0]["prompt"], tokenizer)
            assert fake.asked[0]["top_k"] == -1 and fake.asked[0]["repetition_penalty"] == 1.0
        assert rows[0]["completion"] == "buys" and rows[0]["finish"] == finish
        assert (
            rows[0].get("completion_ids") == ids
            and rows[0]["prompt_ids"] == fake.asked[0]["prompt"]
        ) == kept


def test_a_server_that_repeats_itself_is_asked_one_by_one(tiny):
    """Some servers write n times the same for one seed, which would look like n samples."""
    repeated = lambda body: (200, choices(*[f"buys {body['seed']} ."] * body["n"]))
    with Fake(repeated) as fake:
        rows = sample(settings_for(fake, tiny, questions=3))
        assert {body["n"] for body in fake.asked} == {1} and len(
            {row["completion"] for row in rows}
        ) == 12


def test_a_server_that_takes_text_alone(tiny, monkeypatch):
    """`transformers serve` refuses tokens and unknown fields, and adds the start token itself:
    never two, never none."""
    tokenizer = sampler.load_tokenizer(tiny)

    def strict(body, tokens=0):
        if not isinstance(body["prompt"], str):
            return 400, {"detail": "prompt must be a string."}
        if not json.loads(body["generation_config"])["do_sample"]:
            return 400, {"detail": "this would be greedy"}
        return 200, {
            **choices(good(body)[1]["choices"][0]["text"]),
            "usage": {"prompt_tokens": tokens + len(tokenizer(body["prompt"]).input_ids)},
        }

    with Fake(strict) as fake:
        settings = settings_for(fake, tiny, questions=2)
        rows = sample(settings)
        assert len(rows) == 8 and {body["prompt"] for body in fake.asked} == {
            row["prompt"] for row in rows
        }
        templated = [{"id": "a", "prompt": tokenizer.bos_token + rows[0]["prompt"]}]
        sampler.sample_rollouts(None, tokenizer, templated, lambda *_: (None, 0.0), settings)
        assert fake.asked[-1]["prompt"].strip() == rows[0]["prompt"]
    with (
        Fake(lambda body: strict(body, tokens=3)) as fake,
        pytest.raises(Problem, match="--tokenizer"),
    ):
        sample(settings_for(fake, tiny))


def test_the_file_trains(tiny, tmp_path):
    """An empty completion has only its end token, and half a character is no UTF-8: train.py must
    read both, and compute log mu."""
    texts = itertools.cycle(["buys 3 .", "", "sells 2 .", "4 \ud800"])
    with Fake(lambda body: (200, choices(*itertools.islice(texts, body["n"])))) as fake:
        settings = settings_for(fake, tiny, questions=6)
        sample(
            settings,
            tmp_path / "r.jsonl",
            lambda question, text: (text, 1.0 if "3" in text else -1.0),
        )
        measures = evaluation.evaluate(
            None, sampler.load_tokenizer(tiny), load_task("apples"), settings, "test", 6
        )
        assert measures["greedy"] and {body["temperature"] for body in fake.asked} == {0.0, 1.0}
    train.train(
        train.Settings(
            model=tiny,
            rollouts=str(tmp_path / "r.jsonl"),
            out=str(tmp_path / "trained"),
            sequences=12,
        )
    )
    assert (
        list(tmp_path.glob("r.jsonl.mu-*"))
        and (tmp_path / "trained" / "model.safetensors").exists()
    )


def test_ctrl_c_ends_at_once(tiny, tmp_path, capsys):
    """Threads that wait for an answer must not keep the process; what is finished stays, and only
    the rest is asked later."""
    hanging, out = threading.Event(), tmp_path / "r.jsonl"
    with Fake(
        lambda body: time.sleep(60) if hanging.is_set() and len(fake.asked) > 3 else good(body)
    ) as fake:
        hanging.set()
        alone = subprocess.Popen(
            [
                sys.executable,
                ROOT / "eval.py",
                "--model",
                tiny,
                "--server",
                fake.url,
                "--questions",
                "8",
                "--samples",
                "2",
                "--no-greedy",
                "--max-new-tokens",
                "30",
                "--out",
                str(out),
                "--requests",
                "2",
            ],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # ignored where the tests run in the background
        while len(fake.asked) < 5:
            time.sleep(0.05)
        time.sleep(0.3)
        start = time.time()
        alone.send_signal(signal.SIGINT)
        errors = alone.communicate(timeout=20)[1]
        assert (
            alone.returncode == 130
            and time.time() - start < 5
            and "interrupted" in errors
            and "Traceback" not in errors
        )
        hanging.clear()
        fake.asked.clear()
        rows = sample(settings_for(fake, tiny, questions=8, samples=2), out)
        assert "3 of 8 questions were finished before" in capsys.readouterr().out
        assert len({row["completion"] for row in rows}) == 16 and len(fake.asked) == 5


PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic", "accelerate")
TRANSFORMERS = os.path.join(os.path.dirname(sys.executable), "transformers")


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which(TRANSFORMERS) or not all(map(importlib.util.find_spec, PACKAGES)),
    reason='transformers serve is not installed: pip install "transformers[serving]"',
)
def test_transformers_serve(tiny, tmp_path):
    """The real thing: sampled, not greedy; only whole questions in the file; the greedy answers
    are our own sampler's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path / "serve.log", "w")
    serving = subprocess.Popen(
        [
            TRANSFORMERS,
            "serve",
            tiny,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--device",
            "cpu",
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(600):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5),
            ):
                break
            time.sleep(0.1)
        settings = evaluation.Settings(
            model=tiny,
            server=f"http://127.0.0.1:{port}/v1",
            questions=6,
            samples=4,
            max_new_tokens=30,
            timeout=60,
            patience=10,
        )
        rows = sample(settings, tmp_path / "r.jsonl")
        assert (
            set(collections.Counter(row["id"] for row in rows).values()) == {4} and len(rows) == 24
        )
        assert len({row["completion"] for row in rows}) > 12 and {
            row["finish"] for row in rows
        } <= {"stop", "length"}
        greedy = dict(questions=6, samples=1, max_new_tokens=30, temperature=0.0)
        theirs = sample(evaluation.Settings(model=tiny, server=settings.server, **greedy))
    finally:
        serving.terminate()
        serving.wait(20)
        log.close()
    model, tokenizer = sampler.load_model(tiny, evaluation.Settings(), "cpu")
    local = evaluation.Settings(model=tiny, **greedy)
    ours = sampler.sample_rollouts(
        model,
        tokenizer,
        apples_questions(tokenizer, local, local.questions),
        lambda *_: (None, -1.0),
        local,
    )
    assert [row["completion"] for row in theirs] == [row["completion"] for row in ours]
