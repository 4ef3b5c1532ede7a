"""Which rows of the rollout file a step takes, and how they are dealt out to forward passes.

JSONL lines -> read_data: rows of tokens -> step_units: the rows of a step -> micro_batches
"""

import dataclasses
import functools
import math
import operator
import typing

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import topr
from engine.common import Problem, say
from engine.packing import pack
from engine.parallel import rank, world
from engine.rollouts import each_rollout
from engine.tokens import end_token_of, is_foreign, token_ids

PROMPT_GROUP = 4  # completions of a prompt that stay adjacent in the random order, to be packed
CHECKED_ROWS = 64  # of a file, whose tokens are compared with their text


class Row(typing.NamedTuple):
    """A completion of the file."""

    line: int
    question: str  # its id
    reward: float
    prompt: tuple  # of tokens; equal ones are one object
    completion: np.ndarray  # [time]
    logprobs: np.ndarray  # [time], log mu of each token; None if the file has none


@dataclasses.dataclass(eq=False)
class Data:
    """A rollout file, and how the run goes through it. What stands last comes from
    train.set_up."""

    rows: list
    units: np.ndarray  # [units, 1 or 2]: rows, or pairs of rows for DPO
    units_per_step: int
    steps: int = None  # of an epoch
    rank: int = 0  # which of the ranks this is, and of how many
    ranks: int = 1
    lengths: np.ndarray = None  # [rows], tokens of prompt and completion
    rewards: np.ndarray = None  # [rows]

    silent: np.ndarray = None  # [rows]: True where the loss gives no gradient whatever pi is
    mu: list = None  # [rows] of [time], log mu of the run; None if it is not needed
    mu_tolerance: float = None  # within which it must fit the starting weights, if it must
    packs: bool = False  # several completions of a prompt in one row of a forward pass


# ---- reading ----


