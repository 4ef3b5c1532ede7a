"""What every script here shares: settings, ranks, one-line errors, safe files, tables."""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import json
import os
import random
import signal
import sys
import typing

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm


class Problem(Exception):
    """Something that the user can mend: shown as one line, exit code 2, never a traceback."""

    exit_code = 2


class Stopped(Problem):
    """A signal asked the run to end, and it has, in good order."""

    def __init__(self, message, number):
        super().__init__(message)
        self.exit_code = 128 + number


# ---- settings: a dataclass per script, each field with its sentence ----


def setting(default, help, choices=None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def parse(settings_class, argv=None, description=None, **defaults):
    """Reads the command line into the dataclass; an unknown or mistyped option is an error."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(settings_class):
        flag, kind = "--" + field.name.replace("_", "-"), field.type
        default = defaults.get(field.name, field.default)
        shown = "" if default in ("", None) else f" (default: {default})"
        help = f"{field.metadata['help']}{shown}".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
            continue
        kind = next((t for t in typing.get_args(kind) if t is not type(None)), kind)  # Optional[int] -> int
        parser.add_argument(flag, type=kind, default=default, choices=field.metadata["choices"], help=help,
                            metavar=None if field.metadata["choices"] else kind.__name__.upper())
    return settings_class(**vars(parser.parse_args(argv)))


def run_main(main):
    """Runs a script's main(): a Problem is one line and its exit code, Ctrl-C is exit code 130."""
    name = os.path.basename(sys.argv[0])
    try:
        main()
    except Problem as problem:
        who = f"{name} (rank {rank()})" if world() > 1 else name
        print(f"{who}: {'' if isinstance(problem, Stopped) else 'error: '}{problem}", file=sys.stderr, flush=True)
        if world() > 1:
            os._exit(problem.exit_code)  # at once: the other ranks may be waiting for this one
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- ranks: everything below also works in one plain process, without torchrun ----


def start_ranks():
    """Joins the process group when torchrun started this process. Returns this process's device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        keep_freed_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=30))
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def keep_freed_memory():
    """Has malloc keep what tensors give back for the next ones. By default a large block goes back to the kernel, which
    clears every page before it hands it out again: a tenth of a training step on a CPU."""
    trim_threshold, mmap_max = -1, -4  # names of mallopt(3)
    with contextlib.suppress(OSError, AttributeError):  # no glibc: as it comes
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world() > 1:
        dist.barrier()


def gather(value):
    """Every rank's value, as a list in rank order, on every rank."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def say(*words):
    """Prints from the first rank alone."""
    if rank() == 0:
        tqdm.write(" ".join(str(word) for word in words), file=sys.stdout)
        sys.stdout.flush()


def progress(items=None, total=None, what="", unit="step"):
    """A progress bar with the time left, on the first rank; quiet lines when the output is a file."""
    interval = 0.2 if sys.stderr.isatty() else 10  # seconds
    return tqdm(items, total=total, desc=what, unit=unit, unit_scale=unit == "B", disable=rank() != 0,
                mininterval=interval, dynamic_ncols=True, leave=None)  # an inner bar goes when it is done


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- files: written beside, flushed, renamed, so that a crash never leaves half a file ----


@contextlib.contextmanager
def whole_file(path, mode="w"):
    """`with whole_file(path) as file:` the file appears under its name complete, or not at all."""
    beside = f"{path}.part-{os.getpid()}"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        with open(beside, mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def write_json(path, value):
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1) + "\n")


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise Problem(f"{path}: cannot be read as JSON: {error}")


# ---- tables ----


def table(header, rows):
    """Text columns: words to the left, numbers to the right."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
