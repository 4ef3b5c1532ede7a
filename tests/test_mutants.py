"""The mistakes of other public versions, made on purpose: each must fail a test of test_topr.py.

Run with -s to see the list.
"""

import sys
import types
from pathlib import Path

import pytest

import test_topr

SOURCE = (Path(__file__).parents[1] / "topr.py").read_text()
WEIGHTS = "positive = log_ratio.clamp(*log_pos).exp()"
NEGATIVE = "negative = log_ratio.clamp(*log_neg).exp()"
RATIO = "differences.detach().sum(-1)"
ATTACHED = {"    log_ratio = log_ratio.detach()\n": "", RATIO: "differences.sum(-1)"}
LOSS = "-((coefficient * logp).sum(-1) / length).sum()"
MUTANTS = {  # what is done wrong: {text: replacement}
    "weights not detached": ATTACHED,
    "token ratio": {"ratios[taper.ratio]": 'ratios["token"]'},
    "ratio divided by length": {"ratios[taper.ratio]": 'ratios["mean"]'},
    "mean ratio that is not divided": {"(log_ratio / length)[:, None]": "log_ratio[:, None]"},
    "token ratio that is averaged": {
        '"token": differences': '"token": (log_ratio / length)[:, None]'
    },
    "token weights averaged before they weigh": {
        "advantage[:, None] * weight": "advantage[:, None] * weight.mean(-1, keepdim=True)"
    },
    "clip after exp, attached": {
        **ATTACHED,
        WEIGHTS: "positive = log_ratio.exp().clamp(*taper.pos)",
        NEGATIVE: "negative = log_ratio.exp().clamp(*taper.neg)",
    },
    "clip after exp, as a product of token ratios": {
        RATIO: "differences.detach().exp().prod(-1).log()"
    },
    "mean over the micro-batch": {f"{LOSS} / count": f"{LOSS} / len(reward)"},
    "mu re-anchored on the current weights": {
        "    advantage = reward - baseline": "    mu_logp = logp.detach()\n"
        "    advantage = reward - baseline"
    },
    "limits by the sign of R": {
        "ratios[taper.ratio], advantage[:, None]": "ratios[taper.ratio], reward[:, None]"
    },
    "multiplied by the mask": {"masked_fill(vanished | ~mask, 0.0)": "mul(mask)"},
    "mean over tokens of the batch": {
        "logp).sum(-1) / length": "logp).sum(-1) * len(length) / length.sum()"
    },
    "no length normalisation": {"logp).sum(-1) / length": "logp).sum(-1)"},
    "sums before differences": {
        RATIO: "((logp.detach() * mask).sum(-1) - (mu_logp * mask).sum(-1))"
    },
}


def load(changes):
    source = SOURCE
    for text, replacement in changes.items():
        assert text in source, f"topr.py no longer holds {text!r}: mend the mutant"
        source = source.replace(text, replacement)
    module = types.ModuleType("mutant")
    sys.modules["mutant"] = module  # dataclasses look their module up
    exec(compile(source, "mutant", "exec"), module.__dict__)
    return module


def cases_of_the_loss():
    """(name, call) for every test of test_topr.py, with each of its parameters."""
    for name, test in vars(test_topr).items():
        # the last one is too slow to run for every mutant
        if name.startswith("test_") and name != "test_the_surrogate_is_bounded":
            cases = [{}]
            for mark in getattr(test, "pytestmark", []):
                names = [part.strip() for part in mark.args[0].split(",")]
                values = [value if len(names) > 1 else (value,) for value in mark.args[1]]
                cases = [{**case, **dict(zip(names, value))} for case in cases for value in values]
            for case in cases:
                yield name, lambda module, test=test, case=case: test(module, **case)


def killers(module):
    killed = []
    for name, run in cases_of_the_loss():
        try:
            run(module)
        except (AssertionError, RuntimeError, ValueError, pytest.fail.Exception):
            killed.append(name)
    return sorted(set(killed))


def test_the_unchanged_source_passes():
    assert killers(load({})) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    killed = killers(load(MUTANTS[name]))
    print(f"\n{name}: caught by {', '.join(killed) or 'NOTHING'}")
    assert killed
