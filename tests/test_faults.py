"""Nothing lost, nothing quiet: wrong input, hostile content, full disks, processes that are killed.

The long tallies are in tools/faults.py.
"""

import errno
import gzip
import json
import os
import pickle
import shutil

import pytest
from torch.distributed.checkpoint.api import CheckpointException

import train
from conftest import ROOT, in_process, train_settings
from data import apples
from engine import batches, common, sampler
from engine.common import Problem, visible, whole_file, writing
from engine.rollouts import write_rollouts
from tools import faults

PROMPT = "Tom has 3 apples . He finds 2 . How many ?"
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
COMPLETION = "3 + 2 = 5 . The answer is 5 ."  # 11 words, and the end token


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """(folder, model, tokenizer) of a small Llama with random weights."""
    folder = str(tmp_path_factory.mktemp("policy"))
    apples.write_beginner(folder, apples, 1, seed=1, width=16, layers=1)
    folder += "/random"
    return folder, *sampler.load_model(folder, train.Settings(), "cpu")


@pytest.fixture(scope="module")
def good(policy):
    tokenizer = policy[2]
    ids = [*tokenizer(COMPLETION, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {
        "id": "q",
        "prompt": PROMPT,
        "completion": COMPLETION,
        "reward": 1.0,
        "prompt_ids": tokenizer(PROMPT).input_ids,
        "completion_ids": ids,
        "logprobs": [-0.5] * len(ids),
    }


def read(policy, path, **changes):
    folder, model, tokenizer = policy
    settings = train_settings(folder, path, "", **changes)
    return batches.read_data(settings, model, tokenizer)


def in_a_file(folder, *lines):
    path = folder / "rollouts.jsonl"
    path.write_bytes(
        b"".join(
            line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines
        )
    )
    return path


# ---- lines and files ----

NO_JSON = [
    b"{broken\n",
    b"17\n",
    b"{} {}\n",
    b"\0" * 50 + b"\n",
    b'{"id": ' + b"[" * 100000 + b"\n",
    b"\xef\xbb\xbf{}\n",
    b'{"\x1b[2J": 1}\n',
    b'{"reward":%s}\n' % (b"1" * 5000),
    b"PK\x03\x04" + bytes(200),
]
NO_UTF8 = [
    b'{"id": "\xff"}\n',
    '{"id": "caf\u00e9"}\n'.encode("latin-1"),
    gzip.compress(b"{}"),
    '{"id": "q"}'.encode("utf-16"),
    {"completion": "\ud800"},
]
BAD_LINES = [  # the words to be read, the lines or the fields that differ from a good one
    ("not a JSON object", NO_JSON),
    ("not UTF-8", NO_UTF8),
    ("torn", [b'{"id": "q", "prom']),
    ("longer than 16,777,216 bytes", [b"x" * 20_000_000]),
    ('"id" is missing', [b"{}"]),
    ('"id" is not a string', [{"id": None}, {"id": 7}]),
    ('"prompt" is not a string', [{"prompt": None}, {"prompt": [{"role": "user"}]}]),
    ('"completion" is not a string', [{"completion": None}]),
    ("completion is empty", [{"completion": "", "completion_ids": None, "logprobs": None}]),
    ('"reward" is missing', [{"reward": None}]),
    ("not a number", [{"reward": value} for value in ("1", True, [1])]),
    (
        "is not a number that JSON",
        [{"reward": float("nan")}, {"reward": float("-inf")}, {"logprobs": [float("nan")] * 12}],
    ),
    (
        "too large",
        [
            {"reward": 1e300},
            {"reward": -(10**400)},
            b'{"id":"q","prompt":"How many ?","completion":"5","reward":1e999}\n',
        ],
    ),
    ("a str, not a list", [{name: "5 6"} for name in ("prompt_ids", "completion_ids", "logprobs")]),
    ("a str, not a dict", [{"sampling": "t=1"}]),
    ("not a str", [{"finish": 1}, {"gold": 5}, {"answer": ["5"]}, {"split": {}}]),
    (
        "whole numbers",
        [{"completion_ids": ids} for ids in ([], [1, -2], [1.5], [True], [[5, 6]], [10**400])]
        + [{"prompt_ids": []}],
    ),
    ("not as many as", [{"completion_ids": None}, {"logprobs": [-1.0]}]),
    ("logprob 0 is", [{"logprobs": [value] * 12} for value in (0.5, None, "-1", -(10**400))]),
    ("logprob 11 is", [{"logprobs": [-0.5] * 11 + [-1e39]}]),
    ("beyond the model's vocabulary", [{"completion_ids": [5000] * 12}, {"prompt_ids": [5000]}]),
    ("do not decode to its completion", [{"completion_ids": list(range(20, 32))}]),
    (
        "do not fit the model's 256",
        [{"prompt_ids": [5] * 250}, {"prompt": "apples " * 300, "prompt_ids": None}],
    ),
    ("the prompt has no tokens", [{"prompt": "", "prompt_ids": None}]),
]


@pytest.mark.parametrize("words, line", [(w, line) for w, lines in BAD_LINES for line in lines])
def test_bad_lines(policy, good, tmp_path, monkeypatch, words, line):
    """Each is one line that names the file and the line, and moves no cursor."""
    if "no tokens" in words:  # its own tokenizer puts a start token before every text
        monkeypatch.setattr("engine.tokens.start_tokens", lambda tokenizer: [])
    line = line if isinstance(line, bytes) else {**good, **line}
    path = in_a_file(tmp_path, good, good, line)
    with pytest.raises(Problem) as error:
        read(policy, path)
    message = visible(str(error.value))
    assert message.startswith(f"{path}:3: ") and words in message and len(message) < 600
    assert len(message.splitlines()) == 1 and "\x1b" not in message


@pytest.mark.parametrize(
    "content, mapping, words",
    [
        (b"", "", "no rollouts"),
        (b"\n \r\n\n", "", "no rollouts"),
        (b'{"id": "q", "prompt": "How", "completion": "5", "reward": 0}', "", "--map-rewards=-1,1"),
        *(
            (b"{}", mapping, f"--map-rewards {mapping}: two numbers")
            for mapping in ("1", "a,b", "nan,1", "-1,1,2")
        ),
    ],
)
def test_bad_files(policy, tmp_path, content, mapping, words):
    with pytest.raises(Problem, match=words):
        read(policy, in_a_file(tmp_path, content), map_rewards=mapping)


def test_a_bad_file_by_the_command_line(policy, good, tmp_path):
    path = in_a_file(tmp_path, good, {**good, "reward": "\x1b]0;title\x07good"})
    result = in_process(
        ROOT / "train.py", "--model", policy[0], "--rollouts", path, "--out", tmp_path / "out"
    )
    lines = [line for line in result.stdout.splitlines() if "train.py: error" in line]
    assert result.returncode == 2 and len(lines) == 1 and f"{path}:2: " in lines[0]
    assert "Traceback" not in result.stdout and "\x1b]" not in result.stdout
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_a_damaged_log_mu_is_one_line(policy, good, tmp_path):
    path = in_a_file(tmp_path, good, {**good, "reward": -1.0})
    command = [ROOT / "train.py", "--model", policy[0], "--rollouts", path, "--mu", "start"]
    assert in_process(*command, "--out", tmp_path / "first").returncode == 0
    (kept,) = tmp_path.glob("*.mu-*.npy")
    kept.write_bytes(b"x")
    result = in_process(*command, "--out", tmp_path / "second")
    assert result.returncode == 2 and f"{kept}: is damaged" in result.stdout, result.stdout


def test_odd_files_that_are_right(policy, good, tmp_path):
    """CRLF, blank lines, no newline at the end, unknown fields, the same completion twice."""
    line = json.dumps({**good, "mine": {"x": 1}, "prompt": "\u00fc \0 " + PROMPT}).encode()
    data = read(policy, in_a_file(tmp_path, line + b"\r\n", b"\r\n", b"  \n", line))
    assert [row.line for row in data.rows] == [1, 4]


def test_flipped_bytes(policy, good, tmp_path):
    path = in_a_file(tmp_path, *[{**good, "id": str(number)} for number in range(4)])
    refused, read_well = faults.flipped_files(policy[0], path, tmp_path, 1000)
    assert refused + read_well == 1000 and refused > 50 and read_well > 50


# ---- hostile content ----


def test_nothing_is_written_outside_and_nothing_is_garbled(policy, good, tmp_path, capsys):
    folder = tmp_path / "a/b"
    rows = [
        {
            **good,
            "id": f"../../x{number}\x1b[2J",
            "completion": COMPLETION + "\x1b]0;mine\x07",
            "reward": 1.0 - 2 * (number % 2),
        }
        for number in range(4)
    ]
    write_rollouts(folder / "rollouts.jsonl", rows)
    common.say("\x1b[31mred\r\u202e fine \u00fc\n\ttoo")
    train.train(train_settings(policy[0], folder / "rollouts.jsonl", folder / "out", mu="start"))
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["b"]
    out = capsys.readouterr().out
    assert out.startswith("\\x1b[31mred\\r\\u202e fine \u00fc\n\ttoo\n") and "\x1b" not in out


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_code_comes_with_a_model(policy, good, tmp_path):
    """A pickle in place of safetensors, code beside a model, a pickle in a checkpoint: refused, and
    never run."""
    mark, folder = str(tmp_path / "executed"), tmp_path / "model"
    bomb = pickle.dumps(Bomb(mark), protocol=2)
    shutil.copytree(policy[0], folder)
    os.remove(folder / "model.safetensors")
    for name in ("pytorch_model.bin", "model.bin"):
        (folder / name).write_bytes(bomb)
    with pytest.raises(Problem, match="cannot be loaded"):
        sampler.load_model(str(folder), train.Settings(), "cpu")
    (folder / "modeling_mine.py").write_text(f"open({mark!r}, 'w')\nclass Mine: pass\n")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "mine",
                "auto_map": {
                    f"Auto{kind}": "modeling_mine.Mine" for kind in ("Config", "ModelForCausalLM")
                },
            }
        )
    )
    with pytest.raises(Problem, match="cannot be loaded"):
        sampler.load_model(str(folder), train.Settings(), "cpu")
    path, checkpoint = in_a_file(tmp_path, good), tmp_path / "out/checkpoint-00000001"
    shutil.copytree(policy[0], checkpoint)
    (tmp_path / "out/run.json").write_text("{}")
    for name in (".metadata", "__0_0.distcp", "model.safetensors"):  # where torch keeps pickles
        (checkpoint / name).write_bytes(bomb)
    with pytest.raises(Problem, match="checkpoint-00000001: cannot be opened"):
        train.train(train_settings(policy[0], path, tmp_path / "out", mu="file"))
    assert not os.path.exists(mark)


# ---- disks, and processes that are killed ----


@pytest.mark.parametrize("error", [FULL, CheckpointException("write", {0: (FULL, None)})])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    (tmp_path / "kept.jsonl").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    path, errors = tmp_path / "kept.jsonl", (OSError, CheckpointException)
    with pytest.raises(Problem, match="kept.jsonl: cannot be written: No space left on device"):
        with writing(path, errors), whole_file(path) as file:
            file.write("new")
    assert os.listdir(tmp_path) == ["kept.jsonl"]
    assert (tmp_path / "kept.jsonl").read_text() == "old"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("ranks, options", [(0, ()), (2, ()), (2, ("--shard",))])
def test_killed_and_run_again(tmp_path, optimizer, ranks, options):
    """kill -9 at random moments, the same command again: the same weights to the bit."""
    assert faults.kill_train(tmp_path, ranks, "--optimizer", optimizer, *options, times=2)


@pytest.mark.slow
@pytest.mark.parametrize("way", faults.WAYS)
def test_a_lost_rank_ends_the_run(tmp_path, way):
    """Within 30 seconds, without a traceback of ours; SIGTERM: with a checkpoint of the step."""
    assert faults.lost_rank(tmp_path, way, ranks=2)
