"""What train.py says of a run: each line from numbers that provoke it, and from no others."""

from types import SimpleNamespace

import numpy as np
import pytest

import train
from engine import advice

HEALTHY = {
    "loss": 0.1,
    "d_positive": 0.2,
    "d_negative": -1.0,
    "negative_weight": 0.4,
    "negatives_gone": 0.1,
}
SILENT = {"d_positive": None, "d_negative": None}  # a step with completions of one kind


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"negative_weight": 0.97, "d_negative": -0.05}, "triple --learning-rate"),
        ({"d_positive": -0.6, "d_negative": -0.7}, "--positive-share 0.5"),
        ({"negatives_gone": 0.95}, "95% of the negatives are gone"),
        ({}, ""),
        (SILENT, ""),
        ({"negative_weight": 0.97}, ""),
        ({"negative_weight": 0.9, "d_negative": -0.05}, ""),
        ({"d_positive": -0.6, "d_negative": -0.4}, ""),
        ({"d_positive": -0.4}, ""),
        ({"negatives_gone": 0.85}, ""),
    ],
)
def test_advice_of_a_log(changes, said):
    log = [{"step": 0, "measured": {}}, *[{**HEALTHY, **changes}] * advice.LOOK_AT]
    lines = list(advice.of_log(log))
    assert len(lines) == bool(said) and all(said in line for line in lines)


def test_it_is_of_the_latest_steps():
    bad = {**HEALTHY, "negatives_gone": 1.0}
    assert "gone" in "".join(advice.of_log([HEALTHY] + [bad] * 5))
    assert not list(advice.of_log([bad] + [HEALTHY] * 5))
    # without log mu d is absent, and the weights of reinforce are always 1
    without = {"loss": 0.1, "negative_weight": 1.0, "negatives_gone": 0.0}
    assert not list(advice.of_log([without]))


@pytest.mark.parametrize(
    "changes, share, said",
    [
        ({}, 0.2, True),
        ({}, 0.4, False),
        ({"loss": "sft"}, 0.2, False),
        ({"baseline": -0.5}, 0.2, False),
        ({"positive_share": 0.5}, 0.2, False),
    ],
)
def test_advice_before_the_first_step(changes, share, said):
    _, *lines = advice.before_the_first_step(train.Settings(**changes), data_of(share))
    assert len(lines) == said and all("only 20%" in line for line in lines)


def data_of(share):
    rewards = np.where(np.arange(10) < 10 * share, 1.0, -1.0)
    return SimpleNamespace(rewards=rewards, units=np.arange(10)[:, None], silent=np.zeros(10, bool))


@pytest.mark.parametrize(
    "loss, share, said", [("topr", 0, 1), ("topr", 1, 1), ("sft", 0, 1), ("sft", 1, 0)]
)
def test_rewards_of_one_sign_are_named(loss, share, said):
    """Demonstrations, which are all positive, are what sft is for."""
    settings = train.Settings(loss=loss, baseline=0.1)
    _, *lines = advice.before_the_first_step(settings, data_of(share))
    assert len(lines) == said and all("the same sign" in line for line in lines)


def test_a_run_says_which_settings_differ_from_the_defaults():
    settings = train.Settings(
        model="m", out="o", learning_rate=1e-5, plain_prompt=True, loss="topr"
    )
    said = advice.differing(settings)
    assert "model=m, out=o" in said and "learning_rate=1e-05" in said
    assert "plain_prompt=True" in said and "loss" not in said and "seed" not in said
