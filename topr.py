"""TOPR: Tapered Off-Policy REINFORCE, the loss and the maths around it. Needs torch alone: copy this file.

Completions that an earlier policy mu wrote, scored with a reward, train the policy pi. Correct ones count
fully, as in supervised learning; wrong ones count min(1, pi/mu) of the WHOLE sequence, so that they fade as
the policy leaves them. Plain REINFORCE would push them towards probability zero without end.

Written for sequence i with completion tokens t = 1..T_i:
    l_it = log pi(y_t | x, y_<t)     m_it = log mu(y_t | x, y_<t)     R_i = reward, A_i = R_i - baseline
    d_i  = sum_t (l_it - m_it)       the log of the sequence ratio pi/mu
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Taper:
    """The range [a, b] that the weight of a sequence is held in: `pos` where A > 0, `neg` where A < 0."""

    pos: tuple[float, float]
    neg: tuple[float, float]

    def __post_init__(self):
        for name, (a, b) in (("pos", self.pos), ("neg", self.neg)):
            if not 0 <= a <= b:  # also false for NaN
                raise ValueError(f"{name} limits ({a}, {b}): 0 <= a <= b is needed")

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

    The clip comes before the exp, so that d = +200 gives b and not inf, and d = -200 gives a.
    log_ratio, advantage: [batch] -> weights: [batch], constants for autograd; 0 where A_i = 0.
    """
    taper = TAPERS[taper] if isinstance(taper, str) else taper
    log = lambda x: math.log(x) if x > 0 else -math.inf
    log_ratio = log_ratio.detach()
    positive = log_ratio.clamp(log(taper.pos[0]), log(taper.pos[1])).exp()  # [batch]
    negative = log_ratio.clamp(log(taper.neg[0]), log(taper.neg[1])).exp()  # [batch]
    return torch.where(advantage > 0, positive, torch.where(advantage < 0, negative, 0.0))


def topr_loss(logp, mu_logp, reward, mask, *, taper="topr", baseline=0.0, count=None):
    """The loss whose gradient is the TOPR update.

        loss = - (1/N) sum_i A_i w_i (1/T_i) sum_t l_it        A_i = R_i - baseline

    logp, mu_logp, mask: [batch, time], mask True at completion tokens (elsewhere anything may stand, NaN too)
    reward: [batch]. taper: a name in TAPERS, or a Taper.
    count: N, the sequences in the optimizer step over all micro-batches and ranks, when this batch is a part of it.
    mu_logp may be None where the taper does not look at it (reinforce, sft).
    Returns the loss and stats: weight, log_ratio, advantage of each sequence, [batch].
    """
    taper = TAPERS[taper] if isinstance(taper, str) else taper
    if mu_logp is None and taper.needs_mu:
        raise ValueError("mu_logp is None, but the weights of this taper depend on it")
    logp, mu_logp, reward, mask = checked(logp, mu_logp, reward, mask)
    advantage = reward - baseline  # [batch]
    length = mask.sum(-1)  # [batch]
    log_ratio = sequence_log_ratio(logp, mu_logp, mask)  # [batch], NaN without mu
    weight = taper_weights(log_ratio if taper.needs_mu else torch.zeros_like(log_ratio), advantage, taper)  # [batch]

    gone = (mask & (logp == -math.inf)).any(-1)  # [batch], pi is 0 on the completion: nothing is left to push down
    if (gone & (advantage > 0)).any():
        raise ValueError(f"sequence {first(gone & (advantage > 0))}: a positive has a token with pi = 0 (log -inf)")
    logp = logp.masked_fill(gone[:, None] | ~mask, 0.0)  # select, never multiply: 0 * inf is NaN  [batch, time]
    coefficient = torch.where(gone | (advantage == 0), 0.0, advantage * weight)  # A_i w_i  [batch]
    loss = -(coefficient * logp.sum(-1) / length).sum() / (count or len(reward))
    return loss, {"weight": weight, "log_ratio": log_ratio, "advantage": advantage}


