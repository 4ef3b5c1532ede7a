"""The folder of a run: one run at a time, continued where it broke off."""

import fcntl
import glob
import json
import math
import os
import shutil
import signal

import torch
from safetensors import SafetensorError

from engine.common import Problem, first_line, read_json, say, whole_file, write_json, writing
from engine.parallel import barrier, from_first, gather, laid_out, on_first_rank, rank, whole_weights

DISK_ERRORS = (OSError, RuntimeError, SafetensorError)  # what torch and safetensors raise when they cannot write


def open_folder(settings):
    """Makes the folder and holds its lock until the process ends."""
    if os.path.realpath(settings.out) == os.path.realpath(settings.model):
        raise Problem(f"--out {settings.out} is the starting model itself, and would be overwritten")
    if rank() == 0:
        try:
            os.makedirs(settings.out, exist_ok=True)
            global held_lock
            held_lock = open(os.path.join(settings.out, ".lock"), "w")
            fcntl.flock(held_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"{settings.out}: another process is training in this folder")
        except OSError as error:
            raise Problem(f"{settings.out}: {error.strerror}")


def check_same_run(settings, run):
    """What was trained in a folder belongs to one command: another one is refused, naming what differs."""
    path = os.path.join(settings.out, "run.json")
    if os.path.exists(path) and (checkpoints(settings) or finished(settings)):
        flat = lambda record: record["settings"] | {name: record[name] for name in ("model_weights", "file") if name in record}
        before, now = flat(read_json(path)), flat(run)
        free = ("out", "checkpoint_every", "eval_every", "batch_size", "rounds", "shard")  # nothing in the weights hangs on these
        differ = [f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in now
                  if name not in free and before.get(name) != now[name]]
        if differ:
            raise Problem(f"{settings.out} holds another run: {'; '.join(differ)}. Use another --out, or remove it")


def checkpoints(settings):
    """Complete checkpoints, the newest last."""
    return sorted(glob.glob(os.path.join(glob.escape(settings.out), "checkpoint-" + "[0-9]" * 8)))


def last_checkpoint(settings):
    return f"The last checkpoint is {checkpoints(settings)[-1]}" if checkpoints(settings) else "There is no checkpoint"


def save_checkpoint(settings, model, optimizer, run, step):
    """Weights, optimizer, position and random state, written beside and renamed: complete or not there."""
    random_states, weights, moments = gather(torch.get_rng_state()), whole_weights(model), optimizer.state_dict()["state"]
    moments = {number: on_first_rank(state) for number, state in moments.items()}
    if rank() == 0:
        path = os.path.join(settings.out, f"checkpoint-{step:08}")
        beside, older = path + ".part", checkpoints(settings)
        shutil.rmtree(beside, ignore_errors=True)
        try:
            with writing(path, DISK_ERRORS):
                model.save_pretrained(beside, state_dict=weights)
                with open(os.path.join(beside, "optimizer.pt"), "wb") as file:  # ours: torch's would not say that a disk is full
                    torch.save({"optimizer": moments, "random": random_states}, file)
                for name in os.listdir(beside):
                    with open(os.path.join(beside, name), "rb") as file:
                        os.fsync(file.fileno())
                write_json(os.path.join(beside, "step.json"), {"step": step, **run})
        except Problem:
            shutil.rmtree(beside, ignore_errors=True)  # room for others
            raise
        os.rename(beside, path)
        for old in older:
            shutil.rmtree(old)
    barrier()


def resume(settings, model, optimizer):
    """(log so far, first step to do), after loading the newest checkpoint, if there is one."""
    held = gather(os.path.basename((checkpoints(settings) or [""])[-1]))
    newest, saved = max(held), {"step": 0, "log": []}
    if newest:
        saved = read_checkpoint(settings, model, newest) if held[rank()] == newest else None
        if min(held) != newest:  # machines that share no disk: one that has it tells the others
            saved = from_first(saved, held.index(newest))
    if rank() == 0:
        for half in glob.glob(os.path.join(glob.escape(settings.out), "checkpoint-*.part")):
            shutil.rmtree(half)
        with whole_file(os.path.join(settings.out, "log.jsonl")) as file:
            file.writelines(json.dumps(entry) + "\n" for entry in saved["log"])
    if newest:
        for name, tensor in model.state_dict().items():
            tensor.copy_(laid_out(saved["weights"][name], tensor))
        parameters = list(model.parameters())
        for number, state in saved["optimizer"].items():  # (load_state_dict would round it to the type of the weights)
            p, own = parameters[number], optimizer.state[parameters[number]]
            optimizer.state[p] = {name: laid_out(value, own.get(name, p)) for name, value in state.items()}
        torch.set_rng_state(saved["random"][rank() % len(saved["random"])])
        say(f"{settings.out}: going on from step {saved['step']}")
    return saved["log"], saved["step"]


def read_checkpoint(settings, model, name):
    path = os.path.join(settings.out, name)
    try:
        step = read_json(os.path.join(path, "step.json"))["step"]
        weights = type(model).from_pretrained(path, dtype=next(model.parameters()).dtype, use_safetensors=True).state_dict()
        saved = torch.load(os.path.join(path, "optimizer.pt"), weights_only=True, map_location="cpu")
    except Exception as error:  # of many kinds; for the user they are all the same
        raise Problem(f"{path}: cannot be opened: {first_line(error)} Remove it to start from the beginning")
    return {"step": step, "weights": weights, **saved, "log": [entry for entry in read_log(settings) if entry["step"] < step]}


def finish(settings, model, tokenizer, run):
    """The trained policy as a directory that from_pretrained opens, and the checkpoints gone."""
    weights = whole_weights(model)
    if rank() == 0:
        with writing(settings.out, DISK_ERRORS):
            model.eval().save_pretrained(settings.out, state_dict=weights)
            tokenizer.save_pretrained(settings.out)
        write_json(os.path.join(settings.out, "run.json"), {**run, "finished": True})
        for path in checkpoints(settings):
            shutil.rmtree(path)
        held_lock.close()
    barrier()


def finished(settings):
    path = os.path.join(settings.out, "run.json")
    return os.path.exists(path) and read_json(path).get("finished")


def stop_wish():
    """(list that SIGTERM and Ctrl-C append to, so that the loop can end its step first; the handlers to put back)"""
    wish = []
    note = lambda number, _: wish.append(number)
    return wish, {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}


def write_log(settings, log, entry):
    log.append({name: None if isinstance(value, float) and math.isnan(value) else value for name, value in entry.items()})
    if rank() == 0:
        path = os.path.join(settings.out, "log.jsonl")
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(log[-1], default=float) + "\n")


def read_log(settings):
    with open(os.path.join(settings.out, "log.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]  # a disk that was full may have torn the last
