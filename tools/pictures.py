"""Draws the picture of the README's lesson, for which matplotlib is needed.

torchrun train.py           the embedded job, if runs/apples-seed0/topr is not there
python tools/pictures.py    docs/ratios.png
"""

import sys
from pathlib import Path

import numpy as np

if not __package__:  # started as a script: find the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from engine import mu, run_folder
from engine.common import Problem, run_main
from experiments.common import picture

FOLDER = "runs/apples-seed0"


def log_ratios(policy):
    """d of each rollout under a policy, and which rollouts are right. two of [rows]"""
    settings = train.Settings(model=policy, rollouts=f"{FOLDER}/rollouts-512x16.jsonl", mu="file")
    _, data, _, policy, *_ = train.set_up(settings)
    scores = mu.score_rows(settings, policy, data)
    d = [(scores[number] - row.logprobs).sum() for number, row in enumerate(data.rows)]
    return np.array(d), data.rewards > 0


def draw_ratios(axes):
    titles = {"base": "before training", "topr": "after TOPR"}
    for side, policy in zip(axes, titles):
        d, right = log_ratios(f"{FOLDER}/{policy}")
        for chosen, name, colour in (
            (right, "right answers", "#2f9e44"),
            (~right, "wrong answers", "#c92a2a"),
        ):
            shown = d[chosen].clip(-12, 5)
            side.hist(
                shown,
                np.linspace(-12, 5, 35),
                alpha=0.6,
                label=name,
                color=colour,
                weights=np.full(len(shown), 1 / len(shown)),
            )
        side.set(xlabel="d (below -12: at -12)", ylabel="share of them", title=titles[policy])


def main():
    if not run_folder.finished(f"{FOLDER}/topr"):
        raise Problem(f"{FOLDER}/topr is missing: torchrun train.py makes it")
    with picture("docs/ratios.png", 2) as axes:
        draw_ratios(axes)


if __name__ == "__main__":
    run_main(main)
