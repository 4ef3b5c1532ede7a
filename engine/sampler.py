"""Tokens in, tokens out: many completions at once, by a model of any family of transformers.

It knows no text, no rewards and no files: those are eval.py's part.
"""

import collections
import hashlib
import inspect
import math
import re
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from engine.common import Problem, free_memory, setting
from engine.parallel import load_on_first_rank, world
from engine.tasks import one_line
from engine.tokens import end_tokens

LARGEST_BATCH = 512
STOP_EVERY = 8  # tokens: decoding every row at every token would cost more than the model


@dataclass
class Sampling:
    """How completions are sampled: a part of the settings of every script."""

    samples: int = setting(16, "completions of each question", least=1, main=True, free=True)
    temperature: float = setting(1.0, "sampling temperature; 0 takes the likeliest token", free=True)
    top_k: int = setting(0, "sample from the k likeliest tokens (0: all)", free=True)
    top_p: float = setting(1.0, "sample from the likeliest tokens of this probability", least=0.001,
                           most=1, free=True)
    max_new_tokens: int = setting(512, "longest completion in tokens", least=1, main=True, free=True)
    batch_size: int = setting(0, "completions at once (0: what fits into memory, at most 512)", free=True)
    seed: int = setting(0, "of the sampling, the data order, generated questions", main=True)
    weights: str = setting("auto", "dtype of the weights; auto: the checkpoint's. Training with "
                           "bfloat16 halves the memory; updates are rounded at random, so that "
                           "small ones count", ("auto", "float32", "bfloat16"))
    precision: str = setting("float32", "compute dtype (for the weights see --weights)",
                             ("float32", "bfloat16"))
    template_arguments: str = setting("{}", "arguments of the chat template as JSON, for instance "
                                      '{"enable_thinking": false}', free=True)
    plain_prompt: bool = setting(False, "ignore the chat template: for a base model that ships one", free=True)


# ---- models ----


def load_model(name, settings, device):
    """(model, tokenizer) of a directory or the hub: safetensors only, none of its code."""
    from transformers import AutoModelForCausalLM, logging

    free_memory()  # of an earlier model
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(name)
    with one_line(f"model {name!r} cannot be loaded"):
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=settings.weights, use_safetensors=True).to(device)
    if model.num_parameters() < 5e6:
        torch.set_num_threads(1)  # for so little work one thread is faster than several
    return model.eval(), tokenizer


def load_for_training(settings, device):
    """The same; in shards the first rank alone holds the weights, until `shard` deals them out."""
    if not settings.shard:
        return load_model(settings.model, settings, device)
    model = load_on_first_rank(lambda: load_model(settings.model, settings, "cpu")[0])
    return model, load_tokenizer(settings.model)


def load_tokenizer(name):
    from transformers import AutoTokenizer

    with one_line(f"model {name!r} cannot be loaded"):
        return AutoTokenizer.from_pretrained(name)


