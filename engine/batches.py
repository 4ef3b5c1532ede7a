"""Which rows a step takes, how they are packed into forward passes, and where their log mu comes from."""

import array
import functools
import hashlib
import itertools
import math
import os

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import topr
from data.rollouts import RolloutFile
from data.tokens import all_token_ids, foreign_tokens
from engine.common import Problem, first_line, progress, say, whole_file
from engine.parallel import barrier, gather, rank, world
from topr import completion_logprobs


def read_data(settings, model, tokenizer):
    """The rollout file, checked before any weight moves, with the units of the data: rows, or pairs of rows for DPO."""
    text = model.config.get_text_config()
    room, vocabulary = getattr(text, "max_position_embeddings", None) or math.inf, text.vocab_size

    prompts, prompt_lengths, completions = array.array("q"), array.array("q"), array.array("q")

    def fault(prompt_ids, completion_ids, foreign):
        if max(prompt_ids, default=0) >= vocabulary or max(completion_ids) >= vocabulary:
            return (f"a token id beyond the model's vocabulary of {vocabulary}: was this file written with another "
                    "model? Without prompt_ids, completion_ids and logprobs the text alone counts")
        if foreign:
            return ("its completion_ids do not decode to its completion: was this file written with another tokenizer? "
                    "Without prompt_ids, completion_ids and logprobs the text alone counts")
        if not prompt_ids:
            return "the prompt has no tokens: the first completion token has nothing before it"
        if len(prompt_ids) + len(completion_ids) > room:
            return (f"{len(prompt_ids)} prompt and {len(completion_ids)} completion tokens do not fit the model's {room}: "
                    "remove the line")

    def check(rows):
        tokens = all_token_ids(rows, tokenizer)
        prompts.extend(hash(tuple(prompt)) for prompt, _ in tokens)
        prompt_lengths.extend(len(prompt) for prompt, _ in tokens)
        completions.extend(hash(tuple(completion)) for _, completion in tokens)
        foreign = foreign_tokens(rows, tokenizer)
        return [fault(*ids, other) or len(ids[0]) + len(ids[1]) for ids, other in zip(tokens, foreign)]

    data = RolloutFile(settings.rollouts, settings.map_rewards, check)
    data.prompts, data.prompt_lengths, data.model_width = np.asarray(prompts), np.asarray(prompt_lengths), text.hidden_size
    data.tokens = hashlib.sha256(prompts.tobytes() + completions.tobytes()).hexdigest()  # a text has others in each tokenizer
    data.units = np.arange(len(data))[:, None]  # [units, 1]
    rows = lambda: [{"row": row, "id": data.questions[row], "reward": data.rewards[row]} for row in data.units[:, 0]]
    if settings.anna_karenina:
        data.units = np.array([kept["row"] for kept in topr.anna_karenina(rows())])[:, None]
        say(f"Anna Karenina sampling keeps {len(data.units):,} of {len(data):,} completions")
    if settings.loss == "dpo":
        pairs = topr.preference_pairs([{**row, "id": (row["id"], data.prompts[row["row"]])} for row in rows()])
        if not pairs:
            raise Problem(f"{data.path}: dpo needs questions with both a correct and a wrong completion; there is none")
        data.units = data.units[np.array(pairs), 0]  # [units, 2]
    data.units_per_step = max(1, settings.sequences // data.units.shape[1])
    if data.repeated:
        say(f"{data.path}: {data.repeated:,} completions stand there more than once; each counts")
    rewards = data.rewards[data.units]
    if (rewards == rewards.flat[0]).all():
        say(f"{data.path}: all rewards are {rewards.flat[0]:g}")
    return data


def step_sequences(settings, data, step):
    """The rows of an optimizer step, by the seed alone: the number of ranks changes nothing. The last may be fewer."""
    steps_per_epoch = math.ceil(len(data.units) / data.units_per_step)
    epoch, step = divmod(step, steps_per_epoch)
    order = epoch_order(data, settings.seed, epoch, max(1, settings.prompt_group // data.units.shape[1]))
    chosen = order[step * data.units_per_step : (step + 1) * data.units_per_step]
    return data.units[chosen].ravel()


@functools.lru_cache(maxsize=1)
def epoch_order(data, seed, epoch, together):
    """A random order of the units in which up to `together` of one prompt follow each other."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(data.units))
    order = order[np.argsort(data.prompts[data.units[order, 0]], kind="stable")]  # prompt by prompt
    prompts, number = data.prompts[data.units[order, 0]], np.arange(len(order))
    first = np.r_[True, prompts[1:] != prompts[:-1]]
    place = number - np.maximum.accumulate(np.where(first, number, 0))  # among those of its prompt
    chunk = np.cumsum(place % together == 0) - 1
    return order[np.argsort(rng.permutation(chunk[-1] + 1)[chunk], kind="stable")]


def share_out(settings, data, units, share):
    """(this rank's micro-batches, how many of them count). Ranks and micro-batches get bundles of similar length.

    The others are there to keep step with the other ranks: DDP needs one forward pass from each, FSDP the same number.
    """
    bundles = bundled(settings, data, units, share)
    shares = [batches(settings, data, bundles[number::world()], share) for number in range(world())]
    mine, most = shares[rank()], max(map(len, shares)) if settings.shard else 1
    return mine + [[bundles[-1]]] * (most - len(mine)), len(mine)


def bundled(settings, data, units, share):
    """Units as bundles, the longest first: arrays of rows of the file. Those of a bundle share a prompt, if they can."""
    if not share:
        return sorted(units, key=lambda rows: -data.lengths[rows].max())
    units, bundles = units[np.argsort(data.prompts[units[:, 0]], kind="stable")], []
    for group in np.split(units, 1 + np.flatnonzero(np.diff(data.prompts[units[:, 0]]))):  # [units of one prompt, width]
        prompt, width = data.prompt_lengths[group[0, 0]], group.shape[1]
        completion = (data.lengths[group] - data.prompt_lengths[group]).mean()
        most = min(units.size // world(), group.size, settings.micro_batch or group.size,
                   settings.tokens_per_pass // (prompt + completion))
        fit = max(1, completions_per_row(prompt, completion, int(most), data.model_width) // width)
        bundles += [part.ravel() for part in np.array_split(group, math.ceil(len(group) / fit))]
    return sorted(bundles, key=lambda rows: -space(data, rows, share)[1])


def space(data, rows, share):
    """(rows, tokens in the longest of them) that a bundle takes in a forward pass."""
    if share:
        prompt = data.prompt_lengths[rows[0]]
        return 1, prompt + (data.lengths[rows] - data.prompt_lengths[rows]).sum()
    return len(rows), data.lengths[rows].max()


def batches(settings, data, bundles, share):
    """Splits bundles, the longest first, into lists for one forward pass each."""
    parts, taken, longest, most = [], 0, 0, settings.micro_batch or math.inf
    for bundle in bundles:
        rows, length = space(data, bundle, share)
        if not parts or (taken + rows) * longest > settings.tokens_per_pass or sum(map(len, parts[-1])) + len(bundle) > most:
            parts.append([])
            taken, longest = 0, length
        parts[-1].append(bundle)
        taken += rows
    return parts


def collate(data, bundles, tokenizer, mu, device, share):
    """Bundles as tensors: arguments of completion_logprobs; mask, log mu [batch, time] and reward [batch].

    Here batch is the sequences in their order and time the tokens of the completion alone.
    """
    rows, packed = np.concatenate(bundles), []
    read = [data[row] for row in rows]
    tokens = iter(all_token_ids(read, tokenizer))
    for bundle in bundles:
        for prompt, same in itertools.groupby(itertools.islice(tokens, len(bundle)), key=lambda pair: pair[0]):
            completions = [completion for _, completion in same]
            packed += [(prompt, completions)] if share else [(prompt, [completion]) for completion in completions]
    lengths = torch.tensor([len(completion) for _, completions in packed for completion in completions], device=device)
    mask = torch.arange(lengths.max(), device=device) < lengths[:, None]  # [batch, time]
    mu_logp = None
    if mu:
        values = torch.cat([torch.as_tensor(mu(number, row), dtype=torch.float32) for number, row in zip(rows, read)])
        mu_logp = torch.zeros(mask.shape, device=device).masked_scatter(mask, values.to(device))  # [batch, time]
    reward = torch.tensor([row["reward"] for row in read], device=device)  # [batch]
    return pack(packed, device), mask, mu_logp, reward


def where(data, rows):
    return f"{data.path}, lines {', '.join(str(data.lines[row]) for row in rows[:64])}"


def make_mu(settings, policy, tokenizer, data, share, model_fingerprint, taper):
    """(function (row number, row) -> log mu of its completion tokens, where they come from). Fixed for the whole run.

    Re-anchoring mu on the current weights would make every ratio 1 and turn TOPR into naive REINFORCE unnoticed.
    """
    held = data.has_logprobs.all()
    from_file = lambda number, row: row["logprobs"]
    if taper and not taper.needs_mu:
        return from_file if held else None, "not needed"
    if settings.mu != "start" and held:
        if settings.mu == "checked":
            check_fit(settings, policy, tokenizer, data, share, from_file)
        return from_file, "from the file"
    if settings.mu == "file":
        raise Problem(f"{data.path}: {(~data.has_logprobs).sum():,} of {len(data):,} rows hold no logprobs, and --mu file wants "
                      "them: --mu start computes them")
    path = f"{data.path}.mu-{model_fingerprint[:8]}-{data.tokens[:8]}-{settings.precision}.safetensors"
    if not all(gather(os.path.exists(path))):  # on every machine, where they share no disk
        compute_mu(settings, policy, tokenizer, data, share, path)
    try:
        stored = safe_open(path, "pt")
        offsets, values = stored.get_tensor("offsets").tolist(), stored.get_slice("logprobs")
    except (SafetensorError, OSError) as error:
        raise Problem(f"{path}: cannot be read: {first_line(error)}. Remove it, and it is computed again")
    return lambda number, row: values[offsets[number] : offsets[number + 1]], f"of the starting weights, in {path}"


@torch.no_grad()
def compute_mu(settings, policy, tokenizer, data, share, path):
    """log mu of every completion with the starting weights, once, kept beside the file."""
    mine, _ = share_out(settings, data, np.arange(len(data))[:, None], share)
    logprobs = {}
    for bundles in progress(mine, what="log mu of the starting weights"):
        logprobs.update(policy_logprobs(settings, policy, tokenizer, data, bundles, share))
    everyone = {row: values for part in gather(logprobs) for row, values in part.items()}
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once on every machine
        offsets = np.cumsum([0] + [len(everyone[row]) for row in range(len(data))])
        values = torch.cat([everyone[row] for row in range(len(data))])
        with whole_file(path, "wb") as file:
            file.write(save({"offsets": torch.as_tensor(offsets), "logprobs": values}))
    barrier()


@torch.no_grad()
def policy_logprobs(settings, policy, tokenizer, data, bundles, share):
    """{row: log pi of its completion tokens}"""
    device = next(policy.parameters()).device
    packed, mask, _, _ = collate(data, bundles, tokenizer, None, device, share)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        logp = policy(mask, packed)  # [batch, time]
    return {row: values[keep] for row, values, keep in zip(np.concatenate(bundles).tolist(), logp.cpu(), mask.cpu())}


def check_fit(settings, policy, tokenizer, data, share, mu):
    """Refuses logprobs that the starting weights did not write: before the first step pi/mu must be 1."""
    tolerance = (2.0 if settings.precision == "bfloat16" else 0.1) if settings.mu_tolerance is None else settings.mu_tolerance
    largest, units = 0.0, np.unique(np.linspace(0, len(data) - 1, 64).astype(int))[:, None]  # from all parts of the file
    for bundles in batches(settings, data, bundled(settings, data, units, share), share):
        for row, logp in policy_logprobs(settings, policy, tokenizer, data, bundles, share).items():
            largest = max(largest, abs((logp - torch.tensor(mu(row, data[row]))).sum().item()))
    say(f"{data.path}: before the first step the largest |log pi/mu| of {len(units)} completions is {largest:.2g}")
    if not largest <= tolerance:
        raise Problem(
            f"{data.path}: its logprobs do not fit {settings.model}: |log pi/mu| is {largest:.3g} before the first step, over "
            f"the tolerance of {tolerance}. If another policy wrote the file on purpose: --mu file. If its logprobs are not "
            "those of a plain softmax at temperature 1, or you do not know: --mu start computes them with the starting "
            "weights. If the engine that wrote it computes less exactly: --mu-tolerance")


def pack(rows, device=None):
    """Arguments of completion_logprobs for rows of (prompt, its completions), lists of tokens; padded on the right.

        ids       prompt prompt prompt | first first | second second second
        position       0      1      2 |     3     4 |      3      4      5

    A completion sees the prompt and itself, at the positions that it has alone; its first token is predicted from the
    prompt's last. Rows of one completion each are what every causal model knows, and need no more than ids and mask.
    """
    columns = {"ids": [], "position_ids": [], "previous": [], "part": []}  # part: 0 the prompt, 1, 2 .. its completions
    for prompt, completions in rows:
        start, row = len(prompt), [list(prompt), list(range(len(prompt))), list(range(-1, len(prompt) - 1)), [0] * len(prompt)]
        for number, completion in enumerate(completions, 1):
            here, size = len(row[0]), len(completion)
            for values, more in zip(row, (completion, range(start, start + size), [start - 1, *range(here, here + size - 1)],
                                          [number] * size)):
                values.extend(more)
        for values, new in zip(columns.values(), row):
            values.append(new)
    longest = max(map(len, columns["ids"]))
    fill = {"part": -1}
    columns = {name: torch.tensor([row + [fill.get(name, 0)] * (longest - len(row)) for row in values], device=device)
               for name, values in columns.items()}  # each [rows, time]
    part = columns.pop("part")
    packed = {"ids": columns["ids"], "mask": part > 0}
    if part.max() > 1:
        mine = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        packed |= {**columns, "attention_mask": mine.tril()[:, None]}  # [rows, 1, time, time]
    return packed


def completions_per_row(prompt, completion, most, width):
    """How many completions behind one prompt cost least, for the lengths of both and the width of the model.

    Sharing saves prompt tokens, but attention works out all pairs of a row, those behind the mask too. In a layer a token
    takes 24 width^2 operations in the matrices, a pair 4 width: as much as 6 width pairs.
    """
    cost = lambda n: (prompt / n + completion) * 6 * width + (prompt + n * completion) ** 2 / n  # of one completion
    return min(range(1, max(most, 1) + 1), key=cost)


@torch.no_grad()
def can_share_prompts(model, longest=0):
    """Tries whether this model gives completions in one row the log-probs that they have alone.

    One that keeps a state or counts positions in its own way does not, and a sliding window that is shorter than the
    longest sequence would be lost under our mask.
    """
    config = model.config.get_text_config()
    if longest > (getattr(config, "sliding_window", None) or longest) or model.config._attn_implementation == "eager":
        return False  # eager attention would add our mask of True and False to its scores
    draw = lambda n: torch.randint(config.vocab_size, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    prompt, completions = draw(7), [draw(4), draw(6), draw(5)]
    layouts = [(prompt, [completion]) for completion in completions], [(prompt, completions)]
    try:
        alone, together = (completion_logprobs(model, **packed)[packed["mask"]]
                           for packed in (pack(rows, model.device) for rows in layouts))  # [tokens]
    except (ValueError, TypeError, RuntimeError):  # it takes no such mask, or no positions
        return False
    return (alone - together).abs().mean().item() < (1e-4 if alone.dtype == model.dtype else 0.1)  # bfloat16 is coarse
