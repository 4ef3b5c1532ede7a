"""Each case beside its peers in one run, as a ratio: above 1 we are the quicker, or the smaller. It measures, and tests nothing.

    python tools/bench.py setup            an environment of its own for TRL and bm25s, in runs/bench-venv
    python tools/bench.py                  every case; the tables are printed, and kept in runs/bench.json
    python tools/bench.py train ranks --prompts 64 --pairs 3        some of: train sampling search reading ranks growth

Every contestant is a process of its own that is started once, and does one turn (a training step, all completions) when it is
told to. They take turns, so that a machine which slows down slows all; a ratio is taken between turns of one round, and the
median of the rounds counts. The first turn of each is not counted.
"""

import dataclasses
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import torch  # noqa: E402
from bench_trl import my_turn  # noqa: E402

from engine.common import (  # noqa: E402
    Problem,
    parse,
    progress,
    read_json,
    run_main,
    say,
    setting,
    table,
    write_json,
)
from engine.parallel import gather, rank  # noqa: E402

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs"
PEERS = RUNS / "bench-venv" / "bin" / "python"
MISSING = "not installed: python tools/bench.py setup"
VOCABULARY = 32_000


@dataclasses.dataclass
class Settings:
    pairs: int = setting(5, "rounds that count")
    threads: int = setting(os.cpu_count(), "of every contestant (ranks: one each)")
    prompts: str = setting("64,256,512,1024", "tokens of the prompt, in the training case")
    trl_memory: str = setting(
        "plain",
        "TRL's gradient checkpointing: off, as ours is, or on, as it comes",
        ("plain", "checkpointing"),
    )
    documents: int = setting(0, "made-up documents in the search case (see tools/bench_search.py)")
    data: str = setting(
        "", "SciFact's folder, for the search case (default: that of tools/bench_search.py)"
    )


# ---- contestants ----


