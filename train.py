"""Trains a policy on a rollout file with TOPR. A plain PyTorch loop, one process or many.

    torchrun train.py                                             the embedded job, from nothing
    torchrun train.py --model DIR_OR_NAME --rollouts FILE.jsonl   your model, your rollouts

No critic, no KL, no reference model: log mu, the log-probabilities under the policy that wrote the completions, is
read from the file, or computed once with the starting weights, and never touched again.
"""

import array
import dataclasses
import fcntl
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import time
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
import topr
from data import apples
from data.common import (Problem, Stopped, barrier, draw_lines, first_line, from_first, gather, parse, part_of, progress, rank,
                         read_json, run_main, say, seed_everything, setting, start_ranks, table, whole_file, world, write_json,
                         writing)
from data.rollouts import RolloutFile, all_token_ids, file_fingerprint, foreign_tokens, write_rollouts


@dataclass
class Settings:
    model: str = setting("", "policy to start from: a directory or a hub name (none: the embedded one, made here)")
    rollouts: str = setting("", "rollout file to learn from (none: sampled from the policy, with --task)")
    out: str = setting("", "folder for the trained policy (default: runs/MODEL-LOSS)")
    task: str = setting("", "task to sample from and to measure on, before and after", ("", *evaluation.TASKS))
    rounds: int = setting(1, "rounds of sample-then-train; each starts from the policy of the last (--rollouts: the first's)",
                          least=1)
    # the loss
    loss: str = setting("topr", "what to minimise", (*topr.TAPERS, "ppo", "dpo"))
    pos_limits: str = setting("", "own range a,b of a positive's weight instead of the loss's, for instance 1,1")
    neg_limits: str = setting("", "own range a,b of a negative's weight instead of the loss's, for instance 0,1")
    baseline: float = setting(0.0, "c in A = R - c", least=-math.inf)
    positive_share: Optional[float] = setting(None, "effective share of positives to reach by the baseline")
    anna_karenina: bool = setting(False, "of each question keep the first correct completion and every wrong one")
    map_rewards: str = setting("", "rewards for 0 and 1 in a file that has them: --map-rewards=-1,1")
    ppo_clip: float = setting(0.2, "epsilon of ppo")
    dpo_beta: float = setting(0.1, "beta of dpo")
    mu: str = setting("checked", "where log mu comes from: the file, 64 lines of which must fit the starting weights (checked); "
                      "the file, whoever wrote it (file); the starting weights, once (start)", ("checked", "file", "start"))
    mu_tolerance: Optional[float] = setting(None, "largest |log pi/mu| before the first step with --mu checked "
                                            "(default: 0.1 in float32, 2 in bfloat16)")
    # the optimizer
    optimizer: str = setting("adafactor", "update rule", ("adafactor", "adamw"))
    learning_rate: float = setting(5e-7, "size of a step; the paper's for Adafactor")
    schedule: str = setting("constant", "of the learning rate", ("constant", "cosine"))
    warmup: int = setting(0, "steps in which the rate rises from 0")
    weight_decay: float = setting(0.0, "pull of the weights towards 0")
    grad_clip: float = setting(1.0, "largest norm of the gradient (0: any)")
    epochs: int = setting(1, "passes over the file", least=1)
    sequences: int = setting(64, "completions in an optimizer step, over all ranks", least=1)
    together: int = setting(4, "completions of a prompt that follow each other in the random order: they share a row",
                            least=1)
    share_prompts: bool = setting(True, "read a prompt once for its completions in a step, where the model can")
    micro_batch: int = setting(0, "completions in a forward pass (0: as many as --tokens-per-pass allows)")
    tokens_per_pass: int = setting(16384, "tokens in a forward pass, padding included", least=1)
    precision: str = setting("float32", "of the arithmetic; the weights have their own", ("float32", "bfloat16"))
    weights: str = setting("float32", "of the weights; bfloat16 halves the memory and is rounded at random, so that small "
                           "updates are not lost", ("float32", "bfloat16"))
    gradient_checkpointing: bool = setting(False, "compute activations again in the backward pass: slower, less memory")
    shard: bool = setting(False, "a part of every weight, gradient and optimizer state on each rank (FSDP2), for a model "
                          "beyond one card")
    seed: int = setting(0, "of the order, the sampling and the embedded task")
    # the run
    checkpoint_every: int = setting(100, "steps between checkpoints (0: none)")
    eval_every: int = setting(0, "steps between measurements on the task (0: before and after alone)")
    # sampling, where --task is given
    samples: int = setting(16, "completions of each question", least=1)
    questions: int = setting(0, "training questions to sample from (0: all; 250 of the generated ones)")
    test_questions: int = setting(0, "questions to measure on (0: all; 250 of the generated ones)")
    temperature: float = setting(1.0, "of sampling")
    top_k: int = setting(0, "sample from the k likeliest tokens (0: all)")
    max_new_tokens: int = setting(512, "longest completion", least=1)
    batch_size: int = setting(256, "completions written at once", least=1)


