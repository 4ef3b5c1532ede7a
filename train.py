"""Trains a policy on a rollout file with TOPR. A plain PyTorch loop, one process or many.

    torchrun train.py                                             the embedded job, from nothing
    torchrun train.py --model DIR_OR_NAME --rollouts FILE.jsonl   your model, your rollouts

No critic, no KL, no reference model: log mu, the log-probabilities under the policy that wrote the
completions, is read from the file, or computed once with the starting weights, and then fixed.
The loop is train(); main() and job() are the whole command.
"""

import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch

import eval as evaluation
import topr
from data import apples, load_task
from engine import advice, batches, losses, mu, optim, packing, run_folder
from engine.common import Problem, Stopped, parse, progress, run_main, say, setting
from engine.parallel import barrier, from_first, gather, rank, replicate, shard, start_ranks, world
from engine.sampler import Sampling, fingerprint, load_for_training


@dataclass
class Job(Sampling):
    """A policy and how it learns: the settings that train.py, verifier.py and search.py share."""

    model: str = setting(
        "",
        "policy to start from: a directory or a hub name (none: the embedded one, made here)",
        main=True,
    )
    out: str = setting(
        "", "folder of the trained policy (default: runs/MODEL-LOSS)", main=True, free=True
    )
    rounds: int = setting(
        1, "rounds of sample-then-train, each from the policy of the last", least=1, main=True
    )
    questions: int = setting(0, "training questions (0: all; 250 of generated ones)", free=True)
    test_questions: int = setting(
        0, "questions to measure on (0: all; 250 of generated ones)", free=True
    )
    eval_every: int = setting(0, "steps between measurements (0: only before and after)", free=True)
    loss: str = setting("topr", "what to minimise", (*topr.TAPERS, *losses.OTHERS), main=True)
    learning_rate: float = setting(
        0.0,
        "step size (0: 0.1 / sqrt(trained weights), with --lora ten times that; the paper's: "
        "5e-7, for Adafactor)",
        main=True,
    )
    optimizer: str = setting("adamw", "update rule", ("adamw", "adafactor"), main=True)
    sequences: int = setting(
        64, "completions in an optimizer step, over all ranks", least=1, main=True
    )
    epochs: int = setting(1, "passes over the rollouts", least=1, main=True)
    max_steps: int = setting(0, "optimizer steps at most, for a first look (0: all)")
    positive_share: float | None = setting(
        None, "effective share of positives to reach by the baseline", most=1, main=True
    )
    baseline: float = setting(0.0, "c in A = R - c", least=-1e9, most=1e9)
    ratio: str = setting(
        "",
        "what a weight is made from: the ratio pi/mu of the sequence, its mean over tokens, or "
        "each token's (none: the loss's own)",
        ("sequence", "mean", "token"),
    )
    anna_karenina: bool = setting(
        False, "of each question keep the first correct completion and every wrong one"
    )
    mu: str = setting(
        "checked",
        "source of log mu: the file, whose first step is checked against the starting "
        "weights (checked); the file, whoever wrote it (file); the starting weights, once (start)",
        ("checked", "file", "start"),
    )
    schedule: str = setting("constant", "learning-rate schedule", ("constant", "cosine"))
    warmup: int = setting(0, "steps in which the rate rises from 0, before the schedule begins")
    grad_clip: float = setting(1.0, "largest norm of the gradient (0: no limit)")
    tokens_per_pass: int = setting(
        0, "tokens in a forward pass, padding included (0: 16384, on a CPU 1024)", free=True
    )
    lora: int = setting(
        0, "rank of LoRA adapters, trained in place of the weights (0: none; needs package peft)"
    )
    gradient_checkpointing: bool = setting(
        False, "compute activations again in the backward pass: slower, less memory", free=True
    )
    shard: bool = setting(
        False,
        "a part of all weights, gradients and optimizer state on each rank (FSDP2)",
        free=True,
    )
    checkpoint_every: int = setting(
        100, "steps between checkpoints (0: only every 5 minutes)", free=True
    )
    rollouts: str = setting(
        "", "rollout file to learn from (none: sampled from the policy)", main=True, free=True
    )
    map_rewards: str = setting(
        "", "rewards for 0 and 1 in a file that has them, for instance --map-rewards=-1,1"
    )


