"""Completions from a model, graded, into a rollout file that a later call completes or extends."""

import collections
import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import re
import time
from dataclasses import dataclass

import torch

from data.rollouts import read_rollouts, short_hash, to_line
from data.tokens import end_tokens, prompt_tokens, stop_position, until_stop
from engine import server
from engine.batches import can_pack, completions_per_row, pack
from engine.common import Problem, first_line, progress, say, setting, whole_file, writing
from engine.parallel import barrier, from_first, gather, rank, start_ranks, world
from topr import completion_logprobs


@dataclass
class Sampling:
    """How completions are sampled: a part of the settings of every script."""

    samples: int = setting(16, "completions of each question", least=1, main=True)
    temperature: float = setting(1.0, "sampling temperature; 0 takes the likeliest token")
    top_k: int = setting(0, "sample from the k likeliest tokens (0: all)")
    top_p: float = setting(1.0, "sample from the likeliest tokens of this probability", least=0.001)
    max_new_tokens: int = setting(512, "longest completion in tokens", least=1, main=True)
    batch_size: int = setting(0, "completions at once (0: what fits into memory, at most 256)")
    seed: int = setting(0, "of the sampling, the data order, generated questions", main=True)
    weights: str = setting("auto", "dtype of the weights; auto: the checkpoint's. Training with "
                           "bfloat16 halves the memory; updates are rounded at random, so that "
                           "small ones count", ("auto", "float32", "bfloat16"))
    precision: str = setting("float32", "compute dtype (for the weights see --weights)",
                             ("float32", "bfloat16"))
    system: str = setting("", "system message of every chat prompt; precedes a plain prompt")
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

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=settings.weights, use_safetensors=True).to(device)
    except Exception as error:  # transformers raises many kinds; to the user they are all the same
        raise Problem(f"model {name!r} cannot be loaded: {first_line(error)}")
    if model.num_parameters() < 5e6:
        torch.set_num_threads(1)  # for so little work one thread is faster than several
    return model.eval(), tokenizer


def load_tokenizer(name, advice=""):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise Problem(f"model {name!r} cannot be loaded: {first_line(error)}{advice}")


def load_policy(settings, name):
    """What sample_rollouts takes first: (model, tokenizer), or (None, tokenizer) with a server."""
    if settings.server:
        advice = "; name its tokenizer with --tokenizer"
        return None, load_tokenizer(settings.tokenizer or name, advice)
    return load_model(name, settings, start_ranks())


# ---- many completions at once, with a cache of keys and values ----


@torch.no_grad()
def generate(model, prompts, uniforms, ends, settings, first=0, stopped=None, bar=None):
    """Yields (number of the prompt, completions first .. samples as lists of tokens) when finished.

    prompts: lists of tokens. uniforms(p): random numbers for prompt p, [samples, max_new_tokens].
    A prompt is read once for all its completions, the longest prompts first. Rows are padded on the
    left; finished ones leave the batch, and the next prompts replace them.
    """
    size, finished, batch = settings.batch_size or 256, collections.defaultdict(dict), None
    longest_first = sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))
    waiting = collections.deque(
        (p, range(start, min(start + size, settings.samples)))
        for p in longest_first for start in range(first, settings.samples, size))
    while waiting or batch:
        newcomers, count = [], len(batch["rows"]) if batch else 0
        while waiting and count + len(waiting[0][1]) <= size:
            newcomers.append(waiting.popleft())
            count += len(newcomers[-1][1])
        if newcomers:
            batch = join(batch, read_prompts(model, prompts, newcomers, uniforms, settings))
        write_token(batch, ends, settings, stopped, bar)
        done = [row for row in batch["rows"] if row["done"]]
        if len(done) * 8 >= len(batch["rows"]):  # an eighth is free: worth the copy that makes room
            for row in done:
                copies = finished[row["prompt"]]
                copies[row["copy"]] = row["tokens"]
                if len(copies) == settings.samples - first:
                    yield row["prompt"], [copies[copy] for copy in sorted(copies)]
            batch = keep(batch, [i for i, row in enumerate(batch["rows"]) if not row["done"]])
        if batch:
            step(model, batch, settings)


