"""What every script here shares: settings, ranks, one-line errors, safe files, tables."""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import socket
import sys
import traceback
import typing

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.parallel import barrier, leave_ranks, lost_rank, rank, watched, world


class Problem(Exception):
    """Something that the user can mend: shown as one line, exit code 2, never a traceback."""

    exit_code = 2


class Stopped(Problem):
    """A signal asked the run to end, and it has, in good order."""

    def __init__(self, message, number):
        super().__init__(message)
        self.exit_code = 128 + number


# ---- settings: a dataclass per script, each field with its sentence ----


def setting(default, help, choices=None, least=0, main=False):
    """A field of a settings class. `least`: below it a number is an error; `main`: --help shows it first."""
    metadata = {"help": help, "choices": choices, "least": least, "main": main}
    return dataclasses.field(default=default, metadata=metadata)


def parse(settings_class, argv=None, description=None, **defaults):
    """Reads the command line into the dataclass; an unknown or mistyped option is an error."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    more = parser.add_argument_group("more options")
    own_first = sorted(dataclasses.fields(settings_class), key=lambda field: field.name not in vars(settings_class)["__annotations__"])
    for field in own_first:
        group = parser if field.metadata["main"] else more
        flag, kind = "--" + field.name.replace("_", "-"), field.type
        default = defaults.get(field.name, field.default)
        shown = "" if default in ("", None) else f" (default: {default})"
        help = f"{field.metadata['help']}{shown}".replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
            continue
        kind = next((t for t in typing.get_args(kind) if t is not type(None)), kind)  # Optional[int] -> int
        group.add_argument(flag, type=kind, default=default, choices=field.metadata["choices"], help=help,
                            metavar=None if field.metadata["choices"] else kind.__name__.upper())
    settings = settings_class(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(settings_class):
        value, least = getattr(settings, field.name), field.metadata["least"]
        if type(value) in (int, float) and not least <= value < float("inf"):
            raise Problem(f"--{field.name.replace('_', '-')} {value}: {least} or more is needed")
    return settings


def part_of(settings_class, settings, **changes):
    """The settings that another script's functions take: ours of the same name, and the changes."""
    names = {field.name for field in dataclasses.fields(settings_class)} & vars(settings).keys()
    return settings_class(**{**{name: getattr(settings, name) for name in names}, **changes})


def run_main(main):
    """Runs a script's main(): a Problem is one line and its exit code, Ctrl-C is exit code 130."""
    try:
        main()
        barrier()  # a rank that leaves early would look like one that died
        leave_ranks()
    except Problem as problem:
        fail(f"{'' if isinstance(problem, Stopped) else 'error: '}{problem}", problem.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:
        if world() == 1:
            leave_ranks()
            raise
        if not isinstance(error, dist.DistError) and not re.search("gloo|NCCL", str(error)):
            traceback.print_exc()  # a mistake of this rank: the others only lose the connection to it
            fail(f"failed: {type(error).__name__}: {error}", 1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun wants to end this process: first it says why
        fail(lost_rank() or f"the connection between the ranks broke: {first_line(error)}", 1)


def fail(message, exit_code):
    """One line, and the end of this process; of ranks with the same message the first one says it."""
    name = os.path.basename(sys.argv[0])
    if world() == 1:
        leave_ranks()
        tqdm.write(visible(f"{name}: {message}"), file=sys.stderr)  # on a line of its own, not behind a progress bar
        sys.exit(exit_code)
    try:
        first = watched["store"].add(f"{watched['number']} {message}", 1) == 1
    except RuntimeError:  # the store went with its machine
        first = True
    if first:
        tqdm.write(visible(f"{name} (rank {rank()}): {message}"), file=sys.stderr)
    os._exit(exit_code)  # at once: the other ranks may be waiting for this one


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def visible(text):
    """Text as a terminal may show it: what a file holds must not move the cursor or change the title."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
                  lambda match: match[0].encode("unicode_escape").decode(), text)


def say(*words):
    """Prints from the first rank alone."""
    if rank() == 0:
        tqdm.write(visible(" ".join(str(word) for word in words)), file=sys.stdout)
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
def writing(path, errors=OSError):
    """A full disk or a closed folder is one line."""
    try:
        yield
    except errors as error:
        why = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or first_line(error)
        raise Problem(f"{path}: cannot be written: {why}. What was finished before is kept: mend it, and type the same command")


@contextlib.contextmanager
def whole_file(path, mode="w"):
    """`with whole_file(path) as file:` the file appears under its name complete, or not at all."""
    beside = f"{path}.part-{socket.gethostname()}-{os.getpid()}"
    with writing(path):
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


# ---- tables and pictures ----


def table(header, rows):
    """Text columns: words to the left, numbers to the right."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw_lines(path, points, x, names, **labels):
    """A picture of some numbers of each point against its x, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, style in zip(names, ("o-", "s--", "^:", "v-.", "D-", "x--", "+:")):  # to be told apart without colours
        axes.plot([point[x] for point in points], [point[name] for point in points], style, label=name)
    axes.set(**labels)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
