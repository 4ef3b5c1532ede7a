"""The two pictures of the README's lesson, for which matplotlib is needed.

    torchrun train.py                       the embedded job, if runs/apples-seed0/topr is not there
    python experiments/pictures.py          docs/weights.png and docs/ratios.png
"""

import sys
from pathlib import Path

import numpy as np
import torch

if not __package__:  # started as a script: find the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import topr
import train
from engine import batches, sampler
from engine.common import Problem, run_main, say
from engine.run_folder import finished
from experiments.common import picture

FOLDER = "runs/apples-seed0"
COLOURS = {"topr": "#1f4e9c", "reinforce": "#c92a2a", "is": "#b5651d", "tis": "#a9c46c",
           "sft": "#2f9e44"}
STYLES = {"topr": "-", "reinforce": ":", "is": "-.", "tis": (0, (4, 2)), "sft": "--"}


def log_ratios(policy):
    """d of each rollout under a policy, and which rollouts are right."""
    settings = train.Settings(model=policy, rollouts=f"{FOLDER}/rollouts-512x16.jsonl")
    model, tokenizer = sampler.load_model(policy, settings, "cpu")
    device = torch.device("cpu")
    data = batches.read_data(settings, model, tokenizer, device)
    rows = np.arange(len(data.lines))
    scores = batches.score_rows(settings, train.LogProbs(model, "float32"), data, rows, device)
    differences = np.add.reduceat(scores - data.logprobs, data.starts[:-1])  # [rows]
    return differences, data.rewards > 0


def draw_weights(path):
    d = torch.linspace(-4, 2, 601)
    with picture(path, 1, 2) as axes:
        for side, sign, title in zip(axes, (1.0, -1.0), ("a right answer", "a wrong answer")):
            for name, taper in topr.TAPERS.items():
                weight = topr.taper_weights(d, torch.full_like(d, sign), taper)
                side.plot(d, weight, color=COLOURS[name], linestyle=STYLES[name], label=name,
                          linewidth=2.5)
            side.set(xlabel="d = log pi/mu of the sequence", ylabel="weight", title=title,
                     ylim=(-0.1, 3))


def draw_ratios(path):
    bins = np.linspace(-12, 5, 35)
    with picture(path, 1, 2) as axes:
        for side, policy in zip(axes, ("base", "topr")):
            d, right = log_ratios(f"{FOLDER}/{policy}")
            for chosen, name, colour in ((right, "right answers", "#2f9e44"),
                                         (~right, "wrong answers", "#c92a2a")):
                side.hist(d[chosen].clip(-12, 5), bins, alpha=0.6, label=name, color=colour,
                          weights=np.full(chosen.sum(), 1 / chosen.sum()))
            title = "before training" if policy == "base" else "after TOPR"
            side.set(xlabel="d (below -12: at -12)", ylabel="share of them", title=title)


def main():
    if not finished(f"{FOLDER}/topr"):
        raise Problem(f"{FOLDER}/topr is missing: torchrun train.py makes it")
    draw_weights("docs/weights.png")
    draw_ratios("docs/ratios.png")
    say("docs/weights.png and docs/ratios.png")


if __name__ == "__main__":
    run_main(main)