def read_data(settings, model, tokenizer):
    """The rollout file, checked before any weight moves."""
    config, end_token = model.config.get_text_config(), end_token_of(model, tokenizer)
    rows, prompts = [], {}
    for line, row in each_rollout(settings.rollouts, settings.map_rewards):
        prompt, completion = token_ids(row, tokenizer, end_token)
        fault = find_fault(row, prompt, completion, config)
        if fault is None and len(rows) < CHECKED_ROWS and is_foreign(row, tokenizer):
            fault = f"its completion_ids do not decode to its completion. {TEXT_ALONE}"
        if fault:
            raise Problem(f"{settings.rollouts}:{line}: {fault}")
        prompt, mu = tuple(prompt), row.get("logprobs")
        rows.append(
            Row(
                line,
                row["id"],
                row["reward"],
                prompts.setdefault(prompt, prompt),
                np.array(completion, np.int32),
                np.array(mu, np.float32) if mu else None,
            )
        )
    units = make_units(settings, rows)
    units_per_step = max(1, settings.sequences // units.shape[1])
    return Data(
        rows,
        units,
        units_per_step,
        steps=math.ceil(len(units) / units_per_step),
        rank=rank(),
        ranks=world(),
        lengths=np.array([len(row.prompt) + len(row.completion) for row in rows]),
        rewards=np.array([row.reward for row in rows]),
    )


TEXT_ALONE = (
    "Was this file written with another model? Without prompt_ids, completion_ids and "
    "logprobs the text alone counts"
)


def find_fault(row, prompt, completion, config):
    """What is wrong with a row or its tokens, or None."""
    room = getattr(config, "max_position_embeddings", None) or math.inf
    if row.get("split") == "test":
        return "a question of the test split: sample rollouts with eval.py --split train"
    if not prompt:
        return "the prompt has no tokens: the first completion token has nothing before it"
    if not completion:
        return "the completion has no tokens: remove the line"
    if max(*prompt, *completion) >= config.vocab_size:
        return f"a token id beyond the model's vocabulary of {config.vocab_size}. {TEXT_ALONE}"
    if len(prompt) + len(completion) > room:
        return (
            f"{len(prompt)} prompt and {len(completion)} completion tokens do not fit the "
            f"model's {room}: remove the line"
        )


def make_units(settings, rows):
    """What the order shuffles: rows, those that Anna Karenina keeps, or pairs of rows for DPO."""
    kept = [
        {"row": number, "id": (row.question, row.prompt), "reward": row.reward}
        for number, row in enumerate(rows)
    ]
    if settings.anna_karenina:
        kept = topr.anna_karenina(kept)
        say(f"Anna Karenina sampling keeps {len(kept):,} of {len(rows):,} completions")
    numbers = np.array([row["row"] for row in kept])
    if settings.loss != "dpo":
        return numbers[:, None]  # [units, 1]
    pairs = topr.preference_pairs(kept)
    if not pairs:
        raise Problem(
            f"{settings.rollouts}: dpo needs questions with both a correct and a wrong "
            "completion; there is none"
        )
    return numbers[np.array(pairs)]  # [units, 2]


# ---- the rows of a step ----


def step_units(settings, data, step):
    """The units of an optimizer step, [units, 1 or 2], the same for any number of ranks.

    The last step of an epoch may be smaller.
    """
    epoch, step = divmod(step, data.steps)
    units = epoch_units(data, settings.seed, epoch)
    return units[step * data.units_per_step : (step + 1) * data.units_per_step]


@functools.lru_cache(maxsize=1)
def epoch_units(data, seed, epoch):
    """All units in a random order in which up to PROMPT_GROUP rows of one prompt are adjacent."""
    random = np.random.default_rng([seed, epoch])
    size, groups = PROMPT_GROUP // data.units.shape[1], []
    for units in by_prompt(data, data.units[random.permutation(len(data.units))]):
        groups += [units[start : start + size] for start in range(0, len(units), size)]
    places = random.permutation(len(groups))  # of each group
    return np.concatenate([groups[number] for number in places.argsort()])


def by_prompt(data, units):
    """The units of each prompt, in an order of the prompts that never changes."""
    groups = {}
    for unit in units:
        groups.setdefault(data.rows[unit[0]].prompt, []).append(unit)
    # A prompt is numbers, whose hash is the same in every process.
    return [np.stack(groups[prompt]) for prompt in sorted(groups, key=hash)]


# ---- forward passes ----


class MicroBatch(typing.NamedTuple):
    """One forward pass. batch: its sequences; time: the tokens of a completion alone."""

    rows: np.ndarray  # [batch], rows of the file
    packed: dict  # arguments of completion_logprobs
    mask: torch.Tensor  # [batch, time]
    mu_logp: torch.Tensor  # [batch, time], or None
    reward: torch.Tensor  # [batch]


def micro_batches(settings, data, units, model):
    """This rank's forward passes for some units.

    The units become bundles, which the ranks take in turns, the longest first. All ranks run
    equally many passes, because shards are gathered and gradients exchanged together: a rank that
    has fewer gets passes without any sequence.
    """
    limit = settings.tokens_per_pass or (1024 if model.device.type == "cpu" else 16384)
    bundles = make_bundles(data, units, limit, model.config.get_text_config().hidden_size)
    passes = [[] for _ in range(data.ranks)]  # of each rank
    for number, mine in enumerate(passes):
        room = 0  # for rows in its last pass, as long as the first one, which is the longest
        for length, bundle in bundles[number :: data.ranks]:
            if len(bundle) > room:
                mine.append([])
                room = limit // length
            mine[-1].extend(bundle)
            room -= len(bundle)
    batches = [make_batch(data, lines, model.device) for lines in passes[data.rank]]
    while len(batches) < max(1, *map(len, passes)):
        batches.append(empty_batch(model.device))
    return batches


def make_bundles(data, units, limit, width):
    """[(tokens in a row, bundle)], the longest first. A bundle is what stays together, [rows in a
    forward pass, completions in each]: a unit, or several that are packed into one row."""
    bundles = []
    for group in by_prompt(data, units):  # [units of this prompt, 1 or 2]
        prompt = len(data.rows[group[0, 0]].prompt)
        completion = data.lengths[group].mean() - prompt
        most = min(units.size // data.ranks, group.size, int(limit // (prompt + completion)))
        fit = completions_per_row(prompt, completion, most if data.packs else 1, width)
        parts = math.ceil(len(group) / max(1, fit // group.shape[1]))
        for part in np.array_split(group, parts):
            bundle = part.reshape(1 if data.packs else part.size, -1)
            length = prompt + (data.lengths[bundle] - prompt).sum(1).max()
            bundles.append((length, bundle))
    return sorted(bundles, key=operator.itemgetter(0), reverse=True)


def completions_per_row(prompt, completion, most, width):
    """How many completions behind one prompt cost least, given the lengths of both and the model's
    width.

    Packing saves prompt tokens, but attention computes all pairs of a row, masked ones too. In a
    layer a token takes 24 width^2 operations in the matrices, a pair 4 width: 6 width pairs cost as
    much as a token.
    """
    n = np.arange(1, max(1, most) + 1)
    cost = (prompt / n + completion) * 6 * width + (prompt + n * completion) ** 2 / n
    return int(n[cost.argmin()])


def make_batch(data, lines, device):
    """lines: the rows of the file that share a row of the forward pass, for each of its rows"""
    layout = [
        (data.rows[line[0]].prompt, [data.rows[row].completion for row in line]) for line in lines
    ]
    packed, mask = pack(layout, device)
    rows = np.concatenate(lines)  # [batch]
    mu_logp = None
    if data.mu is not None:
        values = [torch.from_numpy(data.mu[row]) for row in rows]
        mu_logp = pad_sequence(values, batch_first=True).to(device)  # [batch, time]
    reward = torch.tensor(data.rewards[rows], dtype=torch.float32, device=device)
    return MicroBatch(rows, packed, mask, mu_logp, reward)


def empty_batch(device):
    """A forward pass without any sequence, whose gradients are 0."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    nothing = torch.zeros(0, 1, device=device)  # [no sequence, time]
    packed = {"ids": ids, "mask": ids > 0}
    return MicroBatch(np.array([], int), packed, nothing > 0, nothing, nothing[:, 0])