@dataclass
class Settings(Job):
    task: str = setting(
        "",
        "task to sample from and to measure on, before and after: apples, "
        "gsm8k, math, svamp, or the path of your own .py file",
        main=True,
        free=True,
    )


EMBEDDED = dict(
    task="apples",
    learning_rate=1e-3,
    schedule="cosine",
    epochs=2,
    eval_every=32,
    questions=512,
    test_questions=250,
    max_new_tokens=40,
    tokens_per_pass=4096,
    batch_size=512,
)


def train(settings, evaluate=None):
    """One run over one rollout file; the trained policy is in settings.out.

    evaluate(model) -> dict is called every settings.eval_every steps (0: never), and at the end.
    Returns the log, a dict for each step.
    """
    start_ranks()
    lock = run_folder.lock_folder(settings)
    tokenizer, data, model, policy, loss_function, run = set_up(settings)
    optimizer = optim.make_optimizer(settings, model)
    log, first = run_folder.resume(settings, model, optimizer, run)
    steps = data.steps * settings.epochs
    steps = min(steps, settings.max_steps or steps)
    bar = progress(range(first, steps), steps, f"training ({settings.loss})", initial=first)
    saved = time.time()
    with run_folder.open_log(settings) as file, run_folder.catch_signals() as signals:
        for step in bar:
            # Now and then a point of the learning curve; sampling ends gradient checkpointing.
            if evaluate and settings.eval_every and step % settings.eval_every == 0:
                write_log(log, file, {"step": step, "measured": evaluate(model)})
                optim.checkpoint_layers(settings, model)

            # The gradient over all micro-batches and ranks, clipped, and checked to be finite.
            start = time.time()
            units, parts = backward(settings, policy, data, step, loss_function, model)
            limit = settings.grad_clip or math.inf
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
            norm = float(norm.full_tensor() if settings.shard else norm)
            if not math.isfinite(norm):
                raise broken_off(data, step, units.ravel(), f"the gradient norm is {norm}")

            optim.update(settings, optimizer, step, steps)
            optimizer.zero_grad(set_to_none=data.ranks == 1)  # DDP's are its buckets: keep

            # The log; a checkpoint when it is due, or when a signal asks to stop. Ranks exchange
            # what they have, so that all stop and save at the same step.
            all_parts, all_signals, waits = zip(*gather((parts, signals, start - saved)))
            entry = {"step": step, "sequences": units.size, "gradient_norm": norm}
            entry |= step_metrics(all_parts, data.mu is not None)
            rate, seconds = optimizer.param_groups[0]["lr"], time.time() - start
            entry |= {"learning_rate": rate, "seconds": seconds}
            write_log(log, file, entry)
            if step + 1 in (advice.LOOK_AT, steps):
                say(*advice.of_log(log))
            is_due = (step + 1) % (settings.checkpoint_every or math.inf) == 0
            stop = sum(all_signals, [])
            if is_due or stop or waits[0] > 300:  # seconds since the last one
                run_folder.save_checkpoint(settings, model, optimizer, step + 1)
                saved = time.time()
            if stop:
                done = f"stopped by a signal; {step + 1} steps are done and saved"
                raise Stopped(f"{done}: rerun the same command to continue", stop[0])
        if evaluate and settings.eval_every:
            write_log(log, file, {"step": steps, "measured": evaluate(model)})
    run_folder.save_policy(settings, model, tokenizer, run)
    lock.release()
    return log


