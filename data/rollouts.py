"""The rollout file: one JSON object a line, one completion each. The one place that knows the format.

    {"id": "q7", "prompt": "2 + 2 ?", "completion": "The answer is 4.", "reward": 1.0}

id, prompt, completion and reward must be there; see README.md in this folder for the optional fields.

    python data/rollouts.py export FILE OUT            prompt, completion, label (true, false), as TRL's KTO trainer reads them
    python data/rollouts.py export FILE OUT --pairs    prompt, chosen, rejected, as its DPO trainer does
"""

import array
import dataclasses
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script: find the package data
from engine.common import Problem, parse, progress, run_main, say, setting, whole_file

LONGEST_LINE = 64 * 2**20  # bytes; a longer one is a damaged file, not a completion
LARGEST = 3e38  # what float32, in which the loss is computed, can hold
OPTIONAL = {"prompt_ids": list, "completion_ids": list, "logprobs": list, "answer": str, "gold": str, "finish": str,
            "sampling": dict}


def write_rollouts(path, rows):
    """All rows, or no file: it appears under its name only when it is complete."""
    with whole_file(path) as file:
        for row in rows:
            file.write(to_line(row))


def to_line(row):
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_rollouts(path, zero_is_wrong=False):
    """A whole file as a list, for files that fit in memory."""
    file = RolloutFile(path, zero_is_wrong=zero_is_wrong)
    return [file[i] for i in range(len(file))]


def file_fingerprint(path):
    """RolloutFile's, without a look at the rows."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for line in file:
                digest.update(line if line.strip() else b"")
    except OSError as error:
        raise Problem(f"{path}: cannot be read: {error.strerror}")
    return digest.hexdigest()[:16]


def parse_line(line, where, map_rewards=None):
    """One line of bytes to a rollout, or a Problem that says where, what is wrong and what to do."""
    if len(line) > LONGEST_LINE:
        raise Problem(f"{where}: the line has {len(line):,} bytes, more than {LONGEST_LINE:,}: is this a JSONL file?")
    try:
        row = decode_json(line.decode("utf-8"))
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise Problem(f"{where}: not UTF-8 (byte {error.start + 1}): save the file as UTF-8")
    except UnicodeEncodeError:
        raise Problem(f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character: remove the line")
    except (ValueError, RecursionError) as error:
        torn = "" if line.endswith(b"\n") else " (the last line is torn: remove it, or write the file again)"
        raise Problem(f"{where}: not a JSON object: {error}{torn}")
    if not isinstance(row, dict):
        raise Problem(f"{where}: a {type(row).__name__}, not a JSON object")
    for field in ("id", "prompt", "completion"):
        if not isinstance(row.get(field), str):
            raise Problem(f'{where}: "{field}" is {"missing" if field not in row else "not a string"}')
    check_optional(row, where)
    row["reward"] = checked_reward(row, where, map_rewards)
    return row


def not_finite(name):
    raise ValueError(f"{name} is not a number that JSON knows")


decode_json = json.JSONDecoder(parse_constant=not_finite).decode


def reward_map(text):
    """"-1,1" as {0: -1.0, 1: 1.0}"""
    numbers = re.fullmatch(r"([+-]?[0-9.]+),([+-]?[0-9.]+)", text)
    if not numbers:
        raise Problem(f"--map-rewards {text}: two numbers are needed, for instance -1,1")
    return {0: float(numbers[1]), 1: float(numbers[2])}


def checked_reward(row, where, map_rewards):
    reward = row.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, (int, float)):
        raise Problem(f'{where}: "reward" is {"missing" if reward is None else f"{reward!r:.40}, not a number"}')
    if map_rewards:
        if reward not in map_rewards:
            raise Problem(f"{where}: reward {reward!r:.40} with --map-rewards: only 0 and 1 can be mapped")
        return map_rewards[reward]
    if not -LARGEST < reward < LARGEST:
        raise Problem(f"{where}: the reward {reward!r:.40} is too large")
    return float(reward)


def check_optional(row, where):
    for field, kind in OPTIONAL.items():
        if row.get(field) is not None and not isinstance(row[field], kind):
            raise Problem(f'{where}: "{field}" is a {type(row[field]).__name__}, not a {kind.__name__}')
    prompt_ids, completion_ids, logprobs = (row.get(field) for field in ("prompt_ids", "completion_ids", "logprobs"))
    for field in ("prompt_ids", "completion_ids"):
        if row.get(field) is not None and not all(type(i) is int and i >= 0 for i in row[field]):
            raise Problem(f'{where}: "{field}" must hold whole numbers from 0 on')
    if not row["completion"] and not completion_ids:
        raise Problem(f"{where}: the completion is empty: remove the line")
    if completion_ids is not None and not completion_ids:
        raise Problem(f'{where}: "completion_ids" is empty: remove the line, or the field')
    if prompt_ids is not None and not prompt_ids:
        raise Problem(f'{where}: "prompt_ids" is empty: the first completion token has nothing before it')
    if logprobs is None:
        return
    if completion_ids is None:
        raise Problem(f'{where}: "logprobs" without "completion_ids": nobody can tell which token each belongs to')
    if len(logprobs) != len(completion_ids):
        raise Problem(f"{where}: {len(logprobs)} logprobs for {len(completion_ids)} completion_ids")
    for position, value in enumerate(logprobs):
        if type(value) not in (int, float) or not -LARGEST < value <= 1e-6:
            raise Problem(f"{where}: logprob {position} is {value!r:.40}: a finite number, 0 or less, is needed")


class RolloutFile:
    """Reads rows when they are asked for; holds an offset, a reward and two hashes a line, never the text."""

    def __init__(self, path, map_rewards=None, check=None, what="reading", zero_is_wrong=False):
        """Passes over the file once. `check(rows)` tells of each row its length in tokens, or in words what is wrong with it.

        Up to ten bad lines are shown together. zero_is_wrong: rewards of 0 and 1 may stand, for only their sign is looked at.
        """
        self.path, self.map_rewards = path, map_rewards and reward_map(map_rewards)
        offsets, rewards, questions, rows = array.array("q"), array.array("d"), array.array("q"), array.array("q")
        lengths, lines, has_logprobs = array.array("q"), array.array("q"), array.array("b")
        digest, problems = hashlib.sha256(), []
        for batch in self.batches(what, digest):
            good = [row for _, _, row in batch if not isinstance(row, Problem)]
            verdicts = iter(check(good) if check else [0] * len(good))
            for offset, number, row in batch:
                length = None if isinstance(row, Problem) else next(verdicts)
                if not isinstance(length, int):
                    problems.append(f"{path}:{number}: {length}" if length else str(row))
                    continue
                offsets.append(offset)
                lines.append(number)
                rewards.append(row["reward"])
                lengths.append(length)
                has_logprobs.append(row.get("logprobs") is not None)
                questions.append(short_hash(row["id"]))
                rows.append(short_hash(row["id"] + "\0" + row["completion"]))
            if len(problems) >= 10:
                break
        if problems:
            raise Problem("\n".join(problems[:10]))
        if not offsets:
            raise Problem(f"{path}: no rollouts in it")
        self.offsets, self.lines, self.rewards, self.lengths, self.questions, self.has_logprobs = map(
            np.asarray, (offsets, lines, rewards, lengths, questions, has_logprobs))  # each [rows]
        self.has_logprobs = self.has_logprobs.astype(bool)
        self.repeated = len(rows) - len(np.unique(np.asarray(rows)))
        self.fingerprint = digest.hexdigest()[:16]
        if set(np.unique(self.rewards)) <= {0.0, 1.0} and (self.rewards == 0).any() and not zero_is_wrong:
            raise Problem(f"{path}: all rewards are 0 or 1, and 0 would silently drop every wrong completion: "
                          "say what they mean, for instance --map-rewards=-1,1")

    def batches(self, what, digest):
        """Lists of (offset, line number, row or Problem), of about a megabyte each: a tokenizer likes many texts at once."""
        batch, size = [], 0
        for offset, number, line in self.scan(what):
            digest.update(line)
            try:
                row = parse_line(line, f"{self.path}:{number}", self.map_rewards)
            except Problem as problem:
                row = problem
            batch.append((offset, number, row))
            size += len(line)
            if size > 2**20:
                yield batch
                batch, size = [], 0
        yield batch

    def scan(self, what):
        """(offset, line number, line) of each line that is not blank."""
        try:
            size = os.path.getsize(self.path)
            with open(self.path, "rb") as file, progress(total=size, what=what, unit="B") as bar:
                offset, number = 0, 0
                while line := file.readline(LONGEST_LINE + 1):
                    number += 1
                    if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                        raise Problem(f"{self.path}:1: starts with a byte order mark: save the file as plain UTF-8")
                    if line.strip():
                        yield offset, number, line
                    if len(line) > LONGEST_LINE:
                        return  # parse_line has said so; what follows is no line of its own
                    offset += len(line)
                    bar.update(len(line))
        except OSError as error:
            raise Problem(f"{self.path}: cannot be read: {error.strerror}")

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return parse_line(file.readline(), f"{self.path}:{self.lines[i]}", self.map_rewards)


def short_hash(text):
    """64 bits that are the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True)


