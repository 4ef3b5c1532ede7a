"""Completions from a model, graded, into a rollout file that goes on where it broke off."""

import collections
import contextlib
import glob
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass

import torch

from data.rollouts import read_rollouts, short_hash, to_line
from data.tokens import prompt_tokens
from engine import server
from engine.batches import can_share_prompts, completions_per_row, pack
from engine.common import Problem, first_line, progress, say, setting, whole_file, writing
from engine.parallel import barrier, from_first, gather, rank, world
from topr import completion_logprobs


@dataclass
class Sampling:
    """How completions are sampled: a part of the settings of every script."""

    samples: int = setting(16, "completions of each question", least=1, main=True)
    temperature: float = setting(1.0, "sampling temperature; 0 takes the likeliest token")
    top_k: int = setting(0, "sample from the k likeliest tokens (0: all)")
    top_p: float = setting(1.0, "sample from the likeliest tokens that make up this share", least=0.001)
    max_new_tokens: int = setting(512, "longest completion", least=1, main=True)
    batch_size: int = setting(256, "completions written at once", least=1)
    seed: int = setting(0, "seed of the sampling, of the data order and of generated questions", main=True)
    weights: str = setting("float32", "dtype of the weights; in training bfloat16 halves the memory and is rounded at "
                           "random, so that small updates are not lost", ("float32", "bfloat16"))
    precision: str = setting("float32", "compute dtype (for the weights see --weights)", ("float32", "bfloat16"))
    server: str = setting("", "sample from a server such as http://localhost:8000/v1 (vLLM, SGLang, transformers "
                          "serve); its key, if any, is read from OPENAI_API_KEY")
    tokenizer: str = setting("", "with --server: a directory or a hub name, where --model is neither")
    requests: int = setting(16, "with --server: concurrent requests of each rank")
    timeout: float = setting(600.0, "with --server: seconds to wait for an answer before asking again")
    patience: float = setting(300.0, "with --server: seconds of retries while it fails")


def load_model(name, precision, device):
    """(model, tokenizer) from a directory or the hub: safetensors alone, no code from the model's repository."""
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, precision), use_safetensors=True)
    except Exception as error:  # transformers raises many kinds; for the user they are all the same
        raise Problem(f"model {name!r} cannot be loaded: {first_line(error)}")
    if model.num_parameters() < 5e6:
        torch.set_num_threads(1)  # so little work is done sooner by one thread than by several that wait for each other
    return model.to(device).eval(), tokenizer


def load_tokenizer(name, advice=""):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise Problem(f"model {name!r} cannot be loaded: {first_line(error)}{advice}")


def end_tokens(model, tokenizer):
    """All tokens that end a completion: a model may have several."""
    ends = {tokenizer.eos_token_id}
    for config in (model.config.get_text_config(), model.generation_config):
        ids = getattr(config, "eos_token_id", None)
        ends |= set(ids) if isinstance(ids, (list, tuple)) else {ids}
    ends.discard(None)
    if not ends:
        raise Problem("the model has no end-of-sequence token: set eos_token_id in its generation_config.json")
    return sorted(ends)


@torch.no_grad()
def generate(model, prompts, uniforms, ends, settings):
    """Yields (number of the prompt, its completions as lists of tokens), each prompt when it is finished.

    prompts: lists of tokens. uniforms(p): random numbers for prompt p, [samples, max_new_tokens].
    A prompt is read once for all its completions, the longest come first. Rows are padded on the left; those that
    have finished leave the batch, and the next prompts take their place.
    """
    ends = torch.tensor(ends, device=model.device)
    waiting = collections.deque(  # (prompt, the numbers of its completions)
        (p, torch.arange(first, min(first + settings.batch_size, settings.samples)))
        for p in sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))
        for first in range(0, settings.samples, settings.batch_size))
    finished, batch = collections.defaultdict(dict), None
    while waiting or batch:
        newcomers, rows = [], len(batch["done"]) if batch else 0
        while waiting and rows + len(waiting[0][1]) <= settings.batch_size:
            newcomers.append(waiting.popleft())
            rows += len(newcomers[-1][1])
        if newcomers:
            batch = join(batch, read_prompts(model, prompts, newcomers, uniforms))
        write_token(batch, ends, settings)
        if batch["done"].sum() * 8 >= len(batch["done"]):  # an eighth is free: worth the copy that makes room
            done = batch["done"].nonzero()[:, 0]
            for p, copy, length, tokens in zip(*(batch[name][done].tolist() for name in ("prompt", "copy", "length", "tokens"))):
                finished[p][copy] = tokens[:length]
                if len(finished[p]) == settings.samples:
                    yield p, [tokens for _, tokens in sorted(finished.pop(p).items())]
            batch = keep(batch, (~batch["done"]).nonzero()[:, 0])
        if batch:
            step(model, batch)


