"""TOPR as a plain loop: the specification of train.py, without packing, checkpoints or shards.

    [torchrun --nproc-per-node 2] plain_loop.py MODEL ROLLOUTS ORDER OUT

ORDER is a JSON list with the rows of each optimizer step; every row has its tokens and log mu.
"""

import json
import math
import os
import sys

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from topr import token_logprobs, topr_loss

model_name, rollouts, order, out = sys.argv[1:]
rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
rows = [json.loads(line) for line in open(rollouts)]
steps = json.load(open(order))
model = AutoModelForCausalLM.from_pretrained(model_name).eval()  # no dropout: pi/mu starts at 1
policy = model
if ranks > 1:
    torch.distributed.init_process_group("gloo")
    policy = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
log = []
for step, numbers in enumerate(steps):
    total = torch.zeros(())
    for micro_batch in torch.tensor(numbers)[rank::ranks].split(3):
        batch = [rows[number] for number in micro_batch]
        tokens = [row["prompt_ids"] + row["completion_ids"] for row in batch]
        time = max(map(len, tokens))
        ids = torch.zeros(len(batch), time, dtype=torch.long)  # [batch, time], padded on the right
        mask = torch.zeros(len(batch), time, dtype=torch.bool)  # [batch, time]
        mu_logp = torch.zeros(len(batch), time)  # [batch, time]
        for i, row in enumerate(batch):
            start, end = len(row["prompt_ids"]), len(tokens[i])
            ids[i, :end] = torch.tensor(tokens[i])
            mask[i, start:end] = True
            mu_logp[i, start:end] = torch.tensor(row["logprobs"])
        reward = torch.tensor([row["reward"] for row in batch])  # [batch]
        logp = token_logprobs(policy(ids).logits, ids)  # [batch, time]
        loss, _ = topr_loss(logp, mu_logp, reward, mask, count=len(numbers))
        (loss * ranks).backward()  # a sum over ranks, of which DDP takes the mean
        total += loss.detach()
    if ranks > 1:
        torch.distributed.all_reduce(total)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
    optimizer.step()
    optimizer.zero_grad()
    log.append({"loss": total.item(), "gradient_norm": norm.item()})
if rank == 0:
    model.save_pretrained(out)
    json.dump(log, open(f"{out}/log.json", "w"))
