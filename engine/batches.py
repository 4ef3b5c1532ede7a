"""Which rows a step takes, how they are packed into forward passes, and their log mu.

    JSONL lines -> read_data: arrays of tokens -> step_units: the rows of a step -> micro_batches
"""

import dataclasses
import functools
import hashlib
import math
import os
import typing

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import topr
from engine.rollouts import MOST_FAULTS, check_file, file_fingerprint, read_batches, short_hash
from engine.tokens import all_token_ids, end_token_of, foreign_tokens
from engine.common import Problem, first_line, progress, say, whole_file
from engine.parallel import barrier, from_first, rank, sum_over_ranks, world

DEFAULT_TOKENS = {"cpu": 1024, "cuda": 16384}  # in a forward pass; more is slower on a CPU


@dataclasses.dataclass(eq=False)
class Data:
    """A rollout file as arrays."""

    path: str
    fingerprint: str
    lines: np.ndarray  # [rows], line numbers
    rewards: np.ndarray  # [rows]
    questions: list  # [rows], their ids
    prompts: list  # [rows] of [int]; equal ones are one object
    prompt_keys: np.ndarray  # [rows], equal for equal prompts
    completions: np.ndarray  # [tokens], end to end
    starts: np.ndarray  # [rows + 1], where each completion starts in it
    logprobs: np.ndarray  # [tokens], log mu of each completion token; NaN if the file has none
    lengths: np.ndarray  # [rows], tokens of prompt and completion
    model_width: int
    units: np.ndarray = None  # [units, 1 or 2]: rows, or pairs of rows for DPO
    units_per_step: int = 0
    mu: np.ndarray = None  # [tokens], log mu of the run; None if it is not needed
    pack: bool = False  # several completions of a prompt in one row
    mask_dtype: torch.dtype = torch.float32  # of the compute
    tokens_per_pass: int = 16384
    ranks: int = 1
    rank: int = 0


# ---- reading ----


def read_data(settings, model, tokenizer, device):
    """The rollout file as arrays, checked before any weight moves."""
    config, end_token = model.config.get_text_config(), end_token_of(model, tokenizer)
    room = getattr(config, "max_position_embeddings", None) or math.inf
    faults, lines, rewards, questions, prompts, keys = [], [], [], [], [], []
    completions, logprobs, seen_prompts, distinct = [], [], {}, set()
    for batch in read_batches(settings.rollouts, faults, settings.map_rewards):
        rows = [row for _, row in batch]
        tokens = all_token_ids(rows, tokenizer, end_token)
        foreign = foreign_tokens(rows, tokenizer)
        for (line, row), (prompt, completion), other in zip(batch, tokens, foreign):
            fault = find_fault(prompt, completion, other, config.vocab_size, room)
            if fault:
                faults.append(f"{settings.rollouts}:{line}: {fault}")
                continue
            lines.append(line)
            rewards.append(row["reward"])
            questions.append(row["id"])
            key = hash(tuple(prompt))
            keys.append(key)
            prompts.append(seen_prompts.setdefault(key, prompt))
            completions.append(np.array(completion, np.int32))
            mu = row.get("logprobs") or [math.nan] * len(completion)
            logprobs.append(np.array(mu, np.float32))
            distinct.add(short_hash(f"{row['id']}\0{row['completion']}"))
        if len(faults) >= MOST_FAULTS:
            break
    check_file(settings.rollouts, faults, set(rewards))
    sizes = np.array([len(completion) for completion in completions])
    data = Data(path=settings.rollouts, fingerprint=file_fingerprint(settings.rollouts),
                lines=np.array(lines), rewards=np.array(rewards), questions=questions,
                prompts=prompts, prompt_keys=np.array(keys),
                completions=np.concatenate(completions), starts=np.cumsum([0, *sizes]),
                logprobs=np.concatenate(logprobs),
                lengths=sizes + [len(prompt) for prompt in prompts],
                model_width=config.hidden_size, ranks=world(), rank=rank())
    data.tokens_per_pass = settings.tokens_per_pass or DEFAULT_TOKENS.get(device.type, 16384)
    data.mask_dtype = torch.bfloat16 if settings.precision == "bfloat16" else model.dtype
    if len(distinct) < len(lines):
        say(f"{data.path}: {len(lines) - len(distinct):,} duplicate completions, each kept")
    make_units(settings, data)
    return data


