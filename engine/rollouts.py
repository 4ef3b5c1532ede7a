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
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def file_fingerprint(path):
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# ---- reading ----


def read_rollouts(path, map_rewards="", need_reward=True):
    """A whole file as a list of rows, for files that fit in memory."""
    return [row for _, row in each_rollout(path, map_rewards, need_reward)]


def each_rollout(path, map_rewards="", need_reward=True):
    """Yields (line number, row); the first fault is a Problem that says where and what to do.

    need_reward: the rows are for training. Those that are still to be graded may lack a reward.
    """
    mapping, rewards = parse_reward_map(map_rewards), set()
    for number, line in read_lines(path, "reading"):
        row = parse_line(line, f"{path}:{number}", mapping, need_reward)
        rewards.add(row.get("reward"))
        yield number, row
    if not rewards:
        raise Problem(f"{path}: no rollouts in it")
    if need_reward and 0.0 in rewards and rewards <= {0.0, 1.0}:
        raise Problem(
            f"{path}: all rewards are 0 or 1, and 0 would silently drop every wrong "
            "completion: say what they mean, for instance --map-rewards=-1,1"
        )


def read_lines(path, what):
    """(line number, line) of each line that is not blank."""
    with reading(path):
        total = os.path.getsize(path)
        with open(path, "rb") as file, progress(total=total, what=what, unit="B") as bar:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise Problem(
                        f"{path}:{number}: longer than {LONGEST_LINE:,} bytes: is this a "
                        "JSONL file?"
                    )
                if line.strip():
                    yield number, line
                bar.update(len(line))


def parse_line(line, place, mapping=None, need_reward=True):
    """One line of bytes to a row, or a Problem that says where, what is wrong and what to do."""
    try:
        row = decode_json(line.decode("utf-8"))
        if b"\\u" in line:  # it may spell half a surrogate pair, which is no text
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise Problem(
            f"{place}: not UTF-8 ({error.reason}): unpack the file, if it is compressed; "
            "save it as plain UTF-8"
        )
    except (ValueError, RecursionError) as error:
        torn = "" if line.endswith(b"\n") else " (the last line is torn: remove it)"
        raise Problem(f"{place}: not a JSON object: {error}{torn}")
    if not isinstance(row, dict):
        raise Problem(f"{place}: a {type(row).__name__}, not a JSON object")
    for field in ("id", "prompt", "completion"):
        if not isinstance(row.get(field), str):
            why = "missing" if field not in row else "not a string"
            raise Problem(f'{place}: "{field}" is {why}')
    check_optional(row, place)
    if need_reward or "reward" in row:
        row["reward"] = read_reward(row.get("reward"), place, mapping)
    return row


def refuse_constant(name):
    raise ValueError(f"{name} is not a number that JSON knows")


decode_json = json.JSONDecoder(parse_constant=refuse_constant).decode


def parse_reward_map(text):
    """ "-1,1" as {0: -1.0, 1: 1.0}"""
    number = r"([+-]?[0-9]+(?:\.[0-9]+)?)"
    numbers = re.fullmatch(f"{number},{number}", text)
    if text and not numbers:
        raise Problem(f"--map-rewards {text}: two numbers are required, for instance -1,1")
    return {0: float(numbers[1]), 1: float(numbers[2])} if text else None


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
        if ids is not None and not (ids and all(type(n) is int and 0 <= n < 2**31 for n in ids)):
            raise Problem(f'{place}: "{field}" must hold whole numbers from 0 on, at least one')
    if not row["completion"] and not row.get("completion_ids"):
        raise Problem(f"{place}: the completion is empty: remove the line")
    logprobs = row.get("logprobs") or []
    if logprobs and len(logprobs) != len(row.get("completion_ids") or []):
        raise Problem(
            f"{place}: {len(logprobs)} logprobs, which are not as many as its "
            '"completion_ids", the tokens they belong to'
        )
    for position, value in enumerate(logprobs):
        if type(value) not in (int, float) or not -LARGEST < value <= 1e-6:
            raise Problem(
                f"{place}: logprob {position} is {value!r:.40}: a finite number, "
                "0 or less, is required"
            )
