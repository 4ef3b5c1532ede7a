"""TOPR: Tapered Off-Policy REINFORCE, the loss and the maths around it.

Needs torch alone: copy this file.

Trains a policy pi on scored completions of an earlier policy mu. Correct ones count fully, as in
supervised learning; wrong ones count min(1, pi/mu) of the WHOLE sequence, so that they fade as the
policy leaves them. Plain REINFORCE would push them towards probability zero without end.

For sequence i with completion tokens t = 1..T_i:

    l_it = log pi(y_t | x, y_<t)     m_it = log mu(y_t | x, y_<t)
    A_i  = R_i - c                   reward minus baseline
    d_i  = sum_t (l_it - m_it)       log of the sequence ratio pi/mu
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Taper:
    """The interval [a, b] that clips a sequence's weight: `pos` if A > 0, `neg` if A < 0."""

    pos: tuple[float, float]
    neg: tuple[float, float]

    def __post_init__(self):
        for a, b in (self.pos, self.neg):
            if not 0 <= a <= b:  # also false for NaN
                raise ValueError(f"limits ({a}, {b}): 0 <= a <= b is required")

    @property
    def needs_mu(self):
        return self.pos[0] != self.pos[1] or self.neg[0] != self.neg[1]


TAPERS = {
    "topr": Taper(pos=(1, 1), neg=(0, 1)),  # the paper's choice (canonical TOPR)
    "reinforce": Taper(pos=(1, 1), neg=(1, 1)),  # naive off-policy REINFORCE: no correction
    "is": Taper(pos=(0, math.inf), neg=(0, math.inf)),  # plain importance sampling
    "tis": Taper(pos=(0, 1), neg=(0, 1)),  # truncated importance sampling
    "sft": Taper(pos=(1, 1), neg=(0, 0)),  # positives only (STaR, rejection fine-tuning)
}


def taper_weights(log_ratio, advantage, taper):
    """How much each sequence counts.

        w_i = stop_gradient(exp(clip(d_i, log a, log b)))     (a, b) by the sign of A_i

    Clipped in log space, so that exp(d) does not overflow first.
    log_ratio, advantage: [batch] -> weights: [batch], constants for autograd; 0 where A_i = 0.
    """
    taper = TAPERS[taper] if isinstance(taper, str) else taper
    limits = torch.tensor([taper.pos, taper.neg], dtype=torch.float64)
    log_pos, log_neg = limits.log().tolist()  # each (log a, log b)
    log_ratio = log_ratio.detach()
    positive = log_ratio.clamp(*log_pos).exp()  # [batch]
    negative = log_ratio.clamp(*log_neg).exp()  # [batch]
    return torch.where(advantage > 0, positive, torch.where(advantage < 0, negative, 0.0))


def topr_loss(logp, mu_logp, reward, mask, *, taper="topr", baseline=0.0, count=None):
    """The loss whose gradient is the TOPR update.

        loss = - (1/N) sum_i A_i w_i (1/T_i) sum_t l_it        A_i = R_i - baseline

    logp, mu_logp, mask: [batch, time]; mask is True at completion tokens, and elsewhere logp and
    mu_logp may hold anything, NaN too. reward: [batch]. taper: a name in TAPERS, or a Taper.
    count: N, the sequences of the optimizer step over all micro-batches and ranks, if this batch
    is a part of it. mu_logp may be None if the taper does not use it (reinforce, sft).
    Returns the loss and stats: weight, log_ratio (log pi without mu_logp) and advantage of each
    sequence, [batch].
    """
    taper = TAPERS[taper] if isinstance(taper, str) else taper
    if mu_logp is None and taper.needs_mu:
        raise ValueError("mu_logp is None, but the weights of this taper depend on it")
    advantage = reward - baseline  # [batch]
    logp, differences, advantage, mask = checked(logp, mu_logp, advantage, mask)
    length = mask.sum(-1)  # [batch]
    log_ratio = differences.detach().sum(-1)  # d_i = sum_t (l_it - m_it)  [batch]
    weight = taper_weights(log_ratio, advantage, taper)  # [batch]

    vanished = (mask & (logp == -math.inf)).any(-1)  # pi = 0: nothing left to push down  [batch]
    logp = logp.masked_fill(vanished[:, None] | ~mask, 0.0)  # not a product: 0 * inf is NaN
    no_gradient = vanished | (advantage == 0)  # [batch]
    coefficient = torch.where(no_gradient, 0.0, advantage * weight)  # A_i w_i  [batch]
    loss = -(coefficient * logp.sum(-1) / length).sum() / (count or len(reward))
    return loss, {"weight": weight, "log_ratio": log_ratio, "advantage": advantage}