def backward(settings, policy, data, step, loss_function, model):
    """Adds the gradient of the rows of this step, which are the same for any number of ranks.

    Returns the rows, [rows, 1], or for DPO [pairs, 2], and the numbers of each forward pass. The
    first step, where pi is still the starting policy, also shows whether mu fits it.
    """
    units, parts = batches.step_units(settings, data, step), []
    heard = units[~data.silent[units[:, 0]]]  # the others only count towards N
    micro_batches = batches.micro_batches(settings, data, heard, model)
    for number, batch in enumerate(micro_batches, 1):
        # DDP exchanges gradients once, in each rank's last backward pass; FSDP after each.
        policy.require_backward_grad_sync = number == len(micro_batches)
        logp = policy(batch.packed, batch.mask)  # [batch, time]
        # N / ranks: each rank's loss comes out `ranks` times too large, and the mean over ranks
        # that DDP and FSDP take undoes that.
        try:
            loss, stats = loss_function(
                logp, batch.mu_logp, batch.reward, batch.mask, count=units.size / data.ranks
            )
        except ValueError as error:  # log pi is NaN, say: the policy has diverged
            raise broken_off(data, step, batch.rows, error)
        loss.backward()
        stats["loss"] = loss  # one number; the others are [batch]
        parts.append({name: value.tolist() for name, value in stats.items()})
    if data.mu_tolerance and step == 0:
        mu.check_fit(settings, data, sum((part["log_ratio"] for part in parts), []))
    return units, parts


def broken_off(data, step, rows, why):
    lines = ", ".join(str(data.rows[row].line) for row in rows[:64])
    return Problem(
        f"step {step}: {why} (lines {lines} of the rollout file); nothing was updated, and the "
        "last checkpoint is kept"
    )


def write_log(log, file, entry):
    """Adds a line to the log, and to its file."""
    log.append(entry)
    print(json.dumps(entry), file=file, flush=True)


def step_metrics(ranks, has_mu):
    """The statistics of the sequences of a step that have a gradient, of every rank; docs/log.md
    explains each."""
    parts = sum(ranks, [])
    d, weight, advantage = (
        np.concatenate([part[name] for part in parts])  # each [sequences]
        for name in ("log_ratio", "weight", "advantage")
    )
    positive, negative = advantage > 0, advantage < 0
    negatives, total = max(1, negative.sum()), np.abs(advantage).sum()
    metrics = {
        "loss": sum(part["loss"] for part in parts) / len(ranks),  # see backward
        "negative_weight": weight[negative].sum() / negatives,
        "negatives_gone": (weight[negative] < 1e-3).sum() / negatives,
        "positive_share": advantage[positive].sum() / total if total else None,
    }
    if has_mu and len(d):
        metrics |= {"d_min": d.min(), "d_mean": d.mean(), "d_max": d.max()}
        for name, chosen in (("d_positive", positive), ("d_negative", negative)):
            metrics[name] = d[chosen].mean() if chosen.any() else None
    return metrics


# ---- before the first step: the model, the data, log mu, the loss ----


def set_up(settings):
    """The model on one card, whole on each of many (DDP), or in shards (FSDP2); the data, the loss,
    and what makes this run another than the next."""
    device = start_ranks()
    model, tokenizer = load_for_training(settings, device)
    data = batches.read_data(settings, model, tokenizer)
    weights = from_first(rank() == 0 and fingerprint(model))
    run = run_folder.describe_run(settings, starting_weights=weights)
    run_folder.check_same_run(settings, run)
    loss_function, needs_mu, data.silent = losses.make_loss(settings, data)
    optim.prepare_model(settings, model)
    policy = packing.make_policy(model, settings.precision, data.lengths.max())
    data.packs = policy.packs
    if settings.shard:
        shard(policy, device)
    source = mu.make_mu(settings, policy, data, needs_mu, weights)
    if world() > 1 and not settings.shard:
        policy = replicate(policy, batches.empty_batch(device))
    say(
        *advice.before_the_first_step(settings, data),
        f"settings that differ from the defaults: {advice.differing(settings)}",
        f"loss {settings.loss}, {settings.sequences} completions a step, log mu {source}",
    )
    return tokenizer, data, model, policy, loss_function, run


# ---- the whole job: a policy, its rollouts, training, and what came of it ----


