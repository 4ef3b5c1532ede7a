"""The sampler against transformers' own, the file it writes, and the measures against independent
computations."""

import dataclasses
import itertools
import json
import math
import random
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import eval as evaluation
from conftest import ROOT, apples_questions, shell, torchrun
from data import load_task
from engine import tasks
from engine.rollouts import read_rollouts, write_rollouts
from engine import sampler
from engine import measures
from engine.measures import measure
from engine.common import Problem

FAMILIES = dict(
    llama={},
    qwen2={},
    qwen3={"head_dim": 8},
    mistral={"sliding_window": 6},
    gemma2={"head_dim": 8, "sliding_window": 6},
    gemma3_text={"head_dim": 8, "sliding_window": 6},
    gpt2={"n_embd": 32, "n_layer": 2, "n_head": 4},
    gpt_neox={"num_key_value_heads": None},
    phi={"num_key_value_heads": None},
    cohere={"logit_scale": 0.3},
    granite={"logits_scaling": 3.0},
)


def random_model(kind, seed=0):
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        max_position_embeddings=128,
    )
    sizes = {k: v for k, v in {**sizes, **FAMILIES[kind]}.items() if v is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def completions(model, prompts, settings, ends=(2,), generate=sampler.generate):
    model.generation_config.eos_token_id = list(ends)
    tokenizer = SimpleNamespace(eos_token_id=2)
    questions = [{"id": str(number), "prompt": "", "prompt_ids": prompt, "stop": []}
                 for number, prompt in enumerate(prompts)]
    todo, bar = range(len(prompts)), sampler.progress(total=0)
    return dict(generate(model, tokenizer, questions, todo, settings, 0, bar))


PROMPTS = [
    [1, 5, 6, 7],
    [1, 9],
    [1, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    [1, 20, 21],
    [1, 30, 31, 32, 33, 34],
]


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_is_what_generate_writes(kind):
    """Prompts of mixed length, rows that leave and rows that enter, sliding windows, learned
    positions."""
    model = random_model(kind)
    settings = evaluation.Settings(samples=1, temperature=0.0, max_new_tokens=12, batch_size=2)
    written = completions(model, PROMPTS, settings)
    for number, prompt in enumerate(PROMPTS):
        theirs = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=2
        )[0, len(prompt) :]
        assert written[number][0] == theirs.tolist()


@pytest.mark.parametrize("kind", FAMILIES)
def test_sampled_is_what_generate_writes(kind):
    """With the same random numbers, and the logits of transformers' own loop, a prompt at a time.

    State-space and hybrid models, which have no other way, are in tests/test_models.py.
    """
    model = random_model(kind)
    settings = evaluation.Settings(samples=3, max_new_tokens=12, batch_size=5, temperature=0.8)
    theirs = completions(model, PROMPTS, settings, generate=sampler.generate_alone)
    assert completions(model, PROMPTS, settings) == theirs
    assert len({tuple(tokens) for group in theirs.values() for tokens in group}) > 10


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_same_completions_for_any_batch_size(kind):
    model = random_model(kind)
    results = [
        completions(
            model,
            PROMPTS,
            evaluation.Settings(samples=3, max_new_tokens=10, batch_size=size, top_k=20, top_p=0.9),
        )
        for size in (1, 2, 4, 100)
    ]
    assert all(result == results[0] for result in results)
    assert len({tuple(tokens) for group in results[0].values() for tokens in group}) > 5


def test_sampling_follows_the_softmax():
    """4,000 first tokens against the model's own probabilities; top-k and top-p leave nothing
    outside."""
    model = random_model("llama")
    probabilities = model(torch.tensor([PROMPTS[0]])).logits[0, -1].div(0.7).softmax(-1)
    for options, kept in (
        (dict(temperature=0.7), range(61)),
        (dict(temperature=0.7, top_k=5), probabilities.topk(5).indices.tolist()),
    ):
        settings = evaluation.Settings(samples=4000, max_new_tokens=1, batch_size=4000, **options)
        counts = Counter(tokens[0] for tokens in completions(model, [PROMPTS[0]], settings)[0])
        expected = {token: probabilities[token].item() for token in kept}
        total = sum(expected.values())
        assert set(counts) <= set(kept)
        for token, p in expected.items():
            p /= total
            assert abs(counts[token] / 4000 - p) < 5 * math.sqrt(p * (1 - p) / 4000) + 1e-3
    order = probabilities.sort(descending=True)
    nucleus = order.indices[: int((order.values.cumsum(0) < 0.5).sum()) + 1].tolist()
    settings = evaluation.Settings(
        samples=2000, max_new_tokens=1, batch_size=2000, temperature=0.7, top_p=0.5
    )
    assert {tokens[0] for tokens in completions(model, [PROMPTS[0]], settings)[0]} == set(nucleus)


def test_several_end_tokens_and_cut_completions():
    model = random_model("llama")
    ends = (2, 7, 11, 13, 17)
    settings = evaluation.Settings(samples=20, max_new_tokens=8, batch_size=16)
    for tokens in completions(model, PROMPTS[:1], settings, ends)[0]:
        assert (tokens[-1] in ends) or len(tokens) == 8
        assert not set(tokens[:-1]) & set(ends)


ROWS = """
import sys
import train
from data import load_task
from engine import tasks
from engine import parallel, sampler
from engine.common import run_main
model, out, samples, seed = sys.argv[1:]

def main():
    parallel.start_ranks()
    settings = train.Settings(samples=int(samples), seed=int(seed), max_new_tokens=8)
    task = load_task("apples")
    questions = lambda tokenizer: tasks.load_questions(task, "train", 5, 0, tokenizer, settings)
    rows = sampler.sample_once(settings, model, questions, task.grade, out)
    print("rows", parallel.gather((len(rows), len(set(row["id"] for row in rows)))), flush=True)

run_main(main)
"""


@pytest.mark.slow
def test_only_the_first_rank_holds_the_rows(tiny, tmp_path):
    """Each of 8 ranks held all rows of MATH x 32: 8 GiB of each. Reading and extending, too."""
    script, out = tmp_path / "rows.py", tmp_path / "rows.jsonl"
    script.write_text(ROWS)
    for samples in (2, 2, 3):  # made, read, extended
        result = torchrun(2, script, tiny, out, samples, 0)
        assert f"rows [({5 * samples}, 5), (0, 0)]" in result.stdout, result.stdout
    alone = shell(sys.executable, script, tiny, tmp_path / "alone.jsonl", 3, 0)
    assert "rows [(15, 5)]" in alone.stdout, alone.stdout
    texts = [[row["completion"] for row in read_rollouts(path)]
             for path in (out, tmp_path / "alone.jsonl")]
    assert texts[0] == texts[1]
    result = torchrun(2, script, tiny, out, 3, 1)  # another seed: the first rank alone finds it
    assert result.stdout.count("holds other rollouts: seed is 0 there and 1") == 1, result.stdout
    assert result.returncode != 0 and "has died" not in result.stdout, result.stdout


@pytest.mark.slow
def test_the_file_is_the_same_for_any_batch_size_and_number_of_ranks(tiny, tmp_path):
    """Byte for byte, logprobs included."""
    files = []
    for name, ranks, options in (
        ("a", 0, ["--batch-size", 256]),
        ("b", 0, ["--batch-size", 3]),
        ("c", 2, ["--batch-size", 7]),
    ):
        out = tmp_path / f"{name}.jsonl"
        command = [
            ROOT / "eval.py",
            "--model",
            tiny,
            "--task",
            "apples",
            "--questions",
            13,
            "--samples",
            4,
            "--max-new-tokens",
            30,
            "--out",
            out,
            *options,
        ]
        result = torchrun(ranks, *command) if ranks else shell(sys.executable, *command)
        assert result.returncode == 0 and "pass@4" in result.stdout, result.stdout
        files.append(out.read_bytes())
        assert json.loads((tmp_path / f"{name}.json").read_text())["completions"] == 52
    assert all(file == files[0] for file in files) and files[0].count(b"\n") == 52
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{n}.{e}" for n in "abc" for e in ("json", "jsonl")
    )


