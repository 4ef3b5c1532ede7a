"""TOPR with PEFT's LoRA: log mu is what the model says with its adapter switched off.

    python docs/recipes/peft_lora.py MODEL ROLLOUTS OUT [LEARNING_RATE [SEQUENCES [RANK]]]

MODEL must have written the rollouts: its weights are frozen, so that mu stays what it was, without
a second model. OUT/adapter is the adapter, OUT a whole model with the adapter merged into it.
"""

import os
import random
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(os.path.join(os.path.dirname(__file__), "../.."))  # topr.py and engine/ are there
from engine.rollouts import read_rollouts
from engine.tokens import end_token_of, token_ids
from topr import completion_logprobs, topr_loss

MICRO_BATCH = 8  # sequences in a forward pass


def read_rows(path, model, tokenizer):
    """(tokens of the prompt, tokens of the completion, reward) of each rollout."""
    rows = read_rollouts(path)
    end_token = end_token_of(model, tokenizer)
    return [(*token_ids(row, tokenizer, end_token), row["reward"]) for row in rows]


def tensors(rows):
    """ids, mask: [batch, time]; reward: [batch]. Padding is on the right, the mask from lengths."""
    ids = [torch.tensor(prompt + completion) for prompt, completion, _ in rows]
    mask = [torch.arange(len(row)) >= len(prompt) for row, (prompt, *_) in zip(ids, rows)]
    reward = torch.tensor([reward for *_, reward in rows])  # [batch]
    return pad_sequence(ids, batch_first=True), pad_sequence(mask, batch_first=True), reward


def backward(model, rows):
    """The gradient of one optimizer step, in micro-batches. Returns the loss."""
    policy, total = model.get_base_model(), 0.0  # the LoRA layers are inside it
    for start in range(0, len(rows), MICRO_BATCH):
        batch = tensors(rows[start : start + MICRO_BATCH])
        ids, mask, reward = (part.to(model.device) for part in batch)
        with torch.no_grad(), model.disable_adapter():
            mu_logp = completion_logprobs(policy, ids, mask)  # [batch, time]
        logp = completion_logprobs(policy, ids, mask)  # [batch, time]
        loss, _ = topr_loss(logp, mu_logp, reward, mask, count=len(rows))
        loss.backward()
        total += loss.item()
    return total


def main(model_name, rollouts, out, learning_rate=1e-4, sequences=64, rank=16):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto").to(device)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    rows = read_rows(rollouts, base, tokenizer)
    random.Random(0).shuffle(rows)
    lora = LoraConfig(r=int(rank), lora_alpha=2 * int(rank), target_modules="all-linear")
    model = get_peft_model(base, lora).eval()  # eval: with dropout pi/mu would not be 1 at first
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=float(learning_rate), weight_decay=0.0)
    for start in range(0, len(rows), int(sequences)):
        loss = backward(model, rows[start : start + int(sequences)])
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        print(f"{start:7,} of {len(rows):,}   loss {loss:7.4f}   gradient norm {norm:.4f}")
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(f"{out}/adapter")
    model.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