def ppo_loss(logp, mu_logp, reward, mask, *, clip=0.2, count=None):
    """PPO with clipping, as in the paper's comparison: token ratios, advantage = reward, no critic.

        loss = - (1/N) sum_i (1/T_i) sum_t min(r_it R_i, clip(r_it, 1 - eps, 1 + eps) R_i)
        r_it = exp(l_it - m_it)

    Arguments and stats as in topr_loss; weight is the mean ratio over tokens, in which clipped
    tokens count as 0.
    """
    logp, differences, reward, mask = checked(logp, mu_logp, reward, mask)
    length = mask.sum(-1)  # [batch]
    advantage = reward[:, None]  # [batch, 1]
    ratio = differences.clamp(max=20).exp()  # 20: no overflow  [batch, time]
    unclipped = ratio * advantage  # [batch, time]
    objective = torch.minimum(unclipped, ratio.clamp(1 - clip, 1 + clip) * advantage)
    has_gradient = mask & (objective == unclipped)  # [batch, time]
    objective = objective.masked_fill(~mask, 0.0)
    loss = -(objective.sum(-1) / length).sum() / (count or len(reward))
    weight = torch.where(has_gradient, ratio.detach(), 0.0).sum(-1) / length  # [batch]
    log_ratio = differences.detach().sum(-1)  # [batch]
    return loss, {"weight": weight, "log_ratio": log_ratio, "advantage": reward}


def dpo_loss(logp, mu_logp, reward, mask, *, beta=0.1, count=None):
    """DPO with mu as its reference, on pairs: rows 0, 2, 4.. are better, rows 1, 3, 5.. worse.

        loss = - (1/pairs) sum_pairs log sigmoid(beta (d_better - d_worse))

    Arguments and stats as in topr_loss (count is in sequences, two a pair); weight is the slope of
    -log sigmoid.
    """
    logp, differences, reward, mask = checked(logp, mu_logp, reward, mask)
    if len(reward) % 2 or not (reward[0::2] > reward[1::2]).all():
        raise ValueError("dpo_loss needs pairs of rows, the better one first: see preference_pairs")
    log_ratio = differences.sum(-1)  # d, here with its gradient  [batch]
    margin = beta * (log_ratio[0::2] - log_ratio[1::2])  # [pairs]
    loss = -F.logsigmoid(margin).sum() / ((count or len(reward)) / 2)
    weight = torch.sigmoid(-margin.detach()).repeat_interleave(2)  # [batch]
    return loss, {"weight": weight, "log_ratio": log_ratio.detach(), "advantage": reward}


def checked(logp, mu_logp, advantage, mask):
    """(logp, logp - mu_logp or 0, advantage, mask) in float32 or better, or an error that names the
    sequence and the token. Differences first, then sums: both terms are large."""
    mask = mask.bool()
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    advantage = advantage.to(torch.promote_types(advantage.dtype, torch.float32))
    mu_logp = torch.zeros_like(logp) if mu_logp is None else mu_logp.to(logp.dtype).detach()
    if not logp.shape == mask.shape == mu_logp.shape or advantage.shape != logp.shape[:1]:
        raise ValueError("logp, mu_logp and mask must be [batch, time], reward [batch]")
    positive = advantage[:, None] > 0  # [batch, 1]
    faults = {  # what is wrong: where, [batch] or [batch, time]
        "it has no completion tokens": mask.sum(-1) == 0,
        "its reward is not finite": ~advantage.isfinite(),
        "log pi is NaN or +inf": mask & (logp.isnan() | (logp == math.inf)),
        "log pi is above 0: pass log-probabilities, not logits": mask & (logp > 1e-3),
        "log pi = -inf, on a positive": mask & (logp == -math.inf) & positive,
        "log mu is missing, NaN or infinite": mask & ~mu_logp.isfinite()}
    if torch.stack([where.any() for where in faults.values()]).any():  # one wait for the device
        message, where = next(fault for fault in faults.items() if fault[1].any())
        raise ValueError(f"{place_of(where)}: {message}")
    differences = torch.where(mask, logp - mu_logp, 0.0)  # never the padding, which may be NaN
    return logp, differences, advantage, mask