def fingerprint(model):
    """16 letters that change with the weights: names, shapes, 4,096 values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 4096)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def compute_dtype(model, settings):
    enabled = settings.precision == "bfloat16"
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)


# ---- sampling ----


@torch.no_grad()
def generate(model, tokenizer, questions, todo, settings, uniforms, bar):
    """Yields (number of a question, its completions as lists of tokens) for the numbers in todo.

    questions: dicts with "id", "prompt_ids" and "stop" (strings that end a completion, see
    until_stop). todo: alike lengths together, the longest first. uniforms(number): the random
    numbers of a question's completions, [samples, max_new_tokens].
    """
    check_family(model, settings)
    size, finished = settings.batch_size, collections.defaultdict(list)
    if todo and not size:
        size = batch_that_fits(model, len(questions[todo[0]]["prompt_ids"]), settings)
    rows = [(number, copy) for number in todo for copy in range(settings.samples)]
    for start in range(0, len(rows), size or 1):
        batch = rows[start : start + size]
        written = write(model, tokenizer, questions, batch, settings, uniforms, bar)
        for (number, _), tokens in zip(batch, written):
            finished[number].append(tokens)
            if len(finished[number]) == settings.samples:
                yield number, finished.pop(number)


def write(model, tokenizer, questions, batch, settings, uniforms, bar):
    """The tokens of a batch; batch: (number of a question, which of its completions) of each row.

    A prompt is read once for all its rows. Rows that are done leave when an eighth of the batch
    is, for that costs a copy of the cache.
    """
    device, ends = model.device, end_tokens(model, tokenizer)
    ends = torch.tensor(ends, device=device)
    tables = {number: uniforms(number) for number, _ in batch}
    uniform = torch.stack([tables[number][copy] for number, copy in batch])  # [batch, time]
    uniform = uniform.to(device)
    prompts = [questions[number]["prompt_ids"] for number in tables]
    logits, attention, cache = read_prompts(model, settings, prompts)

    place = {number: place for place, number in enumerate(tables)}
    keep = torch.tensor([place[number] for number, _ in batch], device=device)  # [rows]
    logits, attention = logits[keep], attention[keep]
    cache.reorder_cache(keep)
    tokens = torch.zeros_like(uniform, dtype=torch.long)  # [batch, time]
    lengths = torch.full_like(tokens[:, 0], settings.max_new_tokens)  # [batch]
    rows = torch.arange(len(batch), device=device)  # [rows], places in the batch
    live = torch.ones_like(rows, dtype=torch.bool)  # [rows]
    for now in range(settings.max_new_tokens):
        if now > 0:  # rows that are done hide their token, or their position would go on
            attention = torch.cat([attention, live[:, None]], 1)  # [rows, time + 1]
            logits = next_logits(model, settings, chosen, attention, cache)
        broken = live & ~logits.amax(-1).isfinite()  # [rows]
        if broken.any():
            raise broken_model(questions[batch[rows[broken][0]][0]])
        chosen = draw(logits, uniform[rows, now : now + 1], settings)  # [rows, 1]
        tokens[rows, now] = chosen[:, 0]
        done = live & torch.isin(chosen[:, 0], ends)  # [rows]
        if now % STOP_EVERY == STOP_EVERY - 1:
            for row in (live & ~done).nonzero()[:, 0].tolist():
                stop = questions[batch[rows[row]][0]]["stop"]
                done[row] = has_stopped(tokenizer, tokens[rows[row], : now + 1], stop)
        lengths[rows[done]] = now + 1
        live = live & ~done
        bar.update(int(done.sum()))
        left = int(live.sum())
        if left == 0:
            break
        if left * 8 <= len(live) * 7:
            keep = live.nonzero()[:, 0]
            cache.reorder_cache(keep)
            rows, attention, chosen, live = rows[keep], attention[keep], chosen[keep], live[keep]
    bar.update(left)
    return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]


def read_prompts(model, settings, prompts):
    """(logits of the next token [prompts, vocab], attention [prompts, time], the cache)."""
    from transformers import DynamicCache

    prompts = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    attention = pad_left([torch.ones_like(prompt) for prompt in prompts])  # [prompts, time]
    cache = DynamicCache(config=model.config)
    return next_logits(model, settings, pad_left(prompts), attention, cache), attention, cache


def pad_left(rows):
    return pad_sequence(rows, batch_first=True, padding_side="left")


def next_logits(model, settings, ids, attention=None, cache=None):
    """[rows, vocab]: of the token after ids [rows, new], as the trainer computes them."""
    inputs = {"use_cache": False}
    if cache is not None:
        # The older name warns in newer versions, the newer one is ignored in older versions.
        names = inspect.signature(model.forward).parameters
        position = (attention.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # [rows, new]
        inputs = {"use_cache": True, "attention_mask": attention, "position_ids": position,
                  "cache" if "cache" in names else "past_key_values": cache}
    with compute_dtype(model, settings):
        return model(input_ids=ids, logits_to_keep=1, **inputs).logits[:, -1].float()


def draw(logits, uniform, settings):
    """Inverse-CDF sampling: one uniform number decides, whatever the other rows are.

    [rows, vocab], [rows, 1] -> [rows, 1]
    """
    if settings.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    vocabulary, order = logits.shape[1], None
    k = settings.top_k if 0 < settings.top_k < vocabulary else vocabulary
    if k < vocabulary or settings.top_p < 1:
        logits, order = logits.topk(k)  # [rows, k], the likeliest first
    probability = (logits / settings.temperature).softmax(-1)
    if settings.top_p < 1:
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= settings.top_p, 0.0)
    cumulative = probability.cumsum(-1)  # [rows, k]
    chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)  # [rows, 1]
    chosen = chosen.clamp(max=k - 1)
    return chosen if order is None else order.gather(1, chosen)


def has_stopped(tokenizer, tokens, stop):
    """Whether the last tokens hold a stop string; each token has at least a byte of it."""
    if not stop:
        return False
    longest = max(len(mark.encode()) for mark in stop) + 4 + STOP_EVERY
    text = tokenizer.decode(tokens[-longest:].tolist(), skip_special_tokens=True)
    return any(mark in text for mark in stop)


def broken_model(question):
    return Problem(f"question {question['id']!r}: the model's logits are NaN or infinite: are its "
                   "weights damaged, or does it need --weights float32 --precision float32?")


# ---- what a model can do ----


def check_family(model, settings):
    """Refuses a model whose step in a batch is not its plain forward pass.

    Two prompts of different lengths go through all that a batch goes through.
    """
    shorter = torch.tensor([[8, 9, 4]], device=model.device)
    longer = torch.tensor([[3, 5, 6, 1, 2, 7]], device=model.device)
    last, swap = torch.cat([shorter, longer[:, -3:]])[:, -1:], torch.tensor([1, 0])
    try:
        prompts = [longer[0, :-1].tolist(), shorter[0, :-1].tolist()]
        _, attention, cache = read_prompts(model, settings, prompts)
        cache.reorder_cache(swap.to(model.device))
        attention = torch.cat([attention[swap], torch.ones_like(last)], 1)
        batched = next_logits(model, settings, last, attention, cache)  # [2, vocab]
        alone = torch.cat([next_logits(model, settings, ids) for ids in (shorter, longer)])
        fits = (batched - alone).abs().max() < 0.1 * alone.std() or alone.isnan().any()
    except Exception:  # a model may fail in any way at what it does not know
        fits = False
    if not fits:
        raise Problem(f"models of type {model.config.model_type!r} do not work in batches with "
                      "this version of transformers: sample from a server (eval.py --server)")


def check_room(model, questions, new_tokens):
    """The longest sequence that may be written; one that the model has no room for is an error."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest = max(questions, key=lambda question: len(question["prompt_ids"]))
    size = len(longest["prompt_ids"])
    if size + new_tokens > room:
        raise Problem(f"question {longest['id']!r}: {size} prompt tokens and {new_tokens} new ones "
                      f"do not fit the model's {room}: lower --max-new-tokens or leave the "
                      "question out")
    return size + new_tokens


def batch_that_fits(model, prompt, settings):
    """How many rows half of the free memory holds: keys, values and logits."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    token_bytes = 2 * config.num_hidden_layers * kept * width * model.dtype.itemsize
    row_bytes = (prompt + settings.max_new_tokens) * token_bytes + 16 * config.vocab_size
    return int(min(LARGEST_BATCH, max(1, memory_left(model.device) // 2 // row_bytes)))


def memory_left(device):
    """Bytes that the device still has."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as file:
            return int(re.search(r"MemAvailable: *(\d+)", file.read())[1]) * 1024 // world()
    except (OSError, TypeError):
        return 4 * 2**30  # another system: a cautious guess
