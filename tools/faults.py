"""Breaks runs in every way we know, and counts how many came out right. It takes half an hour.

python tools/faults.py               everything
python tools/faults.py kill disk     some of it: kill, kill-eval, kill-job, disk, flip, ranks,
                                     million
"""

import argparse
import glob
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from safetensors.torch import load_file  # noqa: E402

import train  # noqa: E402
from data import apples  # noqa: E402
from engine import batches, run_folder, sampler  # noqa: E402
from engine.common import Problem  # noqa: E402
from engine.rollouts import read_rollouts, write_rollouts  # noqa: E402

RANDOM = random.Random(0)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


# ---- commands, their processes, and what they leave ----


def material(folder, questions=50):
    """A tiny model, and a rollout file that it wrote, with random rewards."""
    model, path = f"{folder}/random", f"{folder}/rollouts.jsonl"
    apples.write_beginner(folder, apples, 1, seed=3, width=32, layers=2)
    code, output, _ = run(
        [sys.executable, *sampling(model, path, questions, 12), "--split", "train", "--no-greedy"],
        folder,
    )
    assert code == 0, output
    rows = [{**row, "reward": RANDOM.choice((-1.0, 1.0))} for row in read_rollouts(path)]
    write_rollouts(path, rows)
    return model, path


def sampling(model, path, questions=100, longest=40):
    return [
        ROOT / "eval.py",
        "--model",
        model,
        "--task",
        "apples",
        "--questions",
        questions,
        "--samples",
        4,
        "--max-new-tokens",
        longest,
        "--batch-size",
        8,
        "--out",
        path,
    ]


def training(model, rollouts, out, *options):
    """A hundred steps."""
    return [
        ROOT / "train.py",
        "--model",
        model,
        "--rollouts",
        rollouts,
        "--out",
        out,
        "--optimizer",
        "adamw",
        "--learning-rate",
        "1e-3",
        "--sequences",
        8,
        "--epochs",
        4,
        "--checkpoint-every",
        2,
        *options,
    ]


def ranks_of(count, *command):
    return [*TORCHRUN, count, *command] if count else [sys.executable, *command]


def started(command, folder):
    """The command's process; its output goes to folder/output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    with open(f"{folder}/output", "w") as file:
        return subprocess.Popen(
            [str(part) for part in command],
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )


def run(command, folder):
    """(exit code, output, seconds)"""
    start = time.time()
    code = started(command, folder).wait()
    return code, output_of(folder), time.time() - start


def output_of(folder):
    return Path(folder, "output").read_text(errors="replace")


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not (found := condition()) and time.time() < end:
        time.sleep(0.001)
    return found


def family(pid):
    """The process and all that it started, the youngest first."""
    parents = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            fields = Path(path).read_text().rsplit(")", 1)[1].split()
            parents.setdefault(int(fields[1]), []).append(int(path.split("/")[2]))
        except OSError:
            pass  # it has ended
    return [p for child in parents.get(pid, []) for p in family(child)] + [pid]


def kill(process):
    for pid in family(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def size(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def own_lines(output):
    """What our own scripts said: torchrun's report and its warnings left out."""
    return [
        line
        for line in output.splitlines()
        if line.startswith(("train.py", "eval.py", "broken.py"))
    ]


def same_bytes(a, b):
    return size(a) == size(b) > 0 and Path(a).read_bytes() == Path(b).read_bytes()


def tally(what, right, of, remark=""):
    print(f"{what}: {right} of {of}{f'; {remark}' if remark else ''}", flush=True)
    return right == of


# ---- a. kill -9 ----