# What differs in the embedded job: a model of 0.14 million weights likes larger steps than one of 8 billion.
EMBEDDED = dict(task="apples", optimizer="adamw", learning_rate=1e-3, schedule="cosine", epochs=2, eval_every=32,
                questions=512, test_questions=250, max_new_tokens=40, tokens_per_pass=4096, batch_size=512)


class LogProbs(torch.nn.Module):
    """The policy as DDP and FSDP want it: a module whose forward pass gives all that the loss needs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, mask, packed):
        logp = topr.completion_logprobs(self.model, **packed)[packed["mask"]]  # [tokens]
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logp)  # [batch, time]


def train(settings, evaluate=None):
    """One run over one rollout file; the trained policy is in settings.out. Returns the log, a dict a step.

    evaluate(model) -> dict is called every settings.eval_every steps, before the first and after the last too.
    """
    device = start_ranks()
    open_folder(settings)
    seed_everything(settings.seed)
    model, tokenizer = evaluation.load_model(settings.model, settings.weights, "cpu" if settings.shard else device)
    data = read_data(settings, model, tokenizer)
    run = {"settings": dataclasses.asdict(settings), "model_weights": evaluation.fingerprint(model), "file": data.fingerprint}
    check_same_run(settings, run)
    share = settings.share_prompts and topr.can_share_prompts(model, data.lengths.max())
    baseline, loss_function = make_loss(settings, data)
    policy = LogProbs(model)
    if settings.shard:
        shard(policy, device)
    mu, source = make_mu(settings, policy, tokenizer, data, share, run["model_weights"])
    steps = math.ceil(len(data.units) / data.units_per_step) * settings.epochs
    say(f"{data.path}: {data.units.size:,} completions, {(data.rewards[data.units] > 0).mean():.1%} positive; {steps:,} steps of "
        f"{settings.sequences} with loss {settings.loss}, baseline {baseline:.3f}, log mu {source}"
        + ("" if share or not settings.share_prompts else "; this model cannot read a prompt once for several completions"))
    say_memory(settings, model, data)

    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    if world() > 1 and not settings.shard:
        policy = DistributedDataParallel(policy, gradient_as_bucket_view=True)
    optimizer = make_optimizer(settings, model)
    if rank() == 0:
        write_json(os.path.join(settings.out, "run.json"), run)
    log, first = resume(settings, model, optimizer)
    stop, handlers = stop_wish()
    bar = progress(total=steps, what=f"training ({settings.loss})")
    bar.update(first)
    for step in range(first, steps):
        if evaluate and settings.eval_every and step % settings.eval_every == 0:
            write_log(settings, log, {"step": step, "measured": evaluate(model)})
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, steps)
        sequences = step_sequences(settings, data, step)  # rows of the file, of all ranks: N = len(sequences)
        micro_batches, real = share_out(settings, data, sequences.reshape(-1, data.units.shape[1]), share)
        parts = []
        for number, bundles in enumerate(micro_batches):
            # DDP exchanges gradients once, in the last backward pass (to be set before the forward pass); FSDP after each,
            # or every rank would have to hold the whole gradient.
            policy.require_backward_grad_sync = number == len(micro_batches) - 1
            packed, mask, mu_logp, reward = collate(data, bundles, tokenizer, mu, device, share)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                logp = policy(mask, packed)  # [batch, time]
            loss, stats = loss_function(logp, mu_logp, reward, mask, count=len(sequences))
            if number >= real:
                loss = 0.0 * loss  # this rank has no more sequences: it only takes part in the exchange
            else:
                parts.append({"loss": loss.item(), **{name: value.tolist() for name, value in stats.items()}})
            (loss * world()).backward()  # DDP and FSDP take the mean over ranks; the loss is a sum over them
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)).item()
        everyone = gather((parts, list(stop)))  # every rank's, so that all ranks see the same step
        metrics = step_metrics([part for parts, _ in everyone for part in parts])
        if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
            raise Problem(f"step {step}: the loss is {metrics['loss']}, the gradient norm {norm}; nothing was updated. "
                          f"{last_checkpoint(settings)}. The rollouts of this step: {where(data, sequences)}")
        update(settings, optimizer, step)
        optimizer.zero_grad(set_to_none=True)

        seconds = time.time() - start
        write_log(settings, log, {
            "step": step, "epoch": step * settings.epochs // steps, **metrics, "gradient_norm": norm,
            "learning_rate": optimizer.param_groups[0]["lr"], "sequences": len(sequences),
            "tokens_per_second": data.lengths[sequences].sum() / seconds, "seconds": seconds, "peak_memory_gib": peak_memory()})
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", norm=f"{norm:.2f}", refresh=False,
                        negatives=f"{metrics['negative_weight'] or 0:.2f}")
        bar.update()
        asked = [number for _, numbers in everyone for number in numbers]
        if asked or settings.checkpoint_every and (step + 1) % settings.checkpoint_every == 0:
            save_checkpoint(settings, model, optimizer, run, step + 1)
        if asked:
            raise Stopped(f"stopped by a signal after step {step}: the same command goes on from there", asked[0])
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if evaluate and settings.eval_every:
        write_log(settings, log, {"step": steps, "measured": evaluate(model)})
    finish(settings, model, tokenizer, run)
    return log


# ---- the data of a run ----


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
    order = epoch_order(data, settings.seed, epoch, max(1, settings.together // data.units.shape[1]))
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
        fit = max(1, topr.completions_per_row(prompt, completion, int(most), data.model_width) // width)
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
    return topr.pack(packed, device), mask, mu_logp, reward


def where(data, rows):
    return f"{data.path}, lines {', '.join(str(data.lines[row]) for row in rows[:64])}"


# ---- the loss, and log mu ----


def make_loss(settings, data):
    """(baseline, function of logp, mu_logp, reward, mask, count), from the settings."""
    plain = settings.baseline == 0 and settings.positive_share is None and not settings.pos_limits and not settings.neg_limits
    if settings.loss in ("ppo", "dpo") and not plain:
        raise Problem(f"--baseline, --positive-share and --pos-limits, --neg-limits have no place in --loss {settings.loss}")
    if settings.loss == "ppo":
        return 0.0, lambda *batch, count: topr.ppo_loss(*batch, clip=settings.ppo_clip, count=count)
    if settings.loss == "dpo":
        return 0.0, lambda *batch, count: topr.dpo_loss(*batch, beta=settings.dpo_beta, count=count)
    rewards, baseline, taper = data.rewards[data.units], settings.baseline, make_taper(settings)
    if settings.positive_share is not None:
        if settings.baseline or set(np.unique(rewards)) - {-1.0, 1.0}:
            raise Problem("--positive-share needs rewards of +1 and -1 and no --baseline beside it")
        try:
            baseline = topr.baseline_for_share((rewards > 0).mean(), settings.positive_share)
        except ValueError as error:
            raise Problem(f"--positive-share {settings.positive_share}: {error}")
    if set(np.unique(rewards)) <= {-1.0, 1.0} and abs(baseline) > 1:
        raise Problem(f"--baseline {baseline}: between -1 and 1, or the sign of a reward would turn")
    return baseline, lambda *batch, count: topr.topr_loss(*batch, taper=taper, baseline=baseline, count=count)


def make_taper(settings):
    """The loss's limits on the weights, or the user's own."""
    try:
        named = topr.TAPERS.get(settings.loss)
        limits = lambda text, default: tuple(float(x) for x in text.split(",", 1)) if text else default
        return named and topr.Taper(limits(settings.pos_limits, named.pos), limits(settings.neg_limits, named.neg))
    except (ValueError, IndexError) as error:
        raise Problem(f"--pos-limits, --neg-limits: {error}; two numbers are needed, for instance 0,1")


def make_mu(settings, policy, tokenizer, data, share, model_fingerprint):
    """(function (row number, row) -> log mu of its completion tokens, where they come from). Fixed for the whole run.

    Re-anchoring mu on the current weights would make every ratio 1 and turn TOPR into naive REINFORCE unnoticed.
    """
    taper = make_taper(settings)
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


# ---- the optimizer ----


def checkpoint_layers(model):
    """Activations are computed again in the backward pass. The rest of the model stays in eval mode, for with dropout
    pi/mu would not be 1 before the first step; a layer does it only where it believes to be training."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def make_optimizer(settings, model):
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay,
                                 fused=True)  # one pass over the weights instead of nine, and no copies of them
    from transformers.optimization import Adafactor

    optimizer = Adafactor(model.parameters(), settings.learning_rate, scale_parameter=False, relative_step=False,
                          warmup_init=False, weight_decay=settings.weight_decay)
    for p in model.parameters():
        if sharded(p) and p.ndim > 1:  # its own would be plain zeros, which do not mix with shards
            zeros = torch.zeros_like(p, dtype=torch.float32)
            optimizer.state[p] = {"step": 0, "RMS": 0, "exp_avg_sq_row": mean_over(zeros, -1),
                                  "exp_avg_sq_col": mean_over(zeros, -2)}
    return optimizer