def test_logprobs_are_those_of_the_plain_softmax(tiny, tmp_path):
    """Whatever temperature, top-k and top-p chose the tokens; the end token counts when it was
    sampled."""
    model, tokenizer = sampler.load_model(tiny, evaluation.Settings(), "cpu")
    settings = evaluation.Settings(
        model=tiny, questions=4, samples=3, max_new_tokens=25, temperature=0.5, top_k=10, top_p=0.9
    )
    questions = apples_questions(tokenizer, settings, settings.questions)
    rows = sampler.sample_rollouts(
        model,
        tokenizer,
        questions,
        load_task("apples").grade,
        settings,
        str(tmp_path / "r.jsonl"),
    )
    assert rows == read_rollouts(tmp_path / "r.jsonl")
    for row in rows:
        ids = row["prompt_ids"] + row["completion_ids"]
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(row["prompt_ids"])
        expected = [logp[t - 1, ids[t]].item() for t in range(start, len(ids))]
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4)
        assert (row["finish"] == "stop") == (ids[-1] == tokenizer.eos_token_id)
        assert (
            tokenizer.decode(row["completion_ids"], skip_special_tokens=True) == row["completion"]
        )


def test_a_broken_off_run_goes_on(tiny, tmp_path, monkeypatch):
    """Finished questions are kept, a torn line is dropped, nothing is sampled twice."""
    model, tokenizer = sampler.load_model(tiny, evaluation.Settings(), "cpu")
    settings = evaluation.Settings(
        model=tiny, questions=9, samples=2, max_new_tokens=20, batch_size=4
    )
    questions, grade, graded = (
        apples_questions(tokenizer, settings, settings.questions),
        load_task("apples").grade,
        [],
    )

    def dying(question, text):
        graded.append(question["id"])
        if len(graded) == 9:
            raise KeyboardInterrupt
        return grade(question, text)

    out = str(tmp_path / "r.jsonl")
    with pytest.raises(KeyboardInterrupt):
        sampler.sample_rollouts(model, tokenizer, questions, dying, settings, out)
    assert not (tmp_path / "r.jsonl").exists()
    (part,) = tmp_path.glob("*.part-*")
    part.write_bytes(part.read_bytes()[:-10])  # and the machine lost power
    later = []
    rows = sampler.sample_rollouts(
        model,
        tokenizer,
        questions,
        lambda q, t: (later.append(q["id"]), grade(q, t))[1],
        settings,
        out,
    )
    assert len(later) == 2 * (9 - 3) and len(rows) == 18
    assert rows == sampler.sample_rollouts(
        model, tokenizer, questions, grade, settings, str(tmp_path / "whole.jsonl")
    )
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_pass_at_k_by_enumeration():
    for n in (1, 3, 6):
        for right in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(range(n), k))
                expected = sum(any(i < right for i in subset) for subset in subsets) / len(subsets)
                assert measures.pass_at_k(n, right, k) == pytest.approx(expected)