def killed(folder, what, command, sign, results, times):
    """Runs the command whole; then so many times kills it at a random moment after `sign()`, runs
    it again, and compares the files of both."""
    right, writing, out = 0, 0, f"{folder}/out"
    process = started(command, folder)
    wait_for(lambda: sign() or process.poll() is not None)
    start = time.time()
    assert process.wait() == 0, output_of(folder)
    seconds = 0.8 * (time.time() - start)
    os.rename(out, f"{folder}/whole")
    for number in range(times):
        unfinished = False
        while not unfinished:  # a run that had ended before its moment came does not count
            shutil.rmtree(out, ignore_errors=True)
            process = started(command, folder)
            wait_for(lambda: sign() or process.poll() is not None)
            time.sleep(RANDOM.random() * seconds)
            if number % 3 == 0 and "eval.py" not in what:  # while a checkpoint is being written
                wait_for(
                    lambda: (
                        glob.glob(f"{out}/**/checkpoint.part", recursive=True)
                        or process.poll() is not None
                    ),
                    1,
                )
            unfinished = process.poll() is None
            kill(process)
        writing += bool(glob.glob(f"{out}/**/checkpoint.part", recursive=True))
        code, output, _ = run(command, folder)
        same = code == 0 and all(
            same_bytes(f"{out}/{name}", f"{folder}/whole/{name}") for name in results
        )
        right += same
        print(
            f"  {what} {number + 1}: {'the same' if same else 'DIFFERENT ' + output[-3000:]}",
            flush=True,
        )
    return tally(
        f"{what}: killed and run again, the same files to the bit",
        right,
        times,
        f"{writing} of them while a checkpoint was being written",
    )


def kill_train(folder, ranks=0, *options, times=10):
    model, rollouts = material(folder)
    command = ranks_of(ranks, *training(model, rollouts, f"{folder}/out", *options))
    return killed(
        folder,
        f"train.py, {ranks or 1} ranks {' '.join(options)}",
        command,
        lambda: size(f"{folder}/out/log.jsonl"),
        ["model.safetensors"],
        times,
    )


def kill_all(folder):
    good = True
    for number, (ranks, *options) in enumerate(
        (
            (0,),
            (0, "--optimizer", "adafactor"),
            (2,),
            (2, "--optimizer", "adafactor"),
            (2, "--shard"),
            (2, "--shard", "--optimizer", "adafactor"),
        )
    ):
        os.makedirs(f"{folder}/{number}")
        good &= kill_train(f"{folder}/{number}", ranks, *options)
    return good


def kill_eval(folder, times=10):
    model, _ = material(folder)
    out = f"{folder}/out/rollouts.jsonl"
    return killed(
        folder,
        "eval.py",
        [sys.executable, *sampling(model, out), "--no-greedy"],
        lambda: glob.glob(f"{out}.part-*"),
        ["rollouts.jsonl"],
        times,
    )


def kill_job(folder, times=10):
    """Rounds of sample-then-train, measured before and after."""
    model, _ = material(folder)
    command = [
        ROOT / "train.py",
        "--model",
        model,
        "--task",
        "apples",
        "--rounds",
        2,
        "--out",
        f"{folder}/out",
        "--optimizer",
        "adamw",
        "--learning-rate",
        "1e-3",
        "--questions",
        20,
        "--test-questions",
        20,
        "--samples",
        4,
        "--max-new-tokens",
        20,
        "--sequences",
        4,
        "--checkpoint-every",
        2,
    ]
    results = ["rollouts-1.jsonl", "rollouts-2.jsonl", "after.jsonl", "model.safetensors"]
    return killed(
        folder,
        "rounds of train.py",
        [sys.executable, *command],
        lambda: os.path.exists(f"{folder}/out"),
        results,
        times,
    )


# ---- b. a full disk ----


