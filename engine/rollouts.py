"""The rollout file: one JSON object a line, one completion each. Only this file knows the format.

    {"id": "q7", "prompt": "2 + 2 ?", "completion": "The answer is 4.", "reward": 1.0}

id, prompt, completion and reward are required; data/README.md has the optional fields.
"""

import hashlib
import json
import os
import re

from engine.common import Problem, progress, reading, whole_file

LONGEST_LINE = 2**24  # bytes; a longer one is a damaged file, not a completion
LARGEST = 3e38  # float32, in which the loss is computed, holds no more
OPTIONAL = {
    "prompt_ids": list,
    "completion_ids": list,
    "logprobs": list,
    "answer": str,
    "gold": str,
    "finish": str,
    "split": str,
    "sampling": dict,
}


# ---- writing ----


def write_rollouts(path, rows):
    """All rows, or no file: it appears under its name only when it is complete."""
    with whole_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def short_hash(text):
    """64 bits that are the same in every process, unlike hash()."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def file_fingerprint(path):
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# ---- reading ----


def read_rollouts(path, need_reward=True):
    """A whole file as a list of rows, for files that fit in memory."""
    return [row for _, row in each_rollout(path, need_reward=need_reward)]


def each_rollout(path, map_rewards="", need_reward=True):
    """Yields (line number, row); the first fault is a Problem that says where and what to do.

    need_reward: the rows are for training. Those that are still to be graded may lack a reward.
    """
    mapping, rewards = parse_reward_map(map_rewards), set()
    for number, line in read_lines(path):
        place = f"{path}:{number}"
        row = parse_line(line, place)
        if need_reward or "reward" in row:
            row["reward"] = read_reward(row.get("reward"), place, mapping)
        rewards.add(row.get("reward"))
        yield number, row
    if not rewards:
        raise Problem(f"{path}: no rollouts in it")
    if need_reward and 0.0 in rewards and rewards <= {0.0, 1.0}:
        raise Problem(
            f"{path}: all rewards are 0 or 1, and 0 would silently drop every wrong "
            "completion: say what they mean, for instance --map-rewards=-1,1"
        )


def parse_reward_map(text):
    """ "-1,1" as {0: -1.0, 1: 1.0}"""
    if not text:
        return {}
    number = r"([+-]?[0-9]+(?:\.[0-9]+)?)"
    numbers = re.fullmatch(f"{number},{number}", text)
    if not numbers:
        raise Problem(f"--map-rewards {text}: two numbers are required, for instance -1,1")
    return dict(enumerate(map(float, numbers.groups())))


def read_reward(reward, place, mapping):
    if type(reward) not in (int, float):
        why = "missing" if reward is None else f"{reward!r:.40}, not a number"
        raise Problem(f'{place}: "reward" is {why}')
    if mapping and reward not in mapping:
        raise Problem(f"{place}: reward {reward!r:.40}: --map-rewards: only 0 and 1 can be mapped")
    if not -LARGEST < reward < LARGEST:
        raise Problem(f"{place}: the reward {reward!r:.40} is too large")
    return float(mapping.get(reward, reward))


def read_lines(path):
    """(line number, line) of each line that is not blank."""
    number = 0
    with (
        reading(path),
        open(path, "rb") as file,
        progress(total=os.path.getsize(path), what="reading", unit="B") as bar,
    ):
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise Problem(
                    f"{path}:{number}: longer than {LONGEST_LINE:,} bytes: is this a JSONL file?"
                )
            if line.strip():
                yield number, line
            bar.update(len(line))


def parse_line(line, place):
    """One line of bytes to a row, or a Problem that says where, what is wrong and what to do."""
    try:
        row = decode_json(line.decode())
        if b"\\u" in line:  # it may spell half a surrogate pair, which is no text
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise Problem(f"{place}: not UTF-8 ({error.reason}): save it as plain UTF-8, uncompressed")
    except (ValueError, RecursionError) as error:
        torn = "" if line.endswith(b"\n") else " (the last line is torn: remove it)"
        raise Problem(f"{place}: not a JSON object: {error}{torn}")
    if not isinstance(row, dict):
        raise Problem(f"{place}: a {type(row).__name__}, not a JSON object")
    for field in ("id", "prompt", "completion"):
        if not isinstance(row.get(field), str):
            why = "missing" if field not in row else "not a string"
            raise Problem(f'{place}: "{field}" is {why}')
    for field, kind in OPTIONAL.items():
        if not isinstance(row.get(field), kind | None):
            raise Problem(
                f'{place}: "{field}" is a {type(row[field]).__name__}, not a {kind.__name__}'
            )
    for field in ("prompt_ids", "completion_ids"):
        ids = row.get(field)
        if ids is not None and not (ids and all(type(n) is int and 0 <= n < 2**31 for n in ids)):
            raise Problem(f'{place}: "{field}" must hold whole numbers from 0 on, at least one')
    completion_ids, logprobs = row.get("completion_ids") or [], row.get("logprobs") or []
    if not row["completion"] and not completion_ids:
        raise Problem(f"{place}: the completion is empty: remove the line")
    if logprobs and len(logprobs) != len(completion_ids):
        raise Problem(f"{place}: {len(logprobs)} logprobs, not as many as its completion_ids")
    for position, value in enumerate(logprobs):
        if type(value) not in (int, float) or not -LARGEST < value <= 1e-6:
            raise Problem(
                f"{place}: logprob {position} is {value!r:.40}: it must be finite, 0 or less"
            )
    return row


def refuse_constant(name):
    raise ValueError(f"{name} is not a number that JSON knows")


decode_json = json.JSONDecoder(parse_constant=refuse_constant).decode  # made once: it takes time
