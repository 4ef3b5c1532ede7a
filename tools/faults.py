"""Breaks runs in every way we know, and counts how many came out right. Not a part of the test suite: it takes an hour.

    python tools/faults.py               everything
    python tools/faults.py kill disk     some of it: kill, kill-ranks, kill-eval, kill-tasks, disk, flip, ranks, nodes, million
"""

import glob
import itertools
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
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from safetensors.torch import load_file  # noqa: E402

import eval as evaluation  # noqa: E402
from conftest import apples_questions  # noqa: E402
from data import apples  # noqa: E402
from engine.rollouts import write_rollouts  # noqa: E402
from engine import sampler  # noqa: E402

RANDOM = random.Random(0)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


# ---- commands, their processes, and what they leave ----


def material(folder, rows=200):
    """A tiny model and a rollout file that it wrote."""
    model, path = f"{folder}/model", f"{folder}/rollouts.jsonl"
    tokenizer = apples.make_tokenizer(apples.vocabulary())
    tokenizer.save_pretrained(model)
    apples.make_model(tokenizer, seed=3, width=32, layers=2).save_pretrained(model)
    settings = evaluation.Settings(model=model, samples=4, max_new_tokens=12)
    policy, tokenizer = sampler.load_model(model, settings, "cpu")
    questions = apples_questions(tokenizer, settings, rows // 4, "train")

    def grade(*_):
        return None, RANDOM.choice((-1.0, 1.0))

    written = sampler.sample_rollouts(policy, tokenizer, questions, grade, settings, path)
    write_rollouts(path, written)
    return model, path


def training(model, rollouts, out, *options):
    return [ROOT / "train.py", "--model", model, "--rollouts", rollouts, "--out", out, "--optimizer", "adamw", "--learning-rate",
            "1e-3", "--sequences", 8, "--epochs", 4, "--checkpoint-every", 2, *options]


def ranks_of(count, *command):
    return [*TORCHRUN, "--standalone", "--nproc-per-node", count, *command] if count else [sys.executable, *command]


def started(command, output, cwd=None):
    """The command's process; its output goes to a file."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    with open(output, "w") as file:
        return subprocess.Popen([str(part) for part in command], cwd=cwd, stdout=file, stderr=file, env=environment,
                                start_new_session=True)


def run(command, output, cwd=None):
    """(exit code, output, seconds)"""
    start = time.time()
    code = started(command, output, cwd).wait()
    return code, Path(output).read_text(errors="replace"), time.time() - start


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


def without_logs(output):
    """What our own scripts said: torchrun's table and its warnings left out."""
    return [line for line in output.splitlines() if line.startswith(("train.py", "eval.py", "broken.py"))]


def tally(what, right, of, remark=""):
    print(f"{what}: {right} of {of}{f'; {remark}' if remark else ''}", flush=True)
    return right == of


# ---- a. kill -9 ----


def killed(folder, what, command, sign, results, times, seconds):
    """Runs the command, kills it at a random moment after `sign()`, runs it again, compares the files with unbroken ones."""
    right, writing = 0, 0
    for number in range(times):
        unfinished = False
        while not unfinished:  # a run that had ended before its moment came does not count
            shutil.rmtree(f"{folder}/out", ignore_errors=True)
            process = started(command, f"{folder}/output")
            wait_for(lambda: sign() or process.poll() is not None)
            time.sleep(RANDOM.random() * seconds)
            if number % 3 == 0:  # while a checkpoint is being written
                wait_for(lambda: glob.glob(f"{folder}/out/checkpoint-*.part") or process.poll() is not None,
                         1 if "train.py" in what else 0)
            unfinished = process.poll() is None
            kill(process)
        writing += bool(glob.glob(f"{folder}/out/checkpoint-*.part"))
        code, output, _ = run(command, f"{folder}/output")
        same = [Path(f"{folder}/out/{name}").read_bytes() == Path(f"{folder}/whole/{name}").read_bytes() if code == 0 else False
                for name in results]
        right += all(same) and code == 0
        print(f"  {what} {number + 1}: {'the same' if all(same) else 'DIFFERENT'}", flush=True)
        if not all(same):
            print(output[-3000:])
    return right, writing


def kill_train(folder, ranks=0, times=30):
    model, rollouts = material(folder)
    command = ranks_of(ranks, *training(model, rollouts, f"{folder}/out"))
    log = f"{folder}/out/log.jsonl"
    process = started(command, f"{folder}/output")
    wait_for(lambda: size(log))
    start = time.time()
    assert process.wait() == 0, Path(f"{folder}/output").read_text()
    seconds = time.time() - start
    os.rename(f"{folder}/out", f"{folder}/whole")
    what = f"train.py{f', {ranks} ranks' if ranks else ''}"
    right, writing = killed(folder, what, command, lambda: size(log), ["model.safetensors"], times, seconds * 0.8)
    return tally(f"{what}: killed and continued, weights bit-identical to an unbroken run", right, times,
                 f"{writing} of them while a checkpoint was being written")


def kill_eval(folder, times=20):
    model, _ = material(folder)
    command = [sys.executable, ROOT / "eval.py", "--model", model, "--questions", 100, "--samples", 4, "--max-new-tokens", 40,
               "--batch-size", 8, "--out", f"{folder}/out/rollouts.jsonl"]
    sign = lambda: glob.glob(f"{folder}/out/rollouts.jsonl.part-*")
    process = started(command, f"{folder}/output")
    wait_for(sign)
    start = time.time()
    assert process.wait() == 0, Path(f"{folder}/output").read_text()
    seconds = time.time() - start
    os.rename(f"{folder}/out", f"{folder}/whole")
    right, _ = killed(folder, "eval.py", command, sign, ["rollouts.jsonl", "rollouts.json"], times, seconds * 0.9)
    return tally("eval.py: killed and continued, the same files as an unbroken run", right, times)


def kill_tasks(folder, times=4):
    """verifier.py and search.py on a tiny model, killed at moments all along their run."""
    from data import library

    model, _ = material(folder)
    write_rollouts(f"{folder}/solutions.jsonl", solutions())
    verifier = [ROOT / "verifier.py", "--model", model, "--solutions", f"{folder}/solutions.jsonl",
                "--samples", 4, "--test-samples", 4, "--max-new-tokens", 12,
                "--out", f"{folder}/out"]
    library.write_collection(f"{folder}/corpus")
    finder = [ROOT / "search.py", "--model", model, "--corpus", f"{folder}/corpus", "--queries", 40, "--test-queries", 20, "--samples",
              4, "--max-new-tokens", 8, "--losses", "sft,topr", "--out", f"{folder}/out"]
    good = True
    for name, command, results in (("verifier.py", verifier, ["trained/model.safetensors", "verdicts.jsonl", "verdicts-trained.jsonl"]),
                                   ("search.py", finder, ["seed0/rollouts.jsonl", "seed0/topr/model.safetensors",
                                                          "seed0/test-topr-sampled.jsonl"])):
        shutil.rmtree(f"{folder}/whole", ignore_errors=True)
        code, output, seconds = run([sys.executable, *command], f"{folder}/output")
        assert code == 0, output
        os.rename(f"{folder}/out", f"{folder}/whole")
        right, _ = killed(folder, name, [sys.executable, *command], lambda: os.path.exists(f"{folder}/out"), results, times,
                          seconds * 0.6)
        good &= tally(f"{name}: killed and continued, the same files as an unbroken run", right, times)
    return good


def solutions():
    """Graded solutions of word problems, right and wrong ones."""
    rows = []
    for problem in itertools.islice(apples.questions("train"), 30):
        for _ in range(4):
            completion = apples.demonstrate(problem, RANDOM, apples.HABITS)
            answer, reward = apples.grade(problem, completion)
            about = {name: problem[name] for name in ("id", "question", "prompt", "gold")}
            rows.append({**about, "completion": completion, "reward": reward, "answer": answer})
    return rows


# ---- b. a full disk ----


def disk(folder):
    """A tmpfs that holds one checkpoint and not two, then a third of a rollout file."""
    model, rollouts = material(folder)
    right, small = [], f"{folder}/small"
    os.makedirs(small)
    cases = {"checkpoint": ([sys.executable, *training(model, rollouts, f"{small}/out")], "out/model.safetensors"),
             "rollout file": ([sys.executable, ROOT / "eval.py", "--model", model, "--questions", 100, "--samples", 4,
                               "--max-new-tokens", 40, "--batch-size", 8, "--out", f"{small}/out/rollouts.jsonl"],
                              "out/rollouts.jsonl")}
    for what, (command, result) in cases.items():
        code, output, _ = run(command, f"{folder}/output")  # once on a disk with room, for comparison
        assert code == 0, output
        whole = Path(small, result).read_bytes()
        shutil.rmtree(f"{small}/out")
        room = size(rollouts) if what == "rollout file" else 5.5 * len(whole)  # a checkpoint takes 3 times the weights
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(room)}", "tmpfs", small]).returncode:
            return tally("full disk (mounting a small tmpfs needs root)", 0, 2)
        try:
            code, output, _ = run(command, f"{folder}/output")
            lines = without_logs(output)
            good = code != 0 and len(lines) == 1 and "No space left" in lines[0] + output and "Traceback" not in output
            print(f"  {what}: exit code {code}, {lines or output}", flush=True)
            if what == "checkpoint":
                (kept,) = glob.glob(f"{small}/out/checkpoint-*")
                shards = glob.glob(f"{kept}/*.safetensors")
                good &= bool(shards) and all(load_file(path) for path in shards)
            subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
            code, output, _ = run(command, f"{folder}/output")
            went_on = "going on" in output
            good &= code == 0 and went_on and Path(small, result).read_bytes() == whole
            print(f"  {what}, with room: {'went on' if went_on else output[-2000:]}", flush=True)
            right.append(good)
        finally:
            subprocess.run(["umount", small], check=True)
    return tally("full disk: one line, a kept checkpoint, the same result once there is room", sum(right), 2)


