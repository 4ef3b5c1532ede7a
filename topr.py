"""TOPR: Tapered Off-Policy REINFORCE, the loss and the maths around it.

Needs torch alone: copy this file.

Trains a policy pi on scored completions of an earlier policy mu. Correct ones count fully, as in
supervised learning; wrong ones are weighted by min(1, pi/mu) of the WHOLE sequence, so that their
gradient fades as the policy moves away from them. Plain REINFORCE would push them towards
probability zero without end.

For sequence i with completion tokens t = 1..T_i:

    l_it = log pi(y_t | x, y_<t)     m_it = log mu(y_t | x, y_<t)
    A_i  = R_i - c                   reward minus baseline; rewards are +1 and -1: 0 teaches nothing
    d_i  = sum_t (l_it - m_it)       log of the sequence ratio pi/mu
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Taper:
    """The interval [a, b] that clips a weight, `pos` if A > 0 and `neg` if A < 0; and the ratio
    that is the weight: of the whole "sequence" (TOPR's), its "mean" over tokens, or each "token"'s.
    """

    pos: tuple[float, float]
    neg: tuple[float, float]
    ratio: str = "sequence"

    def __post_init__(self):
        for a, b in (self.pos, self.neg):
            if not 0 <= a <= b:  # also false for NaN
                raise ValueError(f"limits ({a}, {b}): 0 <= a <= b is required")
        if self.ratio not in ("sequence", "mean", "token"):
            raise ValueError(f"ratio {self.ratio!r}: sequence, mean or token is required")

    @property
    def needs_mu(self):
        return self.pos[0] != self.pos[1] or self.neg[0] != self.neg[1]


TAPERS = {
    "topr": Taper(pos=(1, 1), neg=(0, 1)),  # the paper's choice (canonical TOPR)
    "reinforce": Taper(pos=(1, 1), neg=(1, 1)),  # naive off-policy REINFORCE: no correction
    "is": Taper(pos=(0, math.inf), neg=(0, math.inf)),  # plain importance sampling
    "tis": Taper(pos=(0, 1), neg=(0, 1)),  # truncated importance sampling
    "sft": Taper(pos=(1, 1), neg=(0, 0)),  # positives only (STaR, rejection fine-tuning)
    "nsr": Taper(pos=(0, 0), neg=(1, 1)),  # negatives only (arXiv 2506.01347)
    "cispo": Taper(pos=(0, 5), neg=(0, 5), ratio="token"),  # arXiv 2506.13585
}


def taper_weights(log_ratio, advantage, taper):
    """How much each sequence, or each token, counts.

        w_i = stop_gradient(exp(clip(d_i, log a, log b)))     (a, b) by the sign of A_i

    Clipped in log space, so that exp(d) does not overflow before a finite b caps it.
    log_ratio: [batch] or [batch, time], advantage: [batch] or [batch, 1] -> weights as log_ratio,
    constants for autograd; 0 where A_i = 0.
    """
    taper = TAPERS[taper] if isinstance(taper, str) else taper
    limits = torch.tensor([taper.pos, taper.neg], dtype=torch.float64)  # math.log(0) would raise
    log_pos, log_neg = limits.log().tolist()  # each (log a, log b)
    log_ratio = log_ratio.detach()
    positive = log_ratio.clamp(*log_pos).exp()
    negative = log_ratio.clamp(*log_neg).exp()
    return torch.where(advantage > 0, positive, torch.where(advantage < 0, negative, 0.0))


def topr_loss(logp, mu_logp, reward, mask, *, taper="topr", baseline=0.0, count=None):
    """The loss whose gradient is the TOPR update.

        loss = - (1/N) sum_i A_i (1/T_i) sum_t w_it l_it        A_i = R_i - baseline

    w_it is the sequence's w_i for all of its tokens, unless the taper has a ratio for each token.
    logp, mu_logp, mask: [batch, time]; mask is True at completion tokens, and elsewhere logp and
    mu_logp may hold anything, NaN too. reward: [batch]. taper: a name in TAPERS, or a Taper.
    count: N, the sequences of the optimizer step over all micro-batches and ranks, if this batch
    is a part of it. mu_logp may be None if the taper does not use it (reinforce, sft, nsr).
    Returns the loss and stats: weight, log_ratio (log pi without mu_logp) and advantage of each
    sequence, [batch].
    """
    taper = TAPERS[taper] if isinstance(taper, str) else taper
    if mu_logp is None and taper.needs_mu:
        raise ValueError("mu_logp is None, but the weights of this taper depend on it")
    reward = reward.to(torch.promote_types(reward.dtype, torch.float32))
    advantage = reward - baseline  # [batch]
    logp, differences, advantage, mask, count = checked(logp, mu_logp, advantage, mask, count)
    length = mask.sum(-1)  # [batch]
    log_ratio = differences.detach().sum(-1)  # d_i = sum_t (l_it - m_it)  [batch]
    ratios = {
        "sequence": log_ratio[:, None],
        "mean": (log_ratio / length)[:, None],
        "token": differences,
    }
    weight = taper_weights(ratios[taper.ratio], advantage[:, None], taper)  # [batch, 1 or time]

    # pi = 0: nothing is left to push down. Filled, not multiplied away: 0 * inf is NaN.
    vanished = (mask & (logp == -math.inf)).any(-1, keepdim=True)  # [batch, 1]
    logp = logp.masked_fill(vanished | ~mask, 0.0)
    coefficient = advantage[:, None] * weight  # A_i w_it  [batch, 1 or time]
    loss = -((coefficient * logp).sum(-1) / length).sum() / count
    weight = torch.where(mask, weight, 0.0).sum(-1) / length  # its mean over tokens  [batch]
    return loss, {"weight": weight, "log_ratio": log_ratio, "advantage": advantage}


def ppo_loss(logp, mu_logp, reward, mask, *, clip=0.2, count=None):
    """PPO with clipping, as in the paper's comparison: token ratios, advantage = reward, no critic.

        loss = - (1/N) sum_i (1/T_i) sum_t min(r_it R_i, clip(r_it, 1 - eps, 1 + eps) R_i)
        r_it = exp(l_it - m_it)

    Arguments and stats as in topr_loss; weight is the mean ratio over tokens.
    """
    logp, differences, reward, mask, count = checked(logp, mu_logp, reward, mask, count)
    length = mask.sum(-1)  # [batch]
    advantage = reward[:, None]  # [batch, 1]
    ratio = differences.clamp(max=20).exp()  # 20: no overflow  [batch, time]
    clipped = ratio.clamp(1 - clip, 1 + clip)  # [batch, time]
    objective = torch.minimum(ratio * advantage, clipped * advantage).masked_fill(~mask, 0.0)
    loss = -(objective.sum(-1) / length).sum() / count
    weight = torch.where(mask, ratio.detach(), 0.0).sum(-1) / length  # [batch]
    log_ratio = differences.detach().sum(-1)  # [batch]
    return loss, {"weight": weight, "log_ratio": log_ratio, "advantage": reward}


def dpo_loss(logp, mu_logp, reward, mask, *, beta=0.1, count=None):
    """DPO with mu as its reference, on pairs: rows 0, 2, 4.. are better, rows 1, 3, 5.. worse.

        loss = - (1/pairs) sum_pairs log sigmoid(beta (d_better - d_worse))

    Arguments and stats as in topr_loss (count is in sequences, two a pair); weight is the slope of
    log sigmoid at the pair's margin.
    """
    logp, differences, reward, mask, count = checked(logp, mu_logp, reward, mask, count)
    if len(reward) % 2 or not (reward[::2] > reward[1::2]).all():
        raise ValueError("dpo_loss needs pairs of rows, the better one first: see preference_pairs")
    log_ratio = differences.sum(-1)  # d, here with its gradient  [batch]
    margin = beta * (log_ratio[::2] - log_ratio[1::2])  # [pairs]
    loss = -2 * F.logsigmoid(margin).sum() / count
    weight = torch.sigmoid(-margin.detach()).repeat_interleave(2)  # [batch]
    return loss, {"weight": weight, "log_ratio": log_ratio.detach(), "advantage": reward}


def checked(logp, mu_logp, advantage, mask, count):
    """(logp, logp - mu_logp or 0, advantage, mask, N), in float32 or better, or an error that names
    the sequence and the token, by their places in the batch. Differences first, then sums: both
    terms are large."""
    count = len(mask) if count is None else count
    if not count > 0:
        raise ValueError(f"count is {count}: the sequences of the optimizer step, above 0")
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    advantage = advantage.to(logp.dtype)
    mu_logp = torch.zeros_like(logp) if mu_logp is None else mu_logp.to(logp.dtype).detach()
    if not logp.shape == mask.shape == mu_logp.shape or advantage.shape != logp.shape[:1]:
        raise ValueError("logp, mu_logp and mask must be [batch, time], reward [batch]")
    faults = {  # what is wrong: where, [batch] or [batch, time]
        "it has no completion tokens": mask.sum(-1) == 0,
        "its reward is not finite": ~advantage.isfinite(),
        "log pi is NaN or above 0 (pass log-probabilities, not logits)": mask & ~(logp <= 1e-3),
        "log pi = -inf, on a positive": mask & (logp == -math.inf) & (advantage[:, None] > 0),
        "log mu is missing, NaN or infinite": mask & ~mu_logp.isfinite(),
    }
    if torch.stack([where.any() for where in faults.values()]).any():  # one wait for the device
        for message, where in faults.items():
            for sequence, *token in where.nonzero().tolist():
                token = f", token {token[0]}" if token else ""
                raise ValueError(f"sequence {sequence}{token}: {message}")
    differences = torch.where(mask, logp - mu_logp, 0.0)  # never the padding, which may be NaN
    return logp, differences, advantage, mask, count


# ---- the composition of the data: baseline, shares, Anna Karenina, pairs ----


def effective_positive_share(p, c):
    """The share of positives to which a baseline c is equivalent, if a share p of the +1/-1 rewards
    is +1.

    p~ = p (1 - c) / (1 + c (1 - 2p))
    """
    total = 1 + c * (1 - 2 * p)  # 0 if the baseline is the reward of all
    if not 0 <= p <= 1 or not -1 <= c <= 1 or total == 0:
        raise ValueError(f"there is no share for a share {p} in [0, 1], a baseline {c} in [-1, 1]")
    return p * (1 - c) / total


def baseline_for_share(p, share):
    """The baseline that makes a share p of positives act like `share`.

    c = (p - p~) / (p + p~ - 2 p p~)
    """
    if not 0 < p < 1 or not 0 <= share <= 1:
        raise ValueError(
            f"the share of positives is {p}: the data needs positives and negatives, "
            f"and the target share, {share}, must be in [0, 1]"
        )
    return max(-1.0, min(1.0, (p - share) / (p + share - 2 * p * share)))  # rounding may exceed 1


def anna_karenina(rollouts):
    """All happy families are alike: of each question keep the first correct completion and every
    wrong one. rollouts: dicts with "id" and "reward" -> a list of those kept, in their order."""
    happy, kept = set(), []
    for rollout in rollouts:
        is_right = rollout["reward"] > 0
        if not is_right or rollout["id"] not in happy:
            kept.append(rollout)
        if is_right:
            happy.add(rollout["id"])
    return kept


def preference_pairs(rollouts):
    """(better, worse) positions for DPO: each question's correct and wrong completions, each used
    once at most."""
    right, wrong = defaultdict(list), defaultdict(list)
    for position, rollout in enumerate(rollouts):
        side = right if rollout["reward"] > 0 else wrong
        side[rollout["id"]].append(position)
    return [pair for question in right for pair in zip(right[question], wrong[question])]


# ---- log-probabilities of completions ----


def token_logprobs(logits, ids):
    """log pi of each token given the tokens before it, for any model: the plain way.

    logits: [batch, time, vocab], ids: [batch, time] -> [batch, time], 0 at the first token
    """
    logprobs = logits[:, :-1].float().log_softmax(-1)  # [batch, time - 1, vocab]
    chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0]  # [batch, time - 1]
    return F.pad(chosen, (1, 0))  # [batch, time]


def completion_logprobs(model, ids, mask, *, previous=None, **layout):
    """log pi of the completion tokens (0 elsewhere) under a causal language model of transformers,
    without ever holding [batch, time, vocab].

    ids, mask: [batch, time] -> [batch, time], float32, with gradient. mask is boolean, and False at
    the first token, which has nothing before it.
    previous: [batch, time], the position that predicts each token, if it is not the one before
    (several completions packed behind one prompt).
    layout: attention_mask and position_ids, for padding on the left and for packed rows. Padding on
    the right needs neither, because attention is causal.

    The head runs on chunks of completion positions, and again in the backward pass if there are
    several. head_logprobs knows most families of models: compare it once with token_logprobs of the
    model's own logits, as engine/packing.py does, and use that where they differ.
    """
    row, position = mask[:, 1:].nonzero(as_tuple=True)  # [tokens], [tokens]: the token before
    position = position if previous is None else previous[mask]  # [tokens]
    hidden = model.get_decoder()(input_ids=ids, use_cache=False, **layout).last_hidden_state
    hidden = hidden[row, position]  # [tokens, width]
    chunk = 2**26 // model.config.get_text_config().vocab_size  # 256 MiB of logits
    run_head = partial(head_logprobs, model)
    if len(hidden) > chunk:
        run_head = partial(checkpoint, run_head, use_reentrant=False)
    logprobs = torch.cat(list(map(run_head, hidden.split(chunk), ids[mask].split(chunk))))
    return torch.zeros_like(ids, dtype=torch.float32).masked_scatter(mask, logprobs)


def head_logprobs(model, hidden, targets):
    """log pi of the targets, by the model's head alone. [tokens, width], [tokens] -> [tokens]

    Three families change its logits: Cohere scales them, Granite divides them, Gemma caps them.
    """
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)  # [tokens, vocab]
    scale = getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1)
    if scale != 1:
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return TokenLogProbs.apply(logits.float(), targets)


class TokenLogProbs(torch.autograd.Function):
    """Negative cross-entropy, in float32, whose backward pass allocates one tensor of
    [tokens, vocab], where torch's allocates two: with a large vocabulary these are the peak memory.
    """

    @staticmethod
    def forward(context, logits, targets):
        logprobs = logits.log_softmax(-1)  # [tokens, vocab]
        context.save_for_backward(logprobs, targets)
        return logprobs.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(context, gradient):
        logprobs, targets = context.saved_tensors
        # g (onehot - softmax)
        logits_gradient = logprobs.exp().mul_(-gradient[:, None])  # [tokens, vocab]
        return logits_gradient.scatter_add_(1, targets[:, None], gradient[:, None]), None