class Contestant:
    """A process that does one turn whenever it is told to."""

    def __init__(self, name, command, threads):
        self.name, self.seconds = name, []
        RUNS.joinpath("bench").mkdir(parents=True, exist_ok=True)
        self.log = RUNS / "bench" / f"{name.replace(' ', '-')}.log"
        quiet = {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                env={**os.environ, **quiet},
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.wait()

    def wait(self):
        for line in self.process.stdout:
            if line.startswith("@"):
                self.memory = float(line[1:])
                return
        raise Problem(f"{self.name} has ended: see {self.log}")

    def turn(self):
        start = time.perf_counter()
        print("go", file=self.process.stdin, flush=True)
        self.wait()
        self.seconds.append(time.perf_counter() - start)


def compete(contestants, rounds):
    """{name: {seconds, ratio, memory}} of contestants (name, command, threads); ratios to the first. Also GFLOP/s of matmul."""
    running, rates = [], []
    try:
        for contestant in contestants:
            running.append(Contestant(*contestant))
        for each in [contestant for _ in range(rounds + 1) for contestant in running]:
            if each is running[0]:
                rates.append(matmul_rate(contestants[0][2]))
            each.turn()
    finally:
        for each in running:
            each.process.stdin.close()
            each.process.wait()
    ratios = lambda each: [
        theirs / ours for theirs, ours in zip(each.seconds[1:], running[0].seconds[1:])
    ]
    return {
        each.name: {
            "seconds": statistics.median(each.seconds[1:]),
            "ratio": statistics.median(ratios(each)),
            "memory_gib": each.memory,
            "memory_ratio": each.memory / running[0].memory,
        }
        for each in running
    }, statistics.median(rates)


def matmul_rate(threads, size=2048, times=5):
    """GFLOP/s of float32 matrix products, the most that this machine can do."""
    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    start = time.perf_counter()
    for _ in range(times):
        a @ b
    return times * 2 * size**3 / (time.perf_counter() - start) / 1e9


def worker(name, *arguments):
    return [sys.executable, HERE / "bench.py", "worker", name, *map(str, arguments)]


# ---- what they work on ----


def make_model(folder, width=512, layers=8, vocabulary=VOCABULARY):
    """A Llama with random weights, 58 million of them by default, and a tokenizer with one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    words = Tokenizer(
        models.WordLevel({"</s>": 0} | {f"w{n}": n for n in range(1, vocabulary)}, unk_token="</s>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=round(width / 12) * 32,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    return model


def make_rollouts(path, prompt, completions, questions=1, vocabulary=VOCABULARY):
    """A rollout file: a prompt of so many tokens, completions of these lengths behind it, every other one correct."""
    rng, rows = random.Random(0), []
    draw = lambda count: [rng.randrange(1, vocabulary) for _ in range(count)]
    text = lambda ids: " ".join(f"w{n}" for n in ids)
    for question in range(questions):
        prompt_ids = draw(prompt)
        for number, length in enumerate(completions):
            ids = draw(length - 1)
            rows.append(
                {
                    "id": f"q{question}",
                    "prompt": text(prompt_ids),
                    "completion": " " + text(ids),
                    "prompt_ids": prompt_ids,
                    "completion_ids": ids + [0],
                    "reward": 1.0 if number % 2 else -1.0,
                }
            )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def useful_flops(model, prompt, completions):
    """Operations that a step cannot do without: 6 for a weight and each token that meets it (2 forward, 4 backward).

    Tokens of the prompt are needed once, and not in the head; the embedding is looked up. Attention takes, in every layer,
    12 width operations for a token and each that it sees: 4 forward (scores, values), 8 backward.
    """
    head, embedding = model.lm_head.weight.numel(), model.get_input_embeddings().weight.numel()
    inner = model.num_parameters() - head - embedding
    pairs = sum(range(1, prompt + 1)) + sum(n * prompt + n * (n + 1) // 2 for n in completions)
    config = model.config
    return (
        6 * (inner * (prompt + sum(completions)) + head * sum(completions))
        + 12 * config.hidden_size * config.num_hidden_layers * pairs
    )


LENGTHS = [64, 128, 73, 119, 82, 110, 91, 100]  # of 8 completions; 96 in the mean


# ---- the cases: each returns rows, dicts of one shape ----


def case_train(settings):
    """A training step: 8 completions of one prompt. Peers: TRL's trainers, a loop over all logits."""
    rows, folder = [], RUNS / "bench" / "llama-58m"
    model = make_model(folder)
    for prompt in map(int, settings.prompts.split(",")):
        path = make_rollouts(RUNS / "bench" / f"rollouts-{prompt}.jsonl", prompt, LENGTHS)
        contestants = {
            "train.py": worker("ours", folder, path),
            "plain loop": worker("plain", folder, path),
        }
        if PEERS.exists():
            contestants |= {
                f"TRL {kind.upper()}": [
                    PEERS,
                    HERE / "bench_trl.py",
                    kind,
                    folder,
                    path,
                    settings.trl_memory,
                ]
                for kind in ("kto", "dpo")
            }
        results, rate = compete(
            [(name, command, settings.threads) for name, command in contestants.items()],
            settings.pairs,
        )
        needed = useful_flops(model, prompt, LENGTHS) / 1e9
        for name, result in results.items():
            rows.append(
                {
                    "prompt": prompt,
                    "contestant": name,
                    **result,
                    "gflops": needed / result["seconds"],
                    "of_matmul_rate": needed / result["seconds"] / rate,
                }
            )
        if not PEERS.exists():
            rows.append({"prompt": prompt, "contestant": f"TRL: {MISSING}"})
    return rows


def case_sampling(settings):
    """64 prompts of 8 to 96 tokens, 16 completions of 1 to 96 tokens each, beside transformers' generate."""
    folder = RUNS / "bench" / "llama-sampling"
    make_model(folder, width=256, layers=2, vocabulary=4000)
    names = {"eval.py": "sample", "transformers": "generate"}
    results, _ = compete(
        [(name, worker(task, folder), settings.threads) for name, task in names.items()],
        settings.pairs,
    )
    return [
        {"contestant": name, **result, "completions_per_second": 64 * 16 / result["seconds"]}
        for name, result in results.items()
    ]


def case_search(settings):
    """BM25 beside bm25s, by tools/bench_search.py in the environment that has bm25s."""
    if not PEERS.exists():
        return [{"contestant": f"bm25s: {MISSING}"}]
    path = RUNS / "bench" / "search.json"
    where = ["--data", settings.data] if settings.data else []
    subprocess.run(
        [
            PEERS,
            HERE / "bench_search.py",
            "--documents",
            str(settings.documents),
            "--pairs",
            str(settings.pairs),
            "--out",
            path,
            *where,
        ],
        check=True,
    )
    return read_json(path)


def case_reading(settings, rows=20_000):
    """Opening a rollout file, all its checks included, beside json.loads on every line."""
    path = make_rollouts(
        RUNS / "bench" / "reading.jsonl",
        128,
        [LENGTHS[n % 8] for n in range(8)],
        questions=rows // 8,
    )
    results, _ = compete(
        [(name, worker("reading", path, name), 1) for name in ("read_rollouts", "json.loads")],
        settings.pairs,
    )
    return [
        {"contestant": name, **result, "rows_per_second": rows / result["seconds"]}
        for name, result in results.items()
    ]


def case_ranks(settings, questions=4):
    """Two ranks of one thread beside one rank of one thread: the ratio is how much quicker two are; 32 completions a step."""
    folder = RUNS / "bench" / "llama-58m"
    make_model(folder)
    path = make_rollouts(RUNS / "bench" / "rollouts-ranks.jsonl", 64, LENGTHS, questions)
    one = worker("ours", folder, path)
    two = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *one[1:],
    ]
    results, _ = compete([("two ranks", two, 1), ("one rank", one, 1)], settings.pairs)
    tokens = questions * (64 + sum(LENGTHS))
    return [
        {"contestant": name, **result, "tokens_per_second": tokens / result["seconds"]}
        for name, result in results.items()
    ]