def next_logits(model, settings, **inputs):
    """[rows, vocab]: of the token after the last, as the trainer computes them."""
    with compute_dtype(model, settings):
        return model(use_cache=True, logits_to_keep=1, **inputs).logits[:, -1].float()


def compute_dtype(model, settings):
    enabled = settings.precision == "bfloat16"
    return torch.autocast(model.device.type, torch.bfloat16, enabled=enabled)


def read_prompts(model, prompts, newcomers, uniforms, settings):
    """A batch with a row for each new completion; each prompt went through the model once."""
    from transformers import DynamicCache

    longest, cache = max(len(prompts[p]) for p, _ in newcomers), DynamicCache()
    ids = torch.tensor([[0] * (longest - len(prompts[p])) + prompts[p] for p, _ in newcomers])
    attention = torch.tensor([[0] * (longest - len(prompts[p])) + [1] * len(prompts[p])
                              for p, _ in newcomers], device=model.device)  # [prompts, time]
    logits = next_logits(
        model, settings, input_ids=ids.to(model.device), attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    rows, source = [], []
    for number, (p, copies) in enumerate(newcomers):
        table = uniforms(p)  # [samples, max_new_tokens]
        rows += [{"prompt": p, "copy": copy, "uniform": table[copy].tolist(), "tokens": [],
                  "done": False} for copy in copies]
        source += [number] * len(copies)
    source = torch.tensor(source, device=model.device)  # [rows]
    cache.batch_select_indices(source)
    return {"rows": rows, "attention": attention[source], "logits": logits[source], "cache": cache}


def write_token(batch, ends, settings, stopped=None, bar=None):
    """Draws the next token of every row; those of rows that are done mean nothing."""
    rows, last = batch["rows"], settings.max_new_tokens - 1
    broken = ~batch["logits"].amax(-1).isfinite()  # [rows]
    uniform = torch.tensor([[row["uniform"][min(len(row["tokens"]), last)]] for row in rows])
    batch["chosen"] = draw(batch["logits"], uniform.to(broken.device), settings)  # [rows, 1]
    for row, token, bad in zip(rows, batch["chosen"][:, 0].tolist(), broken.tolist()):
        if row["done"]:
            continue
        if bad:
            raise FloatingPointError(row["prompt"])
        row["tokens"].append(token)
        row["done"] = (token in ends or len(row["tokens"]) > last
                       or bool(stopped and stopped(row["prompt"], row["tokens"])))
        if bar is not None:
            bar.update(row["done"])


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
    live = [[not row["done"]] for row in batch["rows"]]
    attention = torch.cat([batch["attention"], torch.tensor(live).to(batch["attention"])], 1)
    batch["attention"] = attention  # [rows, time + 1]
    batch["logits"] = next_logits(
        model, settings, input_ids=batch["chosen"], attention_mask=attention,
        position_ids=attention.sum(1, True) - 1, past_key_values=batch["cache"])


def keep(batch, numbers):
    """The batch with these rows alone, without columns of padding alone; None without rows."""
    if not numbers:
        return None
    kept = {name: batch[name][numbers] for name in ("attention", "logits", "chosen")}
    spare = (kept["attention"].cumsum(1) == 0).all(0).sum()  # columns of padding on the left
    kept["attention"] = kept["attention"][:, spare:]
    for layer in batch["cache"].layers:  # [rows, heads, time, width]
        layer.keys, layer.values = layer.keys[numbers, :, spare:], layer.values[numbers, :, spare:]
    return {**kept, "rows": [batch["rows"][number] for number in numbers], "cache": batch["cache"]}


def join(old, new):
    """Both batches as one, the shorter padded on the left."""
    if old is None:
        return new
    longest = max(old["attention"].shape[1], new["attention"].shape[1])

    def stack(*parts, after):
        """after: axes behind the one of time."""
        return torch.cat([torch.nn.functional.pad(
            x, (0, 0) * after + (longest - x.shape[-1 - after], 0)) for x in parts])

    for mine, theirs in zip(old["cache"].layers, new["cache"].layers):
        mine.keys = stack(mine.keys, theirs.keys, after=1)
        mine.values = stack(mine.values, theirs.values, after=1)
    return {"rows": old["rows"] + new["rows"], "logits": torch.cat([old["logits"], new["logits"]]),
            "attention": stack(old["attention"], new["attention"], after=0), "cache": old["cache"]}


# ---- models whose state is no such cache ----


@torch.no_grad()
def cache_bytes(model, settings):
    """Bytes of a token in the cache; 0 when our batches give other logits than a plain pass.

    State-space and hybrid models keep a state in their own way. Two prompts of different lengths go
    through all that a batch goes through.
    """
    prompts = [list(range(1, 8)), [8, 9]]
    try:
        parts = [read_prompts(model, prompts, [(p, [0])], lambda p: torch.zeros(1, 1), settings)
                 for p in (0, 1)]
        batch = {**join(*parts), "chosen": torch.tensor([[5], [4]], device=model.device)}
        batch = keep(batch, [1, 0])
        step(model, batch, settings)
        for row, ids in zip(batch["logits"], ([*prompts[1], 4], [*prompts[0], 5])):
            ids = torch.tensor([ids], device=model.device)
            plain = next_logits(model, settings, input_ids=ids)[0]  # [vocab]
            if not (row - plain).abs().max() < 0.1 * plain.std():
                return 0
    except Exception:  # a model may fail in any way at what it does not know
        return 0
    return sum(part[0, :, 0].nbytes for layer in batch["cache"].layers
               for part in (layer.keys, layer.values))


@torch.no_grad()
def generate_alone(model, prompts, uniforms, ends, settings, first=0, stopped=None, bar=None):
    """As generate, by transformers' own loop, one prompt at a time; the draws are ours.

    Rows are not stopped at a stop string: what follows it is cut off later.
    """
    from transformers import GenerationConfig

    neutral = GenerationConfig(eos_token_id=ends, pad_token_id=ends[0], do_sample=False,
                               max_new_tokens=settings.max_new_tokens)
    for p, prompt in enumerate(prompts):
        table = uniforms(p)[first:].to(model.device)  # [completions, max_new_tokens]

        def only_the_drawn(ids, logits):
            if not logits.amax(-1).isfinite().all():
                raise FloatingPointError(p)
            now = ids.shape[1] - len(prompt)
            chosen = draw(logits.float(), uniform[:, now : now + 1], settings)
            return torch.full_like(logits, -math.inf).scatter(1, chosen, 0.0)

        completions = []
        for uniform in table.split(settings.batch_size):
            ids = torch.tensor([prompt] * len(uniform), device=model.device)
            own, model.generation_config = model.generation_config, neutral
            try:
                with compute_dtype(model, settings):
                    ids = model.generate(ids, attention_mask=torch.ones_like(ids),
                                         logits_processor=[only_the_drawn])
            finally:
                model.generation_config = own
            for row in ids[:, len(prompt) :].tolist():
                length = next((n for n, token in enumerate(row, 1) if token in ends), len(row))
                completions.append(row[:length])
            if bar is not None:
                bar.update(len(uniform))
        yield p, completions


@torch.no_grad()
def score(model, prompt, completions, share, mask_dtype=None):
    """log mu of every completion token, by the trainer's own function, one question at a time.

    Its shape depends on the question alone, and pi/mu of an untrained policy is 1.
    """
    mean, fit = sum(map(len, completions)) / len(completions), 1
    if share:
        width = model.config.get_text_config().hidden_size
        fit = completions_per_row(len(prompt), mean, len(completions), width)
    rows = [(prompt, completions[i : i + fit]) for i in range(0, len(completions), fit)]
    packed = pack(rows, model.device, mask_dtype)
    logprobs = completion_logprobs(model, **packed)[packed["mask"]].cpu()  # [tokens]
    return [tokens.tolist() for tokens in logprobs.split([len(tokens) for tokens in completions])]


# ---- the rollouts of a list of questions ----


def sample_once(settings, policy, questions, grade, out="", logprobs=True, **changes):
    """The rollout rows that a policy (its folder or name) writes; a finished file is reused.

    questions: a function tokenizer -> list of question dicts. `changes` replace fields of settings.
    """
    settings = dataclasses.replace(settings, model=policy, **changes)
    model, tokenizer = load_policy(settings, policy)
    what = os.path.basename(out) or "sampling"
    questions = questions(tokenizer)
    return sample_rollouts(model, tokenizer, questions, grade, settings, out, what, logprobs)


def sample_rollouts(model, tokenizer, questions, grade, settings, out="", what="sampling",
                    logprobs=True):
    """Rollout rows for all questions, on every rank; also as the file `out` when it is named.

    A finished file is reused, or extended when more samples are asked for; other rollouts are never
    overwritten. With settings.server `model` is None.
    questions: dicts with "id", "prompt" and what grade(question, completion) needs.
    """
    prompts = [prompt_tokens(question["prompt"], tokenizer) for question in questions]
    name = os.path.normpath(settings.model) if os.path.isdir(settings.model) else settings.model
    fields = ("temperature", "top_k", "top_p", "max_new_tokens", "seed", "precision")
    sampling = {"model": name, **{field: getattr(settings, field) for field in fields}}
    sampling |= {"server": settings.server} if settings.server else {"weights": fingerprint(model)}
    rows = [[] for _ in questions]
    if out and from_first(os.path.exists(out)):
        rows = finished_rows(out, questions, grade, sampling, settings.samples)
    first = len(rows[0])
    if first == settings.samples:
        say(f"{out}: the rollouts are there, reusing them")
        return [row for of_question in rows for row in of_question]
    arguments = (settings, questions, prompts, tokenizer, first)
    if settings.server:
        write = server.writer(*arguments, kept=bool(out))
    else:
        write = writer(model, *arguments, with_logprobs=bool(out) and logprobs)
    with memory_advice("--batch-size, --max-new-tokens, or use --weights bfloat16"):
        samples = settings.samples
        return collect(write, questions, prompts, grade, sampling, samples, rows, out, what)


@contextlib.contextmanager
def memory_advice(advice):
    """Out of memory, on a GPU or a CPU, is one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = re.search("out of memory|allocate memory", str(error))
        if isinstance(error, RuntimeError) and not known:
            raise
        raise Problem(f"out of memory: lower {advice} ({first_line(error)})")


def finished_rows(out, questions, grade, sampling, samples):
    """The rows of each question in a finished file, which must be those of these settings."""
    rows = read_rollouts(out, zero_is_wrong=True)
    each = max(1, len(rows) // len(questions))
    expected = [question for question in questions for _ in range(each)]

    def compare(name, there, asked):
        if there != asked:
            raise Problem(f"{out} holds other rollouts: {name} is {there!r:.60} there and "
                          f"{asked!r:.60} in these settings; use another --out, or remove the file")

    compare("the number of completions", len(rows), len(questions) * min(each, samples))
    for row, question in zip(rows, expected):
        there = {**row, **(row.get("sampling") or {})}
        for name, asked in {**sampling, "id": question["id"], "prompt": question["prompt"]}.items():
            compare(name, there.get(name), asked)
        graded = grade(question, row["completion"])
        compare("(answer, reward)", (row.get("answer"), row["reward"]), graded)
    return [rows[i : i + each] for i in range(0, len(rows), each)]


def writer(model, settings, questions, prompts, tokenizer, first, with_logprobs):
    """write(todo, bar) for collect: (question number, its completions), each when finished."""
    ends = end_tokens(model, tokenizer)
    longest = max(map(len, prompts)) + settings.max_new_tokens
    mask_dtype = torch.bfloat16 if settings.precision == "bfloat16" else model.dtype
    share = with_logprobs and can_pack(model, longest, mask_dtype)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for question, prompt in zip(questions, prompts):
        if len(prompt) + settings.max_new_tokens > room:
            raise Problem(
                f"question {question['id']!r}: {len(prompt)} prompt tokens and "
                f"{settings.max_new_tokens} new ones do not fit the model's {room}: "
                "lower --max-new-tokens or leave the question out")
    token_bytes, sample = cache_bytes(model, settings), generate
    if not token_bytes:
        sample = generate_alone
        say("this model keeps its state in its own way: transformers' generate samples, "
            "one question at a time")
    if not settings.batch_size:
        row_bytes = longest * token_bytes + 16 * model.config.get_text_config().vocab_size
        fit = int(memory_left(model.device) / 2 // row_bytes)
        settings = dataclasses.replace(settings, batch_size=min(256, max(1, fit)))

    def write(todo, bar):
        def uniforms(t):
            question = questions[todo[t]]
            key = short_hash(f"{settings.seed}\0{question['id']}\0{question['prompt']}")
            generator = torch.Generator().manual_seed(key)
            return torch.rand(settings.samples, settings.max_new_tokens, generator=generator)

        def stopped(t, tokens):
            stop = questions[todo[t]].get("stop") or []
            enough = max([len(mark.encode()) + 4 for mark in stop], default=0)  # a token has a byte
            text = tokenizer.decode(tokens[-enough:], skip_special_tokens=True) if stop else ""
            return stop_position(text, stop) < len(text)

        try:
            own = [prompts[q] for q in todo]
            for t, completions in sample(
                    model, own, uniforms, ends, settings, first, stopped, bar):
                prompt, stop = prompts[todo[t]], questions[todo[t]].get("stop") or []
                rows = [until_stop(tokens, tokens[-1] in ends, stop, tokenizer)
                        for tokens in completions]
                if with_logprobs:
                    with compute_dtype(model, settings):
                        ids = [row["completion_ids"] for row in rows]
                        scores = score(model, prompt, ids, share, mask_dtype)
                    for row, logprobs in zip(rows, scores):
                        row["logprobs"] = logprobs
                        if not math.isfinite(sum(logprobs)):
                            raise FloatingPointError(t)
                yield todo[t], [{"prompt_ids": prompt, **row} for row in rows]
        except FloatingPointError as error:
            question = questions[todo[error.args[0]]]
            raise Problem(
                f"question {question['id']!r}: the model's logits are NaN or infinite: are its "
                "weights damaged, or does it need --weights float32 --precision float32?")

    return write


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


def collect(write, questions, prompts, grade, sampling, samples, rows, out, what):
    """Divides the questions among the ranks, grades what write(todo, bar) yields, joins all.

    rows: those that each question has already. Each finished question is kept at once in
    OUT.part-*, and the next call samples only the rest.
    """
    wanted = [sampling, samples, [[question["id"], question["prompt"]] for question in questions]]
    parts = f"{out}.part-{short_hash(json.dumps(wanted)) % 16**8:08x}-"
    one_of_machine, finished, mine = os.environ.get("LOCAL_RANK", "0") == "0", {}, {}
    for part in gather(read_parts(parts) if out and one_of_machine else {}):
        finished |= part
    if finished:
        say(f"{out}: {len(finished)} of {len(questions)} questions were finished before, "
            "going on with the rest")
    longest_first = sorted(range(len(questions)), key=lambda q: -len(prompts[q]))
    todo = [q for q in longest_first if q not in finished][rank() :: world()]
    if out:
        with writing(out):
            os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    own_part, total = f"{parts}{rank()}-{time.time_ns()}", len(todo) * (samples - len(rows[0]))
    with progress(total=total, what=what, unit="completion") as bar:
        for q, completions in write(todo, bar):
            mine[q] = rows[q] + [graded(grade, questions[q], row, sampling) for row in completions]
            if out:
                with writing(own_part), open(own_part, "a", encoding="utf-8") as file:
                    file.write(json.dumps([q, mine[q]]) + "\n")
    for part in gather(mine):
        finished |= part
    rows = [row for q in range(len(questions)) for row in finished[q]]
    if out:
        if rank() == 0:
            with whole_file(out) as whole:
                whole.writelines(map(to_line, rows))
        barrier()
        for part in glob.glob(glob.escape(parts) + "*") if one_of_machine else []:
            with contextlib.suppress(FileNotFoundError):  # machines that share a disk all try
                os.remove(part)
        barrier()
    return rows


def graded(grade, question, completion, sampling):
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
                    question, rows_of_it = json.loads(line)
                    rows[question] = rows_of_it
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