# ---- c. bytes flipped at random ----


def flip(folder, times=20000):
    from test_faults import flipped_files

    model, rollouts = material(folder, rows=8)
    refused, read = flipped_files(model, rollouts, folder, times)
    return tally("bytes flipped in a good file: refused in words or read", refused + read, times, f"{refused:,} refused, {read:,} read")


# ---- d. a rank that dies, fails or stands still ----


def ranks(folder):
    model, rollouts = material(folder)
    script = Path(folder, "broken.py")
    script.write_text("""
import os, train
from engine import batches, parallel
from engine.common import run_main
own, seen = batches.make_batch, []
def make_batch(*given, **more):
    seen.append(1)
    if len(seen) == 40 and parallel.rank() == 1:
        raise ValueError("a mistake of rank 1 alone")
    return own(*given, **more)
if os.environ.get("RAISE"):
    batches.make_batch = make_batch
run_main(train.main)
""")
    right, ways = 0, ("SIGKILL rank 1", "SIGSTOP rank 1", "SIGSTOP rank 0", "raise rank 1")
    for way in ways:
        what, _, number = way.split()
        os.environ["RAISE"] = "1" if what == "raise" else ""
        out = f"{folder}/{way}"
        process = started(ranks_of(3, script, *training(model, rollouts, out, "--epochs", 400)[1:]), f"{folder}/output")
        assert wait_for(lambda: size(f"{out}/log.jsonl")), Path(f"{folder}/output").read_text()
        time.sleep(3)
        start = time.time()
        if what != "raise":
            workers = sorted(pid for pid in family(process.pid) if b"broken.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
                             and pid != process.pid)
            os.kill(workers[int(number)], getattr(signal, what))
        process.wait()
        seconds, output = time.time() - start, Path(f"{folder}/output").read_text()
        lines = without_logs(output)
        named = any(f"rank {number}" in line for line in lines)
        right += named and seconds < 60 and process.returncode != 0 and "gloo" not in output
        print(f"  {way}: all ended after {seconds:.0f} s, exit code {process.returncode}, {lines}", flush=True)
    os.environ["RAISE"] = ""
    good = tally("a rank lost: all others end within 60 s and name it", right, len(ways))
    return restarts(folder, model, rollouts) and good


