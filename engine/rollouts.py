"""The rollout file: one JSON object a line, one completion each. Only this file knows the format.

    {"id": "q7", "prompt": "2 + 2 ?", "completion": "The answer is 4.", "reward": 1.0}

id, prompt, completion and reward are required; data/README.md has the optional fields.
"""

import hashlib
import json
import os
import re

from engine.common import Problem, progress, whole_file

LONGEST_LINE = 64 * 2**20  # bytes; a longer one is a damaged file, not a completion
LARGEST = 3e38  # float32, in which the loss is computed, holds no more
MOST_FAULTS = 10  # reported together
OPTIONAL = {"prompt_ids": list, "completion_ids": list, "logprobs": list, "answer": str,
            "gold": str, "finish": str, "split": str, "sampling": dict}


# ---- writing ----


def write_rollouts(path, rows):
    """All rows, or no file: it appears under its name only when it is complete."""
    with whole_file(path) as file:
        for row in rows:
            file.write(to_line(row))


def to_line(row):
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def short_hash(text):
    """64 bits that are the same in every process, unlike hash()."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def file_fingerprint(path):
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise Problem(f"{path}: cannot be read: {error.strerror}")


# ---- reading ----


def read_rollouts(path, map_rewards="", zero_is_wrong=False, what="reading"):
    """A whole file as a list of rows, for files that fit in memory."""
    faults, rows = [], []
    for batch in read_batches(path, faults, map_rewards, what):
        rows += [row for _, row in batch]
    check_file(path, faults, {row["reward"] for row in rows}, zero_is_wrong)
    return rows


def read_batches(path, faults, map_rewards="", what="reading"):
    """Lists of (line number, row), about a megabyte each: a tokenizer likes many texts at once.

    What is wrong with a line goes into `faults`; after MOST_FAULTS of them reading ends.
    """
    mapping = parse_reward_map(map_rewards) if map_rewards else None
    batch, size = [], 0
    for number, line in read_lines(path, what):
        try:
            batch.append((number, parse_line(line, f"{path}:{number}", mapping)))
        except Problem as problem:
            faults.append(str(problem))
        size += len(line)
        if size > 2**20:
            yield batch
            batch, size = [], 0
        if len(faults) >= MOST_FAULTS:
            break
    yield batch


def read_lines(path, what):
    """(line number, line) of each line that is not blank."""
    try:
        total = os.path.getsize(path)
        with open(path, "rb") as file, progress(total=total, what=what, unit="B") as bar:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    raise Problem(f"{path}:1: byte order mark: save it as plain UTF-8")
                if line.strip():
                    yield number, line
                if len(line) > LONGEST_LINE:
                    return  # parse_line reports it; the rest of it is not a line
                bar.update(len(line))
    except OSError as error:
        raise Problem(f"{path}: cannot be read: {error.strerror}")


def check_file(path, faults, rewards, zero_is_wrong=False):
    """Raises what is wrong with a file as a whole. rewards: the set of those in it."""
    if faults:
        raise Problem("\n".join(faults[:MOST_FAULTS]))
    if not rewards:
        raise Problem(f"{path}: no rollouts in it")
    if 0.0 in rewards and rewards <= {0.0, 1.0} and not zero_is_wrong:
        raise Problem(f"{path}: all rewards are 0 or 1, and 0 would silently drop every wrong "
                      "completion: say what they mean, for instance --map-rewards=-1,1")


def parse_line(line, place, mapping=None):
    """One line of bytes to a row, or a Problem that says where, what is wrong and what to do."""
    if len(line) > LONGEST_LINE:
        raise Problem(f"{place}: longer than {LONGEST_LINE:,} bytes: is this a JSONL file?")
    try:
        row = decode_json(line.decode("utf-8"))
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise Problem(f"{place}: not UTF-8 (byte {error.start + 1}): save the file as UTF-8")
    except UnicodeEncodeError:
        raise Problem(f"{place}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no "
                      "character: remove the line")
    except (ValueError, RecursionError) as error:
        is_torn = not line.endswith(b"\n")
        advice = " (the last line is torn: remove it, or write the file again)" if is_torn else ""
        raise Problem(f"{place}: not a JSON object: {error}{advice}")
    if not isinstance(row, dict):
        raise Problem(f"{place}: a {type(row).__name__}, not a JSON object")
    for field in ("id", "prompt", "completion"):
        if not isinstance(row.get(field), str):
            why = "missing" if field not in row else "not a string"
            raise Problem(f'{place}: "{field}" is {why}')
    check_optional(row, place)
    row["reward"] = read_reward(row.get("reward"), place, mapping)
    return row


def refuse_constant(name):
    raise ValueError(f"{name} is not a number that JSON knows")


decode_json = json.JSONDecoder(parse_constant=refuse_constant).decode


def parse_reward_map(text):
    """"-1,1" as {0: -1.0, 1: 1.0}"""
    numbers = re.fullmatch(r"([+-]?[0-9.]+),([+-]?[0-9.]+)", text)
    if not numbers:
        raise Problem(f"--map-rewards {text}: two numbers are required, for instance -1,1")
    return {0: float(numbers[1]), 1: float(numbers[2])}


def read_reward(reward, place, mapping):
    if isinstance(reward, bool) or not isinstance(reward, (int, float)):
        why = "missing" if reward is None else f"{reward!r:.40}, not a number"
        raise Problem(f'{place}: "reward" is {why}')
    if mapping and reward not in mapping:
        raise Problem(f"{place}: reward {reward!r:.40}: --map-rewards: only 0 and 1 can be mapped")
    if not -LARGEST < reward < LARGEST:
        raise Problem(f"{place}: the reward {reward!r:.40} is too large")
    return mapping[reward] if mapping else float(reward)


def check_optional(row, place):
    for field, kind in OPTIONAL.items():
        if row.get(field) is not None and not isinstance(row[field], kind):
            found = type(row[field]).__name__
            raise Problem(f'{place}: "{field}" is a {found}, not a {kind.__name__}')
    for field in ("prompt_ids", "completion_ids"):
        ids = row.get(field)
        if ids is not None and not all(type(token) is int and token >= 0 for token in ids):
            raise Problem(f'{place}: "{field}" must hold whole numbers from 0 on')
        if ids is not None and not ids:
            raise Problem(f'{place}: "{field}" is empty: remove the line, or the field')
    if not row["completion"] and not row.get("completion_ids"):
        raise Problem(f"{place}: the completion is empty: remove the line")
    logprobs = row.get("logprobs")
    if logprobs is None:
        return
    if row.get("completion_ids") is None:
        raise Problem(f'{place}: "logprobs" without "completion_ids", the tokens they belong to')
    if len(logprobs) != len(row["completion_ids"]):
        raise Problem(f"{place}: {len(logprobs)} logprobs for {len(row['completion_ids'])} "
                      "completion_ids")
    for position, value in enumerate(logprobs):
        if type(value) not in (int, float) or not -LARGEST < value <= 1e-6:
            raise Problem(f"{place}: logprob {position} is {value!r:.40}: a finite number, "
                          "0 or less, is required")