def find_fault(prompt, completion, foreign, vocabulary, room):
    """What is wrong with a row's tokens, or None."""
    advice = "Without prompt_ids, completion_ids and logprobs the text alone counts"
    if max(prompt, default=0) >= vocabulary or max(completion) >= vocabulary:
        return (f"a token id beyond the model's vocabulary of {vocabulary}: was this file written "
                f"with another model? {advice}")
    if foreign:
        return ("its completion_ids do not decode to its completion: was this file written with "
                f"another tokenizer? {advice}")
    if not prompt:
        return "the prompt has no tokens: the first completion token has nothing before it"
    if len(prompt) + len(completion) > room:
        return (f"{len(prompt)} prompt and {len(completion)} completion tokens do not fit the "
                f"model's {room}: remove the line")


def make_units(settings, data):
    """What the order shuffles: rows, those that Anna Karenina keeps, or pairs of rows for DPO."""
    rows = [{"row": row, "id": data.questions[row], "reward": reward}
            for row, reward in enumerate(data.rewards)]
    if settings.anna_karenina:
        rows = topr.anna_karenina(rows)
        say(f"Anna Karenina sampling keeps {len(rows):,} of {len(data.rewards):,} completions")
    data.units = np.array([row["row"] for row in rows])[:, None]  # [units, 1]
    if settings.loss == "dpo":
        for row in rows:  # answers to different prompts are no pair
            row["id"] = (row["id"], data.prompt_keys[row["row"]])
        pairs = topr.preference_pairs(rows)
        if not pairs:
            raise Problem(f"{data.path}: dpo needs questions with both a correct and a wrong "
                          "completion; there is none")
        data.units = data.units[np.array(pairs), 0]  # [units, 2]
    data.units_per_step = max(1, settings.sequences // data.units.shape[1])
    rewards = set(data.rewards[data.units].flat)
    if len(rewards) == 1:
        say(f"{data.path}: all rewards are {rewards.pop():g}")


def line_numbers(data, rows):
    return f"{data.path}, lines {', '.join(str(data.lines[row]) for row in rows[:64])}"


# ---- the rows of a step ----


def steps_per_epoch(data):
    return math.ceil(len(data.units) / data.units_per_step)


def step_units(settings, data, step):
    """The units of an optimizer step, [units, 1 or 2], the same for any number of ranks.

    The last step of an epoch may be smaller.
    """
    epoch, step = divmod(step, math.ceil(len(data.units) / data.units_per_step))
    order = epoch_order(data, settings.seed, epoch, settings.prompt_group)
    chosen = order[step * data.units_per_step : (step + 1) * data.units_per_step]
    return data.units[chosen]


@functools.lru_cache(maxsize=1)
def epoch_order(data, seed, epoch, prompt_group):
    """A random order of the units in which up to `prompt_group` rows of one prompt are adjacent."""
    random = np.random.default_rng([seed, epoch])
    by_prompt = {}
    for unit in random.permutation(len(data.units)):
        by_prompt.setdefault(data.prompt_keys[data.units[unit, 0]], []).append(unit)
    size = max(1, prompt_group // data.units.shape[1])
    groups = []
    for key in sorted(by_prompt):
        units = by_prompt[key]
        groups += [units[start : start + size] for start in range(0, len(units), size)]
    shuffled = [None] * len(groups)
    for group, place in zip(groups, random.permutation(len(groups))):
        shuffled[place] = group
    return np.concatenate(shuffled)  # [units]


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

    Units become bundles, which are dealt out to the ranks by length. Sharded ranks must run equally
    many passes, and each rank at least one under DDP: a rank that has fewer gets filler passes,
    without any sequence.
    """
    bundles = make_bundles(settings, data, units)
    passes = []  # of each rank, a list of lists of bundles
    most = settings.micro_batch or math.inf
    for number in range(data.ranks):
        passes.append([])
        taken = count = longest = 0
        for height, length, bundle in bundles[number :: data.ranks]:
            full = (taken + height) * longest > data.tokens_per_pass or count + len(bundle) > most
            if not passes[number] or full:
                passes[number].append([])
                taken, count, longest = 0, 0, length  # the longest bundle comes first
            passes[number][-1].append(bundle)
            taken += height
            count += len(bundle)
    mine = [make_batch(data, chosen, device) for chosen in passes[data.rank]]
    wanted = max(map(len, passes)) if settings.shard else 1
    while len(mine) < wanted:
        mine.append(make_batch(data, [bundles[-1][2]], device, filler=True))
    return mine


def make_bundles(settings, data, units):
    """(rows in a pass, tokens in each, rows of the file), the longest first: a unit, or several
    that share a prompt and are packed into one row."""
    bundles, by_prompt = [], {}
    for unit in units:
        if data.pack:
            by_prompt.setdefault(data.prompt_keys[unit[0]], []).append(unit)
        else:
            bundles.append((len(unit), data.lengths[unit].max(), unit))
    for key in sorted(by_prompt):
        group = np.array(by_prompt[key])  # [units of this prompt, 1 or 2]
        prompt = len(data.prompts[group[0, 0]])
        completion = data.lengths[group].mean() - prompt
        most = min(units.size // data.ranks, settings.micro_batch or group.size, group.size,
                   int(data.tokens_per_pass // (prompt + completion)))
        fit = completions_per_row(prompt, completion, most, data.model_width)
        parts = math.ceil(len(group) / max(1, fit // group.shape[1]))
        for part in np.array_split(group, parts):
            rows = part.ravel()
            length = prompt + (data.lengths[rows] - prompt).sum()
            bundles.append((1, length, rows))
    order = np.argsort([-length for _, length, _ in bundles], kind="stable")
    return [bundles[place] for place in order]


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


def make_batch(data, bundles, device, filler=False):
    rows = np.concatenate(bundles)
    layout = []
    for bundle in bundles:
        prompt = data.prompts[bundle[0]]
        completions = [data.completions[data.starts[row] : data.starts[row + 1]] for row in bundle]
        layout += [(prompt, completions)] if data.pack else [(prompt, [c]) for c in completions]
    packed = pack(layout, device, data.mask_dtype)
    if filler:
        rows = rows[:0]
        packed["mask"] = torch.zeros_like(packed["mask"])
    lengths = torch.tensor(data.starts[rows + 1] - data.starts[rows], device=device)  # [batch]
    time = torch.arange(1 if filler else lengths.max(), device=device)
    mask = time < lengths[:, None]  # [batch, time]
    mu_logp = None
    if data.mu is not None:
        values = [data.mu[data.starts[row] : data.starts[row + 1]] for row in rows]
        values = torch.tensor(np.concatenate([[], *values]), dtype=torch.float32, device=device)
        mu_logp = torch.zeros(mask.shape, device=device).masked_scatter(mask, values)
    reward = torch.tensor(data.rewards[rows], dtype=torch.float32, device=device)
    return MicroBatch(rows, packed, mask, mu_logp, reward)


def pack(layout, device=None, mask_dtype=None):
    """Arguments of completion_logprobs for rows of (prompt, its completions), lists of tokens.

        ids       prompt prompt prompt | first first | second second second
        position       0      1      2 |     3     4 |      3      4      5

    A completion sees the prompt and itself, at the positions that it has alone; its first token is
    predicted from the prompt's last. Rows of one completion each need no more than ids and mask.
    Padded on the right. mask_dtype: additive attention mask in this type, else a boolean one.
    """
    rows = []
    for prompt, completions in layout:
        ids = list(prompt)
        position = list(range(len(prompt)))
        previous = [max(0, place - 1) for place in position]
        part = [0] * len(prompt)  # 0 the prompt, 1, 2 .. its completions, -1 padding
        for number, completion in enumerate(completions, 1):
            start, size = len(ids), len(completion)
            ids += list(completion)
            position += range(len(prompt), len(prompt) + size)
            previous += [len(prompt) - 1, *range(start, start + size - 1)]
            part += [number] * size
        rows.append((ids, position, previous, part))
    longest = max(len(ids) for ids, *_ in rows)
    columns = []
    for values, fill in zip(zip(*rows), (0, 0, 0, -1)):
        padded = [value + [fill] * (longest - len(value)) for value in values]
        columns.append(torch.tensor(padded, device=device))  # [rows, time]
    ids, position, previous, part = columns
    packed = {"ids": ids, "mask": part > 0}
    if max(len(completions) for _, completions in layout) > 1:
        visible = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        attention = visible.tril()[:, None]  # [rows, 1, time, time]
        if mask_dtype:  # a boolean one would be converted, and kept, in every layer
            hidden = torch.zeros(attention.shape, dtype=mask_dtype, device=device)
            attention = hidden.masked_fill(~attention, -math.inf)
        packed |= {"position_ids": position, "previous": previous, "attention_mask": attention}
    return packed


@torch.no_grad()
def can_pack(model, longest=0, mask_dtype=None):
    """Tries whether this model gives packed completions the log-probs that they have alone.

    A model that keeps a state, or counts positions its own way, does not, and our mask would hide
    a sliding window that is shorter than the longest sequence.
    """
    config = model.config.get_text_config()
    if longest > (getattr(config, "sliding_window", None) or longest):
        return False
    if model.config._attn_implementation != "sdpa":
        return False
    random = torch.Generator().manual_seed(0)
    prompt, *draws = torch.randint(config.vocab_size, (33, 4), generator=random).tolist()
    completions, neighbours = draws[:16], draws[16:]
    mixed = [pair[n % 2] for n, pair in enumerate(zip(completions, neighbours))]  # every other one
    layouts = {"alone": [(prompt, [completion]) for completion in completions],
               "packed": [(prompt, completions)], "other neighbours": [(prompt, mixed)]}
    logprobs = {}
    autocast = mask_dtype == torch.bfloat16 and model.dtype == torch.float32
    try:
        for name, layout in layouts.items():
            packed = pack(layout, model.device, mask_dtype)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                values = topr.completion_logprobs(model, **packed)[packed["mask"]]
            logprobs[name] = values.reshape(16, 4)[::2]  # of those that stay the same
    except (ValueError, TypeError, RuntimeError):  # it takes no such mask, or no positions
        return False
    leak = (logprobs["packed"] - logprobs["other neighbours"]).abs().max().item()
    distance = (logprobs["packed"] - logprobs["alone"]).abs().mean().item()
    exact = mask_dtype in (None, torch.float32) and model.dtype == torch.float32
    return leak < 1e-6 and distance < (1e-4 if exact else 0.1)


# ---- log mu ----


def make_mu(settings, policy, data, device, needs_mu, model_fingerprint):
    """Sets data.mu, log mu of every completion token, for the whole run. Returns its source.

    Re-anchoring mu on the current weights would make every ratio 1 and turn TOPR into naive
    REINFORCE unnoticed.
    """
    missing = int(np.isnan(data.logprobs[data.starts[:-1]]).sum())
    if not needs_mu:
        data.mu = None if missing else data.logprobs
        return "not needed"
    if settings.mu != "start" and not missing:
        data.mu = data.logprobs
        if settings.mu == "checked":
            check_fit(settings, policy, data, device)
        return "from the file"
    if settings.mu == "file":
        raise Problem(f"{data.path}: {missing:,} of {len(data.lines):,} rows hold no logprobs, "
                      "which --mu file needs: --mu start computes them")
    tokens = hashlib.sha256(data.completions.tobytes() + data.prompt_keys.tobytes()).hexdigest()
    path = (f"{data.path}.mu-{model_fingerprint[:8]}-{tokens[:8]}-{settings.precision}.safetensors")
    if not from_first(os.path.exists(path)):
        everything = np.arange(len(data.lines))
        data.mu = score_rows(settings, policy, data, everything, device)
        if rank() == 0:
            with whole_file(path, "wb") as file:
                file.write(save({"logprobs": torch.from_numpy(data.mu)}))
        barrier()
    try:
        data.mu = load_file(path)["logprobs"].numpy()
    except (SafetensorError, OSError) as error:
        raise Problem(f"{path}: cannot be read: {first_line(error)}. Remove it, and it is computed "
                      "again")
    return f"of the starting weights, in {path}"


@torch.no_grad()
def score_rows(settings, policy, data, rows, device):
    """log pi of the completions of some rows, on every rank: [tokens] as data.completions."""
    scores = torch.zeros(len(data.completions))
    chunk = 64 * data.ranks
    for start in progress(range(0, len(rows), chunk), what="log mu of the starting weights"):
        for batch in micro_batches(settings, data, rows[start : start + chunk, None], device):
            logp = policy(batch.packed, batch.mask).cpu()  # [batch, time]
            for row, values, mask in zip(batch.rows, logp, batch.mask.cpu()):
                scores[data.starts[row] : data.starts[row + 1]] = values[mask]
    return sum_over_ranks(scores).numpy()


def check_fit(settings, policy, data, device):
    """Refuses logprobs that the starting weights did not write: pi/mu is 1 at the start."""
    tolerance = settings.mu_tolerance
    if tolerance is None:
        tolerance = 0.1 if data.mask_dtype == torch.float32 else 2.0
    rows = np.unique(np.linspace(0, len(data.lines) - 1, 64).astype(int))  # from all of the file
    scores = score_rows(settings, policy, data, rows, device)
    largest = 0.0
    for row in rows:
        tokens = slice(data.starts[row], data.starts[row + 1])
        largest = max(largest, abs((scores[tokens] - data.mu[tokens]).sum().item()))
    say(f"{data.path}: before the first step the largest |log pi/mu| of {len(rows)} completions is "
        f"{largest:.2g}")
    if not largest <= tolerance:
        raise Problem(
            f"{data.path}: its logprobs do not fit {settings.model}: |log pi/mu| is {largest:.3g} "
            f"before the first step, over the tolerance of {tolerance}. If another policy wrote "
            "the file on purpose: --mu file. If its logprobs are not those of a plain softmax at "
            "temperature 1, or you do not know: --mu start computes them with the starting "
            "weights. If the engine that wrote it computes less exactly: --mu-tolerance")
