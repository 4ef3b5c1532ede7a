"""The learning rate for a model's size: the best of a grid, and what the log says at step 20."""

from engine.common import table
from experiments import common, pretrained

GRIDS = {  # {size: (base policy, learning rates)}
    "0.14 million": ("small", common.RATES),
    "0.7 million": ("larger", common.RATES),
    "10 million": ("largest", (3e-5, 1e-4, 3e-4)),
    "135 million": ("pretrained", (2e-6, 6e-6, 2e-5))}
OPTIMIZERS = ("adamw", "adafactor")
SHOWN = 20  # the step to look at
FIELDS = ("d_mean", "negative_weight", "gradient_norm")
PANELS = 1


def run(settings):
    sizes = ["0.14 million"] if settings.quick else list(GRIDS)
    if "135 million" in sizes:
        pretrained.prepare(settings)
    runs = {f"{size}, {optimizer}": common.each(settings, run_rate, [
                (settings, GRIDS[size][0], optimizer, rate) for rate in GRIDS[size][1]])
            for size in reversed(sizes) for optimizer in OPTIMIZERS}
    return {"runs": runs}


def run_rate(settings, base, optimizer, rate):
    """pass@1 on validation questions after a pass of TOPR, and the log of step 20."""
    if base == "pretrained":  # the two larger rates with AdamW are runs of pretrained.py, too
        other = {} if optimizer == "adamw" else {"optimizer": optimizer}
        arm = {**pretrained.MAIN[pretrained.BEST], **other}
        measures = pretrained.run_arm(settings, 0, arm, rate, "validation")
        _, log = pretrained.train_arm(settings, 0, arm, rate)
    else:
        # 2,400 rollouts of which a fifth is right, whatever the size
        arm = {"loss": "topr", "optimizer": optimizer, "base": base, "positives": 0.2, "epochs": 1}
        measures = common.run_arm(0, arm, rate, "validation")
        _, log = common.train_arm(0, arm, rate)
    passed = measures.get("validation") or measures["pass@1"]
    return {"rate": rate, "pass@1": passed, "invalid": measures["invalid"],
            **{field: log[SHOWN - 1][field] for field in FIELDS}}


def show(result):
    rows = [(name, f"{one['rate']:g}", *list(one.values())[1:])
            for name, runs in result["runs"].items() for one in runs]
    fields = [f"{field} at step {SHOWN}" for field in FIELDS]
    return table(("size, optimizer", "rate", "pass@1", "invalid", *fields), rows)


def draw(result, axes):
    (ax,) = axes
    for number, (name, runs) in enumerate(result["runs"].items()):
        marker, dashes = "osD^"[number // 2], "-:"[number % 2]
        ax.plot([one["rate"] for one in runs], [one["pass@1"] for one in runs], dashes,
                marker=marker, label=name)
    ax.set(xscale="log", xlabel="learning rate", ylabel="pass@1")


def claims(result):
    return []  # the paper says nothing of the rates of other sizes