def restarts(folder, model, rollouts):
    """A rank is killed under --max-restarts 1: torchrun starts both again, and they go on."""
    kinds = {kind: training(model, rollouts, f"{folder}/{kind}") for kind in ("whole", "restarted")}
    code, output, _ = run(ranks_of(2, *kinds["whole"]), f"{folder}/output")
    assert code == 0, output
    process = started([*TORCHRUN, "--standalone", "--nproc-per-node", 2, "--max-restarts", 1, *kinds["restarted"]], f"{folder}/output")
    assert wait_for(lambda: glob.glob(f"{folder}/restarted/checkpoint-*0"))
    os.kill(max(family(process.pid)), signal.SIGKILL)
    code, output = process.wait(), Path(f"{folder}/output").read_text()
    same = code == 0 and Path(f"{folder}/whole/model.safetensors").read_bytes() == Path(f"{folder}/restarted/model.safetensors").read_bytes()
    return tally("a rank killed under --max-restarts: went on, weights bit-identical", int(same and "going on" in output), 1)


# ---- e. two machines ----


def nodes(folder):
    model, rollouts = material(folder, rows=80)
    port, right = 29000 + RANDOM.randrange(1000), 0
    options = ["--epochs", 1]  # ten steps
    code, output, _ = run(ranks_of(0, *training(model, rollouts, f"{folder}/one", *options)), f"{folder}/output")
    assert code == 0, output
    one = load_file(f"{folder}/one/model.safetensors")

    def half(number, disk, *options):
        cwd = f"{folder}/{disk if disk == 'shared' else f'{disk}{number}'}"
        os.makedirs(cwd, exist_ok=True)
        command = [*TORCHRUN, "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}",
                   *training(model, rollouts, "out", *options)]
        return started(command, f"{folder}/half{number}", cwd)

    said = lambda number: Path(f"{folder}/half{number}").read_text()
    for disk in ("shared", "apart"):
        out = f"{folder}/{'shared' if disk == 'shared' else 'apart0'}/out"
        for goal, lost in ((options, None), (["--epochs", 40], 1), (["--epochs", 40], 0)):
            shutil.rmtree(out, ignore_errors=True)
            port += 1
            halves = [half(0, disk, *goal)]
            time.sleep(2)  # the first to come holds the store and rank 0
            halves.append(half(1, disk, *goal))
            if lost is None:
                codes = [process.wait() for process in halves]
                far = max((one[name] - tensor).abs().max().item() for name, tensor in load_file(f"{out}/model.safetensors").items())
                good = codes == [0, 0] and far < 1e-4
                print(f"  {disk} disk, ten steps: furthest weight from one process's {far:.1g}", flush=True)
            else:
                assert wait_for(lambda: len(glob.glob(f"{out}/checkpoint-*0"))), said(0)
                start = time.time()
                kill(halves[lost])
                halves[1 - lost].wait()
                seconds, text = time.time() - start, said(1 - lost)
                lines = without_logs(text)
                port += 1
                halves = [half(0, disk, *goal)]
                time.sleep(2)
                halves.append(half(1, disk, *goal))
                resumed = wait_for(lambda: "going on from step" in said(0) + said(1))
                for process in halves:
                    kill(process)
                good = bool(resumed) and seconds < 60 and lines
                print(f"  {disk} disk, half {lost} killed: the other ended after {seconds:.0f} s, {lines or text}; "
                      f"both again: {'resumed' if resumed else said(0) + said(1)}", flush=True)
            right += bool(good)
    return tally("two machines: the weights of one process; one lost, the other ends, both resume", right, 6)


