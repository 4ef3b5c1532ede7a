"""Measures train.py's own steps on a GPU: peak memory beside optim.memory's count, tokens a second, share of the card's
bfloat16 peak. The model has the named shape and random weights, made on the card; nothing is downloaded.

    python tests/gpu.py --shape 8b                         Llama 3 8B, bfloat16 weights, Adafactor, the paper's step
    python tests/gpu.py --shape 1b --optimizer adamw       Llama 3.2 1B, float32 weights
    torchrun --nproc-per-node 2 tests/gpu.py --shape 8b    the same under DDP, or with --shard
    python tests/gpu.py --table                            only the counts, anywhere (docs/performance.md has them)
"""

import dataclasses
import math
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from data import apples
from data.rollouts import write_rollouts
from engine import optim, run_folder, sampler
from engine.common import parse, run_main, say, setting, table
from engine.parallel import barrier, gather, rank, start_ranks, world

SHAPES = {
    "8b": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False),
    "1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=True),
    "tiny": dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False),
}
PEAKS = {"H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40": 181, "4090": 165}  # dense bfloat16, in 10**12 a second


@dataclasses.dataclass
class Settings:
    shape: str = setting("8b", "the model's", tuple(SHAPES))
    optimizer: str = setting("adafactor", "update rule", ("adafactor", "adamw"))
    weights: str = setting("", "their type (default: bfloat16 for 8b, else float32)", ("", "float32", "bfloat16"))
    gradient_checkpointing: bool = setting(True, "as in train.py")
    tokens_per_pass: int = setting(16384, "as in train.py")
    sequences: int = setting(64, "as in train.py")
    shard: bool = setting(False, "as in train.py")
    longest: int = setting(512, "tokens of the longest sequence, a quarter of them the prompt's")
    steps: int = setting(6, "to train; the first is left out of the speed")
    table: bool = setting(False, "count only")


def wish_of(settings, out):
    weights = settings.weights or ("bfloat16" if settings.shape == "8b" else "float32")
    names = ("optimizer", "gradient_checkpointing", "tokens_per_pass", "sequences", "shard")
    return train.Settings(model=settings.shape, rollouts=f"{out}/rollouts.jsonl", out=f"{out}/trained", weights=weights, mu="file",
                          precision="bfloat16", checkpoint_every=0, **{name: getattr(settings, name) for name in names})


def make_model(shape, weights, device):
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=getattr(torch, weights)).eval()


def make_rollouts(settings):
    """Random tokens: a quarter is the prompt, the completion ends anywhere in the rest."""
    random, vocab = torch.Generator().manual_seed(0), SHAPES[settings.shape]["vocab_size"]
    prompt = settings.longest // 4
    for number in range(settings.sequences * settings.steps):
        length = int(torch.randint(1, settings.longest - prompt + 1, (), generator=random))
        ids = torch.randint(vocab, (prompt + length,), generator=random).tolist()
        yield {"id": str(number), "prompt": "", "completion": "", "reward": 1.0 if number % 2 else -1.0, "prompt_ids": ids[:prompt],
               "completion_ids": ids[prompt:], "logprobs": [-math.log(vocab)] * length}


def needed(log, model, settings):
    """Arithmetic of the steps after the first: 6 a weight and token, and causal attention; nothing for what is computed again."""
    config, lengths = model.config, [len(row["prompt_ids"] + row["completion_ids"]) for row in make_rollouts(settings)]
    head = config.vocab_size * config.hidden_size
    inside = model.num_parameters() - head * (1 if config.tie_word_embeddings else 2)
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    one = lambda n: 6 * (inside * n + head * (n - settings.longest // 4)) + 6 * width * n * n
    return sum(map(one, lengths)) * sum(entry["sequences"] for entry in log[1:]) / len(lengths)


def count(settings, shape, **changes):
    settings = dataclasses.replace(settings, shape=shape, **changes)
    wish = wish_of(settings, "")
    parts = optim.memory(wish, make_model(shape, wish.weights, "meta"), wish.tokens_per_pass, world())
    return {name: f"{size / 2**30:.1f}" for name, size in parts.items()}


def main():
    settings, device = parse(Settings, description=__doc__), start_ranks()
    if settings.table:
        rows = {"8b, bfloat16, adafactor": count(settings, "8b"), "1b, float32, adafactor": count(settings, "1b"),
                "1b, float32, adamw": count(settings, "1b", optimizer="adamw")}
        return say(table(("GiB", *rows), list(zip(rows["1b, float32, adamw"], *(row.values() for row in rows.values())))))
    folder = gather(tempfile.mkdtemp() if rank() == 0 else "")[0]
    wish = wish_of(settings, folder)
    if rank() == 0:
        write_rollouts(wish.rollouts, make_rollouts(settings))
    barrier()
    model = make_model(settings.shape, wish.weights, device)
    tokenizer = apples.make_tokenizer(apples.vocabulary())  # any will do: the file holds tokens
    sampler.load_model = lambda *_: (model, tokenizer)
    run_folder.finish = lambda *_: None  # nobody wants these weights
    log = train.train(wish)
    barrier()  # no rank takes the folder away from another
    shutil.rmtree(folder, ignore_errors=True)
    parts = optim.memory(wish, model, min(wish.tokens_per_pass, settings.longest * wish.sequences // world()), world())
    seconds, name = sum(entry["seconds"] for entry in log[1:]), torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    say(table((f"{settings.shape} on {world()} x {name}", "GiB"), [(part, size / 2**30) for part, size in parts.items()]))
    say(f"peak memory measured: {max(gather(log[-1]['peak_memory_gib'])):.2f} GiB")
    tokens = sum(entry["tokens_per_second"] * entry["seconds"] for entry in log[1:])
    say(f"{tokens / seconds:,.0f} tokens a second, {seconds / len(log[1:]):.2f} s a step of {wish.sequences} sequences")
    peak = next((peak for card, peak in PEAKS.items() if card in name), None)
    if peak:
        say(f"{needed(log, model, settings) / seconds / world() / peak / 1e12:.1%} of the card's {peak} TFLOP/s in bfloat16")


if __name__ == "__main__":
    run_main(main)