def disk(folder):
    """A tmpfs that holds one checkpoint and not two, then a third of a rollout file."""
    model, rollouts = material(folder)
    right, small = 0, f"{folder}/small"
    os.makedirs(small)
    for what, command, result in (
        ("checkpoint", training(model, rollouts, f"{small}/out"), "out/model.safetensors"),
        ("rollout file", sampling(model, f"{small}/out/r.jsonl"), "out/r.jsonl"),
    ):
        command = [sys.executable, *command]
        code, output, _ = run(command, folder)  # once on a disk with room, for comparison
        assert code == 0, output
        shutil.rmtree(f"{folder}/whole", ignore_errors=True)
        os.rename(f"{small}/out", f"{folder}/whole")
        whole = size(f"{folder}/whole/{Path(result).name}")
        room = whole // 3 if what == "rollout file" else 5.5 * whole  # a checkpoint takes 3 times
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(room)}", "tmpfs", small]
        if subprocess.run(mount).returncode:
            return tally("full disk (mounting a small tmpfs needs root)", 0, 2)
        try:
            code, output, _ = run(command, folder)
            lines = own_lines(output)
            good = code != 0 and len(lines) == 1 and "Traceback" not in output
            print(f"  {what}: exit code {code}, {lines or output}", flush=True)
            good &= "No space left" in output
            for shard in glob.glob(f"{small}/out/checkpoint-????????/*.safetensors"):
                good &= bool(load_file(shard))  # the kept checkpoint is whole
            subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
            code, output, _ = run(command, folder)
            went_on = "going on" in output
            good &= went_on and same_bytes(
                f"{small}/{result}", f"{folder}/whole/{Path(result).name}"
            )
            print(f"  {what}, with room: {'went on' if went_on else output[-2000:]}", flush=True)
            right += good
        finally:
            subprocess.run(["umount", small], check=True)
    return tally("full disk: one line, a kept checkpoint, the same result with room", right, 2)


# ---- c. bytes flipped at random ----


def flipped_files(folder, rollouts, scratch, times, seed=0):
    """(files refused in words, files read) of so many with up to four bytes changed; anything else
    is raised."""
    settings = train.Settings(model=str(folder), rollouts=f"{scratch}/flipped.jsonl")
    model, tokenizer = sampler.load_model(settings.model, settings, "cpu")
    bits, whole, refused = random.Random(seed), Path(rollouts).read_bytes(), 0
    for _ in range(times):
        content = bytearray(whole)
        for _ in range(bits.randint(1, 4)):
            content[bits.randrange(len(content))] ^= 1 << bits.randrange(8)
        Path(settings.rollouts).write_bytes(content)
        try:
            data = batches.read_data(settings, model, tokenizer)
            batches.micro_batches(settings, data, data.units, model)
        except Problem as problem:
            assert str(problem).startswith(settings.rollouts)
            refused += 1
    return refused, times - refused


def flip(folder, times=20000):
    model, rollouts = material(folder, questions=2)
    refused, read = flipped_files(model, rollouts, folder, times)
    return tally(
        "bytes flipped in a good file: refused in words or read",
        refused + read,
        times,
        f"{refused:,} refused, {read:,} read",
    )


# ---- d. a rank that dies or fails ----

BROKEN = """
import os, train
from engine import batches, parallel
from engine.common import run_main
own, seen = batches.make_batch, []
def make_batch(*given):
    seen.append(1)
    if len(seen) == 40 and parallel.rank() == 1:
        raise ValueError("a mistake of rank 1 alone")
    return own(*given)
if os.environ.get("RAISE"):
    batches.make_batch = make_batch
run_main(train.main)
"""


WAYS = ("SIGKILL rank 1", "SIGKILL rank 0", "raise rank 1", "SIGTERM rank 1")