def main():
    settings = parse(Settings, __doc__, EMBEDDED)
    start_ranks()
    if not settings.model:
        use_embedded(settings)
    elif not settings.rollouts and not settings.task:
        raise Problem("nothing to learn from: --rollouts FILE.jsonl, or --task to sample from")
    name = os.path.basename(os.path.normpath(settings.model))
    settings.out = settings.out or f"runs/{name}-{settings.loss}"
    job(settings, load_task(settings.task) if settings.task else None)


def use_embedded(settings):
    """Makes the embedded policy and samples its rollouts, which all losses share."""
    if settings.rollouts or settings.task != "apples":
        raise Problem(
            "--rollouts and another --task need --model: the policy to train; the "
            "embedded one knows apples alone"
        )
    task, folder = load_task(settings.task), f"runs/apples-seed{settings.seed}"
    check_settings(settings, task)
    settings.model = base_policy(folder, settings.seed)
    settings.out = settings.out or f"{folder}/{settings.loss}"
    settings.rollouts = f"{folder}/rollouts-{settings.questions}x{settings.samples}.jsonl"
    evaluation.sample_rollout_file(settings, task, settings.model, settings.rollouts)


def job(settings, task=None):
    """Rounds of sample-then-train, measured before and after if there is a task."""
    start = time.time()
    check_settings(settings, task)
    run_folder.prepare_folder(settings)
    if task is None:
        train_once(settings)
        return say(f"the trained policy and the log are in {settings.out}")
    evaluation.check_overlap(settings, task)
    before = evaluation.measure_once(settings, task, settings.model, "before")
    point = evaluation.curve_point(settings, task)
    logs = [log for _, log in rounds(settings, task, point)]
    after = evaluation.measure_once(settings, task, settings.out, "after")
    evaluation.report_change(settings, before, after, logs, time.time() - start)


def rounds(settings, task, evaluate=None):
    """Rounds of sample-then-train. Returns (folder of the policy, log) of each."""
    policy, trained = settings.model, []
    for number in range(1, settings.rounds + 1):
        out = f"{settings.out}/round-{number}" if number < settings.rounds else settings.out
        this = dataclasses.replace(settings, model=policy, out=out)
        if number > 1 or not settings.rollouts:
            this.rollouts = f"{settings.out}/rollouts-{number}.jsonl"
            evaluation.sample_rollout_file(settings, task, policy, this.rollouts, number)
        policy = out
        trained.append((policy, train_once(this, evaluate)))
    return trained


def train_once(settings, evaluate=None):
    """The log of a run: made now, or kept from an earlier run of the same command."""
    if not from_first(run_folder.finished(settings.out)):
        return train(settings, evaluate)
    run_folder.check_same_run(settings, run_folder.describe_run(settings))
    say(f"{settings.out}: trained before, reusing it")
    return from_first(run_folder.read_log(settings.out))


def check_settings(settings, task):
    """Refuses settings that would fail, or turn out to do nothing, only after hours of work."""
    losses.check(settings)
    if task is None and (settings.rounds > 1 or settings.eval_every):
        raise Problem("--rounds and --eval-every need --task: to sample from, and to measure on")
    if settings.shard and (world() == 1 or settings.eval_every):
        raise Problem(
            "--shard needs more than one process (torchrun --nproc-per-node 8 train.py), "
            "and --eval-every 0: no card holds the whole model"
        )


def base_policy(folder, seed, task=apples, steps=1000, rate=5e-3, **size):
    """An embedded policy: a small Llama that imitates flawed demonstrations."""
    settings = Settings(
        model=f"{folder}/random",
        rollouts=f"{folder}/demonstrations.jsonl",
        out=f"{folder}/base",
        loss="sft",
        learning_rate=rate,
        warmup=50,
        schedule="cosine",
        sequences=32,
        tokens_per_pass=4096,
        seed=seed,
    )
    if rank() == 0 and not run_folder.finished(settings.out):
        say(f"{settings.out}: making the base policy from flawed demonstrations")
        apples.write_beginner(folder, task, steps * settings.sequences, seed, **size)
    barrier()
    train_once(settings)
    return settings.out


if __name__ == "__main__":
    run_main(main)
