"""What only a GPU can show, in one command of less than nine minutes: does it run, how fast, how
much memory. Prints a table, and writes it with all numbers to runs/gpu.json.

    python tools/gpu.py                on a machine with a GPU; elsewhere it says so and ends
    python tools/gpu.py --tiny         the same parts at tiny size, on any machine
    python tools/gpu.py step-8b        one part: prints its numbers
    python tools/gpu.py count          bytes of weights, gradients and optimizer state, anywhere

The models are Llamas of a named shape with random weights, made on the card. Each part is a process
of its own with a time limit (not at tiny size), so that one that fails leaves the others alone.
"""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from data import apples  # noqa: E402
from engine import optim, packing, run_folder, sampler  # noqa: E402
from engine.common import progress, say, table, write_json  # noqa: E402
from engine.parallel import local_shard, start_ranks  # noqa: E402
from engine.rollouts import write_rollouts  # noqa: E402

LLAMA_3 = dict(
    vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192
)
SHAPES = {
    "8b": dict(
        LLAMA_3,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        tie_word_embeddings=False,
    ),
    "1b": dict(
        LLAMA_3,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "tiny": dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    ),
}
PEAKS = {"H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40": 181, "4090": 165}
TINY = "--tiny" in sys.argv  # peaks above: dense bfloat16, in 10**12 operations a second
GIB = 2**30


# ---- models and rollouts ----


def make_model(shape, weights, device):
    config = LlamaConfig(**SHAPES["tiny" if TINY else shape])
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, weights)).eval()


def make_rollouts(path, steps, prompt, completion, per_prompt):
    """Random tokens: 64 completions a step, of exactly these lengths. Returns tokens a step."""
    chosen = random.Random(0)
    prompt, completion, sequences = (16, 16, 8) if TINY else (prompt, completion, 64)
    rows, vocabulary = [], SHAPES["tiny"]["vocab_size"]
    for question in range(sequences * steps // per_prompt):
        prompt_ids = chosen.choices(range(vocabulary), k=prompt)
        for _ in range(per_prompt):
            ids = chosen.choices(range(vocabulary), k=completion)
            rows.append(
                {
                    "id": str(question),
                    "prompt": "",
                    "completion": "",
                    "reward": 1.0 if len(rows) % 2 else -1.0,
                    "prompt_ids": prompt_ids,
                    "completion_ids": ids,
                    "logprobs": [-math.log(vocabulary)] * completion,
                }
            )
    write_rollouts(path, rows)
    return sequences * (prompt + completion)


def train_random(model, folder, steps, prompt, completion, per_prompt=1, pack=False, **changes):
    """Runs train.train on a model in memory. Returns (log, tokens a step, peaks in bytes)."""
    tokenizer = apples.make_tokenizer(apples.vocabulary())  # any will do: the file holds tokens
    tokens = make_rollouts(f"{folder}/rollouts.jsonl", steps, prompt, completion, per_prompt)
    settings = train.Settings(
        model="random",
        rollouts=f"{folder}/rollouts.jsonl",
        out=f"{folder}/trained",
        mu="file",
        sequences=8 if TINY else 64,
        precision="bfloat16",
        checkpoint_every=0,
        **changes,
    )
    peaks = {}
    train.load_for_training = lambda *_: (model, tokenizer)
    packing.abilities = lambda *_: (True, pack)
    train.run_folder.save_policy = lambda *_: None  # nobody needs these weights
    train.backward = with_peak(train.backward, "passes", peaks)
    optim.update = with_peak(optim.update, "update", peaks)
    return train.train(settings), tokens, peaks


def with_peak(function, name, peaks):
    """The function, which notes the most memory that was allocated on the card while it ran."""
    if not torch.cuda.is_available():
        return function

    def measured(*arguments):
        torch.cuda.reset_peak_memory_stats()
        result = function(*arguments)
        peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated())
        return result

    return measured