def ppo_loss(logp, mu_logp, reward, mask, *, clip=0.2, count=None):
    """PPO with clipping, as the paper compares with: token ratios, the reward as advantage, no critic.

        loss = - (1/N) sum_i (1/T_i) sum_t min(r_it R_i, clip(r_it, 1 - eps, 1 + eps) R_i)     r_it = exp(l_it - m_it)

    Arguments and stats as in topr_loss; the weight is the mean over tokens of the ratio, 0 where no gradient is left.
    """
    logp, mu_logp, reward, mask = checked(logp, mu_logp, reward, mask)
    length, advantage = mask.sum(-1), reward[:, None]  # [batch], [batch, 1]
    log_ratio = sequence_log_ratio(logp, mu_logp, mask)  # [batch]
    ratio = torch.where(mask, logp - mu_logp, 0.0).clamp(max=20).exp()  # 20: so that none overflows  [batch, time]
    bounded = ratio.clamp(1 - clip, 1 + clip)
    objective = torch.minimum(ratio * advantage, bounded * advantage)  # [batch, time]
    loss = -(objective.masked_fill(~mask, 0.0).sum(-1) / length).sum() / (count or len(reward))
    alive = mask & torch.where(advantage > 0, ratio < 1 + clip, ratio > 1 - clip)
    weight = torch.where(alive, ratio.detach(), 0.0).sum(-1) / length  # [batch]
    return loss, {"weight": weight, "log_ratio": log_ratio, "advantage": reward}


def dpo_loss(logp, mu_logp, reward, mask, *, beta=0.1, count=None):
    """DPO with mu as its reference, on pairs: rows 0, 2, 4.. are the better ones, rows 1, 3, 5.. the worse ones.

        loss = - (1/pairs) sum_pairs log sigmoid(beta (d_better - d_worse))

    Arguments and stats as in topr_loss (count is in sequences, two a pair); the weight is the slope of -log sigmoid.
    """
    logp, mu_logp, reward, mask = checked(logp, mu_logp, reward, mask)
    if len(reward) % 2 or not (reward[0::2] > reward[1::2]).all():
        raise ValueError("dpo_loss needs pairs of rows, the better one first: see preference_pairs")
    log_ratio = torch.where(mask, logp - mu_logp, 0.0).sum(-1)  # d, here with its gradient  [batch]
    margin = beta * (log_ratio[0::2] - log_ratio[1::2])  # [pairs]
    loss = -F.logsigmoid(margin).sum() / ((count or len(reward)) / 2)
    weight = torch.sigmoid(-margin.detach()).repeat_interleave(2)  # [batch]
    return loss, {"weight": weight, "log_ratio": log_ratio.detach(), "advantage": reward}


def sequence_log_ratio(logp, mu_logp, mask):
    """d_i = sum_t (l_it - m_it): differences first, then the sum. [batch, time] -> [batch], no gradient."""
    if mu_logp is None:
        return torch.full_like(logp[:, 0], math.nan).detach()
    return torch.where(mask, logp.detach() - mu_logp, 0.0).sum(-1)


def checked(logp, mu_logp, reward, mask):
    """The four inputs in float32 or better, or an error that names the sequence and the token."""
    float32 = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))
    mask = mask.bool()
    logp, reward = float32(logp), float32(reward)
    if not logp.shape == mask.shape or not reward.shape == logp.shape[:1]:
        raise ValueError(f"shapes differ: logp {list(logp.shape)}, mask {list(mask.shape)}, reward {list(reward.shape)}")
    if (mask.sum(-1) == 0).any():
        raise ValueError(f"sequence {first(mask.sum(-1) == 0)} has no completion tokens")
    if not reward.isfinite().all():
        raise ValueError(f"sequence {first(~reward.isfinite())}: its reward is not finite")
    bad = mask & (logp.isnan() | (logp == math.inf))  # -inf is dealt with by the loss
    if bad.any():
        raise ValueError(f"sequence {first(bad)}, token {first(bad, 1)}: log pi is NaN or +inf")
    if mu_logp is not None:
        mu_logp = float32(mu_logp).detach()
        if mu_logp.shape != logp.shape:
            raise ValueError(f"shapes differ: logp {list(logp.shape)}, mu_logp {list(mu_logp.shape)}")
        bad = mask & ~mu_logp.isfinite()
        if bad.any():
            raise ValueError(f"sequence {first(bad)}, token {first(bad, 1)}: log mu is missing, NaN or infinite")
    return logp, mu_logp, reward, mask


def first(where, axis=0):
    """The row (axis 0) or column (axis 1) of the first True."""
    return where.nonzero()[0, axis].item()


# ---- the composition of the data: baseline, shares, Anna Karenina, pairs ----


def effective_positive_share(p, c):
    """The share of positives that a baseline c acts like, with a share p of +1 among +1/-1 rewards.

        p~ = p (1 - c) / (1 + c (1 - 2p))
    """
    if not 0 <= p <= 1 or not -1 <= c <= 1:
        raise ValueError(f"share {p}, baseline {c}: 0 <= share <= 1 and -1 <= baseline <= 1 are needed")
    total = 1 + c * (1 - 2 * p)  # |A| summed over the data
    if total == 0:
        raise ValueError(f"share {p}, baseline {c}: every advantage is 0")
    return p * (1 - c) / total


