"""eval.py --server: against a server that fails in every way, and against a real one."""

import collections
import http.server
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import eval as evaluation
import train
from conftest import ROOT, apples_questions
from engine import sampler, server
from engine.common import run_main
from engine.rollouts import read_rollouts


class Fake:
    """A completions server in a thread: `answer(body)` gives (status, body of the answer)."""

    def __init__(self, answer, port=0):
        self.asked, self.headers, self.lock = [], [], threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with self.lock:
                    self.asked.append(body)
                    self.headers.append(handler.headers)
                status, content = answer(body)
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                handler.send_response(status)
                torn = status == 299  # one byte never comes
                handler.send_header("Content-Length", str(len(content) + torn))
                handler.send_header("Location", "http://127.0.0.1:9/v1/completions")
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


def choice(text, finish="stop"):
    return {"choices": [{"text": text, "finish_reason": finish}]}


numbers = itertools.count()


def good(body):
    return 200, choice(f"buys {next(numbers)} .")


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(server, "PAUSES", (0.05, 0.1, 0.2, 0.4, 0.8, None))
    monkeypatch.setattr(server, "TIMEOUT", 0.4)


def sample(fake, tiny, out="", grade=lambda row, text: (None, -1.0), **changes):
    options = dict(model=tiny, server=fake.url, samples=4, max_new_tokens=30, questions=24)
    settings = evaluation.Settings(**{**options, **changes})
    tokenizer = sampler.load_tokenizer(tiny)
    questions = apples_questions(tokenizer, settings, settings.questions, settings.split)
    return evaluation.sample_rollouts(None, tokenizer, questions, grade, settings, str(out))


def one_line(monkeypatch, capsys, tiny, url, *options):
    """The error of the whole command, which must be a single line with exit code 2."""
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "eval.py",
            "--task",
            "apples",
            "--model",
            tiny,
            "--server",
            url,
            "--no-greedy",
            "--questions",
            "6",
            "--samples",
            "3",
            *map(str, options),
        ],
    )
    with pytest.raises(SystemExit) as ended:
        run_main(evaluation.main)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py")]
    assert ended.value.code == 2 and len(line) < 700
    return line


def test_every_prompt_has_exactly_its_completions(tiny, tmp_path):
    """One request in five fails, in six ways; the server is restarted half-way, and so is the
    sampling. No completion may be lost, kept twice, or asked for again once its question is
    finished."""
    count, failures = itertools.count(1), collections.Counter()
    ways = itertools.cycle(["status 500", "status 429", "dropped", "torn", "no choices", "hangs"])

    def failing(body):
        if next(count) % 5:
            return good(body)
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

    def restarting(row, text):
        finished.append(row["id"])
        if len(finished) == 4 * 8:  # the server goes, and is back after a while
            servers[-1].stop()
            threading.Timer(0.5, lambda: servers.append(Fake(failing, servers[0].port))).start()
        if len(finished) == 4 * 16:  # the sampler goes
            raise KeyboardInterrupt
        return text, -1.0

    servers.append(Fake(failing))
    with pytest.raises(KeyboardInterrupt):
        sample(servers[0], tiny, out, restarting)
    assert len(servers) == 2 and not out.exists() and len(set(finished)) == 16
    time.sleep(1.5)  # what the first sampler was still asking comes to its end
    servers[1].asked.clear()
    rows = sample(servers[1], tiny, out)
    assert rows == read_rollouts(out) and len(rows) == 24 * 4 and len(failures) == 6
    assert set(collections.Counter(row["id"] for row in rows).values()) == {4}
    assert len({row["completion"] for row in rows}) == 24 * 4
    assert not any("completion_ids" in row or "logprobs" in row for row in rows)
    kept = {row["prompt"] for row in rows if row["id"] in finished[: 4 * 15]}
    assert len(kept) == 15 and not kept & {body["prompt"] for body in servers[1].asked}
    servers[1].stop()


def test_what_is_asked(tiny, monkeypatch):
    """The plain softmax of text with the start token once, and another seed for each completion;
    the key goes along."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Fake(good) as fake:
        sample(fake, tiny, questions=2)
        tokenizer = sampler.load_tokenizer(tiny)
        settings = evaluation.Settings(model=tiny, server=fake.url, samples=1, top_k=7)
        templated = {"id": "a", "prompt": f"{tokenizer.bos_token}Tom", "stop": ["\n", ""]}
        evaluation.sample_rollouts(None, tokenizer, [templated], lambda *_: (None, 0.0), settings)
    *bodies, last = fake.asked
    assert len({body["seed"] for body in bodies}) == 8
    assert {(body["top_k"], body["min_p"], body["temperature"]) for body in bodies} == {(-1, 0, 1)}
    assert last["prompt"] == "Tom" and last["stop"] == ["\n"] and last["top_k"] == 7
    assert {headers["Authorization"] for headers in fake.headers} == {"Bearer secret"}


def test_a_server_that_is_down(tiny, tmp_path, monkeypatch, capsys):
    """At the start, and later, when what is finished is kept."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        line = one_line(monkeypatch, capsys, tiny, url)
    assert url in line and "refused" in line and "is the server up" in line
    answered = itertools.count()
    monkeypatch.setattr(server, "REQUESTS", 1)
    with Fake(lambda body: good(body) if next(answered) < 9 else (503, b"overloaded")) as fake:
        line = one_line(monkeypatch, capsys, tiny, fake.url, "--out", tmp_path / "r.jsonl")
    assert "503: overloaded" in line and "what is finished is kept" in line
    assert sum(len(path.read_text().splitlines()) for path in tmp_path.glob("*.part-*")) == 3


