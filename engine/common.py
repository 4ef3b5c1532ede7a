"""What every script shares: command lines, one-line errors, progress, files, tables, curves."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import re
import socket
import sys
import time
import typing

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout  # a requirement of torch
from tqdm import tqdm

from engine.parallel import barrier, leave_ranks, rank, world


class Problem(Exception):
    """Something the user can fix: shown as one line, exit code 2, never a traceback."""


class Stopped(Exception):
    """A signal asked the run to end, and it has, in good order: (what to say, the signal)."""


# ---- settings: a dataclass per script, each field with its sentence ----


def setting(default, help, choices=None, least=0, most=sys.float_info.max, main=False, free=False):
    """A field of a settings class: a number from `least` to `most`; `main` ones lead --help; a
    `free` one may differ when a run is resumed, because it changes no result."""
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "limits": (least, most),
            "main": main,
            "free": free,
        },
    )


def parse(settings_class, description=None, embedded=None, argv=None):
    """Reads the command line into the dataclass; an unknown or mistyped option is an error.

    embedded: other defaults, which hold when --model is not given.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    more = parser.add_argument_group("more options")
    fields, own = dataclasses.fields(settings_class), inspect.get_annotations(settings_class)
    for field in sorted(fields, key=lambda field: field.name not in own):  # own ones first
        add_option(parser if field.metadata["main"] else more, field)
    arguments = parser.parse_args(argv)
    if embedded and not arguments.model:
        parser.set_defaults(**embedded)
        arguments = parser.parse_args(argv)
    for field in fields:
        value, (least, most) = getattr(arguments, field.name), field.metadata["limits"]
        if type(value) in (int, float) and not least <= value <= most:
            limits = f"{least} to {most}" if most < sys.float_info.max else f"{least} or more"
            raise Problem(f"{option_name(field)} {value}: {limits} is required")
    return settings_class(**vars(arguments))


def add_option(group, field):
    shown = "" if field.default in ("", None) else f" (default: {field.default})"
    option = {"default": field.default, "help": (field.metadata["help"] + shown).replace("%", "%%")}
    if field.type is bool:
        option["action"] = argparse.BooleanOptionalAction
    else:
        kind, *_ = typing.get_args(field.type) or [field.type]  # int | None -> int
        choices = field.metadata["choices"]
        option |= {"type": kind, "choices": choices}
        option["metavar"] = None if choices else kind.__name__.upper()
    group.add_argument(option_name(field), **option)


def option_name(field):
    return "--" + field.name.replace("_", "-")


# ---- the end of a script: one line, and an exit code that tells ----


def run_main(main):
    """Runs a script's main(): a Problem is one line and exit code 2, Ctrl-C is exit code 130."""
    try:
        main()
        barrier()
        leave_ranks()
    except Problem as problem:
        fail(f"error: {problem}", 2)
    except Stopped as stopped:
        message, number = stopped.args
        fail(message, 128 + number)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:
        on_cpu = "DefaultCPUAllocator" in str(error)  # torch has a type for it on a GPU alone
        if on_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            fail(f"error: out of memory: {first_line(error)}. {LESS_MEMORY}", 2)
        if isinstance(error, dist.DistError) or re.search("gloo|NCCL", str(error)):
            fail(f"another rank has died or hangs, and the run ends: {first_line(error)}", 1)
        raise


LESS_MEMORY = (
    "What takes less: --tokens-per-pass 1024, --gradient-checkpointing, --weights "
    "bfloat16, --optimizer adafactor, --shard on several ranks, --batch-size 16"
)


def fail(message, exit_code):
    """One line, and the end of this process."""
    if rank() > 0:
        time.sleep(3)  # the first rank says the same, most often, and torchrun then ends this one
    tqdm.write(visible(f"{os.path.basename(sys.argv[0])}: {message}"), file=sys.stderr)
    if world() > 1:
        os._exit(exit_code)  # at once: the other ranks may be waiting for this one
    leave_ranks()
    sys.exit(exit_code)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text):
    """Text that is safe to print: what a file holds must not move the cursor."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


# ---- output and progress ----


def say(*lines):
    """Prints from the first rank alone."""
    if rank() == 0 and lines:
        tqdm.write(visible("\n".join(lines)), file=sys.stdout)
        sys.stdout.flush()


def progress(items=None, total=None, what="", unit="step", initial=0):
    """A progress bar with the time left, on the first rank; quiet lines if the output is a file."""
    return tqdm(
        items,
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        initial=initial,
        disable=rank() != 0,
        mininterval=0.2 if sys.stderr.isatty() else 10,  # seconds
        dynamic_ncols=True,
        leave=None,  # an inner bar disappears at its end
    )


# ---- files: written beside, flushed, renamed, so that a crash never leaves half a file ----


@contextlib.contextmanager
def reading(path):
    """A file that is not there, or is damaged, is one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise Problem(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


@contextlib.contextmanager
def writing(path, errors=OSError):
    """Makes the folder of a path; a full disk or a closed folder is one line."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield
    except errors as error:
        failures = getattr(error, "failures", {}).values()  # of torch's checkpoints: what, where
        error, _ = next(iter(failures), (error, None))
        raise Problem(
            f"{path}: cannot be written: {getattr(error, 'strerror', None) or first_line(error)}. "
            "What was finished before is kept: fix that, then rerun the same command"
        )


def lock(path):
    """A lock of the first rank, which holds until its release or the end of the process."""
    held = FileLock(path, timeout=0)
    if rank() == 0:
        with writing(path):
            try:
                held.acquire()
            except Timeout:
                raise Problem(f"{path} is locked: another process is at work there")
    return held


@contextlib.contextmanager
def whole_file(path):
    """`with whole_file(path) as file:` the file appears under its name complete, or not at all.
    It takes text, and file.buffer bytes."""
    beside = f"{path}.part-{socket.gethostname()}-{os.getpid()}"
    with writing(path):
        try:
            with open(beside, "w", encoding="utf-8", newline="\n") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            if os.path.exists(beside):
                os.remove(beside)


def check_same(path, what, before, now):
    """A file or a folder of another command is refused, naming what differs."""
    differ = [
        f"{name} was {before[name]!r:.60} and is {value!r:.60}"
        for name, value in now.items()
        if name in before and before[name] != value  # an older one may lack an option
    ]
    if differ:
        raise Problem(f"{path} holds {what}: {'; '.join(differ)}. Use another --out, or remove it")


def write_json(path, value):
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1) + "\n")


def read_json(path):
    with reading(path), open(path, encoding="utf-8") as file:
        return json.load(file)


def read_json_lines(path):
    """The values of a file to which lines were added one by one; the last may be torn."""
    with reading(path), open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


# ---- tables and pictures ----


def table(header, rows):
    """Text columns: words to the left, numbers to the right."""
    columns = []  # of cells that are equally wide
    for column in zip(header, *rows):
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in column]
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if columns else cell.ljust(width) for cell in cells])
    head, *lines = ("  ".join(cells).rstrip() for cells in zip(*columns))
    return "\n".join([head, "-" * len(head), *lines])


def draw_lines(path, points, names, **labels):
    """A picture of numbers of each point against the first of them, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    axes = Figure(figsize=(6, 4)).subplots()
    x, *lines = names
    styles = ("o-", "s--", "^:", "v-.", "D-", "x--", "+:")  # distinguishable without colours
    for name, style in zip(lines, styles):
        values = [point[name] for point in points]
        axes.plot([point[x] for point in points], values, style, label=name)
    axes.set(**labels)
    axes.legend()
    axes.figure.savefig(path, dpi=120, bbox_inches="tight")
