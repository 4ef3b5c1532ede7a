"""TOPR with PEFT's LoRA: log mu is what the model says with its adapter switched off.

    python peft_lora.py MODEL ROLLOUTS.jsonl OUT

MODEL must have written the rollout file: its weights are frozen, so that mu stays what it was
and needs neither a second model nor logprobs in the file. OUT/adapter is the adapter, OUT a whole
model with the adapter merged into it.
"""

import json
import random
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from topr import completion_logprobs, topr_loss


def tensors(rows, device):
    """ids, mask: [batch, time]; reward: [batch]. Padding is on the right, the mask from lengths."""
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)  # [batch, time]
    mask = torch.zeros(ids.shape, dtype=torch.bool)  # [batch, time]
    for number, (row, length) in enumerate(zip(rows, lengths)):
        ids[number, :length] = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        mask[number, len(row["prompt_ids"]):length] = True
    reward = torch.tensor([row["reward"] for row in rows])  # [batch]
    return ids.to(device), mask.to(device), reward.to(device)


def backward(model, rows, micro_batch):
    """The gradient of one optimizer step, in micro-batches. Returns the loss."""
    policy, total = model.get_base_model(), 0.0  # the LoRA layers are inside it
    for start in range(0, len(rows), micro_batch):
        ids, mask, reward = tensors(rows[start : start + micro_batch], model.device)
        with torch.no_grad(), model.disable_adapter():
            mu_logp = completion_logprobs(policy, ids, mask)  # [batch, time]
        logp = completion_logprobs(policy, ids, mask)  # [batch, time]
        loss, _ = topr_loss(logp, mu_logp, reward, mask, count=len(rows))
        loss.backward()
        total += loss.item()
    return total


def main(model_name, rollouts, out, sequences=64, micro_batch=16, learning_rate=1e-4, rank=16):
    with open(rollouts) as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(model_name).to(device)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(base, lora).eval()  # eval: with dropout pi/mu would not be 1 at first
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    for start in range(0, len(rows), sequences):
        loss = backward(model, rows[start : start + sequences], micro_batch)
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        print(f"{start:7,} of {len(rows):,}   loss {loss:7.4f}   gradient norm {norm:.4f}")
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(f"{out}/adapter")
    model.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(model_name).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
