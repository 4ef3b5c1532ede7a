"""log pi of completions: several of them packed behind one prompt, where the model can do that."""

import math

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import topr


def pack(layout, device=None, mask_dtype=None):
    """Arguments of completion_logprobs for rows of (prompt, its completions), tokens each.

        ids       prompt prompt prompt | first first | second second second
        position       0      1      2 |     3     4 |      3      4      5
        part           0      0      0 |     1     1 |      2      2      2

    A completion sees the prompt and itself, at the positions that it has alone; its first token is
    predicted from the prompt's last. Rows of one completion each need no more than ids and mask.
    Padded on the right. mask_dtype: additive attention mask in this type, else a boolean one.
    """
    rows = []
    for prompt, completions in layout:
        sizes = np.array([len(prompt), *map(len, completions)])
        part = np.repeat(np.arange(len(sizes)), sizes)  # [time]
        place = np.arange(len(part))  # [time]
        inside = place - (sizes.cumsum() - sizes)[part]  # place in its own part  [time]
        position = inside + len(prompt) * (part > 0)  # [time]
        previous = np.where((inside == 0) & (part > 0), len(prompt) - 1, place - 1)  # [time]
        ids = np.concatenate([prompt, *completions])  # [time]
        rows.append(torch.tensor(np.stack([ids, position, previous, part], 1)))  # [time, 4]
    padded = pad_sequence(rows, batch_first=True, padding_value=-1).to(device)  # [rows, time, 4]
    ids, position, previous = padded[..., :3].clamp(min=0).unbind(-1)  # each [rows, time]
    part = padded[..., 3]  # [rows, time], -1 at padding
    packed = {"ids": ids, "mask": part > 0}
    if part.max() > 1:
        visible = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        attention = visible.tril()[:, None]  # [rows, 1, time, time]
        if mask_dtype:  # a boolean one would be converted, and kept, in every layer
            hidden = torch.zeros(attention.shape, dtype=mask_dtype, device=device)
            attention = hidden.masked_fill(~attention, -math.inf)
        packed |= {"position_ids": position, "previous": previous, "attention_mask": attention}
    return packed


def completion_mask(completions, device):
    """[batch, time]: True at the tokens of each completion, False at its padding."""
    lengths = torch.tensor([len(tokens) for tokens in completions], device=device)  # [batch]
    return torch.arange(lengths.max(), device=device) < lengths[:, None]


def dtype_of_compute(model, precision):
    """What the model's attention computes in, and so the dtype of its additive mask."""
    return torch.bfloat16 if precision == "bfloat16" else model.dtype


class LogProbs(torch.nn.Module):
    """The policy as a module, because DDP and FSDP hook forward(): log pi of the completions.

    packed: arguments of completion_logprobs, often with several completions behind one prompt.
    mask: [batch, time] -> [batch, time], a row for each completion
    """

    def __init__(self, model, precision="float32", head_is_known=True):
        super().__init__()
        self.model = model
        self.bfloat16 = precision == "bfloat16"
        self.head_is_known = head_is_known

    def forward(self, packed, mask):
        with torch.autocast(mask.device.type, torch.bfloat16, enabled=self.bfloat16):
            if self.head_is_known:
                logp = topr.completion_logprobs(self.model, **packed)  # [rows, time of a row]
            else:  # then nothing is packed
                logits = self.model(input_ids=packed["ids"], use_cache=False).logits
                logp = topr.token_logprobs(logits, packed["ids"])  # [batch, time of a row]
        empty = torch.zeros(mask.shape, device=mask.device)
        return empty.masked_scatter(mask, logp[packed["mask"]])  # [batch, time]


@torch.no_grad()
def head_is_known(model):
    """Tries whether topr.completion_logprobs gives what the model's own logits give."""
    ids = torch.tensor([[0, 1, 2]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits  # [1, time, vocab]
    try:
        logp = topr.completion_logprobs(model, ids, ids > 0)  # [1, time]
    except (AttributeError, TypeError, RuntimeError):  # a decoder or a head of another kind
        return False
    return torch.allclose(logp, topr.token_logprobs(logits, ids), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def abilities(model, longest, precision, mask_dtype):
    """(whether its head is known, whether completions can be packed behind one prompt).

    The second is tried, too: are log-probs of packed completions those that they have alone? A
    model that keeps a state, or counts positions its own way, gives others, and our mask would hide
    a sliding window that is shorter than the longest sequence.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or longest
    known = head_is_known(model)
    if not known or longest > window or model.config._attn_implementation != "sdpa":
        return known, False
    random = torch.Generator().manual_seed(0)
    prompt, *draws = torch.randint(config.vocab_size, (33, 4), generator=random).tolist()
    completions, others = draws[:16], draws[16:]
    others[::2] = completions[::2]  # every second one is the same, among other neighbours
    layouts = [(prompt, completions)], [(prompt, others)], [(prompt, [c]) for c in completions]
    mask = torch.ones(16, 4, dtype=torch.bool, device=model.device)
    policy = LogProbs(model, precision)
    try:
        packed, elsewhere, alone = (policy(pack(layout, model.device, mask_dtype), mask)[::2]
                                    for layout in layouts)  # [8, 4]
    except (ValueError, TypeError, RuntimeError):  # it takes no such mask, or no positions
        return known, False
    tolerance = 1e-4 if mask_dtype == torch.float32 else 0.1
    leaks = (packed - elsewhere).abs().max() > 1e-6  # rounding in bfloat16 would hide a leak
    return known, not leaks and (packed - alone).abs().mean().item() < tolerance
