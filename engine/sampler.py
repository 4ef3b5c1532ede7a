"""Tokens in, tokens out: many completions at once, by a model of any family of transformers.

It knows no text, no rewards and no files: those are eval.py's part.
"""

import gc
import hashlib
import inspect
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from engine.common import Problem, setting
from engine.parallel import load_on_first_rank, world
from engine.tasks import one_line
from engine.tokens import end_tokens

LARGEST_BATCH = 512
LOOK_EVERY = 4  # tokens between checks which rows are done


@dataclass
class Sampling:
    """How completions are sampled: a part of the settings of every script."""

    samples: int = setting(16, "completions of each question", least=1, main=True, free=True)
    temperature: float = setting(
        1.0, "sampling temperature; 0 takes the likeliest token", free=True
    )
    top_k: int = setting(0, "sample from the k likeliest tokens (0: all)", free=True)
    top_p: float = setting(
        1.0, "sample from the likeliest tokens of this probability", least=0.001, most=1, free=True
    )
    max_new_tokens: int = setting(
        512, "longest completion in tokens", least=1, main=True, free=True
    )
    batch_size: int = setting(
        0, "completions at once (0: what fits into memory, at most 512)", free=True
    )
    seed: int = setting(
        0, "of the sampling, the data order, generated questions", main=True, most=2**32
    )
    weights: str = setting(
        "auto",
        "dtype of the weights; auto: the checkpoint's. Training with "
        "bfloat16 halves the memory; updates are rounded at random, so that "
        "small ones count",
        ("auto", "float32", "bfloat16"),
    )
    precision: str = setting(
        "auto",
        "compute dtype; auto: bfloat16 on a GPU that has it",
        ("auto", "float32", "bfloat16"),
    )
    template_arguments: str = setting(
        "{}",
        'arguments of the chat template as JSON, for instance {"enable_thinking": false}',
        free=True,
    )
    plain_prompt: bool = setting(
        False, "ignore the chat template: for a base model that ships one", free=True
    )

    def __post_init__(self):
        if self.precision == "auto":
            has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            self.precision = "bfloat16" if has_bfloat16 else "float32"


# ---- models ----


def load_model(name, settings, device):
    """(model, tokenizer) of a directory or the hub: safetensors only, none of its code."""
    from transformers import AutoModelForCausalLM, logging

    # An earlier model sits in reference cycles: without a collection it stays in memory.
    gc.collect()
    torch.cuda.empty_cache()  # nothing without a GPU
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(name)
    with one_line(f"model {name!r} cannot be loaded"):
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=settings.weights, use_safetensors=True, trust_remote_code=False
        ).to(device)
    if model.num_parameters() < 5e6:
        torch.set_num_threads(1)  # for so little work one thread is faster than several
    return model.eval(), tokenizer


def load_for_training(settings, device):
    """As load_model; in shards the first rank alone holds the weights, which `shard` deals out."""
    if not settings.shard:
        return load_model(settings.model, settings, device)
    model = load_on_first_rank(lambda: load_model(settings.model, settings, "cpu")[0])
    return model, load_tokenizer(settings.model)


def load_tokenizer(name):
    from transformers import AutoTokenizer

    with one_line(f"model {name!r} cannot be loaded"):
        if os.path.isabs(name) and not os.path.isdir(name):
            raise FileNotFoundError("there is no such folder")
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def fingerprint(model):
    """16 letters that change with the weights: names, shapes, 4,096 values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.flatten()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat[:: max(1, len(flat) // 4096)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- sampling ----


@torch.no_grad()
def generate(model, tokenizer, questions, todo, settings, bar):
    """Yields (number of a question, its completions as lists of tokens) for the numbers in todo.

    questions: dicts with "id", "prompt_ids", "stop" (strings that end a completion) and "key", the
    seed of its random numbers. todo: alike lengths together, the longest first.
    """
    check_family(model, settings)
    rows = [(number, copy) for number in todo for copy in range(settings.samples)]
    finished = []  # completions of one question: rows of a question follow each other
    while rows:
        longest = len(questions[rows[0][0]]["prompt_ids"]) + settings.max_new_tokens
        size = settings.batch_size or batch_that_fits(model, longest)
        batch, rows = rows[:size], rows[size:]
        written = write(model, tokenizer, questions, batch, settings, bar)
        for (number, _), tokens in zip(batch, written):
            finished.append(tokens)
            if len(finished) == settings.samples:
                yield number, finished
                finished = []


def write(model, tokenizer, questions, batch, settings, bar):
    """The tokens of each row of a batch, a row being (number of a question, which completion).

    A prompt is read once for all its rows. After every few tokens the rows that are done leave;
    what they wrote after their end is cut off.
    """
    numbers = list(dict.fromkeys(number for number, _ in batch))
    prompts = [questions[number]["prompt_ids"] for number in numbers]
    logits, attention, cache = read_prompts(model, settings, prompts)
    index = [numbers.index(number) for number, _ in batch]  # a row for each completion
    tables = {number: uniforms(questions[number]["key"], settings) for number in numbers}
    uniform = torch.stack([tables[number][copy] for number, copy in batch]).to(model.device)
    running, written = list(range(len(batch))), [[] for _ in batch]
    ends = end_tokens(model, tokenizer)
    for start in range(0, settings.max_new_tokens, LOOK_EVERY):
        cache.reorder_cache(torch.tensor(index, device=model.device))
        logits, attention, recent = logits[index], attention[index], []
        for column in uniform[running, start : start + LOOK_EVERY].T:  # [rows]
            recent.append(draw(logits, column[:, None], settings))  # [rows, 1]
            attention = F.pad(attention, (0, 1), value=1)  # [rows, time + 1]
            logits = next_logits(model, settings, recent[-1], attention, cache)  # [rows, vocab]
        finite, index = logits.amax(-1).isfinite().tolist(), []
        for row, tokens in enumerate(torch.cat(recent, 1).tolist()):
            question, whole = questions[batch[running[row]][0]], written[running[row]]
            if not finite[row]:
                raise Problem(
                    f"question {question['id']!r}: the model's logits are NaN or "
                    "infinite: are its weights damaged, or does it need --weights "
                    "float32 --precision float32?"
                )
            end = next((n for n, token in enumerate(tokens, 1) if token in ends), None)
            whole += tokens[:end]
            if end is None and not has_stopped(tokenizer, whole, question["stop"]):
                index.append(row)
        bar.update(len(running) - len(index))
        if not index:
            break
        running = [running[row] for row in index]
    bar.update(len(index))
    return written


def uniforms(key, settings):
    """The random numbers of a question's completions, [samples, max_new_tokens]."""
    generator = torch.Generator().manual_seed(key)
    return torch.rand(settings.samples, settings.max_new_tokens, generator=generator)


