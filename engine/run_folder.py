"""The folder of a run: one run at a time, continued where it broke off.

run.json         settings, and fingerprints of the starting weights and of the rollout file
log.jsonl        one line a step
checkpoint-N/    weights and optimizer after N steps; the newest alone, gone at the end
"""

import contextlib
import dataclasses
import glob
import json
import os
import shutil
import signal
import sys
import warnings

import torch

from engine import lora
from engine.common import (
    Problem,
    check_same,
    first_line,
    lock,
    read_json,
    read_json_lines,
    say,
    whole_file,
    write_json,
    writing,
)
from engine.parallel import barrier, from_first, rank, whole_weights
from engine.rollouts import file_fingerprint

HALF = "checkpoint.part"  # while it is written
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may save alone


# ---- one run at a time ----


def prepare_folder(settings):
    """Makes the folder of a job: what is wrong with it is found out before hours of work."""
    out = settings.out
    if os.path.realpath(out) == os.path.realpath(settings.model):
        raise Problem(f"--out {out} is the starting model, and would be overwritten")
    lock(f"{out}/.lock").release()  # may files be written to it, and is no other run at work?
    check_same_run(settings, {"rounds": settings.rounds})


def lock_folder(settings):
    """Makes the folder; the lock that is returned holds until its release or the process's end."""
    held = lock(f"{settings.out}/.lock")
    barrier()
    if not os.path.exists(held.lock_file):
        raise Problem(f"{settings.out} is not visible on every machine: --out needs a common disk")
    return held


@contextlib.contextmanager
def catch_signals():
    """`with catch_signals() as signals:` SIGTERM and Ctrl-C are appended to a list, so that the
    loop can save its state first."""
    signals = []

    def note(number, _):
        signals.append(number)
        print("stopping at the end of this step", file=sys.stderr)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---- one command a folder ----


def describe_run(settings, **weights):
    """What makes a run this one: its settings, but for those that change no result, and files."""
    fixed = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if not field.metadata["free"]
    }
    return {**fixed, "file": file_fingerprint(settings.rollouts), **weights}


def check_same_run(settings, run):
    """A folder belongs to one command: another one is refused, naming what differs."""
    if checkpoints(settings.out) or finished(settings.out):
        check_same(settings.out, "another run", read_json(f"{settings.out}/run.json"), run)


def finished(folder):
    path = f"{folder}/run.json"
    return os.path.exists(path) and "finished" in read_json(path)


# ---- the log ----


def read_log(folder):
    return read_json_lines(f"{folder}/log.jsonl")


@contextlib.contextmanager
def open_log(settings):
    """The log's file, to add to; what the other ranks write there is dropped."""
    path = f"{settings.out}/log.jsonl" if rank() == 0 else os.devnull
    with writing(path), open(path, "a", encoding="utf-8") as file:
        yield file


# ---- checkpoints ----


def checkpoints(folder):
    """Complete checkpoints, the newest last."""
    return sorted(glob.glob(f"{glob.escape(folder)}/checkpoint-{'[0-9]' * 8}"))


def run_tensors(model, optimizer):
    """The tensors of a run by name; torch.distributed.checkpoint writes and fills them in place."""
    tensors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors[name] = p
            for key, value in optimizer.state[p].items():
                if torch.is_tensor(value) and value.ndim:  # numbers follow from the step
                    tensors[f"{key} of {name}"] = value
    return tensors


def save_checkpoint(settings, model, optimizer, step):
    """Written beside and renamed: complete or not there."""
    import torch.distributed.checkpoint as dcp  # takes a second, and most commands need none

    path, beside = f"{settings.out}/checkpoint-{step:08}", f"{settings.out}/{HALF}"
    older = checkpoints(settings.out)
    if rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
    barrier()
    with writing(path, (OSError, RuntimeError, dcp.api.CheckpointException)):
        dcp.save(
            run_tensors(model, optimizer),  # as safetensors: DCP's own format holds pickles
            storage_writer=dcp.HuggingFaceStorageWriter(beside, save_distributed=True),
        )
        if rank() == 0:
            os.rename(beside, path)
            for old in older:
                shutil.rmtree(old)
    barrier()


def resume(settings, model, optimizer, run):
    """(log so far, first step to do), after loading the newest checkpoint, if there is one."""
    found = from_first(checkpoints(settings.out))
    step, log = 0, []
    if found:
        step = load_checkpoint(found[-1], model, optimizer)
        log = [entry for entry in read_log(settings.out) if entry["step"] < step]
        say(f"{settings.out}: going on from step {step}")
    if rank() == 0:
        write_json(f"{settings.out}/run.json", run)
        with whole_file(f"{settings.out}/log.jsonl") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in log)
    barrier()
    return log, step


def load_checkpoint(path, model, optimizer):
    """Fills model and optimizer; returns the number of steps that are done."""
    import torch.distributed.checkpoint as dcp

    try:
        with torch.no_grad():
            dcp.load(
                run_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(path)
            )
    except (Exception, dcp.api.CheckpointException) as error:  # many kinds; for the user one
        raise Problem(
            f"{path}: cannot be opened: {first_line(error)} Remove it to start from the beginning"
        )
    step = int(path.rpartition("-")[2])
    for state in optimizer.state.values():
        state["step"] += step  # a number or a tensor, and 0 until now
    return step


def save_policy(settings, model, tokenizer, run):
    """The trained policy as a directory that from_pretrained opens; the checkpoints are removed."""
    from transformers import GenerationConfig

    if settings.lora:
        lora.merge(model)
    weights = whole_weights(model) if settings.shard or settings.lora else None
    if rank() == 0:
        with writing(settings.out, (OSError, RuntimeError)):
            if settings.lora:
                lora.save_adapters(settings, weights)
                weights = lora.without_adapters(weights)
            own, model.generation_config = model.generation_config, GenerationConfig()
            model.save_pretrained(settings.out, state_dict=weights)
            own.to_json_file(f"{settings.out}/generation_config.json")  # odd ones are not refused
            tokenizer.save_pretrained(settings.out)
        write_json(f"{settings.out}/run.json", {**run, "finished": True})
        for path in [*checkpoints(settings.out), f"{settings.out}/{HALF}"]:
            shutil.rmtree(path, ignore_errors=True)
    barrier()