def read_prompts(model, prompts, newcomers, uniforms):
    """A batch with a row for each completion to be written; each prompt went through the model once."""
    from transformers import DynamicCache

    longest = max(len(prompts[p]) for p, _ in newcomers)
    ids = torch.zeros(len(newcomers), longest, dtype=torch.long)  # [prompts, time]
    attention = torch.zeros(len(newcomers), longest, dtype=torch.long)  # [prompts, time]
    for row, (p, _) in enumerate(newcomers):
        ids[row, longest - len(prompts[p]):] = torch.tensor(prompts[p])
        attention[row, longest - len(prompts[p]):] = 1
    device = model.device
    ids, attention, cache = ids.to(device), attention.to(device), DynamicCache()
    logits = model(input_ids=ids, attention_mask=attention, position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
                   past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]  # [prompts, vocab]
    source = torch.repeat_interleave(torch.tensor([len(copies) for _, copies in newcomers])).to(device)  # [rows]
    cache.batch_select_indices(source)
    uniform = torch.cat([uniforms(p)[copies] for p, copies in newcomers]).to(device)  # [rows, max_new_tokens]
    count = lambda: torch.zeros(len(source), dtype=torch.long, device=device)
    return {"prompt": torch.tensor([p for p, _ in newcomers], device=device)[source],
            "copy": torch.cat([copies for _, copies in newcomers]).to(device),
            "attention": attention[source], "logits": logits[source].float(), "uniform": uniform, "cache": cache,
            "tokens": torch.zeros(uniform.shape, dtype=torch.long, device=device), "length": count(), "done": count().bool()}


def write_token(batch, ends, settings):
    """Draws the next token of every row that is not done."""
    now = batch["length"].clamp(max=settings.max_new_tokens - 1)[:, None]  # [rows, 1]
    chosen = draw(batch["logits"], batch["uniform"].gather(1, now), settings)  # [rows, 1]
    batch["tokens"].scatter_(1, now, torch.where(batch["done"][:, None], batch["tokens"].gather(1, now), chosen))
    batch["length"] += ~batch["done"]
    batch["done"] |= torch.isin(chosen[:, 0], ends) | (batch["length"] == settings.max_new_tokens)
    batch["chosen"] = chosen


def draw(logits, uniform, settings):
    """Inverse-CDF sampling: one uniform number decides, whatever stands in the other rows. [rows, vocab] -> [rows, 1]"""
    if settings.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    order, k = None, settings.top_k if 0 < settings.top_k < logits.shape[1] else logits.shape[1]
    if k < logits.shape[1] or settings.top_p < 1:
        logits, order = logits.topk(k)  # [rows, k], the likeliest first
    probability = (logits / settings.temperature).softmax(-1)
    if settings.top_p < 1:
        probability = probability.masked_fill(probability.cumsum(-1) - probability >= settings.top_p, 0.0)
    cumulative = probability.cumsum(-1)  # [rows, k]
    chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=k - 1)
    return chosen if order is None else order.gather(1, chosen)


def step(model, batch):
    """Feeds the tokens just drawn through the model, for the logits of the next."""
    batch["attention"] = torch.cat([batch["attention"], torch.ones_like(batch["chosen"])], 1)  # [rows, time + 1]
    batch["logits"] = model(
        input_ids=batch["chosen"], attention_mask=batch["attention"], position_ids=batch["attention"].sum(1, True) - 1,
        past_key_values=batch["cache"], use_cache=True).logits[:, -1].float()  # [rows, vocab]