@torch.no_grad()
def update(settings, optimizer, step):
    """One optimizer step; bfloat16 weights take it in float32, one tensor at a time, and are rounded at random.

    bfloat16 has 8 bits: beside a weight of 0.02 an update of 5e-7 is a 240th of the spacing, and rounding to nearest
    would lose every one of them in silence. Rounded up with the probability of the part lost, it arrives in the mean.
    (A compensated sum would arrive too, but needs a second tensor for each weight.)
    """
    if settings.weights == "float32":
        return optimizer.step()
    (group,) = optimizer.param_groups
    parameters, shard = group["params"], rank() if settings.shard else 0  # under DDP the same draws on every rank
    random = torch.Generator(parameters[0].device).manual_seed((settings.seed * 1_000_003 + step) * 10_007 + shard)
    for p in parameters:
        if p.grad is None:
            continue
        wide = p.detach().float()
        wide.grad, p.grad = p.grad.float(), None
        group["params"], optimizer.state[wide] = [wide], optimizer.state.pop(p, {})
        optimizer.step()
        optimizer.state[p] = optimizer.state.pop(wide)
        bits = local(wide).view(torch.int32)
        bits += torch.randint(2**16, bits.shape, generator=random, dtype=torch.int32, device=bits.device)
        local(p).copy_((bits & -(2**16)).view(torch.float32))  # cuts off what bfloat16 does not hold
    group["params"] = parameters