def place_of(flags):
    """The first True of [batch] or [batch, time], in words."""
    index = flags.nonzero()[0].tolist()
    return f"sequence {index[0]}" + (f", token {index[1]}" if len(index) > 1 else "")


# ---- the composition of the data: baseline, shares, Anna Karenina, pairs ----


def effective_positive_share(p, c):
    """The share of positives that a baseline c acts like, if a share p of the +1/-1 rewards is +1.

        p~ = p (1 - c) / (1 + c (1 - 2p))
    """
    if not 0 <= p <= 1 or not -1 <= c <= 1:
        raise ValueError(f"share {p} must be in [0, 1], baseline {c} in [-1, 1]")
    return p * (1 - c) / (1 + c * (1 - 2 * p))


def baseline_for_share(p, share):
    """The baseline that makes a share p of positives act like `share`.

        c = (p - p~) / (p + p~ - 2 p p~)
    """
    if not 0 < p < 1:
        raise ValueError(f"the share of positives is {p}: the data needs positives and negatives")
    if not 0 <= share <= 1:
        raise ValueError(f"the target share must be in [0, 1], not {share}")
    return max(-1.0, min(1.0, (p - share) / (p + share - 2 * p * share)))  # rounding may exceed 1


def anna_karenina(rollouts):
    """All happy families are alike: of each question keep the first correct completion and every
    wrong one. rollouts: dicts with "id" and "reward" -> a list of those kept, in their order."""
    happy, kept = set(), []
    for rollout in rollouts:
        if rollout["reward"] <= 0 or rollout["id"] not in happy:
            kept.append(rollout)
        if rollout["reward"] > 0:
            happy.add(rollout["id"])
    return kept


def preference_pairs(rollouts):
    """(better, worse) positions for DPO: each question's correct and wrong completions, each used
    once at most."""
    right, wrong = {}, {}
    for position, rollout in enumerate(rollouts):
        side = right if rollout["reward"] > 0 else wrong
        side.setdefault(rollout["id"], []).append(position)
    return [pair for question in right for pair in zip(right[question], wrong.get(question, []))]


# ---- log-probabilities of completions ----


def token_logprobs(logits, ids):
    """log pi of each token given the tokens before it, for any model: the plain way.

    logits: [batch, time, vocab], ids: [batch, time] -> [batch, time], 0 at the first token
    """
    logprobs = logits[:, :-1].float().log_softmax(-1)  # [batch, time - 1, vocab]
    chosen = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)  # [batch, time - 1]
    return F.pad(chosen, (1, 0))  # [batch, time]


def completion_logprobs(model, ids, mask, *, previous=None, **layout):
    """log pi of the completion tokens (0 elsewhere) under a causal language model of transformers,
    without ever holding [batch, time, vocab].

    ids, mask: [batch, time] -> [batch, time], float32, with gradient
    previous: [batch, time], the position that predicts each token, if it is not the one before
    (several completions packed behind one prompt).
    layout: attention_mask and position_ids, for padding on the left and for packed rows. Padding on
    the right needs neither, for attention is causal.

    The head runs on chunks of completion positions, and again in the backward pass if there are
    several. head_logprobs knows most families of models; for another one use token_logprobs.
    """
    mask = mask.bool()
    if mask[:, 0].any():
        raise ValueError(f"{place_of(mask[:, 0])}: the first token has nothing before it")
    row, position = mask.nonzero(as_tuple=True)  # [tokens], [tokens]
    position = position - 1 if previous is None else previous[mask]  # [tokens]
    outputs = model.get_decoder()(input_ids=ids, use_cache=False, **layout)
    hidden = outputs.last_hidden_state[row, position]  # [tokens, width]
    chunk = max(1, 2**26 // model.config.get_text_config().vocab_size)  # 256 MiB of logits
    run_head = partial(head_logprobs, model)
    if len(hidden) > chunk and torch.is_grad_enabled():
        run_head = partial(checkpoint, run_head, use_reentrant=False)
    logprobs = list(map(run_head, hidden.split(chunk), ids[mask].split(chunk)))
    empty = torch.zeros(ids.shape, device=ids.device)
    return empty.masked_scatter(mask, torch.cat(logprobs))  # [batch, time]


def head_logprobs(model, hidden, targets):
    """log pi of the targets, by the model's head alone. [tokens, width], [tokens] -> [tokens]

    Three families change its logits: Cohere scales them, Granite divides them, Gemma caps them.
    """
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)  # [tokens, vocab]
    if factor := getattr(config, "logit_scale", None):
        logits = logits * factor
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
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