def keep(batch, rows):
    """The batch with these rows alone, and without the columns that are padding in all of them; None when empty."""
    if len(rows) == 0:
        return None
    kept = {name: value[rows] for name, value in batch.items() if name != "cache"}
    spare = (kept["attention"].cumsum(1) == 0).all(0).sum()  # columns of padding on the left
    kept["attention"] = kept["attention"][:, spare:]
    for layer in batch["cache"].layers:
        layer.keys, layer.values = layer.keys[rows, :, spare:], layer.values[rows, :, spare:]  # [rows, heads, time, width]
    return {**kept, "cache": batch["cache"]}


def join(old, new):
    """Both batches as one, the shorter padded on the left."""
    if old is None:
        return new
    longest = max(old["attention"].shape[1], new["attention"].shape[1])
    widen = lambda x, axis: torch.nn.functional.pad(x, (0, 0) * (-1 - axis) + (longest - x.shape[axis], 0))
    for mine, theirs in zip(old["cache"].layers, new["cache"].layers):
        mine.keys = torch.cat([widen(mine.keys, -2), widen(theirs.keys, -2)])
        mine.values = torch.cat([widen(mine.values, -2), widen(theirs.values, -2)])
    joined = {name: torch.cat([old[name], new[name]]) for name in new if name not in ("cache", "attention")}
    joined["attention"] = torch.cat([widen(old["attention"], -1), widen(new["attention"], -1)])
    return {**joined, "cache": old["cache"]}


@torch.no_grad()
def score(model, prompt, completions, share):
    """log mu of every completion token, by the function that the trainer uses, one question at a time.

    Its shape depends on the question alone, not on who shared the batch, and pi/mu of an untrained policy is 1.
    """
    mean = sum(map(len, completions)) / len(completions)
    fit = completions_per_row(len(prompt), mean, len(completions), model.config.get_text_config().hidden_size) if share else 1
    packed = pack([(prompt, completions[i : i + fit]) for i in range(0, len(completions), fit)], model.device)
    logprobs = completion_logprobs(model, **packed)[packed["mask"]].cpu()  # [tokens]
    return [tokens.tolist() for tokens in logprobs.split([len(tokens) for tokens in completions])]


def sample_rollouts(model, tokenizer, questions, grade, settings, out="", what="sampling", logprobs=True):
    """Rollout rows that the model writes for all questions, on every rank; also as the file `out` when it is named.

    A file that holds just these already is not written again, and one that holds others is never overwritten.
    With settings.server the model is there, and `model` is None.
    questions: dicts with "id", "prompt" and what grade(question, completion) -> (answer, reward) needs.
    """
    prompts = [prompt_tokens(question["prompt"], tokenizer) for question in questions]
    if settings.server:
        write, policy = server.writer(settings, questions, prompts, tokenizer, kept=bool(out)), {"server": settings.server}
    else:
        write = writer(model, tokenizer, questions, prompts, settings, with_logprobs=bool(out) and logprobs)
        policy = {"weights": fingerprint(model)}
    sampling = {**settings_of_sampling(settings), **policy}
    if out and from_first(os.path.exists(out)):
        return reused(out, questions, grade, sampling, settings.samples)
    longest_first = sorted(range(len(questions)), key=lambda q: -len(prompts[q]))
    return collect(write, questions, longest_first, grade, sampling, settings.samples, out, what)


def reused(out, questions, grade, sampling, samples):
    """The rows of a finished file, if they are those that would be written now."""
    rows, wanted = read_rollouts(out, zero_is_wrong=True), [question for question in questions for _ in range(samples)]
    same = len(rows) == len(wanted) and all(
        (row["id"], row["prompt"], row.get("sampling")) == (question["id"], question["prompt"], sampling)
        and grade(question, row["completion"]) == (row.get("answer"), row["reward"]) for row, question in zip(rows, wanted))
    if not same:
        raise Problem(f"{out} holds other rollouts than these settings ask for: use another --out, or remove it")
    say(f"{out}: the rollouts are there, reusing them")
    return rows