def test_majority_by_enumeration():
    """Over many draws of k, not the first k; a tie counts its share, invalid answers do not
    vote."""
    rng = random.Random(0)
    for _ in range(20):
        answers = [rng.choice(["5", "6", "7", None]) for _ in range(7)]
        for k in (1, 2, 4, 7):
            expected = []
            for subset in itertools.combinations(answers, k):
                votes = Counter(a for a in subset if a is not None).most_common()
                best = [a for a, count in votes if count == votes[0][1]]
                expected.append(("5" in best) / len(best) if best else 0.0)
            got = measures.majority_at_k(
                answers, [a == "5" for a in answers], k, random.Random(1), 4000
            )
            assert got == pytest.approx(sum(expected) / len(expected), abs=0.04)


def test_votes_are_counted_before_anything_looks_at_the_reference():
    """Merging only right spellings let five right "18" beat three "20" and three "20.00"."""
    answers = ["18"] * 5 + ["20"] * 3 + [None] + ["20.00"] * 3
    votes = measures.group_answers(answers, lambda a, b: float(a) == float(b))
    assert votes == [0] * 5 + [1] * 3 + [None] + [1] * 3
    right = [answer == "18" for answer in answers]
    assert measures.majority_at_k(votes, right, 12, random.Random(0), 1) == 0.0
    assert measures.majority_at_k(answers, right, 12, random.Random(0), 1) == 1.0
    rows = [
        dict(id="q", reward=1.0 if answer == "18" else -1.0, answer=answer) for answer in answers
    ]
    assert (
        measure(rows + rows[1:5], same_answer=lambda a, b: float(a) == float(b))["maj@16"]["mean"]
        == 1.0
    )
    assert measures.group_answers([None, None]) == [None, None]
    assert measures.majority_at_k([None, None], [False, False], 2, random.Random(0), 1) == 0.0


def test_measures_over_questions():
    rows = [
        dict(id="a", reward=1.0, answer="5", finish="stop"),
        dict(id="a", reward=-1.0, answer=None, finish="length"),
        dict(id="b", reward=1.0, answer="7", finish="stop"),
        dict(id="b", reward=1.0, answer="7", finish="stop"),
    ]
    measures = measure(rows)
    assert measures["questions"] == 2 and measures["completions"] == 4 and "tokens" not in measures
    assert measures["pass@1"]["mean"] == 0.75 and measures["invalid"]["mean"] == 0.25
    assert measures["cut off"]["mean"] == 0.25
    assert measures["pass@2"]["mean"] == 1.0 and measures["maj@2"]["mean"] == 1.0