def baseline_for_share(p, share):
    """The baseline that makes a share p of positives act like `share`:  c = (p - p~) / (p + p~ - 2 p p~)"""
    if not 0 < p < 1 or not 0 <= share <= 1:
        raise ValueError(f"share {p} to {share}: the data needs positives and negatives, the wish is between 0 and 1")
    return max(-1.0, min(1.0, (p - share) / (p + share - 2 * p * share)))  # rounding may step over 1


def anna_karenina(rollouts):
    """All happy families are alike: of each question keep the first correct completion and every wrong one.

    rollouts: dicts with "id" and "reward" -> a list of those kept, in their order.
    """
    happy, kept = set(), []
    for rollout in rollouts:
        if rollout["reward"] > 0:
            if rollout["id"] in happy:
                continue
            happy.add(rollout["id"])
        kept.append(rollout)
    return kept


def preference_pairs(rollouts):
    """(better, worse) positions for DPO: each question's correct and wrong completions, each used once at most."""
    right, wrong = {}, {}
    for position, rollout in enumerate(rollouts):
        (right if rollout["reward"] > 0 else wrong).setdefault(rollout["id"], []).append(position)
    return [pair for question, better in right.items() for pair in zip(better, wrong.get(question, []))]


# ---- log-probabilities of completions, without ever holding [batch, time, vocab] ----


def completion_logprobs(model, ids, mask, *, attention_mask=None, position_ids=None, previous=None, chunk_tokens=None):
    """log pi of the tokens where mask is True, 0 elsewhere, in float32, with gradient.

    model: a causal language model of transformers. ids, mask: [batch, time] -> [batch, time]
    Right padding needs no attention_mask (the attention is causal); left padding needs one, [batch, time].
    previous: [batch, time], the position that predicts each token where it is not the one before: see pack.
    The head runs on chunks of completion positions and is run again in the backward pass, so that the largest
    tensor is [chunk_tokens, vocab]. Up to that size nothing is run twice.
    """
    mask = mask.bool()
    if mask[:, 0].any():
        raise ValueError(f"sequence {first(mask[:, 0])}: the first token has nothing before it to be predicted from")
    if attention_mask is not None and attention_mask.dim() == 2 and position_ids is None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # [batch, time]
    extra = {"attention_mask": attention_mask, "position_ids": position_ids}
    extra = {name: value for name, value in extra.items() if value is not None}
    outputs = model.get_decoder()(input_ids=ids, use_cache=False, **extra)
    row, position = mask.nonzero(as_tuple=True)  # [tokens], [tokens]
    hidden = outputs.last_hidden_state[row, position - 1 if previous is None else previous[mask]]  # [tokens, width]
    targets = ids[mask]  # [tokens]

    chunk_tokens = chunk_tokens or max(1, 2**26 // model.config.get_text_config().vocab_size)
    chunks = list(zip(hidden.split(chunk_tokens), targets.split(chunk_tokens)))
    again = len(chunks) > 1 and torch.is_grad_enabled()
    run = lambda *inputs: checkpoint(head_logprobs, *inputs, use_reentrant=False) if again else head_logprobs(*inputs)
    logprobs = torch.cat([run(model, outputs, h, y) for h, y in chunks])  # [tokens]
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, logprobs)  # [batch, time]


def head_logprobs(model, outputs, hidden, targets):
    """log softmax, in float32, of the model's own head at the targets. [tokens, width], [tokens] -> [tokens]

    The head is reached through the model's forward, with its decoder replaced for that moment by one that returns
    `hidden`: whatever a model does to its logits (Cohere scales, Gemma caps, Granite divides) is done here too.
    """
    decoder = model.get_decoder()
    outputs.last_hidden_state = hidden[None]  # [1, tokens, width]
    own_forward, decoder.forward = decoder.forward, lambda *_, **__: outputs
    try:
        logits = model.forward(inputs_embeds=hidden[None], use_cache=False).logits[0].float()  # [tokens, vocab]
    finally:
        decoder.forward = own_forward
    return TokenLogProbs.apply(logits, targets)


class TokenLogProbs(torch.autograd.Function):
    """cross_entropy with the sign of a log-prob and its own backward pass, which makes one tensor of [tokens, vocab] where
    torch makes two: with a large vocabulary these are the peak of the memory. [tokens, vocab], [tokens] -> [tokens]
    """

    @staticmethod
    def forward(context, logits, targets):
        logprobs = logits.log_softmax(-1)  # [tokens, vocab]
        context.save_for_backward(logprobs, targets)
        return logprobs.gather(1, targets[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(context, gradient):
        logprobs, targets = context.saved_tensors
        logits_gradient = logprobs.exp().mul_(-gradient[:, None])  # g (onehot - softmax)  [tokens, vocab]
        return logits_gradient.scatter_add_(1, targets[:, None], gradient[:, None]), None