def learning_rate(settings, step, steps):
    warm = min(1.0, (step + 1) / (settings.warmup + 1))
    if settings.schedule == "cosine":
        warm *= 0.5 * (1 + math.cos(math.pi * step / steps))
    return settings.learning_rate * warm


# ---- shards: what --shard does, and what it is put together from again ----


def shard(policy, device):
    """Leaves a part of every weight on each rank; each layer is put together while it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, kinds = init_device_mesh(device.type, (world(),)), policy.model._no_split_modules or ()
    layers = [module for module in policy.modules() if type(module).__name__ in kinds]
    for module in (*reversed(layers), policy):  # inner ones first; the policy itself holds what is in no layer
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def sharded(tensor):
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """The tensor put together from its shards: every rank must ask for it."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def local(tensor):
    """This rank's shard, in place."""
    return tensor.to_local() if sharded(tensor) else tensor


def mean_over(tensor, axis):
    """The mean of a sharded tensor, whole on every rank where it runs over what is shared out."""
    from torch.distributed.tensor import Replicate

    mean = tensor.mean(axis)
    return mean.redistribute(placements=[Replicate() if part.is_partial() else part for part in mean.placements])


def whole_weights(model):
    """What save_pretrained writes on the first rank; None where it can see for itself."""
    weights = model.state_dict(keep_vars=True)
    return on_first_rank(weights) if any(map(sharded, weights.values())) else None


def on_first_rank(tensors):
    """The same dict with sharded tensors put together, one after the other, in the first rank's own memory."""
    made = {}  # a tied weight has two names and is written once
    for tensor in tensors.values():
        if sharded(tensor) and id(tensor) not in made:
            full = tensor.full_tensor()
            made[id(tensor)] = full.detach().cpu() if rank() == 0 else None
    return {name: made.get(id(tensor), tensor) for name, tensor in tensors.items()}


def laid_out(value, like):
    """A whole value of a checkpoint as `like` is: on its device, or this rank's shard of it."""
    if not torch.is_tensor(value) or value.dim() == 0:
        return value
    if not sharded(like):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


# ---- what is logged: exact over the whole step and all ranks ----


def step_metrics(parts):
    """The statistics of all sequences of the step as a dict; see the README for what each one tells."""
    loss = sum(part["loss"] for part in parts)
    d, weight, advantage = (np.array([value for part in parts for value in part[name]])
                            for name in ("log_ratio", "weight", "advantage"))  # each [sequences]
    negative, total = advantage < 0, np.abs(advantage).sum()
    mean = lambda values: float(values.mean()) if len(values) else None
    quantiles = dict(zip(("d_min", "d_10", "d_50", "d_90", "d_max"), np.quantile(d, (0, 0.1, 0.5, 0.9, 1)).tolist()))
    known = not np.isnan(d).any()  # without mu nobody can tell
    return {"loss": loss, "negative_weight": mean(weight[negative]), "negatives_liked": mean(d[negative] > 0) if known else None,
            "negatives_gone": mean(weight[negative] < 1e-3), "d_mean": mean(d), **quantiles,
            "positive_share": float(np.abs(advantage[advantage > 0]).sum() / total) if total else None}


