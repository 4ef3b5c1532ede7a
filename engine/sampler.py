"""Completions from a model, graded, into a rollout file that a later call completes or extends."""

import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from engine.rollouts import read_rollouts, short_hash, to_line
from engine.tasks import one_line
from engine.tokens import end_tokens, prompt_tokens, until_stop
from engine import server
from engine.batches import can_pack, completions_per_row, pack
from engine.common import Problem, free_memory, progress, say, setting, whole_file, writing
from engine.parallel import barrier, from_first, gather_on_first, rank, start_ranks, world
from topr import completion_logprobs


@dataclass
class Sampling:
    """How completions are sampled: a part of the settings of every script."""

    samples: int = setting(16, "completions of each question", least=1, main=True)
    temperature: float = setting(1.0, "sampling temperature; 0 takes the likeliest token")
    top_k: int = setting(0, "sample from the k likeliest tokens (0: all)")
    top_p: float = setting(1.0, "sample from the likeliest tokens of this probability", least=0.001,
                           most=1)
    max_new_tokens: int = setting(512, "longest completion in tokens", least=1, main=True)
    batch_size: int = setting(0, "completions at once (0: what fits into memory, at most 256)")
    seed: int = setting(0, "of the sampling, the data order, generated questions", main=True)
    weights: str = setting("auto", "dtype of the weights; auto: the checkpoint's. Training with "
                           "bfloat16 halves the memory; updates are rounded at random, so that "
                           "small ones count", ("auto", "float32", "bfloat16"))
    precision: str = setting("float32", "compute dtype (for the weights see --weights)",
                             ("float32", "bfloat16"))
    template_arguments: str = setting("{}", "arguments of the chat template as JSON, for instance "
                                      '{"enable_thinking": false}')
    plain_prompt: bool = setting(False, "ignore the chat template: for a base model that ships one")
    server: str = setting("", "sample from a server such as http://localhost:8000/v1 (vLLM, "
                          "SGLang, transformers serve); OPENAI_API_KEY holds its key, if any")
    tokenizer: str = setting("", "with --server: a directory or hub name, if --model is neither")
    requests: int = setting(16, "with --server: concurrent requests of each rank")
    timeout: float = setting(600.0, "with --server: seconds to wait for an answer before a retry")
    patience: float = setting(300.0, "with --server: seconds of retries while it fails")


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


def load_tokenizer(name, advice=""):
    from transformers import AutoTokenizer

    with one_line(f"model {name!r} cannot be loaded{advice}"):
        return AutoTokenizer.from_pretrained(name)


def load_policy(settings, name):
    """What sample_rollouts takes first: (model, tokenizer), or (None, tokenizer) with a server."""
    if settings.server:
        advice = " (--tokenizer can name its tokenizer)"
        return None, load_tokenizer(settings.tokenizer or name, advice)
    return load_model(name, settings, start_ranks())


# ---- many completions at once, with a cache of keys and values ----


@dataclass
class Row:
    """A completion that is being written."""

    number: int  # of its question
    question: dict
    copy: int  # which of the question's completions it is
    uniform: collections.abc.Iterator  # a random number for each token
    tokens: list
    done: bool = False


@dataclass
class Batch:
    """Completions that are written at the same time, padded on the left."""

    rows: list
    attention: torch.Tensor  # [rows, time]
    logits: torch.Tensor  # [rows, vocab], of each row's next token
    cache: object  # keys and values, [rows, heads, time, width] in each layer
    chosen: torch.Tensor = None  # [rows, 1], each row's last token


@torch.no_grad()
def generate(model, tokenizer, questions, todo, settings, first, bar):
    """Yields (number of a question in todo, its completions first .. samples as lists of tokens).

    A prompt is read once for all its completions. Finished rows leave the batch, and the rows of
    the next questions replace them.
    """
    ends, size = end_tokens(model, tokenizer), settings.batch_size
    waiting = collections.deque()
    for number in todo:
        for start in range(first, settings.samples, size):
            waiting.append((number, range(start, min(start + size, settings.samples))))
    finished, batch = collections.defaultdict(dict), None
    while waiting or batch:
        newcomers, count = [], len(batch.rows) if batch else 0
        while waiting and count + len(waiting[0][1]) <= size:
            newcomers.append(waiting.popleft())
            count += len(newcomers[-1][1])
        if newcomers:
            batch = join(batch, read_prompts(model, questions, newcomers, settings))
        write_token(batch, ends, tokenizer, settings, bar)
        done = [row for row in batch.rows if row.done]
        if len(done) * 8 >= len(batch.rows):  # an eighth is free: worth the copy that makes room
            for row in done:
                copies = finished[row.number]
                copies[row.copy] = row.tokens
                if len(copies) == settings.samples - first:
                    yield row.number, [copies[copy] for copy in sorted(copies)]
            batch = keep(batch, [i for i, row in enumerate(batch.rows) if not row.done])
        if batch:
            step(model, batch, settings)