def test_shares_have_wilsons_interval():
    """The normal interval of 0 of 20 was [0, 0], of 1 of 20 it began below 0."""
    for right, n in ((0, 20), (1, 20), (7, 20), (20, 20), (1, 1)):
        p, found = right / n, measures.interval([True] * right + [False] * (n - right))
        for end in (found["low"], found["high"]):  # where p is 1.96 standard errors from the end
            assert abs(p - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), abs=1e-6)
        assert 0 <= found["low"] <= p + 1e-9 and p - 1e-9 <= found["high"] <= 1
    assert measures.interval([2.0, 4.0])["low"] == pytest.approx(3 - 1.96)


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("p", [0.02, 0.05])
@pytest.mark.parametrize("samples, alike", [(1, 0.5), (16, 0.05), (16, 0.3), (16, 0.7)])
def test_intervals_cover(n, p, samples, alike):
    """95% intervals held the truth in as little as 57% of such cases; `alike`: correlation within
    a question."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(600):
        chances = rng.beta(p * (1 / alike - 1), (1 - p) * (1 / alike - 1), n)  # [questions]
        found = measures.interval(rng.binomial(samples, chances) / samples)
        covered += found["low"] <= p <= found["high"]
    assert covered / 600 > 0.88


def test_paired_intervals():
    """Shared difficulty cancels; equal pairs are not proof of no change; it covers."""
    before = np.linspace(0, 0.8, 50)
    found = measures.paired_interval(before, before + 0.1)
    assert found["mean"] == pytest.approx(0.1) and found["low"] > 0 and found["high"] < 0.2
    same = measures.paired_interval([0, 1] * 10, [0, 1] * 10)
    assert same["mean"] == 0 and same["low"] == -same["high"] < -0.05
    rng, covered = np.random.default_rng(0), 0
    for _ in range(600):
        ability = rng.random(40)
        before, after = rng.random(40) < ability * 0.5, rng.random(40) < ability * 0.7
        found = measures.paired_interval(before, after)
        covered += found["low"] <= 0.1 <= found["high"]
    assert covered / 600 > 0.93


def test_grading_an_existing_file(tmp_path):
    rows = [
        dict(id="a", prompt="?", completion="so\nThe answer is 5 .", reward=-1.0, gold="5"),
        dict(id="b", prompt="?", completion="no idea", reward=1.0, gold="5"),
    ]
    write_rollouts(tmp_path / "old.jsonl", rows)
    result = shell(
        sys.executable,
        ROOT / "eval.py",
        "--grade",
        tmp_path / "old.jsonl",
        "--out",
        tmp_path / "new.jsonl",
    )
    assert result.returncode == 0, result.stdout
    assert [(row["answer"], row["reward"]) for row in read_rollouts(tmp_path / "new.jsonl")] == [
        ("5", 1.0),
        (None, -1.0),
    ]
    assert json.loads((tmp_path / "new.json").read_text())["pass@1"]["mean"] == 0.5
    del rows[1]["gold"]
    write_rollouts(tmp_path / "old.jsonl", rows)
    with pytest.raises(Problem, match='old.jsonl: rollout 2 .* has no "gold"'):
        evaluation.regrade(str(tmp_path / "old.jsonl"), load_task("apples"))


def test_a_prompt_without_room_is_named(tiny):
    model, tokenizer = sampler.load_model(tiny, evaluation.Settings(), "cpu")
    settings = evaluation.Settings(model=tiny, questions=2, max_new_tokens=250)
    with pytest.raises(Problem, match="apples-test-0-0.*--max-new-tokens"):
        sampler.sample_rollouts(
            model,
            tokenizer,
            apples_questions(tokenizer, settings, settings.questions),
            None,
            settings,
        )
    assert dataclasses.asdict(settings)["samples"] == 16


def test_a_finished_file_is_reused_and_never_overwritten(tiny, tmp_path, capsys):
    """The same command again costs nothing; other settings under the same name are refused."""
    model, tokenizer = sampler.load_model(tiny, evaluation.Settings(), "cpu")
    wish = evaluation.Settings(model=tiny, questions=3, samples=2, max_new_tokens=8)
    questions, grade = (
        apples_questions(tokenizer, wish, wish.questions),
        load_task("apples").grade,
    )
    out = str(tmp_path / "rollouts.jsonl")
    first = sampler.sample_rollouts(model, tokenizer, questions, grade, wish, out)
    stamp = open(out, "rb").read()
    assert sampler.sample_rollouts(model, tokenizer, questions, grade, wish, out) == first
    assert "reusing" in capsys.readouterr().out
    for changes in (dict(temperature=0.5), dict(samples=1), dict(seed=1)):
        with pytest.raises(Problem, match="holds other rollouts"):
            sampler.sample_rollouts(
                model, tokenizer, questions, grade, dataclasses.replace(wish, **changes), out
            )
    assert open(out, "rb").read() == stamp