def writer(model, tokenizer, questions, prompts, settings, with_logprobs):
    """write(todo) for collect: (question number, its completions), each question as soon as it is finished."""
    ends = end_tokens(model, tokenizer)
    share = with_logprobs and can_share_prompts(model, max(map(len, prompts)) + settings.max_new_tokens)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for question, prompt in zip(questions, prompts):
        if len(prompt) + settings.max_new_tokens > room:
            raise Problem(f"question {question['id']!r}: {len(prompt)} prompt tokens and {settings.max_new_tokens} new ones do "
                          f"not fit the model's {room}: lower --max-new-tokens or leave the question out")

    def write(todo):
        uniforms = lambda t: torch.rand(settings.samples, settings.max_new_tokens, generator=torch.Generator().manual_seed(
            short_hash(f"{settings.seed}\0{questions[todo[t]]['id']}\0{questions[todo[t]]['prompt']}")))
        for t, completions in generate(model, [prompts[q] for q in todo], uniforms, ends, settings):
            logprobs = score(model, prompts[todo[t]], completions, share) if with_logprobs else [None] * settings.samples
            yield todo[t], [{
                "completion": tokenizer.decode(tokens[:-1] if tokens[-1] in ends else tokens, skip_special_tokens=True),
                "finish": "stop" if tokens[-1] in ends else "length", "prompt_ids": prompts[todo[t]], "completion_ids": tokens,
                **({"logprobs": log_mu} if with_logprobs else {})} for tokens, log_mu in zip(completions, logprobs)]

    return write


def settings_of_sampling(settings):
    return {name: getattr(settings, name) for name in ("model", "temperature", "top_k", "top_p", "max_new_tokens", "seed")}


def collect(write, questions, order, grade, sampling, samples, out, what):
    """Shares the questions out over the ranks, grades what write(todo) yields, joins it in the order of the questions.

    Each finished question is kept at once in OUT.part-*, so that a run that was broken off goes on from there.
    """
    wanted = [sampling, samples, [[question["id"], question["prompt"]] for question in questions]]
    parts = f"{out}.part-{short_hash(json.dumps(wanted)) % 16**8:08x}-"
    here = read_parts(parts) if out and os.environ.get("LOCAL_RANK", "0") == "0" else {}  # once on every machine
    rows = {q: kept for part in gather(here) for q, kept in part.items()}  # question number -> rows
    if rows:
        say(f"{out}: {len(rows)} of {len(questions)} questions were finished before, going on with the rest")
    todo = [q for q in order if q not in rows][rank()::world()]
    if out:
        with writing(out):
            os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
            file = open(f"{parts}{rank()}-{time.time_ns()}", "w", encoding="utf-8")
    with progress(total=len(todo), what=what, unit="question") as bar:
        for q, completions in write(todo):
            question, rows[q] = questions[q], []
            for completion in completions:
                answer, reward = grade(question, completion["completion"])
                rows[q].append({"id": question["id"], "question": question.get("question"), "prompt": question["prompt"],
                                "completion": completion["completion"], "reward": reward, "answer": answer,
                                "gold": question.get("gold"), **completion, "sampling": sampling})
            if out:
                with writing(file.name):
                    file.write(json.dumps([q, rows[q]]) + "\n")
                    file.flush()
            bar.update()
    for part in gather({q: rows[q] for q in todo}):
        rows.update(part)
    rows = [row for q in range(len(questions)) for row in rows[q]]
    if out:
        file.close()
        if rank() == 0:
            with whole_file(out) as whole:
                whole.writelines(map(to_line, rows))
        barrier()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            for part in glob.glob(glob.escape(parts) + "*"):
                with contextlib.suppress(FileNotFoundError):  # of machines that share a disk one is first
                    os.remove(part)
        barrier()
    return rows


def read_parts(parts):
    """What an earlier, broken-off run with the same settings finished: question number -> rows."""
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
    """16 letters that change with the weights: names, shapes and up to 4,096 values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 4096)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
