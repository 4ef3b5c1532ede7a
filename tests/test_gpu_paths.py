"""What only shows on GPUs or at size, checked on a CPU: devices, copies, memory, traffic."""

import json

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

import train
from conftest import ROOT, in_process, torchrun
from engine import optim, run_folder
from engine.packing import LogProbs, pack

RANKS = """
import gc, json, sys, time
import numpy as np, torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import checkpoint as dcp
from transformers import LlamaConfig, LlamaForCausalLM
import topr, train
from engine import batches, optim, packing, parallel, run_folder

folder, found = sys.argv[1], {}
device, rank = parallel.start_ranks(), parallel.rank()


def llama(width, layers, vocabulary):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=3 * width, tie_word_embeddings=False)).eval()


def resident():
    lines = open("/proc/self/status").readlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


# ---- gradients under DDP: four micro-batches, three steps ----

settings = train.Settings(optimizer="adamw", learning_rate=1e-5)


def steps(model, policy, count, seen):
    optimizer = optim.make_optimizer(settings, model)
    ids = torch.arange(2, 14).reshape(1, 12)  # [batch, time]
    packed = {"ids": ids, "mask": ids > 9}
    completion = torch.ones(1, 4, dtype=torch.bool)  # [batch, time of the completion]
    for step in range(count):
        for passes in range(1, 5):  # so that the memory is seen between the passes
            policy.require_backward_grad_sync = passes == 4
            logp = policy(packed, completion)  # [batch, time]
            topr.ppo_loss(logp, logp.detach(), torch.ones(1), completion)[0].backward()
            seen.append(resident())
        optim.update(settings, optimizer, step, count)
        seen.append(resident())
        optimizer.zero_grad(set_to_none=False)
    return optimizer


def replicated(model):
    return parallel.replicate(packing.LogProbs(model), batches.empty_batch(device))


small = llama(16, 1, 32)
steps(small, replicated(small), 2, [])
base, seen = resident(), []
model = llama(1024, 3, 4096)  # 188 MiB
weights = sum(p.nbytes for p in model.parameters())
optimizer = steps(model, replicated(model), 3, seen)
found["weights"], found["memory"] = weights, (max(seen) - base) / (4 * weights)
del model, optimizer
gc.collect()


# ---- shards: who loads, what a pass keeps, what a resume reads ----

loads = []


def load():
    loads.append(rank)
    return llama(64, 4, 128)


model = parallel.load_on_first_rank(load)
found["loads"], found["start"] = len(loads), next(model.parameters()).device.type
policy = packing.LogProbs(model, "bfloat16")
parallel.shard(policy, device)
ids = torch.arange(2, 14).reshape(1, 12)  # [batch, time]
saved = []


def keep(tensor):
    saved.append(tensor.detach())
    return tensor


with saved_tensors_hooks(keep, lambda tensor: tensor):
    loss = policy({"ids": ids, "mask": ids > 7}, torch.ones(1, 6, dtype=torch.bool)).sum()
copies = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
          for tensor in saved if tensor.dtype == torch.bfloat16}
smallest = 64 * 64 * 2  # bytes of the smallest matrix; activations of 12 tokens are smaller
found["copies"] = sum(size for size in copies.values() if size >= smallest)
loss.backward()
settings = train.Settings(model="none", out=folder, shard=True, optimizer="adamw")
optimizer = optim.make_optimizer(settings, model)
optim.update(settings, optimizer, 0, 1)
run_folder.save_checkpoint(settings, model, optimizer, 1)
tensors = run_folder.run_tensors(model, optimizer)
found["whole"] = sum(tensor.numel() for tensor in tensors.values())
found["local"] = sum(parallel.local_shard(tensor).numel() for tensor in tensors.values())
own, read = dcp.HuggingFaceStorageReader._process_read_request, []


def count(reader, file, request, planner):
    read.append(int(np.prod(request.lengths)))
    return own(reader, file, request, planner)


dcp.HuggingFaceStorageReader._process_read_request = count
open(folder + "/log.jsonl", "a").close()
run_folder.resume(settings, model, optimizer, {})
found["read"] = sum(read)


# ---- log mu of many rows ----

start = time.time()
scores = parallel.gather({row: np.ones(20, np.float32) for row in range(rank, 240_000, 2)})
found["rows"], found["seconds"] = sum(map(len, scores)), time.time() - start
json.dump(found, open(f"{folder}/found-{rank}.json", "w"))
parallel.barrier()
parallel.leave_ranks()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks measured: one start for all, for it takes longer than the checks."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(RANKS)
    result = torchrun(2, folder / "script.py", folder)
    assert result.returncode == 0, result.stdout
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_ranks_hold_and_read_no_more_than_they_need(found):
    """With several micro-batches the passes without an exchange allocated more gradients; under
    autocast each rank kept a bfloat16 copy of every layer until its backward pass; eight
    ranks loaded eight whole models, and as many whole checkpoints; and a tensor a row, through
    pickle, took 28 s for log mu of 240,000 rows."""
    for rank, of_rank in enumerate(found):
        assert of_rank["weights"] > 160 * 2**20
        assert of_rank["memory"] < 1.1  # of weights, gradients and AdamW's two moments
        assert of_rank["copies"] == 0
        assert (of_rank["loads"], of_rank["start"]) == ((1, "cpu"), (0, "meta"))[rank]
        assert of_rank["read"] == of_rank["local"] < 0.6 * of_rank["whole"]
        assert of_rank["rows"] == 240_000 and of_rank["seconds"] < 15


# ---- AdamW on a card ----


def llama(**sizes):
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_hidden_layers": 4,
                **sizes,
            }
        )
    ).eval()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_every_optimizer_state_is_on_its_parameters_device(optimizer, tmp_path, monkeypatch):
    """The fused AdamW needs its zero-dimensional step on the card; a resume left it on the CPU."""
    with torch.device("meta"):  # any device that is not the CPU
        model = llama()
    settings = train.Settings(out=str(tmp_path), optimizer=optimizer)
    steps = optim.make_optimizer(settings, model)

    def devices():
        return {
            value.device.type
            for state in steps.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        }

    assert devices() == {"meta"} and len(steps.state) == len(list(model.parameters()))
    (tmp_path / "checkpoint-00000003").mkdir()
    (tmp_path / "log.jsonl").write_text("")
    monkeypatch.setattr("torch.distributed.checkpoint.load", lambda *_, **__: None)
    assert run_folder.resume(settings, model, steps, {}) == ([], 3)
    assert devices() == {"meta"}


# ---- packed rows ----


def masks_kept(weights, precision):
    """How many different tensors as large as the attention mask autograd keeps."""
    torch.manual_seed(0)
    model, kept = llama().to(getattr(torch, weights)), set()
    packed, mask = pack([(range(1, 60), [range(1, 50)] * 4)], "cpu")
    time = packed["ids"].shape[1]

    def keep(tensor):
        if tensor.shape[-2:] == (time, time):
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        LogProbs(model, precision)(packed, mask).sum().backward()
    return len(kept)


@pytest.mark.parametrize(
    "weights, precision",
    [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_a_packed_row_keeps_one_mask(weights, precision):
    """A boolean mask was converted, and kept, in every layer: 0.5 GB each at 16,000 tokens."""
    assert masks_kept(weights, precision) == 1


# ---- out of memory ----


@pytest.mark.parametrize(
    "error, ranks",
    [
        ("torch.empty(2**52)", 0),
        ("raise_(torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB'))", 0),
        pytest.param("torch.empty(2**52)", 2, marks=pytest.mark.slow),
    ],
)
def test_out_of_memory_is_one_line(error, ranks, tmp_path):
    """It was a traceback of two screens."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom engine.common import run_main\n"
        "from engine.parallel import start_ranks\n"
        "def raise_(error):\n    raise error\n"
        f"def main():\n    start_ranks()\n    {error}\nrun_main(main)\n"
    )
    result = torchrun(ranks, script) if ranks else in_process(script)
    line, *others = [line for line in result.stdout.splitlines() if line.startswith("script.py")]
    assert result.returncode and "out of memory" in line and "--gradient-checkpointing" in line
    assert str(ROOT) not in result.stdout
    assert ranks or not others
