"""Trains a policy on a rollout file with TOPR. A plain PyTorch loop, one process or many.

    torchrun train.py                                             the embedded job, from nothing
    torchrun train.py --model DIR_OR_NAME --rollouts FILE.jsonl   your model, your rollouts

No critic, no KL, no reference model: log mu, the log-probabilities under the policy that wrote the completions, is
read from the file, or computed once with the starting weights, and never touched again.
"""

import dataclasses
import math
import os
import signal
import time
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
import topr
from data import apples
from data.tasks import load_questions, load_task
from data.rollouts import file_fingerprint, write_rollouts
from engine import batches, sampler
from engine.batches import collate, make_mu, read_data, share_out, step_sequences, where
from engine.common import (
    Problem,
    Stopped,
    draw_lines,
    parse,
    part_of,
    progress,
    read_json,
    run_main,
    say,
    seed_everything,
    setting,
    table,
    write_json,
)
from engine.optim import checkpoint_layers, make_optimizer, peak_memory, say_memory, update
from engine.parallel import barrier, from_first, gather, rank, shard, start_ranks, whole, world
from engine.sampler import Sampling
from engine.run_folder import (
    check_same_run,
    finish,
    finished,
    last_checkpoint,
    open_folder,
    read_log,
    resume,
    save_checkpoint,
    stop_wish,
    write_log,
)


@dataclass
class Optimisation:
    """How a policy learns from a rollout file: a part of the settings of train.py, verifier.py and search.py."""

    loss: str = setting("topr", "what to minimise", (*topr.TAPERS, "ppo", "dpo"), main=True)
    learning_rate: float = setting(5e-7, "step size; the default is the paper's for Adafactor", main=True)
    optimizer: str = setting("adafactor", "update rule", ("adafactor", "adamw"), main=True)
    sequences: int = setting(64, "completions in an optimizer step, over all ranks", least=1, main=True)
    epochs: int = setting(1, "passes over the file", least=1, main=True)
    positive_share: Optional[float] = setting(None, "effective share of positives to reach by the baseline", main=True)
    baseline: float = setting(0.0, "c in A = R - c", least=-math.inf)
    pos_limits: str = setting("", "own range a,b of a positive's weight instead of the loss's, for instance 1,1")
    neg_limits: str = setting("", "own range a,b of a negative's weight instead of the loss's, for instance 0,1")
    anna_karenina: bool = setting(False, "of each question keep the first correct completion and every wrong one")
    ppo_clip: float = setting(0.2, "epsilon of ppo")
    dpo_beta: float = setting(0.1, "beta of dpo")
    mu: str = setting("checked", "source of log mu: the file, 64 lines of which must fit the starting weights (checked); "
                      "the file, whoever wrote it (file); the starting weights, once (start)", ("checked", "file", "start"))
    mu_tolerance: Optional[float] = setting(None, "largest |log pi/mu| before the first step with --mu checked "
                                            "(default: 0.1 in float32, 2 in bfloat16)")
    schedule: str = setting("constant", "learning-rate schedule", ("constant", "cosine"))
    warmup: int = setting(0, "steps in which the rate rises from 0")
    weight_decay: float = setting(0.0, "decay of the weights towards 0")
    grad_clip: float = setting(1.0, "largest norm of the gradient (0: no limit)")
    pack_prompts: bool = setting(True, "read a prompt once for its completions in a step, where the model can")
    prompt_group: int = setting(4, "completions of a prompt that stay adjacent in the random order", least=1)
    micro_batch: int = setting(0, "completions in a forward pass (0: as many as --tokens-per-pass allows)")
    tokens_per_pass: int = setting(16384, "tokens in a forward pass, padding included", least=1)
    gradient_checkpointing: bool = setting(False, "compute activations again in the backward pass: slower, less memory")
    shard: bool = setting(False, "a part of every weight, gradient and optimizer state on each rank (FSDP2), for a model "
                          "beyond one card")
    checkpoint_every: int = setting(100, "steps between checkpoints (0: none)")