def case_growth(settings):
    """Tokens per second of a training step for wider models, and for longer completions."""
    points = [("width", width, width, LENGTHS) for width in (128, 256, 512, 1024)]
    points += [("completion", length, 512, [length] * 8) for length in (64, 128, 256, 512, 1024)]
    rows = []
    for what, value, width, completions in progress(points, what="growth"):
        folder = RUNS / "bench" / f"llama-{width}"
        model, path = (
            make_model(folder, width),
            make_rollouts(RUNS / "bench" / "rollouts-growth.jsonl", 64, completions),
        )
        results, rate = compete(
            [(f"{what} {value}", worker("ours", folder, path), settings.threads)], settings.pairs
        )
        seconds, needed = (
            results[f"{what} {value}"]["seconds"],
            useful_flops(model, 64, completions) / 1e9,
        )
        tokens = 64 + sum(completions)
        rows.append(
            {
                what: value,
                "weights_millions": model.num_parameters() / 1e6,
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "gflop_per_token": needed / tokens,
                "of_matmul_rate": needed / seconds / rate,
                "memory_gib": results[f"{what} {value}"]["memory_gib"],
            }
        )
    draw_growth(rows)
    return rows


def draw_growth(rows):
    """Tokens per second against model size and length, on double logarithmic axes, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True)
    for axes, what, label in zip(
        both, ("width", "completion"), ("million weights", "tokens of a completion")
    ):
        points = [row for row in rows if what in row]
        x = [row["weights_millions" if what == "width" else what] for row in points]
        axes.loglog(x, [row["tokens_per_second"] for row in points], "o-", label="measured")
        axes.loglog(
            x,
            [
                points[0]["tokens_per_second"]
                * points[0]["gflop_per_token"]
                / row["gflop_per_token"]
                for row in points
            ],
            "--",
            label="as the operations of a token grow",
        )
        axes.set(xlabel=label, ylabel="tokens per second")
        axes.legend()
    figure.savefig(RUNS / "growth.png", dpi=120, bbox_inches="tight")


# ---- what the contestants do ----


def work_ours(model, rollouts):
    """train.py's own loop; between its steps it waits for its turn, where it would measure."""
    import train

    def wait(_):
        if not gather(rank() > 0 or my_turn())[0]:
            os._exit(0)
        return {}

    with open(rollouts) as file:
        sequences = len(file.readlines())
    train.train(
        train.Settings(
            model=model,
            rollouts=rollouts,
            out=f"{rollouts}.run-{os.getppid()}",
            mu="start",
            optimizer="adamw",
            learning_rate=1e-5,
            sequences=sequences,
            epochs=10**6,
            checkpoint_every=0,
            eval_every=1,
        ),
        evaluate=wait,
    )