def next_logits(model, settings, **inputs):
    """[rows, vocab]: of the token after the last, as the trainer computes them."""
    with compute_dtype(model, settings):
        return model(use_cache=True, logits_to_keep=1, **inputs).logits[:, -1].float()


def compute_dtype(model, settings):
    enabled = settings.precision == "bfloat16"
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)


def uniforms(settings, question):
    """The random numbers of a question's completions, [samples, max_new_tokens]."""
    key = short_hash(f"{settings.seed}\0{question['id']}\0{question['prompt']}")
    generator = torch.Generator().manual_seed(key)
    return torch.rand(settings.samples, settings.max_new_tokens, generator=generator)


def read_prompts(model, questions, newcomers, settings):
    """A batch of new rows; newcomers: (number of a question, which of its completions)."""
    from transformers import DynamicCache

    cache, prompts = DynamicCache(), []
    for number, _ in newcomers:
        prompts.append(torch.tensor(questions[number]["prompt_ids"], device=model.device))
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    attention = pad([torch.ones_like(prompt) for prompt in prompts])  # [prompts, time]
    logits = next_logits(
        model, settings, input_ids=pad(prompts), attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    rows, source = [], []
    for place, (number, copies) in enumerate(newcomers):
        table = uniforms(settings, questions[number])
        for copy in copies:
            rows.append(Row(number, questions[number], copy, iter(table[copy].tolist()), []))
            source.append(place)
    source = torch.tensor(source, device=model.device)  # [rows]
    cache.batch_select_indices(source)
    return Batch(rows, attention[source], logits[source], cache)


def write_token(batch, ends, tokenizer, settings, bar):
    """Draws the next token of every row; those of rows that are done mean nothing."""
    broken = ~batch.logits.amax(-1).isfinite()  # [rows]
    uniform = torch.tensor([[next(row.uniform, 0.0)] for row in batch.rows], device=broken.device)
    batch.chosen = draw(batch.logits, uniform, settings)  # [rows, 1]
    for row, token, is_broken in zip(batch.rows, batch.chosen[:, 0].tolist(), broken.tolist()):
        if row.done:
            continue
        if is_broken:
            raise broken_model(row.question)
        row.tokens.append(token)
        is_last = token in ends or len(row.tokens) == settings.max_new_tokens
        row.done = is_last or has_stopped(row, tokenizer)
        bar.update(row.done)


def has_stopped(row, tokenizer):
    """Whether the last tokens hold a stop string; each token has at least a byte of it."""
    stop = row.question["stop"]
    if not stop:
        return False
    longest = max(len(mark.encode()) for mark in stop) + 4
    text = tokenizer.decode(row.tokens[-longest:], skip_special_tokens=True)
    return any(mark in text for mark in stop)


def broken_model(question):
    return Problem(f"question {question['id']!r}: the model's logits are NaN or infinite: are its "
                   "weights damaged, or does it need --weights float32 --precision float32?")


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


def step(model, batch, settings):
    """Feeds the tokens just drawn through the model, for the logits of the next.

    Rows that are done hide theirs, or their positions would pass the last one of the model.
    """
    live = torch.tensor([[not row.done] for row in batch.rows]).to(batch.attention)
    batch.attention = torch.cat([batch.attention, live], 1)  # [rows, time + 1]
    batch.logits = next_logits(
        model, settings, input_ids=batch.chosen, attention_mask=batch.attention,
        position_ids=batch.attention.sum(1, True) - 1, past_key_values=batch.cache)


def keep(batch, places):
    """The batch with these rows alone, without columns of padding alone; None without rows."""
    if not places:
        return None
    attention = batch.attention[places]
    spare = (attention.cumsum(1) == 0).all(0).sum()  # columns of padding on the left
    for layer in batch.cache.layers:
        layer.keys = layer.keys[places, :, spare:]
        layer.values = layer.values[places, :, spare:]
    rows = [batch.rows[place] for place in places]
    return Batch(rows, attention[:, spare:], batch.logits[places], batch.cache,
                 batch.chosen[places])


def join(old, new):
    """Both batches as one."""
    if old is None:
        return new
    for mine, theirs in zip(old.cache.layers, new.cache.layers):
        mine.keys = stack(mine.keys, theirs.keys)
        mine.values = stack(mine.values, theirs.values)
    attention = stack(old.attention[..., None], new.attention[..., None])[..., 0]
    logits = torch.cat([old.logits, new.logits])
    return Batch(old.rows + new.rows, attention, logits, old.cache)


def stack(*parts):
    """Tensors of [rows, .., time, width] as one, the shorter padded on the left of time."""
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([F.pad(part, (0, 0, longest - part.shape[-2], 0)) for part in parts])


# ---- models whose state is no such cache ----


@torch.no_grad()
def cache_bytes(model, settings):
    """Bytes of a token in the cache; 0 when our batches give other logits than a plain pass.

    State-space and hybrid models keep a state in their own way. Two prompts of different lengths go
    through all that a batch goes through.
    """
    ids = [list(range(1, 8)), [8, 9, 4]]
    questions = [{"id": "", "prompt": "", "prompt_ids": row[:-1]} for row in ids]
    try:
        one, other = (read_prompts(model, questions, [(n, [0])], settings) for n in (0, 1))
        batch = join(one, other)
        batch.chosen = torch.tensor([row[-1:] for row in ids], device=model.device)
        batch = keep(batch, [1, 0])
        step(model, batch, settings)
        for row, found in zip(ids, batch.logits.flip(0)):
            ids_alone = torch.tensor([row], device=model.device)
            alone = next_logits(model, settings, input_ids=ids_alone)[0]  # [vocab]
            if not (found - alone).abs().max() < 0.1 * alone.std():
                return 0
    except Exception:  # a model may fail in any way at what it does not know
        return 0
    return sum(layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes
               for layer in batch.cache.layers)


@torch.no_grad()
def generate_alone(model, tokenizer, questions, todo, settings, first, bar):
    """As generate, by transformers' own loop, one prompt at a time; the draws are ours.

    Rows are not stopped at a stop string: what follows it is cut off later.
    """
    from transformers import GenerationConfig

    ends, own = end_tokens(model, tokenizer), model.generation_config
    neutral = GenerationConfig(eos_token_id=ends, pad_token_id=ends[0], do_sample=False,
                               max_new_tokens=settings.max_new_tokens)
    for number in todo:
        question, completions = questions[number], []
        prompt = question["prompt_ids"]
        table = uniforms(settings, question)[first:].to(model.device)
        for uniform in table.split(settings.batch_size):  # [rows, max_new_tokens]
            ids = torch.tensor([prompt] * len(uniform), device=model.device)
            chooser = functools.partial(only_the_drawn, question, uniform, settings)
            model.generation_config = neutral
            try:
                with compute_dtype(model, settings):
                    ids = model.generate(ids, attention_mask=torch.ones_like(ids),
                                         logits_processor=[chooser])
            finally:
                model.generation_config = own
            for row in ids[:, len(prompt) :].tolist():
                length = next((n for n, token in enumerate(row, 1) if token in ends), len(row))
                completions.append(row[:length])
            bar.update(len(uniform))
        yield number, completions


def only_the_drawn(question, uniform, settings, ids, logits):
    """Logits [rows, vocab] that leave generate no choice but the token that we draw."""
    if not logits.amax(-1).isfinite().all():
        raise broken_model(question)
    now = ids.shape[1] - len(question["prompt_ids"])
    chosen = draw(logits.float(), uniform[:, now : now + 1], settings)
    return torch.full_like(logits, -math.inf).scatter(1, chosen, 0.0)


@torch.no_grad()
def score(model, prompt, completions, share, mask_dtype=None):
    """log mu of every completion token, by the trainer's own function, one question at a time.

    Its shape depends on the question alone, and pi/mu of an untrained policy is 1.
    """
    fit = 1
    if share:
        mean = sum(map(len, completions)) / len(completions)
        width = model.config.get_text_config().hidden_size
        fit = completions_per_row(len(prompt), mean, len(completions), width)
    rows = [(prompt, completions[i : i + fit]) for i in range(0, len(completions), fit)]
    packed = pack(rows, model.device, mask_dtype)
    logprobs = completion_logprobs(model, **packed)[packed["mask"]].cpu()  # [tokens]
    return [tokens.tolist() for tokens in logprobs.split([len(tokens) for tokens in completions])]


# ---- the rollouts of a list of questions ----


def sample_once(settings, policy, questions, grade, out="", logprobs=True, **changes):
    """The rollout rows that a policy (its folder or name) writes; a finished file is reused.

    The rows are on the first rank alone, as those of sample_rollouts.
    questions: a function tokenizer -> list of question dicts. `changes` replace fields of settings.
    """
    settings = dataclasses.replace(settings, model=policy, **changes)
    model, tokenizer = load_policy(settings, policy)
    what = os.path.basename(out) or "sampling"
    questions = questions(tokenizer)
    return sample_rollouts(model, tokenizer, questions, grade, settings, out, what, logprobs)


def sample_rollouts(model, tokenizer, questions, grade, settings, out="", what="sampling",
                    logprobs=True):
    """Rollout rows for all questions, on the first rank; also as the file `out` when it is named.

    The other ranks get an empty list: the rows of a large file would fill the memory of each.
    A finished file is reused, or extended when more samples are asked for; other rollouts are never
    overwritten. With settings.server `model` is None.
    questions: dicts with "id", "prompt" and what grade(question, completion) needs.
    """
    questions = [{**question, "stop": list(filter(None, question.get("stop") or [])),
                  "prompt_ids": prompt_tokens(question["prompt"], tokenizer)}
                 for question in questions]
    name = os.path.normpath(settings.model) if os.path.isdir(settings.model) else settings.model
    fields = ("temperature", "top_k", "top_p", "max_new_tokens", "seed", "precision")
    sampling = {"model": name, **{field: getattr(settings, field) for field in fields}}
    sampling |= {"server": settings.server} if settings.server else {"weights": fingerprint(model)}
    rows, fault = [[] for _ in questions], None
    if out and rank() == 0 and os.path.exists(out):
        try:
            rows = finished_rows(out, questions, grade, sampling, settings.samples)
        except Problem as problem:
            fault = problem
    first, fault = from_first((len(rows[0]), fault))
    if fault:
        raise fault
    if first == settings.samples:
        say(f"{out}: the rollouts are there, reusing them")
        return list(itertools.chain(*rows))
    if settings.server:
        complete = functools.partial(
            server.complete, tokenizer, questions, settings, first, bool(out))
    else:
        with_logprobs = logprobs and bool(out)
        longest = check_room(model, questions, settings.max_new_tokens)
        complete = functools.partial(
            complete_here, model, tokenizer, questions, settings, first, longest, with_logprobs)
    copies = range(first, settings.samples)
    return collect(complete, questions, grade, sampling, copies, rows, out, what)


def finished_rows(out, questions, grade, sampling, samples):
    """The rows of each question in a finished file, which must be those of these settings."""
    rows = read_rollouts(out, zero_is_wrong=True)
    each = max(1, len(rows) // len(questions))
    require_equal(out, "the number of completions", len(rows), len(questions) * min(each, samples))
    for place, row in enumerate(rows):
        question = questions[place // each]
        answer, reward = grade(question, row["completion"])
        there = {**row, **(row.get("sampling") or {})}
        asked = {**sampling, "id": question["id"], "prompt": question["prompt"], "answer": answer,
                 "reward": reward}
        for name in asked:
            require_equal(out, name, there.get(name), asked[name])
    return [rows[i : i + each] for i in range(0, len(rows), each)]


def require_equal(out, name, there, asked):
    if there != asked:
        raise Problem(f"{out} holds other rollouts: {name} is {there!r:.60} there and "
                      f"{asked!r:.60} in these settings; use another --out, or remove the file")


def complete_here(model, tokenizer, questions, settings, first, longest, with_logprobs, todo, bar):
    """Yields (question number, its new completions), each question of todo when it is finished."""
    mask_dtype = torch.bfloat16 if settings.precision == "bfloat16" else model.dtype
    share = with_logprobs and can_pack(model, longest, mask_dtype)
    token_bytes, sample = cache_bytes(model, settings), generate
    if not token_bytes:
        sample = generate_alone
        say("this model keeps its state in its own way: transformers' generate samples, "
            "one question at a time")
    if not settings.batch_size:
        row_bytes = longest * token_bytes + 16 * model.config.get_text_config().vocab_size
        fit = int(memory_left(model.device) / 2 // row_bytes)
        settings = dataclasses.replace(settings, batch_size=min(256, max(1, fit)))
    ends = end_tokens(model, tokenizer)
    for number, completions in sample(model, tokenizer, questions, todo, settings, first, bar):
        question = questions[number]
        prompt = question["prompt_ids"]
        rows = [{"prompt_ids": prompt,
                 **until_stop(tokens, tokens[-1] in ends, question["stop"], tokenizer)}
                for tokens in completions]
        if with_logprobs:
            with compute_dtype(model, settings):
                ids = [row["completion_ids"] for row in rows]
                scores = score(model, prompt, ids, share, mask_dtype)
            for row, logprobs in zip(rows, scores):
                row["logprobs"] = logprobs
                if not math.isfinite(sum(logprobs)):
                    raise broken_model(question)
        yield number, rows


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


def collect(complete, questions, grade, sampling, copies, rows, out, what):
    """Divides the questions among the ranks, grades what complete(todo, bar) yields, joins all.

    copies: which completions of each question are new; they follow its rows. Each finished question
    is kept at once in OUT.part-*, and the next call samples only the rest.
    """
    wanted = [sampling, list(copies), [[one["id"], one["prompt"]] for one in questions]]
    parts = f"{out}.part-{short_hash(json.dumps(wanted)) % 16**8:08x}-"
    finished = read_parts(parts) if out and rank() == 0 else {}
    there = from_first(set(finished))
    if there:
        say(f"{out}: {len(there)} of {len(questions)} questions were finished before, "
            "going on with the rest")
    numbers = [number for number in range(len(questions)) if number not in there]
    numbers.sort(key=lambda number: -len(questions[number]["prompt_ids"]))  # alike ones together
    todo = numbers[rank() :: world()]
    if out:
        with writing(out):
            os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    mine, own_part = {}, f"{parts}{rank()}-{time.time_ns()}"
    with progress(total=len(todo) * len(copies), what=what, unit="completion") as bar:
        for number, completions in complete(todo, bar):
            mine[number] = [grade_row(grade, questions[number], row, sampling)
                            for row in completions]
            if out:
                with writing(own_part), open(own_part, "a", encoding="utf-8") as file:
                    file.write(json.dumps([number, mine[number]]) + "\n")
    finished = collections.ChainMap(finished, *gather_on_first(mine))
    if rank() == 0:
        rows = [row for number, before in enumerate(rows) for row in before + finished[number]]
    if out:
        if rank() == 0:
            with whole_file(out) as file:
                file.writelines(map(to_line, rows))
        barrier()
        for part in glob.glob(glob.escape(parts) + "*"):
            with contextlib.suppress(FileNotFoundError):  # all ranks try
                os.remove(part)
        barrier()
    return rows if rank() == 0 else []


def grade_row(grade, question, completion, sampling):
    """A whole row, as it is in the file."""
    answer, reward = grade(question, completion["completion"])
    about = {name: question.get(name) for name in ("id", "question", "prompt", "gold", "split")}
    about |= {"completion": completion["completion"], "reward": reward, "answer": answer}
    return {**about, **completion, "sampling": sampling}


def read_parts(parts):
    """{question number: rows} of an earlier call with the same settings that did not finish."""
    rows = {}
    for path in glob.glob(glob.escape(parts) + "*"):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    number, rows_of_it = json.loads(line)
                    rows[number] = rows_of_it
                except ValueError:
                    say(f"{path}: dropped a torn last line")
    return rows


def fingerprint(model):
    """16 letters that change with the weights: names, shapes, 4,096 values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 4096)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
