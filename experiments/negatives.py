"""Figure 4: what the negatives add to the positives, and on which questions."""

import numpy as np

from experiments.common import bars, compare, difference, picture, run_arm, run_base, show_arms, spread, table, verdict

SHARES = {"TOPR, as sampled": dict(loss="topr"), "TOPR, share 0.33": dict(loss="topr", positive_share=0.33),
          "TOPR, share 0.5": dict(loss="topr", positive_share=0.5), "TOPR, share 0.75": dict(loss="topr", positive_share=0.75)}
GROUPS = {"none": (0, 0), "1 to 4": (1, 4), "5 to 16": (5, 16)}  # right answers of 16


def run(settings, each):
    seeds = range(settings.seeds)
    arms = compare(settings, each, run_arm, {"positives only": dict(loss="sft"), **SHARES}, "negatives")
    best = best_share(arms)
    right = {"base": each(run_base, [(seed,) for seed in seeds], "base policies: test")}
    for name, arm in (("positives only", arms["positives only"]), ("TOPR", arms[best])):
        jobs = [(seed, arm["settings"], arm["learning_rate"], "test") for seed in seeds]  # measured already: only read
        right[name] = each(run_arm, jobs, f"negatives: {name} by question")
    right = {name: np.array([one["right"] for one in runs]) for name, runs in right.items()}  # [seeds, questions] each
    return {"arms": arms, "best": best,
            "share of questions": {name: {group: [float(inside(one, group).mean()) for one in runs] for group in GROUPS}
                                   for name, runs in right.items()},
            "pass@1 by the base policy": {
                name: {group: [pass_in(one, before, group) for one, before in zip(runs, right["base"])] for group in GROUPS}
                for name, runs in right.items()}}


def best_share(arms):
    """By the validation questions; in the quick form there are none, and share 0.33 stands for it."""
    scores = {name: max(map(np.sum, arms[name]["validation"].values())) for name in SHARES}
    return max(scores, key=scores.get) if any(scores.values()) else "TOPR, share 0.33"


def inside(right, group):
    """Which questions have so many right answers. [questions]"""
    low, high = GROUPS[group]
    return (right >= low) & (right <= high)


def pass_in(right, before, group):
    """pass@1 on the questions where the base policy has so many right; None where there is no such question."""
    chosen = right[inside(before, group)]
    return float(chosen.mean() / 16) if len(chosen) else None


def show(result):
    rows = lambda part: [(name, *map(spread, groups.values())) for name, groups in result[part].items()]
    return "\n\n".join([
        show_arms(result["arms"], ("pass@1", "maj@16", "invalid"), f"best: {result['best']}"),
        table(("share of questions by right answers of 16", *GROUPS), rows("share of questions")),
        table(("pass@1 by the base policy's right answers of 16", *GROUPS), rows("pass@1 by the base policy"))])


def draw(result, path):
    arms, count = result["arms"], result["share of questions"]
    with picture(path, 1, 2) as (left, right):
        bars(left, list(GROUPS), {name: np.array([groups[group] for group in GROUPS]).T for name, groups in count.items()})
        left.set(xlabel="right answers of 16", ylabel="share of questions")
        bars(right, ["pass@1", "maj@16"], {name: np.array([arm["pass@1"], arm["maj@16"]]).T for name, arm in (
            ("positives only", arms["positives only"]), ("TOPR", arms[result["best"]]))})
        right.set(ylabel="share right", ylim=(0, 1))


def claims(result):
    arms, best, passed = result["arms"], result["best"], result["pass@1 by the base policy"]
    gains = {measure: difference(arms[best][measure], arms["positives only"][measure]) for measure in ("pass@1", "maj@16")}
    yield ("Positives only is stable and lower (Figure 4)",
           f"pass@1 {spread(arms['positives only']['pass@1'])}, {best} (the best of {len(SHARES)} on the validation questions) "
           f"{spread(arms[best]['pass@1'])}: "
           f"{spread(gains['pass@1'], sign=True)}, on the worst seed {min(gains['pass@1']):+.3f}; maj@16 "
           f"{spread(gains['maj@16'], sign=True)}",
           verdict(min(gains["pass@1"]) > 0 and np.mean(gains["maj@16"]) >= 0, np.mean(gains["pass@1"]) > 0))
    mean = lambda values: np.mean([value for value in values if value is not None])
    gain = {group: mean(passed["TOPR"][group]) - mean(passed["positives only"][group])
            for group in GROUPS if any(value is not None for value in passed["base"][group])}
    none = {name: groups["none"] for name, groups in result["share of questions"].items()}
    more = [gain[group] > max(gain.get("5 to 16", 0), 0) for group in gain if group != "5 to 16"]
    yield ("What negatives add is on questions with few or no solutions (Figure 4)",
           "pass@1 gained over positives only, by the base policy's right answers of 16: "
           + ", ".join(f"{group} {value:+.3f}" for group, value in gain.items())
           + f"; questions without any right answer: positives only {spread(none['positives only'])}, TOPR "
           f"{spread(none['TOPR'])}",
           verdict(all(more) and any(more) and np.mean(none["TOPR"]) < np.mean(none["positives only"]), any(more)))
