"""log mu, the log-probabilities under the policy that wrote the rollouts: fixed for the run."""

import hashlib
import os

import numpy as np
import torch

from engine.batches import completions_per_row, micro_batches
from engine.common import Problem, progress, say, whole_file
from engine.packing import pack
from engine.parallel import barrier, from_first, gather, rank, world


def make_mu(settings, policy, data, needs_mu, model_fingerprint):
    """Sets data.mu, log mu of every completion token, for the whole run. Returns its source.

    Re-anchoring mu on the current weights would make every ratio 1 and turn TOPR into naive
    REINFORCE unnoticed.
    """
    missing = sum(row.logprobs is None for row in data.rows)
    if not missing:
        data.mu = [row.logprobs for row in data.rows]
    if not needs_mu:
        return "not needed"
    if settings.mu != "start" and not missing:
        if settings.mu == "checked":
            data.mu_tolerance = 0.1 if policy.dtype == torch.float32 else 2.0
        return "from the file"
    if settings.mu == "file":
        raise Problem(f"{settings.rollouts}: {missing:,} rows hold no logprobs: --mu start")
    inputs = hashlib.sha256(f"{model_fingerprint} {settings.precision}".encode())
    for row in data.rows:
        inputs.update(np.array([*row.prompt, -1, *row.completion]).tobytes())
    path = f"{settings.rollouts}.mu-{inputs.hexdigest()[:16]}.npy"
    if not os.access(os.path.dirname(path) or ".", os.W_OK):
        path = f"{settings.out}/{os.path.basename(path)}"
    if not from_first(os.path.exists(path)):
        scores = score_rows(settings, policy, data)
        if rank() == 0:
            with whole_file(path) as file:
                np.save(file.buffer, np.concatenate(scores))
        barrier()
    ends = np.cumsum([len(row.completion) for row in data.rows])
    try:
        data.mu = np.split(np.load(path), ends[:-1])
    except (ValueError, OSError, EOFError):
        raise Problem(f"{path}: is damaged: delete it, and it is computed again")
    return f"of the starting weights, in {path}"


@torch.no_grad()
def score_rows(settings, policy, data):
    """log pi of every completion of the file, on every rank: a list of [time]"""
    scores, chunk = {}, 64 * world()
    numbers = np.arange(len(data.rows))[:, None]  # [rows, 1]
    for start in progress(range(0, len(numbers), chunk), what="log mu of the starting weights"):
        units = numbers[start : start + chunk]
        for batch in micro_batches(settings, data, units, policy.model):
            logp = policy(batch.packed, batch.mask).cpu()  # [batch, time]
            for row, values, mask in zip(batch.rows, logp, batch.mask.cpu()):
                scores[row] = values[mask].numpy()
    for part in gather(scores):
        scores |= part
    return [scores[row] for row in range(len(data.rows))]


def check_fit(settings, data, log_ratios):
    """Refuses logprobs that the starting weights did not write: before the first update pi/mu is 1.

    log_ratios: log pi/mu of the completions of the first step, this rank's.
    """
    largest = max(map(abs, log_ratios), default=0.0)
    fit = f"{settings.rollouts}: the largest |log pi/mu| is {largest:.2g} before the first step"
    say(fit)
    if not largest <= data.mu_tolerance:
        raise Problem(
            f"{fit}: its logprobs do not fit {settings.model}. If another policy wrote the file on "
            "purpose: --mu file. If its logprobs are not those of a plain softmax at temperature "
            "1, or you do not know: --mu start computes them with the starting weights"
        )


@torch.no_grad()
def score(policy, prompt, completions):
    """log mu of the tokens of one question's completions, for the rollout file: lists of numbers.

    By the trainer's own function, in a shape that depends on the question alone: pi/mu of an
    untrained policy is 1.
    """
    mean = sum(map(len, completions)) / len(completions)
    most = len(completions) if policy.packs else 1
    width = policy.model.config.get_text_config().hidden_size
    fit = completions_per_row(len(prompt), mean, most, width)
    rows = [(prompt, completions[i : i + fit]) for i in range(0, len(completions), fit)]
    logp = policy(*pack(rows, policy.model.device)).tolist()  # [batch, time]
    return [values[: len(tokens)] for values, tokens in zip(logp, completions)]