def count_memory(model, optimizer):
    """Bytes on this rank that are exact before the first step; activations come on top."""
    size = {"weights": 0, "gradients": 0, "optimizer": 0}
    for p in model.parameters():
        size["weights"] += local_shard(p).nbytes
        size["gradients"] += local_shard(p).nbytes * p.requires_grad
        for value in optimizer.state[p].values() if p.requires_grad else ():
            is_tensor = torch.is_tensor(value) and value.ndim
            size["optimizer"] += local_shard(value).nbytes if is_tensor else 0
    return size


def seconds_of(function, *arguments):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- the parts: each takes a folder and returns its numbers ----


def suite(folder):
    """The whole test suite, with the models on the card."""
    tests = [ROOT / "tests/test_topr.py"] if TINY else [ROOT / "tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    failed = re.findall(r"^FAILED (\S+)", result.stdout, re.M)
    counts = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", result.stdout[-500:])
    }
    return {**counts, "which": failed[:20], "ok": result.returncode == 0}


def run_script(*words, out):
    command = [sys.executable, ROOT / "train.py", *map(str, words), "--out", out]
    process = subprocess.run(command, cwd=Path(out).parent, text=True, capture_output=True)
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    return process.stdout


def apples_model(folder):
    """A directory with a small random model of the embedded task."""
    tokenizer = apples.make_tokenizer(apples.vocabulary())
    tokenizer.save_pretrained(f"{folder}/model")
    apples.make_model(tokenizer, seed=0, width=32, layers=2).save_pretrained(f"{folder}/model")
    return f"{folder}/model"


def job_numbers(folder, *words):
    start = time.time()
    run_script(*words, out=f"{folder}/out")
    results = json.loads(Path(folder, "out/results.json").read_text())
    return {
        "seconds": time.time() - start,
        "pass@1 before": results["before"]["pass@1"]["mean"],
        "pass@1 after": results["after"]["pass@1"]["mean"],
    }


def embedded(folder):
    """The embedded job: python train.py. At tiny size without its base policy."""
    if not TINY:
        return job_numbers(folder)
    return job_numbers(
        folder,
        "--model",
        apples_model(folder),
        "--task",
        "apples",
        "--samples",
        2,
        "--questions",
        4,
        "--test-questions",
        4,
        "--max-new-tokens",
        8,
    )


def resume(folder):
    """Trained whole, and killed after a checkpoint and continued: the same weights?"""
    model, found = apples_model(folder), {}
    write_rollouts(f"{folder}/rollouts.jsonl", apples.demonstrations(320, 0))
    for optimizer in ("adamw",) if TINY else ("adamw", "adafactor"):
        words = [
            "--model",
            model,
            "--rollouts",
            f"{folder}/rollouts.jsonl",
            "--loss",
            "reinforce",
            "--optimizer",
            optimizer,
            "--sequences",
            8,
            "--checkpoint-every",
            4,
        ]
        run_script(*words, out=f"{folder}/{optimizer}")
        broken = Path(folder, f"{optimizer}-broken")
        command = [sys.executable, ROOT / "train.py", *words, "--out", broken]
        with open(os.devnull, "w") as quiet:
            process = subprocess.Popen(list(map(str, command)), stdout=quiet, stderr=quiet)
        while process.poll() is None and not list(broken.glob("checkpoint-*0*[0-9]")):
            time.sleep(0.01)
        process.kill()
        process.wait()
        went_on = "going on from step" in run_script(*words, out=str(broken))
        whole = Path(folder, optimizer, "model.safetensors").read_bytes()
        same = (broken / "model.safetensors").read_bytes() == whole
        found[optimizer] = {"resumed": went_on, "same bytes": same}
    return {**found, "ok": all(value["same bytes"] for value in found.values())}


def smollm(folder):
    """SmolLM2 from the hub, or its cache: sample, train, measure."""
    return job_numbers(
        folder,
        "--model",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "--task",
        "apples",
        "--questions",
        32,
        "--test-questions",
        32,
        "--samples",
        8,
        "--max-new-tokens",
        128,
        "--weights",
        "bfloat16",
        "--precision",
        "bfloat16",
    )