def lost_rank(folder, way, ranks=3):
    """A rank is killed, or fails: the others end within 30 s, with a line of theirs or of torchrun,
    and no traceback."""
    model, rollouts = material(folder)
    script, out = Path(folder, "broken.py"), f"{folder}/{way}"
    script.write_text(BROKEN)
    what, _, number = way.split()
    os.environ["RAISE"] = "1" if what == "raise" else ""
    command = [script, *training(model, rollouts, out, "--epochs", 4000)[1:]]
    process = started(ranks_of(ranks, *command), folder)
    assert wait_for(lambda: size(f"{out}/log.jsonl")), output_of(folder)
    if what != "raise":
        time.sleep(2 * RANDOM.random())
        workers = sorted(
            pid
            for pid in family(process.pid)
            if pid != process.pid and b"broken.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(workers[int(number)], getattr(signal, what))
    start = time.time()
    code = process.wait()
    seconds, output = time.time() - start, output_of(folder)
    lines = own_lines(output)
    print(f"  {way}: all ended after {seconds:.0f} s, exit code {code}, {lines}", flush=True)
    if what == "raise":
        return seconds < 30 and code != 0 and "a mistake of rank 1 alone" in output
    lines = lines or "Root Cause" in output  # torchrun's report: it may be faster than the others
    if what == "SIGTERM":
        lines = run_folder.checkpoints(out) and "stopped by a signal" in output
    return bool(lines) and seconds < 30 and code != 0 and f'File "{ROOT}' not in output


def ranks(folder):
    right = 0
    for number, way in enumerate(WAYS):
        os.makedirs(f"{folder}/{number}")
        right += lost_rank(f"{folder}/{number}", way)
    good = tally("a rank lost: all others end within 30 s, with a line", right, len(WAYS))
    return restarts(folder) and good


def restarts(folder):
    """A rank is killed under --max-restarts 1: torchrun starts both again, and they go on."""
    model, rollouts = material(folder)
    code, output, _ = run(ranks_of(2, *training(model, rollouts, f"{folder}/whole")), folder)
    assert code == 0, output
    again = training(model, rollouts, f"{folder}/again")
    process = started([*TORCHRUN, 2, "--max-restarts", 1, *again], folder)
    assert wait_for(lambda: glob.glob(f"{folder}/again/checkpoint-*0"))
    os.kill(max(family(process.pid)), signal.SIGKILL)
    process.wait()
    same = same_bytes(f"{folder}/whole/model.safetensors", f"{folder}/again/model.safetensors")
    return tally(
        "a rank killed under --max-restarts: went on, the same weights to the bit",
        int(same and "going on" in output_of(folder)),
        1,
    )


# ---- e. a million lines ----


def write_many(path, count, tokenizer, with_ids):
    words = "The answer is 7 + 4 = 11 . He finds 4 . Ann buys 3 . How many ?".split()
    with open(path, "w") as file:
        for number in range(count):
            if number % 16 == 0:
                question = f"Tom has {RANDOM.randrange(41)} apples . Ann buys 3 . How many ?"
            if not with_ids or number < 1000:  # the others repeat these: making ids takes long
                text = " ".join(RANDOM.choices(words, k=11 if with_ids else 40))
            row = {
                "id": f"question-{number // 16}",
                "prompt": question,
                "completion": text,
                "reward": RANDOM.choice((-1, 1)),
            }
            if with_ids:
                ids = tokenizer(text, add_special_tokens=False).input_ids
                row |= {"completion_ids": ids, "logprobs": [-1.25] * len(ids)}
            file.write(json.dumps(row) + "\n")


def million(folder, many=1_000_000):
    """With text alone the loss is one that needs no log mu: computing it for every line takes the
    model, and its time."""
    model, _ = material(folder)
    tokenizer, right = sampler.load_tokenizer(model), 0
    for kind, options in (("text", ["--loss", "reinforce"]), ("ids", ["--mu", "file"])):
        seen = {}
        for count in (1000, many):
            path, out = f"{folder}/{kind}-{count}.jsonl", f"{folder}/{kind}-{count}"
            write_many(path, count, tokenizer, kind == "ids")
            start = time.time()
            process = started(ranks_of(0, *training(model, path, out, *options)), folder)
            found = wait_for(lambda: size(f"{out}/log.jsonl") or process.poll() is not None, 600)
            assert found and process.poll() is None, output_of(folder)
            seconds, status = time.time() - start, Path(f"/proc/{process.pid}/status").read_text()
            seen[count] = seconds, int(status.split("VmHWM:")[1].split()[0]) / 1024
            kill(process)
            print(
                f"  {kind}, {count:,} lines of {size(path) / count:.0f} bytes: first step done "
                f"after {seconds:.0f} s, {seen[count][1]:,.0f} MB",
                flush=True,
            )
            os.remove(path)
        right += seen[many][0] < 120
    return tally(f"{many:,} lines: first step within two minutes", right, 2)


CASES = {
    "kill": kill_all,
    "kill-eval": kill_eval,
    "kill-job": kill_job,
    "disk": disk,
    "flip": flip,
    "ranks": ranks,
    "million": million,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}")
    names, good = parser.parse_args().cases or list(CASES), True
    if not set(names) <= set(CASES):
        parser.error(f"the cases are {', '.join(CASES)}")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            good &= CASES[name](folder)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