def has_stopped(tokenizer, tokens, stop):
    """Whether the last tokens hold a stop string; each token has at least a byte of it."""
    enough = len("".join(stop).encode()) + 4 + LOOK_EVERY
    text = stop and tokenizer.decode(tokens[-enough:], skip_special_tokens=True)
    return any(mark in text for mark in stop)


def read_prompts(model, settings, prompts):
    """(logits of the next token [prompts, vocab], attention [prompts, time], the cache)."""
    from transformers import DynamicCache

    rows = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    attention, cache = (ids >= 0).long(), DynamicCache(config=model.config)
    return next_logits(model, settings, ids.clamp(min=0), attention, cache), attention, cache


def next_logits(model, settings, ids, attention, cache):
    """[rows, vocab]: of the token after ids [rows, new], as the trainer computes them."""
    # transformers 5.24 renamed it: newer versions warn of the old name, older ones swallow the new.
    names = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    position = (attention.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # [rows, new]
    has_bfloat16 = settings.precision == "bfloat16"
    with torch.autocast(model.device.type, torch.bfloat16, enabled=has_bfloat16):
        output = model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=position,
            use_cache=True,
            logits_to_keep=1,
            **{name: cache},
        )
    return output.logits[:, -1].float()


def draw(logits, uniform, settings):
    """Inverse-CDF sampling: one uniform number decides, whatever the other rows are.

    [rows, vocab], [rows, 1] -> [rows, 1]
    """
    if settings.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    vocabulary, order = logits.shape[1], None
    k = min(settings.top_k or vocabulary, vocabulary)
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


# ---- what a model can do ----


def check_family(model, settings):
    """Refuses a model whose step in a batch is not its plain forward pass.

    Two prompts of different lengths go through all that a batch goes through.
    """
    order = torch.tensor([1, 0], device=model.device)
    try:
        _, attention, cache = read_prompts(model, settings, [[3, 5, 6, 1, 2], [8, 9]])
        cache.reorder_cache(order)
        attention = F.pad(attention[order], (0, 1), value=1)
        batched = next_logits(model, settings, order[:, None] + 3, attention, cache)  # [2, vocab]
        alone = [read_prompts(model, settings, [ids])[0] for ids in ([8, 9, 4], [3, 5, 6, 1, 2, 3])]
        distance = (batched - torch.cat(alone)).abs().max()
        fits = not distance > 0.1 * batched.std()  # NaN is a fault of the weights
    except Exception:  # a model may fail in any way at what it does not know
        fits = False
    if not fits:
        raise Problem(
            f"models of type {model.config.model_type!r} do not work in batches with "
            "this version of transformers: sample from a server (eval.py --server)"
        )


def check_room(model, questions, new_tokens):
    """The longest sequence that may be written; one that the model has no room for is an error."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(questions, key=lambda question: len(question["prompt_ids"]))
    size = len(longest["prompt_ids"])
    if room and size + new_tokens > room:
        raise Problem(
            f"question {longest['id']!r}: {size} prompt tokens and {new_tokens} new ones "
            f"do not fit the model's {room}: lower --max-new-tokens or leave the "
            "question out"
        )
    return size + new_tokens


def batch_that_fits(model, longest):
    """How many rows half of the free memory holds: keys, values and logits."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    token_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    row_bytes = longest * token_bytes + 16 * config.vocab_size
    return min(LARGEST_BATCH, max(1, memory_left(model.device) // 2 // row_bytes))


def memory_left(device):
    """Bytes that the device still has; of a CPU half of all memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // world()
