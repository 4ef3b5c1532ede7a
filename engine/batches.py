"""Which rows of the rollout file a step takes, and how they are dealt out to forward passes.

    JSONL lines -> read_data: rows of tokens -> step_units: the rows of a step -> micro_batches
"""

import dataclasses
import functools
import itertools
import math
import operator
import typing

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import topr
from engine.common import Problem, say
from engine.packing import completion_mask, dtype_of_compute, pack
from engine.parallel import rank, world
from engine.rollouts import each_rollout, file_fingerprint
from engine.tokens import all_token_ids, end_token_of, is_foreign

DEFAULT_TOKENS = {"cpu": 1024, "cuda": 16384}  # in a forward pass; more is slower on a CPU
PROMPT_GROUP = 4  # completions of a prompt that stay adjacent in the random order, to be packed
CHECKED_ROWS = 64  # of a file, whose tokens are compared with their text


@dataclasses.dataclass(slots=True, eq=False)
class Row:
    """A completion of the file."""

    line: int
    question: str  # its id
    reward: float
    prompt: tuple  # of tokens; equal ones are one object
    completion: np.ndarray  # [time]
    logprobs: np.ndarray  # [time], log mu of each token; None if the file has none


@dataclasses.dataclass(eq=False)
class Data:
    """A rollout file, and how the run goes through it."""

    path: str
    fingerprint: str
    rows: list
    lengths: np.ndarray  # [rows], tokens of prompt and completion
    rewards: np.ndarray  # [rows]
    tokens_per_pass: int
    mask_dtype: torch.dtype  # of the compute
    model_width: int
    units: np.ndarray = None  # [units, 1 or 2]: rows, or pairs of rows for DPO
    units_per_step: int = 0
    silent: np.ndarray = None  # [rows]: True where the loss gives no gradient whatever pi is
    mu: list = None  # [rows] of [time], log mu of the run; None if it is not needed
    check_mu: bool = False  # whether it is to fit the starting weights, at the first step
    pack: bool = False  # several completions of a prompt in one row
    ranks: int = 1
    rank: int = 0


# ---- reading ----


def read_data(settings, model, tokenizer, device):
    """The rollout file, checked before any weight moves."""
    config, path = model.config.get_text_config(), settings.rollouts
    rows, prompts = [], {}
    for line, row, prompt, completion in each_tokenized(settings, model, tokenizer):
        fault = find_fault(prompt, completion, config)
        if row.get("split") == "test":
            fault = "a question of the test split: sample rollouts with eval.py --split train"
        if fault is None and len(rows) < CHECKED_ROWS and is_foreign(row, tokenizer):
            fault = f"its completion_ids do not decode to its completion. {TEXT_ALONE}"
        if fault:
            raise Problem(f"{path}:{line}: {fault}")
        prompt, mu = tuple(prompt), row.get("logprobs")
        rows.append(Row(line, row["id"], row["reward"], prompts.setdefault(prompt, prompt),
                        np.array(completion, np.int32), np.array(mu, np.float32) if mu else None))
    data = Data(
        path=path, fingerprint=file_fingerprint(path), rows=rows,
        lengths=np.array([len(row.prompt) + len(row.completion) for row in rows]),
        rewards=np.array([row.reward for row in rows]),
        tokens_per_pass=settings.tokens_per_pass or DEFAULT_TOKENS.get(device.type, 16384),
        mask_dtype=dtype_of_compute(model, settings.precision),
        model_width=config.hidden_size, ranks=world(), rank=rank())
    make_units(settings, data)
    return data


def each_tokenized(settings, model, tokenizer):
    """Yields (line, row, its prompt's tokens, its completion's); tokenizers like many texts."""
    end_token = end_token_of(model, tokenizer)
    rollouts = each_rollout(settings.rollouts, settings.map_rewards)
    while chunk := list(itertools.islice(rollouts, 1024)):
        tokens = all_token_ids([row for _, row in chunk], tokenizer, end_token)
        for (line, row), (prompt, completion) in zip(chunk, tokens):
            yield line, row, prompt, completion


