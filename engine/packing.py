"""log pi of completions: several of them packed behind one prompt, where the model can do that."""

import math

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import topr
from engine.parallel import from_first, rank


def pack(rows, device):
    """(arguments of completion_logprobs, [batch, time]: which tokens each completion has) for rows
    of (prompt, its completions), tokens each.

        ids       prompt prompt prompt | first first | second second second
        position       0      1      2 |     3     4 |      3      4      5
        part           0      0      0 |     1     1 |      2      2      2

    A completion sees the prompt and itself, at the positions that it has alone; its first token is
    predicted from the prompt's last. Rows of one completion each need no more than ids and mask.
    Padded on the right.
    """
    tables, lengths = [], []
    for prompt, completions in rows:
        ids, position, previous, part = [], [], [], []
        for number, tokens in enumerate([prompt, *completions]):
            first = len(prompt) if number else 0  # the position of its first token
            position += range(first, first + len(tokens))
            previous += [first - 1, *range(len(ids), len(ids) + len(tokens) - 1)]
            part += [number] * len(tokens)
            ids += list(tokens)
        table = np.array([ids, position, previous, part])  # quicker than torch.tensor  [4, time]
        tables.append(torch.from_numpy(table.T))
        lengths += map(len, completions)
    padded = pad_sequence(tables, batch_first=True, padding_value=-1).to(device)
    ids, position, previous = padded[..., :3].clamp(min=0).unbind(-1)  # each [rows, time]
    part = padded[..., 3]  # [rows, time], -1 at padding
    packed = {"ids": ids, "mask": part > 0}
    if part.max() > 1:
        visible = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        packed |= {"position_ids": position, "previous": previous}
        packed["attention_mask"] = visible.tril()[:, None]  # [rows, 1, time, time]
    lengths = torch.tensor(lengths, device=device)  # [batch]
    return packed, torch.arange(lengths.max(), device=device) < lengths[:, None]


class LogProbs(torch.nn.Module):
    """The policy as a module, because DDP and FSDP hook forward(): log pi of the completions."""

    def __init__(self, model, precision="float32"):
        super().__init__()
        self.model = model
        self.dtype = torch.bfloat16 if precision == "bfloat16" else model.dtype  # of the compute
        self.autocasts = precision == "bfloat16"
        self.head_is_known, self.packs = True, False  # see make_policy

    def forward(self, packed, mask):
        """packed and mask: as pack returns them -> [batch, time], a row for each completion"""
        if "attention_mask" in packed:  # a boolean one would be converted, and kept, in every layer
            visible = packed["attention_mask"]
            bias = torch.zeros_like(visible, dtype=self.dtype).masked_fill(~visible, -math.inf)
            packed = {**packed, "attention_mask": bias}
        with torch.autocast(mask.device.type, torch.bfloat16, enabled=self.autocasts):
            if self.head_is_known:
                logp = topr.completion_logprobs(self.model, **packed)  # [rows, time of a row]
            else:  # then nothing is packed
                logits = self.model(input_ids=packed["ids"], use_cache=False).logits
                logp = topr.token_logprobs(logits, packed["ids"])  # [batch, time of a row]
        empty = torch.zeros(mask.shape, device=mask.device)
        return empty.masked_scatter(mask, logp[packed["mask"]])  # [batch, time]


# ---- what a model can do ----


def make_policy(model, precision, longest):
    """The policy, after trying what its model can do.

    longest: tokens of the longest sequence. In shards the first rank alone has the weights to try.
    """
    policy = LogProbs(model, precision)
    policy.head_is_known, policy.packs = from_first(rank() == 0 and abilities(policy, longest))
    return policy


@torch.no_grad()
def abilities(policy, longest):
    """(whether its head is known, whether completions can be packed behind one prompt): both tried.

    Does topr.completion_logprobs give what the model's own logits give? Are log-probs of packed
    completions those that they have alone? A model that keeps a state, or counts positions its own
    way, gives others, and our mask would hide a sliding window that is shorter than the longest
    sequence.
    """
    model, config = policy.model, policy.model.config.get_text_config()
    ids = torch.tensor([[0, 1, 2]], device=model.device)
    plain = topr.token_logprobs(model(input_ids=ids, use_cache=False).logits, ids)  # [1, time]
    try:
        logp = topr.completion_logprobs(model, ids, ids > 0)  # [1, time]
        known = torch.allclose(logp, plain, rtol=1e-3, atol=1e-3)
    except (AttributeError, TypeError, RuntimeError):  # a decoder or a head of another kind
        known = False
    window = getattr(config, "sliding_window", None) or longest
    if not known or longest > window or model.config._attn_implementation != "sdpa":
        return known, False
    random = torch.Generator().manual_seed(0)
    prompt, *draws = torch.randint(config.vocab_size, (33, 4), generator=random).tolist()
    completions, others = draws[:16], draws[16:]
    others[::2] = completions[::2]  # every second one is the same, among other neighbours
    layouts = [(prompt, completions)], [(prompt, others)], [(prompt, [c]) for c in completions]
    try:
        packed, elsewhere, alone = (
            policy(*pack(layout, model.device))[::2] for layout in layouts
        )  # each [8, 4]
    except (ValueError, TypeError, RuntimeError):  # it takes no such mask, or no positions
        return known, False
    leaks = (packed - elsewhere).abs().max() > 1e-6  # rounding in bfloat16 would hide a leak
    tolerance = 1e-4 if policy.dtype == torch.float32 else 0.1
    return known, not leaks and (packed - alone).abs().mean().item() < tolerance
