"""The learning rate for a model's size: the best of a grid, and what the log says at step 20."""

from experiments import common, pretrained

GRIDS = {  # {size: (base policy, learning rates)}
    "0.14 million": ("small", common.RATES),
    "0.7 million": ("larger", common.RATES),
    "10 million": ("largest", (3e-5, 1e-4, 3e-4)),
    "135 million": ("pretrained", (2e-6, 6e-6, 2e-5))}
OPTIMIZERS = ("adamw", "adafactor")
SHOWN = 20  # the step to look at
MEASURES = ("pass@1", "negative_weight")  # the weight in the log at step 20
PANELS = 1


def run(settings):
    sizes = ["0.14 million"] if settings.quick else list(GRIDS)
    if "135 million" in sizes:
        pretrained.prepare(settings)
    jobs = [(size, optimizer, rate) for size in reversed(sizes)
            for optimizer in OPTIMIZERS for rate in GRIDS[size][1]]
    found = common.each(settings, run_rate, jobs)
    return {"arms": {f"{size}, {optimizer}, {rate:g}": one
                     for (size, optimizer, rate), one in zip(jobs, found)}}


def run_rate(size, optimizer, rate):
    """pass@1 on validation questions after a pass of TOPR, and the log of step 20."""
    base, _ = GRIDS[size]
    if base == "pretrained":  # the two larger rates with AdamW are runs of pretrained.py, too
        other = {} if optimizer == "adamw" else {"optimizer": optimizer}
        arm = {**pretrained.MAIN[pretrained.BEST], **other}
        measures = pretrained.run_arm(0, arm, rate, "validation")
        _, log = pretrained.train_arm(0, arm, rate)
    else:
        # 2,400 rollouts of which a fifth is right, whatever the size
        arm = {"loss": "topr", "optimizer": optimizer, "base": base, "positives": 0.2, "epochs": 1}
        measures = common.run_arm(0, arm, rate, "validation")
        _, log = common.train_arm(0, arm, rate)
    passed = measures.get("validation") or measures["pass@1"]
    return {"learning_rate": rate, "pass@1": [passed],
            "negative_weight": [log[SHOWN - 1]["negative_weight"]]}


def draw(result, ax):
    for size, marker in zip(GRIDS, "osD^"):
        for optimizer, dashes in zip(OPTIMIZERS, "-:"):
            series = f"{size}, {optimizer}"
            runs = [arm for name, arm in result["arms"].items() if name.startswith(series)]
            ax.plot([arm["learning_rate"] for arm in runs], [arm["pass@1"] for arm in runs],
                    dashes, marker=marker, label=series)
    ax.set(xscale="log", xlabel="learning rate", ylabel="pass@1")


def claims(result):
    return []  # the paper says nothing of the rates of other sizes
