"""Nothing lost, nothing quiet: wrong input, hostile content, ranks that are lost. The long tallies are in tools/faults.py."""

import errno
import gzip
import json
import os
import pickle
import random
import sys
import time

import pytest
import torch

import train
from conftest import ROOT, shell, torchrun
from data import apples
from engine.rollouts import write_rollouts
from engine.tokens import foreign_tokens
from engine import batches, common, sampler
from engine.common import Problem, visible, whole_file

# id, prompt, completion, reward, and tokens of the embedded task's tokenizer
PROMPT, COMPLETION = "Tom has 3 apples . He finds 2 . How many ?", "3 + 2 = 5 . The answer is 5 ."


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """(folder, model, tokenizer) of a small Llama with random weights."""
    folder = str(tmp_path_factory.mktemp("policy"))
    tokenizer = apples.make_tokenizer(apples.vocabulary())
    tokenizer.save_pretrained(folder)
    apples.make_model(tokenizer, seed=1, width=16, layers=1).save_pretrained(folder)
    return folder, *sampler.load_model(folder, train.Settings(), "cpu")


@pytest.fixture(scope="module")
def good(policy):
    tokenizer = policy[2]
    ids = tokenizer(COMPLETION, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return {"id": "q", "prompt": PROMPT, "completion": COMPLETION, "reward": 1.0, "completion_ids": ids,
            "prompt_ids": tokenizer(PROMPT).input_ids, "logprobs": [-0.5] * len(ids)}


def read(policy, path, **changes):
    folder, model, tokenizer = policy
    settings = train.Settings(model=folder, rollouts=str(path), **changes)
    return batches.read_data(settings, model, tokenizer, torch.device("cpu"))


def in_a_file(folder, *lines):
    path = folder / "rollouts.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


BAD_LINES = {  # what is wrong with a line: (the line, or the fields that differ from a good one; the words to be read)
    "not JSON": (b"{broken\n", "not a JSON object"), "torn": (b'{"id": "q", "prom', "torn"), "a list": (b"[1]\n", "a list"),
    "a number": (b"17\n", "not a JSON object"), "null": (b"null\n", "not a JSON object"), "text": (b"hello\n", "not a JSON object"),
    "two objects": (b"{} {}\n", "not a JSON object"), "not UTF-8": (b'{"id": "\xff"}\n', "not UTF-8 (byte 9)"),
    "Latin-1": ('{"id": "caf\u00e9"}\n'.encode("latin-1"), "not UTF-8"), "NUL bytes": (b"\0" * 50 + b"\n", "not a JSON object"),
    "UTF-16": ('{"id": "q"}'.encode("utf-16"), "not UTF-8"), "nested": (b'{"id": ' + b"[" * 100000 + b"\n", "not a JSON object"),
    "a second BOM": (b"\xef\xbb\xbf{}\n", "not a JSON object"), "a terminal's control codes": (b'{"\x1b[2J": 1}\n', "not a JSON object"),
    "no id": ({"id": None}, '"id" is not a string'), "id of a number": ({"id": 7}, '"id" is not a string'),
    "no prompt": ({"prompt": None}, '"prompt" is not a string'), "a chat": ({"prompt": [{"role": "user"}]}, '"prompt" is not a string'),
    "no completion": ({"completion": None}, '"completion" is not a string'),
    "half a character": ({"completion": "\ud800"}, "half of a surrogate pair"),
    "an empty completion": ({"completion": "", "completion_ids": None, "logprobs": None}, "completion is empty"),
    "no reward": ({"reward": None}, '"reward" is missing'), "reward of text": ({"reward": "1"}, "not a number"),
    "reward of yes": ({"reward": True}, "not a number"), "reward NaN": ({"reward": float("nan")}, "NaN"),
    "reward inf": ({"reward": float("inf")}, "Infinity"), "reward over float32": ({"reward": 1e300}, "too large"),
    "reward of 400 digits": ({"reward": 10**400}, "too large"), "reward of a list": ({"reward": [1]}, "not a number"),
    "reward 1e999": (b'{"id":"q","prompt":"How many ?","completion":"5","reward":1e999}\n', "too large"),
    "reward of 5000 digits": (b'{"id":"q","prompt":"How many ?","completion":"5","reward":%s}\n' % (b"1" * 5000), "not a JSON object"),
    "ids of text": ({"completion_ids": "5 6"}, "a str, not a list"), "ids below 0": ({"completion_ids": [1, -2]}, "whole numbers"),
    "ids of 1.5": ({"completion_ids": [1.5]}, "whole numbers"), "ids of true": ({"completion_ids": [True]}, "whole numbers"),
    "nested ids": ({"completion_ids": [[5, 6]]}, "whole numbers"), "no ids": ({"completion_ids": []}, '"completion_ids" is empty'),
    "no prompt ids": ({"prompt_ids": []}, '"prompt_ids" is empty'), "prompt ids of text": ({"prompt_ids": "12"}, "a str, not a list"),
    "logprobs without ids": ({"completion_ids": None}, 'without "completion_ids"'),
    "a logprob too few": ({"logprobs": [-1.0]}, "1 logprobs for 12"), "a positive logprob": ({"logprobs": [0.5] * 12}, "logprob 0 is 0.5"),
    "logprob null": ({"logprobs": [None] * 12}, "logprob 0 is None"), "logprob NaN": ({"logprobs": [float("nan")] * 12}, "NaN"),
    "logprob -inf": ({"logprobs": [-0.5] * 11 + [-1e39]}, "logprob 11 is"), "logprob of text": ({"logprobs": ["-1"] * 12}, "logprob 0"),
    "logprob of 400 digits": ({"logprobs": [-(10**400)] * 12}, "logprob 0 is -1000"),
    "an id beyond the vocabulary": ({"completion_ids": [5000] * 12}, "beyond the model's vocabulary"),
    "an id of 400 digits": ({"completion_ids": [10**400] * 12}, "beyond the model's vocabulary"),
    "a prompt id beyond the vocabulary": ({"prompt_ids": [5000]}, "beyond the model's vocabulary"),
    "another tokenizer": ({"completion_ids": list(range(20, 32))}, "do not decode to its completion"),
    "no room": ({"prompt_ids": [5] * 250}, "do not fit the model's 256"), "text without room": (
        {"prompt": "apples " * 300, "prompt_ids": None}, "do not fit the model's 256"),
    "finish of a number": ({"finish": 1}, '"finish" is a int'), "sampling of text": ({"sampling": "t=1"}, "a str, not a dict"),
    "gold of a number": ({"gold": 5}, '"gold" is a int'), "answer of a list": ({"answer": ["5"]}, '"answer" is a list'),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_lines(policy, good, tmp_path, what):
    line, words = BAD_LINES[what]
    path = in_a_file(tmp_path, good, good, line if isinstance(line, bytes) else {**good, **line})
    before, start = sampler.fingerprint(policy[1]), time.time()
    with pytest.raises(Problem) as error:
        read(policy, path)
    message = visible(str(error.value))
    assert message.startswith(f"{path}:3: ") and words in message and len(message.splitlines()) == 1, message
    assert len(message) < 600 and "\x1b" not in message
    assert time.time() - start < 5 and sampler.fingerprint(policy[1]) == before


def test_bad_files(policy, good, tmp_path):
    line = json.dumps(good).encode() + b"\n"
    plain = {name: good[name] for name in ("id", "prompt", "completion")}
    for content, words in ((b"", "no rollouts"), (b"\n \r\n\n", "no rollouts"), (b"\xef\xbb\xbf" + line, ":1: .*byte order mark"),
                           (gzip.compress(line), ":1: not UTF-8"), (line + b"x" * 100_000_000, ":2: longer than .* bytes"),
                           (line * 3 + b"\xff\n" * 30, ":4: not UTF-8"), (b"PK\x03\x04" + bytes(200), ":1: not a JSON"),
                           (b"".join(json.dumps({**plain, "reward": r}).encode() + b"\n" for r in (0, 1)), "--map-rewards")):
        path = in_a_file(tmp_path, content)
        with pytest.raises(Problem, match=words) as error:
            read(policy, path)
        assert len(str(error.value).splitlines()) <= 10
    for path, words in ((tmp_path, "directory"), (tmp_path / "none.jsonl", "No such file")):
        with pytest.raises(Problem, match=words):
            read(policy, path)
    for mapping in ("1", "a,b", "nan,1", "-1,1,2"):
        with pytest.raises(Problem, match="--map-rewards"):
            read(policy, in_a_file(tmp_path, good), map_rewards=mapping)
    path = in_a_file(tmp_path, good)
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root reads everything
        with pytest.raises(Problem, match="Permission denied"):
            read(policy, path)


def test_a_bad_file_by_the_command_line(policy, good, tmp_path):
    path = in_a_file(tmp_path, good, {**good, "reward": "\x1b]0;title\x07good"}, {**good, "completion_ids": [999] * 12})
    result = shell(sys.executable, ROOT / "train.py", "--model", policy[0], "--rollouts", path, "--out", tmp_path / "out")
    lines = [line for line in result.stdout.splitlines() if str(path) in line]
    assert result.returncode == 2 and len(lines) == 2 and "Traceback" not in result.stdout and "\x1b]" not in result.stdout
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_odd_files_that_are_right(policy, good, tmp_path, capsys):
    """CRLF, blank lines, no newline at the end, unknown fields, the same completion twice, one reward for all."""
    line = json.dumps({**good, "mine": {"x": 1}, "prompt": "\u00fc \0 " + PROMPT, "prompt_ids": good["prompt_ids"]}).encode()
    data = read(policy, in_a_file(tmp_path, line + b"\r\n", b"\r\n", b"  \n", line))
    assert data.lines.tolist() == [1, 4]
    out = capsys.readouterr().out
    assert "1 duplicate completions, each kept" in out and "all rewards are 1" in out


def test_ids_that_fit_their_text_are_read_whoever_wrote_them(policy, good):
    """vLLM keeps or drops special tokens and spaces, cuts stop words off, and may end within a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer, ids = policy[2], good["completion_ids"]
    for text in (COMPLETION, COMPLETION + "</s>", " " + COMPLETION, COMPLETION + "\n", COMPLETION[:-2], "<s>" + COMPLETION,
                 "3 + 2 = 5 .", "The answer is 5 .", "", COMPLETION.upper()):
        assert foreign_tokens([{"completion": text, "completion_ids": ids}], tokenizer) == [False], text
    unknown = "thrice and unheard of ! 5"
    assert foreign_tokens([{"completion": unknown, "completion_ids": tokenizer(unknown).input_ids[1:]}], tokenizer) == [False]
    for text in ("No", "Something else is written here .", "Die Antwort ist 5"):
        assert foreign_tokens([{"completion": text, "completion_ids": ids}, {"completion": text}], tokenizer) == [True, False], text
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer("caf\u00e9 \U0001f600").input_ids
    for cut in range(1, len(ids) + 1):
        for text in (tokenizer.decode(ids[:cut]), tokenizer.decode(ids[:cut]).rstrip("\ufffd")):  # engines differ here too
            assert foreign_tokens([{"completion": text, "completion_ids": ids[:cut]}], tokenizer) == [False], (cut, text)


def flipped_files(model, rollouts, folder, times, seed=0):
    """(files refused in words, files read) of so many with up to four bytes changed. Anything else is raised."""
    policy = model, *sampler.load_model(model, train.Settings(), "cpu")
    rng, whole, counts = random.Random(seed), open(rollouts, "rb").read(), [0, 0]
    say, batches.say = batches.say, lambda *_: None
    try:
        for _ in range(times):
            content = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            with open(f"{folder}/flipped.jsonl", "wb") as file:
                file.write(content)
            try:
                data = read(policy, f"{folder}/flipped.jsonl")
                assert len(data.lines) > 0 and data.rewards.dtype == float
                data.mu = data.logprobs
                batches.micro_batches(train.Settings(), data, data.units, torch.device("cpu"))
                counts[1] += 1
            except Problem as problem:
                assert str(problem)
                counts[0] += 1
    finally:
        batches.say = say
    return counts


def test_flipped_bytes(policy, good, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["engine.rollouts"], "progress", lambda *_, **__: common.tqdm(disable=True))
    path = in_a_file(tmp_path, *[{**good, "id": str(number)} for number in range(4)])
    refused, read_well = flipped_files(policy[0], path, tmp_path, 2000)
    assert refused + read_well == 2000 and refused > 50 and read_well > 50


# ---- hostile content ----


def test_nothing_is_written_outside_and_nothing_is_garbled(policy, good, tmp_path, capsys):
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True)
    rows = [{**good, "id": f"../../x{number}\x1b[2J", "completion": COMPLETION + "\x1b]0;mine\x07", "reward": 1.0 - 2 * (number % 2)}
            for number in range(4)]
    write_rollouts(folder / "rollouts.jsonl", rows)
    common.say("\x1b[31mred\r\u202e", "fine \u00fc\n\ttoo")
    train.train(train.Settings(model=policy[0], rollouts=str(folder / "rollouts.jsonl"), out=str(folder / "out"), mu="start"))
    assert sorted(os.listdir(tmp_path)) == ["a"] and sorted(os.listdir(tmp_path / "a")) == ["b"]
    out = capsys.readouterr().out
    assert out.startswith("\\x1b[31mred\\r\\u202e fine \u00fc\n\ttoo\n") and "\x1b" not in out


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_code_comes_with_a_model(policy, good, tmp_path):
    """A pickle in place of safetensors, code beside a model, a pickle in a checkpoint: refused, and never run."""
    mark, folder = str(tmp_path / "executed"), tmp_path / "model"
    shell("cp", "-r", policy[0], folder)
    os.remove(folder / "model.safetensors")
    for name in ("pytorch_model.bin", "model.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    with pytest.raises(Problem, match="cannot be loaded"):
        sampler.load_model(str(folder), train.Settings(), "cpu")
    code = folder / "modeling_mine.py"
    code.write_text(f"open({mark!r}, 'w')\nclass Mine: pass\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": {
        "AutoConfig": "modeling_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}}))
    with pytest.raises(Problem, match="cannot be loaded"):
        sampler.load_model(str(folder), train.Settings(), "cpu")
    write_rollouts(tmp_path / "rollouts.jsonl", [good] * 4)
    settings = train.Settings(model=policy[0], rollouts=str(tmp_path / "rollouts.jsonl"), out=str(tmp_path / "out"), mu="file")
    os.makedirs(tmp_path / "out")
    shell("cp", "-r", policy[0], tmp_path / "out/checkpoint-00000001")
    (tmp_path / "out/checkpoint-00000001/step.json").write_text('{"step": 1}')
    for name in (".metadata", "__0_0.distcp", "model.safetensors"):  # where torch keeps pickles
        (tmp_path / "out/checkpoint-00000001" / name).write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    with pytest.raises(Problem, match="checkpoint-00000001: cannot be opened"):
        train.train(settings)
    assert not os.path.exists(mark)


# ---- disks and ranks ----


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_rollouts(tmp_path / "kept.jsonl", [{"id": "old"}])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Problem, match="kept.jsonl: cannot be written: No space left on device") as error:
        with whole_file(tmp_path / "kept.jsonl") as file:
            file.write("new")
    assert len(str(error.value).splitlines()) == 1 and os.listdir(tmp_path) == ["kept.jsonl"]
    assert "old" in (tmp_path / "kept.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("way, words", [
    ("os.kill(os.getpid(), 9)", "rank 1 (process "), ("1 / 0", "(rank 1): failed: ZeroDivisionError"),
    ("parallel.watched['ended'].set(); time.sleep(100)", "rank 1 (process ")])
def test_a_lost_rank_is_named(tmp_path, way, words):
    """Killed, failing, or without a sign of life: the others end soon, and one line says which it was."""
    (tmp_path / "lost.py").write_text(
        "import os, time\nfrom engine import common, parallel\nparallel.SILENCE = 6\n"
        f"def main():\n    parallel.start_ranks()\n    if parallel.rank() == 1:\n        {way}\n"
        "    parallel.barrier()\ncommon.run_main(main)\n")
    start = time.time()
    result = torchrun(2, tmp_path / "lost.py")
    assert result.returncode != 0 and words in result.stdout and "gloo" not in result.stdout, result.stdout
    assert time.time() - start < 60
