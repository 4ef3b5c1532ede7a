"""train.py without packing, checkpoints and shards: one pass over a rollout file, on any ranks.

torchrun [--nproc-per-node 8] docs/recipes/loop.py MODEL ROLLOUTS OUT [LEARNING_RATE]
"""

import math
import os
import sys

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(os.path.join(os.path.dirname(__file__), "../.."))  # topr.py and engine/ are there
from engine.rollouts import read_rollouts
from engine.tokens import end_token_of, token_ids
from topr import completion_logprobs, topr_loss


class LogProbs(torch.nn.Module):  # for DDP, which exchanges gradients only if its forward is called
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return completion_logprobs(self.model, ids, mask)  # [batch, time]


def make_batch(rows):  # padded on the right, with 0 and False
    ids = [torch.tensor(prompt + completion) for prompt, completion in rows]
    mask = [torch.arange(len(prompt + completion)) >= len(prompt) for prompt, completion in rows]
    return [pad_sequence(part, batch_first=True).to(device) for part in (ids, mask)]


path, rollouts, out, *rate = sys.argv[1:]
rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
policy = LogProbs(model.eval())  # eval: no dropout
tokenizer = AutoTokenizer.from_pretrained(path)
rows = read_rollouts(rollouts)
end = end_token_of(model, tokenizer)
tokens = [token_ids(row, tokenizer, end) for row in rows]  # (prompt, completion) each
reward = torch.tensor([row["reward"] for row in rows], device=device)  # [rows]
with torch.no_grad():  # log mu: once, before the first step; never again
    mu = [policy(*make_batch([row]))[0] for row in tokens]  # [rows] of [time]
if ranks > 1:
    torch.distributed.init_process_group("nccl" if device != "cpu" else "gloo")
    policy = DistributedDataParallel(policy)
rate = float(rate[0]) if rate else 0.1 / math.sqrt(model.num_parameters())
optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))  # equal on all ranks
for step, chosen in enumerate(order.split(64)):
    passes = math.ceil(len(chosen) / ranks / 8)  # equally many on each rank
    total = torch.zeros((), device=device)
    for part in chosen[rank::ranks].tensor_split(passes):  # 1 to 8; the last step has one a rank
        ids, mask = make_batch([tokens[i] for i in part])  # [batch, time]
        mu_logp = pad_sequence([mu[i] for i in part], batch_first=True)  # [batch, time]
        loss, _ = topr_loss(policy(ids, mask), mu_logp, reward[part], mask, count=len(chosen))
        (loss * ranks).backward()  # the loss is a sum over ranks, DDP takes the mean
        total += loss.detach()
    if ranks > 1:
        torch.distributed.all_reduce(total)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step} loss {total.item():.7f} norm {norm.item():.7f}")
if rank == 0:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
