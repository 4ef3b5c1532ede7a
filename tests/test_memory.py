"""Memory: what is said before a run, earlier models, and the script that measures a GPU."""

import re
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import train
from conftest import ROOT, shell
from engine import optim
from tools import gpu


@pytest.mark.parametrize(
    "weights, optimizer",
    [("float32", "adafactor"), ("float32", "adamw"), ("bfloat16", "adafactor")],
)
def test_the_count_is_what_is_held(weights, optimizer):
    """Weights, gradients and optimizer state, to the byte, after a real step."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
        )
    ).to(getattr(torch, weights))
    settings = train.Settings(optimizer=optimizer)
    steps = optim.make_optimizer(settings, model)
    counted = gpu.count_memory(model, steps)
    model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optim.update(settings, steps, 0, 1)
    states = [value for state in steps.state.values() for value in state.values()]
    assert counted["weights"] == sum(p.nbytes for p in model.parameters())
    assert counted["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert counted["optimizer"] == sum(
        v.nbytes for v in states if torch.is_tensor(v) and v.ndim
    )  # no numbers


ROUNDS = """
import sys, torch, train
from data import apples, load_task
from transformers import LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
tokenizer = apples.make_tokenizer(apples.vocabulary())
tokenizer.save_pretrained(folder + "/model")
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=640, intermediate_size=1760,
                     num_hidden_layers=12, num_attention_heads=10, max_position_embeddings=256,
                     eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
LlamaForCausalLM(config).save_pretrained(folder + "/model")
own = train.train


def watched(*arguments):
    lines = open("/proc/self/status").readlines()
    print("resident", next(line for line in lines if line.startswith("VmRSS")).split()[1])
    return own(*arguments)


train.train = watched
settings = train.Settings(
    model=folder + "/model", out=folder + "/out", task="apples", rounds=3, questions=4,
    test_questions=4, samples=2, max_new_tokens=4, sequences=8, tokens_per_pass=512, eval_every=1,
    checkpoint_every=0)
train.job(settings, load_task("apples"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_further_rounds_start_with_the_memory_of_the_first(tmp_path):
    """Nothing collected: a job of two rounds held four earlier models when the last was loaded.

    What the first training leaves, 10 to 22 MiB, are libraries at work; a model here has 240. The
    C library keeps freed blocks of less than 32 MiB, unless told not to.
    """
    (tmp_path / "script.py").write_text(ROUNDS)
    result = shell(
        sys.executable, tmp_path / "script.py", tmp_path, MALLOC_MMAP_THRESHOLD_="100000"
    )
    assert result.returncode == 0, result.stdout
    first, second, third = map(int, re.findall(r"resident (\d+)", result.stdout))
    print(f"resident before each training, in KiB: {first:,}, {second:,}, {third:,}")
    assert second < first + 32 * 1024 and third < 1.02 * second


def test_the_table_of_the_documents():
    """The table in the documents was predicted by a formula that no longer exists."""
    text = (ROOT / "docs/performance.md").read_text()
    written = [line.strip() for line in text.splitlines()]
    for line in gpu.count().strip().splitlines():
        assert line.strip() in written, line


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure this GPU")
def test_the_gpu_script_without_a_gpu_says_so():
    result = shell(sys.executable, ROOT / "tools/gpu.py")
    assert result.returncode == 0 and result.stdout == (
        "no GPU on this machine: nothing was measured\n"
    )


@pytest.mark.slow
def test_the_gpu_script_runs_at_tiny_size():
    """Its parts had never run anywhere: a GPU is lent for minutes, too few to correct names."""
    result = subprocess.run(
        [sys.executable, ROOT / "tools/gpu.py", "--tiny"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for part in ("step-8b", "packed", "sampling", "checkpoint", "resume", "embedded", "suite"):
        assert re.search(rf"^{part} .*part's seconds", result.stdout, re.M), result.stdout