@dataclass
class Settings(Optimisation, Sampling):
    model: str = setting("", "policy to start from: a directory or a hub name (none: the embedded one, made here)", main=True)
    rollouts: str = setting("", "rollout file to learn from (none: sampled from the policy, with --task)", main=True)
    out: str = setting("", "folder for the trained policy (default: runs/MODEL-LOSS)", main=True)
    task: str = setting("", "task to sample from and to measure on, before and after", main=True)
    rounds: int = setting(1, "rounds of sample-then-train; each starts from the policy of the last (--rollouts: the first's)",
                          least=1, main=True)
    map_rewards: str = setting("", "rewards for 0 and 1 in a file that has them: --map-rewards=-1,1")
    questions: int = setting(0, "training questions to sample from (0: all; 250 of the generated ones)")
    test_questions: int = setting(0, "questions to measure on (0: all; 250 of the generated ones)")
    eval_every: int = setting(0, "steps between measurements on the task (0: before and after alone)")


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
    model, tokenizer = sampler.load_model(settings.model, settings, "cpu" if settings.shard else device)
    data = read_data(settings, model, tokenizer)
    run = {"settings": dataclasses.asdict(settings), "model_weights": sampler.fingerprint(model), "file": data.fingerprint}
    check_same_run(settings, run)
    share = settings.pack_prompts and batches.can_share_prompts(model, data.lengths.max())
    baseline, loss_function = make_loss(settings, data)
    policy = LogProbs(model)
    if settings.shard:
        shard(policy, device)
    mu, source = make_mu(settings, policy, tokenizer, data, share, run["model_weights"], make_taper(settings))
    steps = math.ceil(len(data.units) / data.units_per_step) * settings.epochs
    say(f"{data.path}: {data.units.size:,} completions, {(data.rewards[data.units] > 0).mean():.1%} positive; {steps:,} steps of "
        f"{settings.sequences} with loss {settings.loss}, baseline {baseline:.3f}, log mu {source}"
        + ("" if share or not settings.pack_prompts else "; this model cannot read a prompt once for several completions"))
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


# ---- the loss ----


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


def learning_rate(settings, step, steps):
    warm = min(1.0, (step + 1) / (settings.warmup + 1))
    if settings.schedule == "cosine":
        warm *= 0.5 * (1 + math.cos(math.pi * step / steps))
    return settings.learning_rate * warm


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
    task = load_task(settings.task)
    sampler.sample_once(settings, policy, lambda tokenizer: load_questions(
        task, "train", settings.questions, settings.seed, tokenizer, settings), task.grade, path)
    return path


def measured(settings, policy, name):
    """What eval.py measures on the test questions; kept in the run's folder."""
    path = os.path.join(settings.out, f"{name}.json")
    model, tokenizer = sampler.load_policy(settings, policy)
    wish = sampling(settings, model=policy, split="test", questions=settings.test_questions, seed=settings.seed + 1)
    what = {"settings": dataclasses.asdict(wish), "weights": sampler.fingerprint(model)}
    kept = from_first(read_json(path) if rank() == 0 and os.path.exists(path) else {})
    if {key: kept.get(key) for key in what} == what:
        return kept["measures"]
    measures = evaluation.evaluate(model, tokenizer, load_task(settings.task), wish, "test", settings.test_questions,
                                   what=f"measuring {name}")
    if rank() == 0:
        write_json(path, {**what, "measures": measures})
    return measures


def curve_point(settings):
    """model -> pass@1 and invalid on a few test questions, for the learning curve."""
    wish = sampling(settings, split="test", samples=4, seed=settings.seed + 1)
    tokenizer = sampler.load_tokenizer(settings.model)

    def point(model):
        measures = evaluation.evaluate(model.eval(), tokenizer, load_task(settings.task), wish, "test",
                                       min(100, settings.test_questions or 100), what="measuring", greedy=False)
        return {name: measures[name]["mean"] for name in ("pass@1", "invalid")}

    return point


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