@pytest.mark.parametrize(
    "status, said",
    [
        (400, "HTTP 400: "),
        (401, "OPENAI_API_KEY"),
        (404, "--server ends in /v1"),
        (302, "HTTP 302"),
    ],
)
def test_a_refusal_is_not_asked_again(tiny, monkeypatch, capsys, status, said):
    """The server's words are shown, never its control characters or a megabyte of them; the key
    is not; a redirect to another host does not get it."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr(server, "REQUESTS", 1)
    refusal = {"error": {"message": "too long\x1b[2J\n" + "x" * 10**6}}
    with Fake(lambda body: (status, refusal)) as fake:
        line = one_line(monkeypatch, capsys, tiny, fake.url)
    assert said in line and "too long" in line and "\x1b" not in line and "secret" not in line
    assert "apples-test" in line
    assert len({body["seed"] for body in fake.asked}) == len(fake.asked)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "http://user:key@host/v1",
        "http://host:99999/v1",
    ],
)
def test_an_address_that_cannot_work(tiny, monkeypatch, capsys, url):
    assert "http://localhost:8000/v1" in one_line(monkeypatch, capsys, tiny, url)


@pytest.mark.parametrize(
    "answer",
    [
        b" " * 2 * 10**6,
        {"choices": [{"text": 5}]},
        {"choices": [7]},
        [],
        choice("x", "abort"),
        b"[" * 10**5,
        b"\xff",
    ],
)
def test_answers_that_are_none(monkeypatch, answer):
    """A flood is not read to its end, and nothing is believed to have the right kind."""
    monkeypatch.setattr(server, "LARGEST", 10**6)
    with Fake(lambda body: (200, answer)) as fake, pytest.raises(server.PASSING):
        server.post(server.address(fake.url), {})


def test_the_file_trains(tiny, tmp_path):
    """An empty completion has only its end token, and half a character is no UTF-8: train.py must
    read both, and compute log mu."""
    texts, out = itertools.cycle(["buys 3 .", "", "sells 2 .", "4 \ud800"]), tmp_path / "r.jsonl"
    with Fake(lambda body: (200, choice(next(texts)))) as fake:
        sample(
            fake,
            tiny,
            out,
            lambda row, text: (text, 1.0 if "3" in text else -1.0),
            questions=6,
            split="train",
        )
    train.train(
        train.Settings(model=tiny, rollouts=str(out), out=str(tmp_path / "trained"), sequences=12)
    )
    assert list(tmp_path.glob("r.jsonl.mu-*"))
    assert (tmp_path / "trained" / "model.safetensors").exists()


def test_ctrl_c_ends_at_once(tiny, tmp_path):
    """Threads that wait for an answer must not keep the process; what is finished stays, and only
    the rest is asked later."""
    out, count = tmp_path / "r.jsonl", itertools.count()
    with Fake(lambda body: time.sleep(60) if next(count) >= 9 else good(body)) as fake:
        alone = subprocess.Popen(
            [
                sys.executable,
                ROOT / "eval.py",
                "--task",
                "apples",
                "--model",
                tiny,
                "--server",
                fake.url,
                "--questions",
                "30",
                "--samples",
                "1",
                "--no-greedy",
                "--out",
                out,
            ],
            stderr=subprocess.PIPE,
            text=True,  # SIGINT is ignored where tests run in background
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while len(fake.asked) < 9 + server.REQUESTS:
            time.sleep(0.05)
        time.sleep(0.3)
        start = time.time()
        alone.send_signal(signal.SIGINT)
        errors = alone.communicate(timeout=20)[1]
        assert alone.returncode == 130 and time.time() - start < 5
        assert "interrupted" in errors and "Traceback" not in errors
    (part,) = tmp_path.glob("*.part-*")
    assert part.read_text().count("\n") == 9


@pytest.mark.slow
def test_llama_cpp(tmp_path, monkeypatch):
    """The real thing (pip install xllamacpp; tools/smollm2.py makes the model): text up to the stop
    string, sampled, and greedy when asked."""
    xllamacpp, folder = pytest.importorskip("xllamacpp"), ROOT / "runs" / "smollm2"
    if not (folder / "model").exists():
        pytest.skip(f"{folder} does not hold the model")
    parameters = xllamacpp.CommonParams()
    (parameters.model.path,) = map(str, folder.glob("*/*.gguf"))
    parameters.n_ctx, parameters.port, parameters.cpuparams.n_threads = 512, 0, 2
    serving = xllamacpp.Server(parameters)
    monkeypatch.setattr(server, "TIMEOUT", 60)
    tokenizer = sampler.load_tokenizer(str(folder / "model"))
    question, texts = {"id": "a", "prompt": "The capital of France is", "stop": ["."]}, []
    for temperature in (1.0, 0.0):
        settings = evaluation.Settings(
            model=str(folder / "model"),
            server=f"{serving.listening_address}/v1",
            samples=4,
            max_new_tokens=9,
            temperature=temperature,
        )
        rows = evaluation.sample_rollouts(
            None, tokenizer, [question], lambda *_: (None, 0.0), settings
        )
        texts.append({row["completion"] for row in rows})
    assert len(texts[0]) > 1 and len(texts[1]) == 1 and "Paris" in texts[1].pop()
    assert all("." not in text and len(tokenizer(text).input_ids) < 11 for text in texts[0])