def peak_memory():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory(settings, model, tokens, ranks=1):
    """The bytes that a card holds at most, by part, with so many tokens in the largest forward pass.

    Weights, gradients and optimizer state are exact; DDP adds nothing, its buckets are the gradients. Activations are
    those of Llama's layer (norms, grouped attention that never holds [time, time], gated MLP): for others an estimate.
    """
    config, shapes = model.config.get_text_config(), [p.shape for p in model.parameters()]
    count, largest = sum(map(math.prod, shapes)), max(map(math.prod, shapes))
    size = 2 if settings.weights == "bfloat16" else 4  # of a weight, a gradient and what runs along the layers
    mixed = settings.precision == "bfloat16" and size == 4
    moments = lambda s: math.prod(s[:-1]) + math.prod(s[:-2] + s[-1:]) if len(s) > 1 else math.prod(s)
    state = 2 * count if settings.optimizer == "adamw" else sum(map(moments, shapes))
    steady = {"weights": size * count, "gradients": size * count, "optimizer": 4 * state}

    width, vocab, layers, heads = config.hidden_size, config.vocab_size, config.num_hidden_layers, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    attention = 2 * head * (heads + (getattr(config, "num_key_value_heads", None) or heads))  # queries, output; keys, values
    gated = getattr(config, "intermediate_size", None) or 4 * width
    norms = 26 if mixed else 16 if size == 2 else 24  # bytes: of each of two the input, in float32, and what comes out
    inside = tokens * (norms * width + (2 if mixed else size) * (attention + 4 * gated))  # gate, its silu, up, product
    again = settings.gradient_checkpointing  # then only what goes into a layer is kept, and each runs again with gradients
    parts = {"activations": layers * tokens * width * size if again else layers * inside,
             "a layer again": inside + 2 * tokens * gated * (2 if mixed else size) if again else 0,
             "logits": 12 * vocab * min(tokens, max(1, 2**26 // vocab)) + 2 * vocab * width * size,  # a chunk; head's gradients
             "copies": 2 * count if mixed else 0}  # autocast keeps the weights in bfloat16 during the forward pass
    if settings.shard:
        steady = {name: value // ranks for name, value in steady.items()}
        outside = vocab * width * (1 if config.tie_word_embeddings else 2)
        steady["put together"] = 2 * size * (outside + 2 * (count - outside) // layers)  # two layers, with their gradients
    update = (16 * largest if size == 2 else 8 * largest if settings.optimizer == "adafactor" else 4 * count)
    update //= ranks if settings.shard else 1
    passes = parts["activations"] + max(parts["a layer again"], parts["logits"] + parts["copies"])
    return {**steady, **parts, "update": update, "at most": sum(steady.values()) + max(passes, update)}


def say_memory(settings, model, data):
    """Before the first step: what it will need, where that is anything to speak of."""
    longest, share = data.lengths.max(), math.ceil(settings.sequences / world())
    tokens = max(settings.tokens_per_pass, longest)
    needs = memory(settings, model, min(tokens, (settings.micro_batch or share) * longest), world())
    if needs["at most"] > 2**30:
        card = f" of the card's {torch.cuda.mem_get_info()[1] / 2**30:.1f}" if torch.cuda.is_available() else ""
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in needs.items() if size)
        say(f"memory in GiB: {parts}{card}")


def write_log(settings, log, entry):
    log.append({name: None if isinstance(value, float) and math.isnan(value) else value for name, value in entry.items()})
    if rank() == 0:
        path = os.path.join(settings.out, "log.jsonl")
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(log[-1], default=float) + "\n")


# ---- the folder of a run: one run at a time, continued where it broke off ----

DISK_ERRORS = (OSError, RuntimeError, SafetensorError)  # what torch and safetensors raise when they cannot write


def open_folder(settings):
    """Makes the folder and holds its lock until the process ends."""
    if os.path.realpath(settings.out) == os.path.realpath(settings.model):
        raise Problem(f"--out {settings.out} is the starting model itself, and would be overwritten")
    if rank() == 0:
        try:
            os.makedirs(settings.out, exist_ok=True)
            global held_lock
            held_lock = open(os.path.join(settings.out, ".lock"), "w")
            fcntl.flock(held_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"{settings.out}: another process is training in this folder")
        except OSError as error:
            raise Problem(f"{settings.out}: {error.strerror}")


def check_same_run(settings, run):
    """What was trained in a folder belongs to one command: another one is refused, naming what differs."""
    path = os.path.join(settings.out, "run.json")
    if os.path.exists(path) and (checkpoints(settings) or finished(settings)):
        flat = lambda record: record["settings"] | {name: record[name] for name in ("model_weights", "file") if name in record}
        before, now = flat(read_json(path)), flat(run)
        free = ("out", "checkpoint_every", "eval_every", "batch_size", "rounds", "shard")  # nothing in the weights hangs on these
        differ = [f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in now
                  if name not in free and before.get(name) != now[name]]
        if differ:
            raise Problem(f"{settings.out} holds another run: {'; '.join(differ)}. Use another --out, or remove it")


def checkpoints(settings):
    """Complete checkpoints, the newest last."""
    return sorted(glob.glob(os.path.join(glob.escape(settings.out), "checkpoint-" + "[0-9]" * 8)))


def last_checkpoint(settings):
    return f"The last checkpoint is {checkpoints(settings)[-1]}" if checkpoints(settings) else "There is no checkpoint"


def save_checkpoint(settings, model, optimizer, run, step):
    """Weights, optimizer, position and random state, written beside and renamed: complete or not there."""
    random_states, weights, moments = gather(torch.get_rng_state()), whole_weights(model), optimizer.state_dict()["state"]
    moments = {number: on_first_rank(state) for number, state in moments.items()}
    if rank() == 0:
        path = os.path.join(settings.out, f"checkpoint-{step:08}")
        beside, older = path + ".part", checkpoints(settings)
        shutil.rmtree(beside, ignore_errors=True)
        try:
            with writing(path, DISK_ERRORS):
                model.save_pretrained(beside, state_dict=weights)
                with open(os.path.join(beside, "optimizer.pt"), "wb") as file:  # ours: torch's would not say that a disk is full
                    torch.save({"optimizer": moments, "random": random_states}, file)
                for name in os.listdir(beside):
                    with open(os.path.join(beside, name), "rb") as file:
                        os.fsync(file.fileno())
                write_json(os.path.join(beside, "step.json"), {"step": step, **run})
        except Problem:
            shutil.rmtree(beside, ignore_errors=True)  # room for others
            raise
        os.rename(beside, path)
        for old in older:
            shutil.rmtree(old)
    barrier()


def resume(settings, model, optimizer):
    """(log so far, first step to do), after loading the newest checkpoint, if there is one."""
    held = gather(os.path.basename((checkpoints(settings) or [""])[-1]))
    newest, saved = max(held), {"step": 0, "log": []}
    if newest:
        saved = read_checkpoint(settings, model, newest) if held[rank()] == newest else None
        if min(held) != newest:  # machines that share no disk: one that has it tells the others
            saved = from_first(saved, held.index(newest))
    if rank() == 0:
        for half in glob.glob(os.path.join(glob.escape(settings.out), "checkpoint-*.part")):
            shutil.rmtree(half)
        with whole_file(os.path.join(settings.out, "log.jsonl")) as file:
            file.writelines(json.dumps(entry) + "\n" for entry in saved["log"])
    if newest:
        for name, tensor in model.state_dict().items():
            tensor.copy_(laid_out(saved["weights"][name], tensor))
        parameters = list(model.parameters())
        for number, state in saved["optimizer"].items():  # (load_state_dict would round it to the type of the weights)
            p, own = parameters[number], optimizer.state[parameters[number]]
            optimizer.state[p] = {name: laid_out(value, own.get(name, p)) for name, value in state.items()}
        torch.set_rng_state(saved["random"][rank() % len(saved["random"])])
        say(f"{settings.out}: going on from step {saved['step']}")
    return saved["log"], saved["step"]


def read_checkpoint(settings, model, name):
    path = os.path.join(settings.out, name)
    try:
        step = read_json(os.path.join(path, "step.json"))["step"]
        weights = type(model).from_pretrained(path, dtype=next(model.parameters()).dtype, use_safetensors=True).state_dict()
        saved = torch.load(os.path.join(path, "optimizer.pt"), weights_only=True, map_location="cpu")
    except Exception as error:  # of many kinds; for the user they are all the same
        raise Problem(f"{path}: cannot be opened: {first_line(error)} Remove it to start from the beginning")
    return {"step": step, "weights": weights, **saved, "log": [entry for entry in read_log(settings) if entry["step"] < step]}


def finish(settings, model, tokenizer, run):
    """The trained policy as a directory that from_pretrained opens, and the checkpoints gone."""
    weights = whole_weights(model)
    if rank() == 0:
        with writing(settings.out, DISK_ERRORS):
            model.eval().save_pretrained(settings.out, state_dict=weights)
            tokenizer.save_pretrained(settings.out)
        write_json(os.path.join(settings.out, "run.json"), {**run, "finished": True})
        for path in checkpoints(settings):
            shutil.rmtree(path)
        held_lock.close()
    barrier()


def finished(settings):
    path = os.path.join(settings.out, "run.json")
    return os.path.exists(path) and read_json(path).get("finished")


def stop_wish():
    """(list that SIGTERM and Ctrl-C append to, so that the loop can end its step first; the handlers to put back)"""
    wish = []
    note = lambda number, _: wish.append(number)
    return wish, {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}


# ---- the whole job: a policy, its rollouts, training, and what came of it ----


def main():
    settings, start = parse(Settings, description=__doc__), time.time()
    start_ranks()
    if not settings.model:
        if settings.rollouts:
            raise Problem("--rollouts needs --model: the policy to train on them")
        settings = parse(Settings, description=__doc__, **EMBEDDED)
        if settings.task != "apples":
            raise Problem(f"--task {settings.task} needs --model: the embedded policy can do apples alone")
        check_settings(settings)
        folder = f"runs/apples-seed{settings.seed}"
        settings.model, settings.out = base_policy(folder, settings.seed), settings.out or f"{folder}/{settings.loss}"
        name = f"rollouts-{settings.questions}x{settings.samples}.jsonl"  # the losses share it
        settings.rollouts = sampled(settings, settings.model, os.path.join(folder, name))
    if not settings.rollouts and not settings.task:
        raise Problem("nothing to learn from: --rollouts FILE.jsonl, or --task to sample from")
    settings.out = settings.out or f"runs/{os.path.basename(settings.model.rstrip('/'))}-{settings.loss}"
    job(settings, start)


def job(settings, start=None):
    """Rounds of sample-then-train, measured before and after when there is a task. Returns the results."""
    start = start or time.time()
    check_settings(settings)
    before = measured(settings, settings.model, "before") if settings.task else None
    trained = rounds(settings, curve_point(settings) if settings.task else None)
    if not settings.task:
        say(f"the trained policy is in {settings.out}")
        return None
    results = {"settings": dataclasses.asdict(settings), "before": before, "after": measured(settings, settings.out, "after"),
               "curve": curve([log for _, log in trained]), "seconds": time.time() - start}
    show(settings, results)
    return results


def rounds(settings, evaluate=None):
    """Rounds of sample-then-train; the last policy is in settings.out. Returns (folder of the policy, log) of each."""
    policy, trained = settings.model, []
    for number in range(1, settings.rounds + 1):
        last = number == settings.rounds
        this = dataclasses.replace(settings, model=policy, out=settings.out if last else f"{settings.out}/round-{number}")
        if number > 1 or not settings.rollouts:
            this.rollouts = sampled(settings, policy, f"{settings.out}/rollouts-{number}.jsonl")
        policy = this.out
        trained.append((policy, train_or_reuse(this, evaluate)))
    return trained


def train_or_reuse(settings, evaluate=None):
    """The log of a run: made now, or kept since the same command was typed before."""
    if not from_first(finished(settings)):
        return train(settings, evaluate)
    check_same_run(settings, {"settings": dataclasses.asdict(settings), "file": file_fingerprint(settings.rollouts)})
    say(f"{settings.out}: trained before, reusing it")
    return from_first(read_log(settings) if rank() == 0 else None)


def check_settings(settings):
    """What would only fail, or do nothing, after hours of work."""
    make_taper(settings)
    if settings.rollouts and not os.path.isfile(settings.rollouts):
        raise Problem(f"{settings.rollouts}: cannot be read: there is no such file")
    if settings.rounds > 1 and not settings.task:
        raise Problem("--rounds needs --task: what to sample from in the second round")
    if settings.eval_every and not settings.task:
        raise Problem("--eval-every needs --task: what to measure on")
    if settings.out and finished(settings):
        done = read_json(os.path.join(settings.out, "run.json"))["settings"]["rounds"]
        if done != settings.rounds:
            raise Problem(f"{settings.out} holds {done} round(s): use another --out; --model {settings.out} goes on from there")
    if settings.shard and world() == 1:
        raise Problem("--shard needs more than one process: torchrun --nproc-per-node 8 train.py --shard ...")
    if settings.shard and settings.task and settings.eval_every:
        raise Problem("--shard draws no curve along the training, for no card holds the whole model then: use --eval-every 0")


def curve(logs):
    """The measurements along all rounds, one dict each, with the steps counted through."""
    points, done = [], 0
    for log in logs:
        points += [{"step": done + entry["step"], **entry["measured"]} for entry in log if "measured" in entry]
        done += sum("loss" in entry for entry in log)
    return points


def show(settings, results):
    """The curve, the table of before and after, and both as files."""
    before, after = results["before"], results["after"]
    names = [name for name, value in before.items() if isinstance(value, dict) and name in after]
    spread = lambda value: f"{value['mean']:.3f} +-{value['high'] - value['mean']:.3f}"
    say(text_curve(results["curve"]))
    say(table((f"{after['questions']} held-out questions", "before", "after", "change"),
              [(name, spread(before[name]), spread(after[name]), f"{after[name]['mean'] - before[name]['mean']:+.3f}")
               for name in names]))
    say(f"{results['seconds']:.0f} s; the trained policy, results.json and the log are in {settings.out}")
    if rank() == 0:
        write_json(os.path.join(settings.out, "results.json"), results)
        draw_lines(os.path.join(settings.out, "curve.png"), results["curve"], "step", ["pass@1", "invalid"],
                   title=settings.loss, xlabel="optimizer step", ylabel="share of completions", ylim=(0, 1))


def base_policy(folder, seed, task=apples, steps=1000, rate=5e-3, **size):
    """An embedded policy: a small Llama that imitates flawed demonstrations, trained by the loop above."""
    out, start, file = f"{folder}/base", f"{folder}/random", f"{folder}/demonstrations.jsonl"
    imitate = Settings(model=start, rollouts=file, out=out, loss="sft", optimizer="adamw", learning_rate=rate, warmup=50,
                       schedule="cosine", sequences=32, tokens_per_pass=4096, seed=seed)
    if from_first(finished(imitate)):
        say(f"{out}: the base policy is there, reusing it")
        return out
    say(f"{out}: making the base policy from flawed demonstrations")
    if rank() == 0:
        tokenizer = apples.make_tokenizer(task.vocabulary())
        tokenizer.save_pretrained(start)
        apples.make_model(tokenizer, seed, **size).save_pretrained(start)
        write_rollouts(file, task.demonstrations(steps * 32, seed, tokenizer))
    barrier()
    train(imitate)
    return out


def sampling(settings, **changes):
    """The part of the settings that eval.py needs."""
    return part_of(evaluation.Settings, settings, **{"out": "", **changes})


def sampled(settings, policy, path):
    """The rollout file that this policy writes on the training questions; made once."""
    model, tokenizer = evaluation.load_model(policy, settings.precision, start_ranks())
    wish = sampling(settings, model=policy, split="train")
    questions = evaluation.load_questions(wish, tokenizer)
    evaluation.sample_rollouts(model, tokenizer, questions, evaluation.grader(settings.task), wish, path)
    return path


def measured(settings, policy, name):
    """What eval.py measures on the test questions; kept in the run's folder."""
    path = os.path.join(settings.out, f"{name}.json")
    model, tokenizer = evaluation.load_model(policy, settings.precision, start_ranks())
    wish = sampling(settings, model=policy, split="test", questions=settings.test_questions, seed=settings.seed + 1)
    what = {"settings": dataclasses.asdict(wish), "weights": evaluation.fingerprint(model)}
    kept = from_first(read_json(path) if rank() == 0 and os.path.exists(path) else {})
    if {key: kept.get(key) for key in what} == what:
        return kept["measures"]
    measures = evaluation.evaluate(model, tokenizer, wish, what=f"measuring {name}")
    if rank() == 0:
        write_json(path, {**what, "measures": measures})
    return measures


def curve_point(settings):
    """model -> pass@1 and invalid on a few test questions, for the learning curve."""
    wish = sampling(settings, split="test", questions=min(100, settings.test_questions or 100), samples=4,
                    seed=settings.seed + 1, greedy=False)
    tokenizer = evaluation.load_tokenizer(settings.model)

    def point(model):
        measures = evaluation.evaluate(model.eval(), tokenizer, wish, what="measuring")
        return {name: measures[name]["mean"] for name in ("pass@1", "invalid")}

    return point


def read_log(settings):
    with open(os.path.join(settings.out, "log.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]  # a disk that was full may have torn the last


def text_curve(points, height=10):
    """pass@1 (*) and invalid answers (o) against the step, drawn with letters."""
    rows = [[" "] * (6 * len(points)) for _ in range(height + 1)]
    for column, point in enumerate(points):
        for name, letter in (("invalid", "o"), ("pass@1", "*")):
            rows[height - round(point[name] * height)][6 * column + 2] = letter
    lines = [f"{1 - i / height:4.1f} |" + "".join(row) for i, row in enumerate(rows)]
    return "\n".join(["pass@1 (*) and invalid answers (o) against the step", *lines, "     +" + "-" * (6 * len(points)),
                      "step  " + "".join(f"{point['step']:<6}" for point in points)])


if __name__ == "__main__":
    run_main(main)
