"""TOPR in plain PyTorch, with a language model that is not from transformers: a GRU.

    python docs/recipes/plain_pytorch.py

The model reads one token and writes up to eight more. A completion is right if it repeats the
token that it read at least twice. One round: sample, score, train on what was sampled.
"""

import os
import sys

import torch

sys.path.append(os.path.join(os.path.dirname(__file__), "../.."))  # topr.py is there
from topr import token_logprobs, topr_loss

VOCABULARY, END, LONGEST = 8, 0, 8


class GRU(torch.nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, width)
        self.recurrent = torch.nn.GRU(width, width, batch_first=True)
        self.head = torch.nn.Linear(width, VOCABULARY)

    def forward(self, ids):
        hidden, _ = self.recurrent(self.embedding(ids))  # [batch, time, width]
        return self.head(hidden)  # [batch, time, vocab]


@torch.no_grad()
def sample(model, count):
    """ids and mask of `count` sequences, [batch, time], and their rewards, [batch]."""
    ids = torch.randint(1, VOCABULARY, (count, 1))  # the prompts
    for _ in range(LONGEST):
        probabilities = model(ids)[:, -1].softmax(-1)  # [batch, vocab]
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], 1)
    ended_before = (ids == END).cumsum(1) - (ids == END).long() > 0  # [batch, time]
    mask = ~ended_before  # the end token is a part of the completion
    mask[:, 0] = False  # the prompt is not
    repeats = (mask & (ids == ids[:, :1])).sum(1)  # [batch]
    reward = torch.where(repeats >= 2, 1.0, -1.0)  # -1, not 0: a 0 would weigh nothing
    return ids, mask, reward


def backward(model, ids, mask, reward, mu_logp, micro_batch):
    """The gradient of one optimizer step, in micro-batches. Returns the loss."""
    total = 0.0
    for rows in torch.arange(len(ids)).split(micro_batch):
        logp = token_logprobs(model(ids[rows]), ids[rows])  # [batch, time]
        loss, _ = topr_loss(logp, mu_logp[rows], reward[rows], mask[rows], count=len(ids))
        loss.backward()
        total += loss.item()
    return total


def main():
    torch.manual_seed(0)
    model = GRU()
    ids, mask, reward = sample(model, 2048)
    with torch.no_grad():
        mu_logp = token_logprobs(model(ids), ids)  # once, before the first step; never again
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for rows in torch.randperm(len(ids)).split(128):
        backward(model, ids[rows], mask[rows], reward[rows], mu_logp[rows], micro_batch=32)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    before = (reward > 0).float().mean()
    after = (sample(model, 2048)[2] > 0).float().mean()
    print(f"right: {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
