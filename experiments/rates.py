"""The learning rate for a model's size: the best of a grid, and what the log says at step 20."""

from experiments import common, pretrained

GRIDS = {  # {size: (base policy, learning rates)}
    "0.14 million": ("small", common.RATES),
    "0.7 million": ("larger", common.RATES),
    "10 million": ("largest", (3e-5, 1e-4, 3e-4)),
    "135 million": ("pretrained", (2e-6, 6e-6, 2e-5)),
}
OPTIMIZERS = ("adamw", "adafactor")
SHOWN = 20  # the step to look at
MEASURES = ("pass@1", "negative_weight")  # the weight in the log at step 20


def run(settings):
    sizes = ["0.14 million"] if settings.quick else list(GRIDS)
    if "135 million" in sizes:
        pretrained.prepare(settings)
    jobs = {
        f"{size}, {optimizer}, {rate:g}": common.submit(settings, run_rate, size, optimizer, rate)
        for size in reversed(sizes)
        for optimizer in OPTIMIZERS
        for rate in GRIDS[size][1]
    }
    return {"arms": {name: job.result() for name, job in jobs.items()}}


def run_rate(size, optimizer, rate):
    """pass@1 on validation questions after a pass of TOPR, and the log of step 20."""
    base, _ = GRIDS[size]
    if base == "pretrained":  # the two larger rates with AdamW are runs of pretrained.py, too
        other = {} if optimizer == "adamw" else {"optimizer": optimizer}
        source, arm = pretrained, {**pretrained.MAIN[pretrained.BEST], **other}
    else:  # 2,400 rollouts of which a fifth is right, whatever the size
        source, arm = (
            common,
            {"loss": "topr", "optimizer": optimizer, "base": base, "positives": 0.2, "epochs": 1},
        )
    measures = source.run_arm(0, arm, rate, "validation")
    _, log = source.train_arm(0, arm, rate)
    return {
        "learning_rate": rate,
        "pass@1": [measures.get("pass@1", measures["score"])],
        "negative_weight": [log[SHOWN - 1]["negative_weight"]],
    }


def draw(result, ax):
    for size in GRIDS:
        for optimizer, dashes in zip(OPTIMIZERS, ("o-", "s--")):
            series = f"{size}, {optimizer}"
            points = [
                (arm["learning_rate"], *arm["pass@1"])
                for name, arm in result["arms"].items()
                if name.startswith(series)
            ]
            ax.plot(*zip(*points), dashes, label=series)
    ax.set(xscale="log", xlabel="learning rate", ylabel="pass@1")


def claims(result):
    return []  # the paper says nothing of the rates of other sizes
