"""What every script here shares: settings, ranks, one-line errors, safe files, tables."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import traceback
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


def setting(default, help, choices=None, least=0):
    """`least` is for numbers; below it is an error."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "least": least})


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


# ---- ranks: everything below also works in one plain process, without torchrun ----


def start_ranks():
    """Joins the process group when torchrun started this process. Returns this process's device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank_, world_ = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=30),
                                store=dist.PrefixStore(name_of_start(store, rank_, world_), store), rank=rank_, world_size=world_)
        watch_ranks()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def name_of_start(store, rank_, world_):
    """A name that the processes started together share, and none before them.

    Under --max-restarts torchrun keeps its store, and in it the addresses of processes that have died: who reads such a
    one is refused there. So rank 0 names each start, and tells it to those that ask now.
    """
    me = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    if rank_ > 0:
        store.set(f"asks-{rank_}", me)
        name = store.get(f"start of {me}").decode()  # waits for rank 0
        store.add(f"{name} arrived", 1)
        return name
    while store.add(f"{me} arrived", 0) < world_ - 1:
        for asks in (f"asks-{other}" for other in range(1, world_)):
            if store.check([asks]):
                store.set(f"start of {store.get(asks).decode()}", me)
        time.sleep(0.05)
    return me


SILENCE = 22  # seconds without a sign of life after which a rank counts as lost; torchrun allows a machine 15
watched = {}  # of watch_ranks: the names of the ranks, the seconds since each one's last sign, and what the threads share


def watch_ranks():
    """Ends this process with a line that says which, when another rank gives no sign of life.

    Collectives cannot tell: a rank may rightly keep them waiting for long, while it samples or reads a file. So a thread
    of each rank counts up a number of its own in torchrun's store and looks at the others'; another thread, which no
    network call can block, counts the seconds in which they stand still. (A paused process counts none.)
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    number = gather(time.time_ns())[0]  # the store may outlive this process group: torchrun restarts
    keys, seen, silent, ended = [f"{number}-{r}" for r in range(world())], {}, [0] * world(), threading.Event()
    store.add(keys[rank()], 1)
    watched.update(names=gather(f"rank {rank()} (process {os.getpid()} on {socket.gethostname()})"), silent=silent,
                   store=store.clone(), number=number, ended=ended)

    def beat():
        with contextlib.suppress(RuntimeError):  # the store went with its machine: watch will tell
            while not ended.wait(1):
                store.add(keys[rank()], 1)
                for r, count in enumerate(store.multi_get(keys)):
                    if seen.get(r) != count:
                        seen[r], silent[r] = count, 0

    def watch():
        while not ended.wait(1):
            silent[:] = [seconds + 1 for seconds in silent]
            if max(silent) >= SILENCE:
                tqdm.write(f"{os.path.basename(sys.argv[0])} (rank {rank()}): {lost_rank()}", file=sys.stderr)
                os._exit(1)

    watched["threads"] = [threading.Thread(target=part, daemon=True) for part in (beat, watch)]
    for thread in watched["threads"]:
        thread.start()


def lost_rank():
    """Which rank is gone, in words, or None; one that died a moment ago is given the time to be missed."""
    for _ in range(10):
        deaf = watched["silent"][rank()]  # seconds without news of anybody
        lost = [name for name, seconds in zip(watched["names"], watched["silent"]) if seconds >= deaf + 4]
        if deaf >= 6:
            return f"rank 0's machine ({os.environ['MASTER_ADDR']}) does not answer: the run ends"
        if lost:
            return f"{', '.join(lost)} has died or stands still: the run ends"
        time.sleep(1)


def leave_ranks():
    if dist.is_initialized():
        watched["ended"].set()
        for thread in watched["threads"]:
            thread.join(5)
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world() > 1:
        dist.barrier()


def from_first(value, source=0):
    """The first rank's value (or another's), on every rank. A dict goes entry by entry: no message is larger than one."""
    if world() == 1:
        return value
    message = [list(value) if isinstance(value, dict) else None, None if isinstance(value, dict) else value]
    dist.broadcast_object_list(message, source)
    keys, plain = message
    return plain if keys is None else {key: from_first(value[key] if rank() == source else None, source) for key in keys}


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
