"""log mu, the log-probabilities under the policy that wrote the rollouts: fixed for the run."""

import collections
import hashlib
import os

import numpy as np
import torch

from engine.batches import completions_per_row, micro_batches
from engine.common import Problem, first_line, progress, say, whole_file
from engine.packing import LogProbs, abilities, completion_mask, dtype_of_compute, pack
from engine.parallel import barrier, from_first, gather, rank


def make_mu(settings, policy, data, device, needs_mu, model_fingerprint):
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
        data.check_mu = settings.mu == "checked"
        return "from the file"
    if settings.mu == "file":
        raise Problem(f"{data.path}: {missing:,} of {len(data.rows):,} rows hold no logprobs, "
                      "which --mu file needs: --mu start computes them")
    tokens = hashlib.sha256()
    for row in data.rows:
        tokens.update(np.array([*row.prompt, -1, *row.completion]).tobytes())
    name = f"{model_fingerprint[:8]}-{tokens.hexdigest()[:8]}-{settings.precision}"
    path = f"{data.path}.mu-{name}.npy"
    if not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
        path = f"{settings.out}/{os.path.basename(path)}"
    if not from_first(os.path.exists(path)):
        scores = score_rows(settings, policy, data, range(len(data.rows)), device)
        if rank() == 0:
            with whole_file(path, "wb") as file:
                np.save(file, np.concatenate([scores[row] for row in range(len(data.rows))]))
        barrier()
    ends = np.cumsum([len(row.completion) for row in data.rows])
    try:
        data.mu = np.split(np.load(path), ends[:-1])
    except (ValueError, OSError, EOFError) as error:
        raise Problem(f"{path}: cannot be read: {first_line(error)}. Remove it, and it is computed "
                      "again")
    return f"of the starting weights, in {path}"


@torch.no_grad()
def score_rows(settings, policy, data, rows, device):
    """log pi of the completions of some rows, on every rank: {row: [time]}"""
    scores, chunk = {}, 64 * data.ranks
    for start in progress(range(0, len(rows), chunk), what="log mu of the starting weights"):
        units = np.array(rows[start : start + chunk])[:, None]  # [rows, 1]
        for batch in micro_batches(settings, data, units, device):
            logp = policy(batch.packed, batch.mask).cpu()  # [batch, time]
            for row, values, mask in zip(batch.rows, logp, batch.mask.cpu()):
                scores[row] = values[mask].numpy()
    return collections.ChainMap(*gather(scores))


def check_fit(settings, data, log_ratios):
    """Refuses logprobs that the starting weights did not write: before the first update pi/mu is 1.

    log_ratios: log pi/mu of the completions of the first step, this rank's.
    """
    tolerance = 0.1 if data.mask_dtype == torch.float32 else 2.0
    largest = max(map(abs, log_ratios), default=0.0)
    say(f"{data.path}: before the first step the largest |log pi/mu| of {len(log_ratios)} "
        f"completions is {largest:.2g}")
    if not largest <= tolerance:
        raise Problem(
            f"{data.path}: its logprobs do not fit {settings.model}: |log pi/mu| is {largest:.3g} "
            f"before the first step, over the tolerance of {tolerance}. If another policy wrote "
            "the file on purpose: --mu file. If its logprobs are not those of a plain softmax at "
            "temperature 1, or you do not know: --mu start computes them with the starting weights")


def make_scorer(model, longest, precision):
    """What score takes: the policy as a module, whether completions can be packed, mask dtype."""
    mask_dtype = dtype_of_compute(model, precision)
    known, can_share = abilities(model, longest, precision, mask_dtype)
    return LogProbs(model, precision, known), can_share, mask_dtype


@torch.no_grad()
def score(scorer, prompt, completions):
    """log mu of the tokens of one question's completions, for the rollout file: lists of numbers.

    By the trainer's own function, in a shape that depends on the question alone: pi/mu of an
    untrained policy is 1.
    """
    policy, can_share, mask_dtype = scorer
    device, fit = policy.model.device, 1
    if can_share:
        mean = sum(map(len, completions)) / len(completions)
        width = policy.model.config.get_text_config().hidden_size
        fit = completions_per_row(len(prompt), mean, len(completions), width)
    rows = [(prompt, completions[i : i + fit]) for i in range(0, len(completions), fit)]
    mask = completion_mask(completions, device)
    logp = policy(pack(rows, device, mask_dtype), mask).tolist()  # [batch, time]
    return [values[: len(tokens)] for values, tokens in zip(logp, completions)]