TEXT_ALONE = ("Was this file written with another model? Without prompt_ids, completion_ids and "
              "logprobs the text alone counts")


def find_fault(prompt, completion, config):
    """What is wrong with a row's tokens, or None."""
    room = getattr(config, "max_position_embeddings", None) or math.inf
    if not prompt:
        return "the prompt has no tokens: the first completion token has nothing before it"
    if not completion:
        return "the completion has no tokens: remove the line"
    if max(*prompt, *completion) >= config.vocab_size:
        return f"a token id beyond the model's vocabulary of {config.vocab_size}. {TEXT_ALONE}"
    if len(prompt) + len(completion) > room:
        return (f"{len(prompt)} prompt and {len(completion)} completion tokens do not fit the "
                f"model's {room}: remove the line")


def make_units(settings, data):
    """What the order shuffles: rows, those that Anna Karenina keeps, or pairs of rows for DPO."""
    rows = [{"row": number, "id": (row.question, row.prompt), "reward": row.reward}
            for number, row in enumerate(data.rows)]
    if settings.anna_karenina:
        rows = topr.anna_karenina(rows)
        say(f"Anna Karenina sampling keeps {len(rows):,} of {len(data.rows):,} completions")
    data.units = np.array([row["row"] for row in rows])[:, None]  # [units, 1]
    if settings.loss == "dpo":
        pairs = topr.preference_pairs(rows)
        if not pairs:
            raise Problem(f"{data.path}: dpo needs questions with both a correct and a wrong "
                          "completion; there is none")
        data.units = data.units[np.array(pairs), 0]  # [units, 2]
    data.units_per_step = max(1, settings.sequences // data.units.shape[1])
    data.silent = np.zeros(len(data.rows), bool)


def line_numbers(data, rows):
    return f"{data.path}, lines {', '.join(str(data.rows[row].line) for row in rows[:64])}"


# ---- the rows of a step ----


def steps_per_epoch(data):
    return math.ceil(len(data.units) / data.units_per_step)


def step_units(settings, data, step):
    """The units of an optimizer step, [units, 1 or 2], the same for any number of ranks.

    The last step of an epoch may be smaller.
    """
    epoch, step = divmod(step, steps_per_epoch(data))
    order = epoch_order(data, settings.seed, epoch)
    return data.units[order[step * data.units_per_step : (step + 1) * data.units_per_step]]


@functools.lru_cache(maxsize=1)
def epoch_order(data, seed, epoch):
    """A random order of the units in which up to PROMPT_GROUP rows of one prompt are adjacent."""
    random = np.random.default_rng([seed, epoch])
    size, groups = max(1, PROMPT_GROUP // data.units.shape[1]), []
    for units in by_prompt(data, random.permutation(len(data.units)), data.units[:, 0]):
        groups += [units[start : start + size] for start in range(0, len(units), size)]
    shuffled = [None] * len(groups)
    for group, place in zip(groups, random.permutation(len(groups))):
        shuffled[place] = group
    return np.concatenate(shuffled)  # [units]


def by_prompt(data, items, first_rows):
    """Lists of the items whose prompt is the same, in an order of the prompts that never changes.

    first_rows[item]: a row of the item.
    """
    groups = {}
    for item in items:
        groups.setdefault(data.rows[first_rows[item]].prompt, []).append(item)
    return [groups[prompt] for prompt in sorted(groups, key=hash)]  # of numbers: no random hash


# ---- forward passes ----


class MicroBatch(typing.NamedTuple):
    """One forward pass. batch: its sequences; time: the tokens of a completion alone."""

    rows: np.ndarray  # [batch], rows of the file
    packed: dict  # arguments of completion_logprobs
    mask: torch.Tensor  # [batch, time]
    mu_logp: torch.Tensor  # [batch, time], or None
    reward: torch.Tensor  # [batch]


def micro_batches(settings, data, units, device):
    """This rank's forward passes for some units.

    Silent units are left out: they have a part in N, and in nothing else. The others become
    bundles, which are dealt out to the ranks by length. Sharded ranks must run equally many passes,
    and each rank at least one under DDP: a rank that has fewer gets filler passes, without any
    sequence.
    """
    bundles = make_bundles(data, units[~data.silent[units[:, 0]]])
    passes = []  # of each rank, a list of lists of bundles
    for number in range(data.ranks):
        passes.append([])
        taken = longest = 0
        for height, length, rows in bundles[number :: data.ranks]:
            if not passes[number] or (taken + height) * longest > data.tokens_per_pass:
                passes[number].append([])
                taken, longest = 0, length  # the longest bundle comes first
            passes[number][-1].append(rows)
            taken += height
    mine = [make_batch(data, bundles, device) for bundles in passes[data.rank]]
    wanted = max(1, *map(len, passes)) if settings.shard else 1
    while len(mine) < wanted:
        mine.append(filler_batch(data, device))
    return mine


def make_bundles(data, units):
    """(rows in a pass, tokens in each, rows of the file), the longest first: a unit, or several
    that share a prompt and are packed into one row."""
    if not data.pack:
        bundles = [(len(unit), data.lengths[unit].max(), unit) for unit in units]
    else:
        bundles = []
        for group in by_prompt(data, range(len(units)), units[:, 0]):
            group = units[group]  # [units of this prompt, 1 or 2]
            prompt = len(data.rows[group[0, 0]].prompt)
            completion = data.lengths[group].mean() - prompt
            most = min(units.size // data.ranks, group.size,
                       int(data.tokens_per_pass // (prompt + completion)))
            fit = completions_per_row(prompt, completion, most, data.model_width)
            parts = math.ceil(len(group) / max(1, fit // group.shape[1]))
            for part in np.array_split(group, parts):
                rows = part.ravel()
                bundles.append((1, prompt + (data.lengths[rows] - prompt).sum(), rows))
    return sorted(bundles, key=operator.itemgetter(1), reverse=True)


def completions_per_row(prompt, completion, most, width):
    """How many completions behind one prompt cost least, given the lengths of both and the model's
    width.

    Packing saves prompt tokens, but attention computes all pairs of a row, masked ones too. In a
    layer a token takes 24 width^2 operations in the matrices, a pair 4 width: 6 width pairs cost as
    much as a token.
    """
    best, least = 1, math.inf
    for n in range(1, most + 1):
        cost = (prompt / n + completion) * 6 * width + (prompt + n * completion) ** 2 / n
        if cost < least:
            best, least = n, cost
    return best


def make_batch(data, bundles, device):
    numbers, layout = np.concatenate(bundles), []
    for bundle in bundles:
        prompt = data.rows[bundle[0]].prompt
        completions = [data.rows[number].completion for number in bundle]
        layout += [(prompt, completions)] if data.pack else [(prompt, [c]) for c in completions]
    mask = completion_mask([data.rows[number].completion for number in numbers], device)
    mu_logp = None
    if data.mu is not None:
        values = [torch.from_numpy(data.mu[number]) for number in numbers]
        mu_logp = pad_sequence(values, batch_first=True).to(device)  # [batch, time]
    reward = torch.tensor(data.rewards[numbers], dtype=torch.float32, device=device)
    return MicroBatch(numbers, pack(layout, device, data.mask_dtype), mask, mu_logp, reward)


def filler_batch(data, device):
    """A forward pass without any sequence, whose gradients are 0."""
    batch = make_batch(data, data.units[:1], device)
    packed = {**batch.packed, "mask": torch.zeros_like(batch.packed["mask"])}
    mu_logp = None if batch.mu_logp is None else batch.mu_logp[:0]
    return MicroBatch(batch.rows[:0], packed, batch.mask[:0], mu_logp, batch.reward[:0])