def step_8b(folder):
    """A training step of 8B, bfloat16 weights, Adafactor, prompts of 256, completions of 512."""
    return step_numbers("8b", "bfloat16", folder, optimizer="adafactor")


def step_1b(folder):
    """The same for 1B, float32 weights, AdamW."""
    return step_numbers("1b", "float32", folder, optimizer="adamw")


def step_numbers(shape, weights, folder, **changes):
    """The first step is left out of the speed."""
    device = start_ranks()
    model = make_model(shape, weights, device)
    counted = count_memory(model, optim.make_optimizer(train.Settings(**changes), model))
    log, tokens, peaks = train_random(
        model, folder, 5, 256, 512, gradient_checkpointing=True, weights=weights, **changes
    )
    seconds = sorted(entry["seconds"] for entry in log[1:])[len(log) // 2]
    operations = 6 * model.num_parameters() * tokens  # what is computed again does not count
    peak = next((peak for card, peak in PEAKS.items() if card in card_name()), None)
    numbers = {"seconds a step": seconds, "tokens a second": tokens / seconds}
    if peak:
        numbers["share of peak"] = operations / seconds / peak / 1e12
    numbers |= {f"GiB {name}, counted": size / GIB for name, size in counted.items()}
    numbers |= {f"GiB peak in {name}": size / GIB for name, size in peaks.items()}
    return numbers


def packed(folder):
    """A step of 1B at prompts of 512 with 8 completions of 96: prompts read once, and each time."""
    device, numbers = start_ranks(), {}
    for name, pack in (("packed", True), ("unpacked", False)):
        model = make_model("1b", "bfloat16", device)
        log, _, _ = train_random(
            model,
            tempfile.mkdtemp(dir=folder),
            4,
            512,
            96,
            per_prompt=8,
            pack=pack,
            weights="bfloat16",
        )
        numbers[name] = min(entry["seconds"] for entry in log[1:])
    return {**numbers, "ratio": numbers["unpacked"] / numbers["packed"]}


def sampling(folder):
    """64 prompts x 16 completions of 1B, 128 tokens at most: our sampler and generate."""
    device = start_ranks()
    model = make_model("1b", "bfloat16", device)
    questions, samples, longest = (4, 2, 8) if TINY else (64, 16, 128)
    vocabulary, width = model.config.vocab_size, model.config.hidden_size
    head = torch.nn.Linear(width, vocabulary, device=device, dtype=torch.bfloat16)
    head.weight.data = model.get_output_embeddings().weight.data
    head.bias.data.zero_()
    head.bias.data[0] = math.log(vocabulary / 32)  # lengths are geometric, about 32 tokens
    model.lm_head = head
    chosen = random.Random(0)
    prompts = [
        chosen.choices(range(1, vocabulary), k=chosen.randint(8, 128)) for _ in range(questions)
    ]
    settings = sampler.Sampling(samples=samples, max_new_tokens=longest, batch_size=256)
    asked = [
        {"id": str(number), "prompt_ids": prompt, "stop": [], "key": number}
        for number, prompt in enumerate(prompts)
    ]
    longest_first = sorted(range(questions), key=lambda number: -len(prompts[number]))
    tokenizer = types.SimpleNamespace(eos_token_id=0)

    def ours():
        with progress(total=questions * samples) as bar:
            done = list(sampler.generate(model, tokenizer, asked, longest_first, settings, bar))
        assert sum(len(completions) for _, completions in done) == questions * samples

    @torch.no_grad()
    def theirs():
        for start in range(0, questions, 256 // samples):
            part = prompts[start : start + 256 // samples]
            most = max(map(len, part))
            ids = torch.tensor([[0] * (most - len(p)) + p for p in part], device=device)
            real = torch.tensor([[0] * (most - len(p)) + [1] * len(p) for p in part], device=device)
            model.generate(
                ids,
                attention_mask=real,
                do_sample=True,
                top_k=0,
                eos_token_id=0,
                max_new_tokens=longest,
                num_return_sequences=samples,
                pad_token_id=0,
            )

    ours()
    theirs()  # the first turns compile kernels
    numbers = {"ours": seconds_of(ours), "generate": seconds_of(theirs)}
    return {**numbers, "ratio": numbers["generate"] / numbers["ours"]}


def checkpoint(folder):
    """Seconds of writing and reading a checkpoint of 1B with AdamW."""
    model = make_model("1b", "float32", start_ranks())
    settings = train.Settings(out=folder, optimizer="adamw")
    optimizer = optim.make_optimizer(settings, model)
    optimizer.step()
    written = seconds_of(run_folder.save_checkpoint, settings, model, optimizer, 1)
    Path(folder, "log.jsonl").touch()
    read = seconds_of(run_folder.resume, settings, model, optimizer, {})
    size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    return {"seconds to write": written, "seconds to read": read, "GiB": size / GIB}


PARTS = {
    "step-8b": (step_8b, 120),
    "step-1b": (step_1b, 60),
    "packed": (packed, 60),
    "sampling": (sampling, 90),
    "checkpoint": (checkpoint, 60),
    "resume": (resume, 100),
    "embedded": (embedded, 120),
    "smollm": (smollm, 60),
    "suite": (suite, 300),
}
if TINY:
    del PARTS["smollm"]  # needs the hub


# ---- all parts ----


def count():
    """The table of docs/performance.md: counted from shapes on no device, not measured."""
    columns = {
        "8b, bfloat16, adafactor": ("8b", "bfloat16", "adafactor"),
        "1b, float32, adafactor": ("1b", "float32", "adafactor"),
        "1b, float32, adamw": ("1b", "float32", "adamw"),
    }
    sizes = []
    for shape, weights, optimizer in columns.values():
        model = make_model(shape, weights, "meta")
        settings = train.Settings(optimizer=optimizer)
        sizes.append(count_memory(model, optim.make_optimizer(settings, model)))
    rows = [(name, *(f"{size[name] / GIB:.2f}" for size in sizes)) for name in sizes[0]]
    rows.append(("together", *(f"{sum(size.values()) / GIB:.2f}" for size in sizes)))
    return table(("GiB, counted", *columns), rows)


def card_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def run_part(name, seconds):
    """Its numbers, from a process of its own; or what went wrong."""
    if TINY:  # starting a process would take longer than the part
        with tempfile.TemporaryDirectory() as folder:
            return PARTS[name][0](folder)
    command = [sys.executable, __file__, name]
    process = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=max(1, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what the part has started
        process.wait()
        return {"failed": f"not done after {seconds:.0f} s"}
    if process.returncode:
        return {"failed": (errors.strip().splitlines() or ["?"])[-1]}
    return json.loads(output.splitlines()[-1])


def run_all(seconds=530):
    start, found, rows = time.time(), {}, []
    for name, (part, limit) in PARTS.items():
        began = time.time()
        found[name] = run_part(name, min(limit, start + seconds - began))
        found[name]["part's seconds"] = time.time() - began
        say(f"{name}: {found[name]}")
        rows += [(name, what, value) for what, value in found[name].items()]
    facts = {"card": card_name(), "torch": torch.__version__, "tiny": TINY}
    path = ROOT / "runs" / ("gpu-tiny.json" if TINY else "gpu.json")
    write_json(path, {**facts, "parts": found})
    say("\n" + table(("part", f"on {card_name()}", "value"), rows))
    say(f"{time.time() - start:.0f} s; the numbers are in {path}")
    wrong = [
        name
        for name, numbers in found.items()
        if numbers.get("failed") or numbers.get("ok") is False
    ]
    return 1 if wrong else 0


def main():
    words = [word for word in sys.argv[1:] if word != "--tiny"]
    if words == ["count"]:
        return say(count())
    if not TINY and not torch.cuda.is_available():
        return say("no GPU on this machine: nothing was measured")
    if not words:
        sys.exit(run_all())
    with tempfile.TemporaryDirectory() as folder:
        say(json.dumps(PARTS[words[0]][0](folder)))


if __name__ == "__main__":
    main()