# ---- f. a million lines ----


def million(folder, many=1_000_000):
    """With text alone the loss is one that needs no log mu: computing it for every line takes the model, and its time."""
    model, _ = material(folder)
    tokenizer = sampler.load_tokenizer(model)
    words, right = "the answer is 7 + 4 = 11 . He finds 4 . Ann buys 3 . How many ?".split(), 0
    for kind in ("text", "ids"):
        seen = {}
        for count in (1000, many):
            path = f"{folder}/{kind}-{count}.jsonl"
            with open(path, "w") as file:
                for number in range(count):
                    if number % 16 == 0:
                        question = f"Tom has {RANDOM.randrange(41)} apples . He finds {RANDOM.randrange(41)} . Ann buys 3 . How many ?"
                    text = " ".join(RANDOM.choices(words, k=40 if kind == "text" else 11))
                    row = {"id": f"question-{number // 16}", "prompt": question, "completion": text, "reward": RANDOM.choice((-1, 1))}
                    if kind == "ids":
                        if number < 1000:  # the others repeat the last of these: making ids takes long
                            ids = {"completion": text, "completion_ids": tokenizer(text, add_special_tokens=False).input_ids}
                        row.update(ids, logprobs=[-1.25] * len(ids["completion_ids"]))
                    file.write(json.dumps(row) + "\n")
            out = f"{folder}/{kind}-{count}"
            options = ["--mu", "file"] if kind == "ids" else ["--loss", "reinforce"]
            process, start = started(ranks_of(0, *training(model, path, out, *options, "--checkpoint-every", 0)), f"{folder}/output"), time.time()
            assert wait_for(lambda: size(f"{out}/log.jsonl") or process.poll() is not None, 600) and process.poll() is None, Path(
                f"{folder}/output").read_text()
            seconds = time.time() - start
            status = Path(f"/proc/{process.pid}/status").read_text()
            seen[count] = seconds, int(status.split("VmHWM:")[1].split()[0]) / 1024
            kill(process)
            print(f"  {kind}, {count:,} lines of {size(path) / count:.0f} bytes: first step done after {seconds:.0f} s, "
                  f"{seen[count][1]:,.0f} MB", flush=True)
            os.remove(path)
        right += seen[many][0] < 60 and seen[many][1] - seen[1000][1] < 300
    return tally(f"{many:,} lines: first step within 60 s, within 300 MB of a thousand lines", right, 2)


PARTS = {"kill": kill_train, "kill-ranks": lambda folder: kill_train(folder, ranks=2), "kill-eval": kill_eval,
         "kill-tasks": kill_tasks, "disk": disk, "flip": flip, "ranks": ranks, "nodes": nodes, "million": million}


def main():
    wanted = sys.argv[1:] or list(PARTS)
    if set(wanted) - set(PARTS):
        sys.exit(f"parts: {', '.join(PARTS)}")
    good = []
    for name in wanted:
        print(f"{name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            good.append(PARTS[name](folder))
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