# ---- for other tools ----


@dataclasses.dataclass
class ExportSettings:
    pairs: bool = setting(False, "prompt, chosen, rejected instead of prompt, completion, label")
    map_rewards: str = setting("", "rewards for 0 and 1 in a file that has them, for instance -1,1")


def main():
    options = [word for word in sys.argv[1:] if word.startswith("-")]
    settings = parse(ExportSettings, options, "python data/rollouts.py export FILE OUT [options]")
    words = [word for word in sys.argv[1:] if word not in options]
    if len(words) != 3 or words[0] != "export":
        raise Problem("what is to be done? python data/rollouts.py export FILE OUT, or with --pairs")
    export(RolloutFile(words[1], settings.map_rewards), words[2], settings.pairs)


def export(file, out, pairs=False):
    """A file of the few columns that other trainers want, each of one type in every row."""
    labelled = lambda row: {"prompt": row["prompt"], "completion": row["completion"], "label": row["reward"] > 0}
    rows = as_pairs(file) if pairs else map(labelled, map(file.__getitem__, range(len(file))))
    written = 0
    with whole_file(out) as lines:
        for row in rows:
            lines.write(to_line(row))
            written += 1
    say(f"{out}: {written:,} rows")


def as_pairs(file):
    """Each question's correct and wrong completions of the same prompt, each used once at most."""
    from topr import preference_pairs

    families = [short_hash(f"{row['id']}\0{row['prompt']}") for row in map(file.__getitem__, range(len(file)))]
    pairs = preference_pairs({"id": family, "reward": reward} for family, reward in zip(families, file.rewards))
    if not pairs:
        raise Problem(f"{file.path}: no question has both a correct and a wrong completion: there are no pairs")
    for better, worse in pairs:
        yield {"prompt": file[better]["prompt"], "chosen": file[better]["completion"], "rejected": file[worse]["completion"]}


if __name__ == "__main__":
    run_main(main)