def work_plain(model, rollouts):
    """What one would write first: padded rows, all logits, one loss."""
    from transformers import AutoModelForCausalLM

    import topr

    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.0)
    with open(rollouts) as file:
        rows = [json.loads(line) for line in file]
    pad = lambda lists: torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(values) for values in lists], batch_first=True
    )
    ids = pad([row["prompt_ids"] + row["completion_ids"] for row in rows])
    exists = pad([[1] * (len(row["prompt_ids"]) + len(row["completion_ids"])) for row in rows])
    mask = pad([[0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"]) for row in rows])[
        :, 1:
    ].bool()
    reward = torch.tensor([row["reward"] for row in rows])

    def logprobs():
        logits = model(input_ids=ids, attention_mask=exists).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]

    with torch.no_grad():
        mu = logprobs()
    while my_turn():
        topr.topr_loss(logprobs(), mu, reward, mask)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def sampling_work(folder, wanted=24):
    """(model, prompts): the head's bias makes the end token so likely that completions have `wanted` tokens in the mean."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head = torch.nn.Linear(*model.lm_head.weight.T.shape)
    head.weight.data, head.bias.data = (
        model.lm_head.weight.data,
        torch.zeros(model.config.vocab_size),
    )
    head.bias.data[0] = math.log(
        model.config.vocab_size / wanted
    )  # the other logits are nearly 0: lengths are geometric
    model.lm_head, rng = head, random.Random(0)
    return model, [
        [rng.randrange(1, model.config.vocab_size) for _ in range(rng.randint(8, 96))]
        for _ in range(64)
    ]


def work_sample(folder):
    import eval as evaluation
    from engine import sampler
    from engine.parallel import start_ranks

    start_ranks()
    model, prompts = sampling_work(folder)
    settings = evaluation.Settings(samples=16, max_new_tokens=96, batch_size=256)
    questions = [
        {"id": str(number), "prompt_ids": prompt, "stop": [], "key": number}
        for number, prompt in enumerate(prompts)
    ]
    longest_first = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    tokenizer = SimpleNamespace(eos_token_id=0)
    while my_turn():
        with progress(total=1024) as bar:
            written = sampler.generate(model, tokenizer, questions, longest_first, settings, bar)
            assert sum(len(completions) for _, completions in written) == 1024


@torch.no_grad()
def work_generate(folder, rows=256):
    """As many rows at once as eval.py has."""
    model, prompts = sampling_work(folder)
    torch.manual_seed(0)
    while my_turn():
        for first in range(0, len(prompts), rows // 16):
            part = prompts[first : first + rows // 16]
            longest = max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in part])
            exists = torch.tensor(
                [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part]
            )
            model.generate(
                input_ids=ids,
                attention_mask=exists,
                do_sample=True,
                top_k=0,
                max_new_tokens=96,
                num_return_sequences=16,
                pad_token_id=0,
            )


def work_reading(path, how):
    from engine.rollouts import read_rollouts

    while my_turn():
        if how == "read_rollouts":
            read_rollouts(path)
        else:
            with open(path) as file:
                for line in file:
                    json.loads(line)


# ---- the whole ----


CASES = {
    name.removeprefix("case_"): case
    for name, case in list(globals().items())
    if name.startswith("case_")
}


def setup():
    """The peers' own environment: they never become needs of the project."""
    subprocess.run([sys.executable, "-m", "venv", PEERS.parents[1]], check=True)
    requirements = [f"torch=={torch.__version__.split('+')[0]}", "trl", "bm25s", "numba"]
    subprocess.run(
        [
            PEERS,
            "-m",
            "pip",
            "install",
            "-q",
            *requirements,
            "-r",
            HERE.parent / "requirements.txt",
        ],
        check=True,
    )


def main():
    words = (
        [word for word in sys.argv[1:] if not word.startswith("-")]
        if sys.argv[1:2] == ["worker"]
        else []
    )
    if words:
        return globals()[f"work_{words[1]}"](*words[2:])
    names = []
    while sys.argv[1:] and not sys.argv[1].startswith("-"):
        names.append(sys.argv.pop(1))
    if names == ["setup"]:
        return setup()
    if set(names) - set(CASES):
        raise Problem(
            f"no case {', '.join(sorted(set(names) - set(CASES)))}: setup, or some of {', '.join(CASES)}"
        )
    settings, path = parse(Settings, description=__doc__), RUNS / "bench.json"
    for name in names or CASES:
        load, rows = os.getloadavg()[0], CASES[name](settings)
        columns = list({column: None for row in rows for column in row})
        say(f"\n{name}: {CASES[name].__doc__}  (load before: {load:.1f})")
        cells = [[row.get(column, "") for column in columns] for row in rows]
        say(table([column.replace("_", " ") for column in columns], cells))
        kept = read_json(path) if path.exists() else {}
        write_json(
            path,
            {**kept, name: {"load": load, "settings": dataclasses.asdict(settings), "rows": rows}},
        )


if __name__ == "__main__":
    run_main(main)
