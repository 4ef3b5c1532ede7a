"""The experiments at tiny size, and the README's claims against the committed results."""

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import types

import pytest

import search
import train
import verifier
from conftest import ROOT, in_process, shell
from data import apples, library, load_task
from engine import tasks
from experiments import long_apples
from engine.rollouts import read_rollouts, write_rollouts
from engine.common import Problem, read_json
from experiments import collapse, common, importance, long, negatives, pretrained, queries, rates
from experiments import rounds, run, scifact, shares, verdicts

RESULTS = ROOT / "experiments/results"
README = "".join((ROOT / page / "README.md").read_text() for page in (".", "experiments"))


def in_this_process(function, jobs, what):
    return [function(*job) for job in jobs]


@pytest.fixture
def tiny_world(tiny, rollouts, tmp_path, monkeypatch):
    """Two seeds of the tiny policy and its 50 rollouts, in two sizes; ten questions, two rates."""
    monkeypatch.chdir(tmp_path)
    small = {"sequences": 8, "questions": 4, "test_questions": 4, "max_new_tokens": 6, "eval_every": 1}
    for job in {id(job): job for job in common.JOBS.values()}.values():
        for name, value in small.items():
            monkeypatch.setitem(job, name, value)
    for seed in range(2):
        for base in common.BASES:
            shutil.copytree(tiny, f"{common.folder_of(seed, base)}/base")
            rows = read_rollouts(rollouts)
            for number, row in enumerate(rows):  # DPO then has other pairs and steps for each seed
                row["reward"] = 1.0 if number % (3 + 6 * seed) == 0 else -1.0
            write_rollouts(common.rollouts_of(seed, base), rows)
    monkeypatch.setattr(common, "QUESTIONS", {"test": slice(0, 6), "validation": slice(6, 10)})
    monkeypatch.setattr(common, "RATES", (1e-4, 1e-3))
    monkeypatch.setattr(common, "PART", 10)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("finding, seeds", [
    (collapse, 2), (negatives, 1), (shares, 2), (importance, 1), (rounds, 1), (long, 2)])
def test_a_finding_from_its_arms_to_its_claims(finding, seeds, tiny_world, monkeypatch):
    """A finding must run, and its result must survive JSON, which turns rates into strings."""
    if finding == shares:
        monkeypatch.setattr(shares, "SHARES", (0.1, 0.5, 1.0))
    monkeypatch.setattr(long, "RATE", 1e-4)
    result = finding.run(common.Settings(seeds=seeds), in_this_process)
    path = tiny_world / "result.json"
    common.write_json(path, result)
    result = read_json(path)
    for arm in result["arms"].values():
        assert arm["learning_rate"] in (1e-4, 1e-3)
        assert set(arm["validation"]) <= {"0.0001", "0.001"}
        assert len(arm["pass@1"]) == seeds and all(0 <= value <= 1 for value in arm["pass@1"])
        chosen = arm["validation"][f"{arm['learning_rate']:g}"]
        assert sum(chosen) == max(map(sum, arm["validation"].values()))
    assert "pass@1" in finding.show(result)
    check_claims_and_picture(finding, result, tiny_world)


def check_claims_and_picture(finding, result, folder):
    for claim, measured, verdict in finding.claims(result):
        assert verdict in ("reproduces", "in part", "does not at this size")
        assert "nan" not in measured, measured
    if importlib.util.find_spec("matplotlib"):
        finding.draw(result, folder / "picture.png")
        assert (folder / "picture.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_rates_of_every_size(tiny_world, tiny, monkeypatch):
    monkeypatch.setattr(rates, "GRIDS", {base: (1e-4, 1e-3) for base in ("small", "largest")})
    monkeypatch.setattr(rates, "SHOWN", 1)
    result = rates.run(common.Settings(seeds=1), in_this_process)
    common.write_json("result.json", result)
    result = read_json("result.json")
    assert list(result["runs"]) == [f"{size} million, {optimizer}" for size in ("10", "0.14")
                                    for optimizer in ("adamw", "adafactor")]
    runs = result["runs"]["10 million, adafactor"]
    assert set(runs) == {"0.0001", "0.001"} and "gradient_norm at step 1" in rates.show(result)
    check_claims_and_picture(rates, result, tiny_world)


@pytest.mark.slow
def test_scifact_from_its_rollouts_to_its_claims(tiny, tmp_path, monkeypatch):
    """The classical expansion must help, and no query that is measured may have been learned."""
    monkeypatch.chdir(tmp_path)
    library.write_collection("library")
    monkeypatch.setattr(scifact, "RATES", (1e-4, 1e-3))
    monkeypatch.setattr(scifact, "LEARN", 6)
    scifact.collection.cache_clear()
    reward = search.reward  # the tiny policy earns nothing, and a share needs positives
    monkeypatch.setattr(search, "reward", lambda *given: [
        {**row, "reward": 1.0 if number % 4 == 0 else row["reward"]}
        for number, row in enumerate(reward(*given))])
    with pytest.raises(Problem, match="--corpus DIR"):
        scifact.run(common.Settings(pretrained=tiny), in_this_process)
    settings = common.Settings(pretrained=tiny, corpus="library", quick=True)
    base, _, parts = scifact.collection("library", tiny, True)
    assert not parts["learn"].keys() & (parts["choose"].keys() | parts["test"].keys())
    result = scifact.run(settings, in_this_process)
    common.write_json("result.json", result)
    result = read_json("result.json")
    assert result["gains"]["Rocchio minus no expansion, greedy"]["recall@100"]["mean"] > 0
    assert len(result["examples"]) == scifact.EXAMPLES and "TOPR" in result["examples"][0]
    for name, arm in result["arms"].items():
        folder = scifact.folder_of_arm(base, arm["settings"], arm["learning_rate"])
        trained = read_json(f"{folder}/policy/run.json")["settings"]
        assert trained.items() >= scifact.ARMS[name].items()
    assert "ndcg@10" in scifact.show(result)
    check_claims_and_picture(scifact, result, tmp_path)
    monkeypatch.setattr(train, "train", None)
    assert scifact.run(settings, in_this_process)["gains"] == result["gains"]


@pytest.mark.slow
def test_the_verifier_from_its_rates_to_its_claims(tiny, rollouts, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RATES", (1e-4, 1e-3))

    def tiny_verifier(seed):
        return verifier.Settings(
            model=tiny, solutions=rollouts, test_fraction=0.4, out=f"{tmp_path}/seed{seed}", seed=seed,
            longest=160, samples=2, test_samples=2, optimizer="adamw", max_new_tokens=6)

    monkeypatch.setattr(verdicts, "prepare_verifier", tiny_verifier)
    result = verdicts.run(common.Settings(seeds=2), in_this_process)
    assert len(result["arms"]["TOPR"]["accuracy"]) == 2
    assert "invalid verdicts" in verdicts.show(result)
    check_claims_and_picture(verdicts, result, tmp_path)


@pytest.mark.slow
def test_the_search_task_from_its_rates_to_its_claims(tmp_path, monkeypatch):
    base_policy, topics = train.base_policy, queries.topics
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "RATES", (1e-4, 1e-3))

    def small_policy(folder, seed, task, **_):
        return base_policy(folder, seed, task, steps=5, layers=1)

    def few_topics(split):
        return [dict(list(part.items())[:6]) for part in topics(split)]

    monkeypatch.setattr(train, "base_policy", small_policy)
    monkeypatch.setattr(queries, "topics", few_topics)
    queries.collection.cache_clear()
    try:
        learn, validation = topics("validation")
        assert not learn.keys() & validation.keys() and len(validation) == queries.HELD_OUT
        result = queries.run(common.Settings(seeds=1), in_this_process)
    finally:
        queries.collection.cache_clear()
    assert len(result["arms"]["TOPR"]["sampled"]) == 1 and "recall@10" in queries.show(result)
    check_claims_and_picture(queries, result, tmp_path)


def word_problems(name):
    """A task like svamp, whose grader finds a third of all completions right."""

    def questions(split):
        return [{"id": f"{split}-{number}", "question": f"Tom has {number} apples . How many ?",
                 "gold": str(number), "equation": str(number)}
                for number in range(30)]

    def grade(question, completion):
        return ("1", 1.0) if len(completion) % 3 == 0 else (None, -1.0)

    return types.SimpleNamespace(questions=questions, grade=grade)


@pytest.mark.slow
def test_the_pretrained_model_from_its_demonstrations_to_its_claims(tiny, tmp_path, monkeypatch):
    """Demonstrations, validation and held-out questions must not overlap, and all of it resumes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "load_task", word_problems)
    monkeypatch.setattr(pretrained, "RATES", (1e-4, 1e-3))
    monkeypatch.setattr(pretrained, "SEEDS", 2)
    parts = {"demonstrations": slice(0, 14), "round 1": slice(14, 18), "round 2": slice(18, 22),
             "held out": slice(22, 26), "validation": slice(26, 30), "SVAMP": slice(0, 4)}
    monkeypatch.setattr(pretrained, "QUESTIONS", parts)
    ids = [row["id"] for part in parts for row in pretrained.read_questions(common.Settings(), part)]
    assert len(ids) == len(set(ids)) == 34
    settings = common.Settings(seeds=5, pretrained=tiny)
    result = pretrained.run(settings, in_this_process)
    best = result["best"]["TOPR"]
    assert len(result["arms"][best]["SVAMP"]) == len(result["arms"]["positives only"]["SVAMP"]) == 2
    assert f"{best}, two rounds minus base" in result["paired"]
    common.write_json("result.json", result)
    result = read_json("result.json")
    assert "held out, greedy" in pretrained.show(result)
    check_claims_and_picture(pretrained, result, tmp_path)
    monkeypatch.setattr(train, "train", None)
    assert pretrained.run(settings, in_this_process)["paired"] == result["paired"]


def test_a_wrong_wheel_is_one_line(tmp_path):
    """A truncated download must not become a model."""
    (tmp_path / "half.whl").write_bytes(b"PK")
    for name, message in (("half.whl", "not the published file"), ("none.whl", "no such file")):
        with pytest.raises(Problem, match=message):
            pretrained.find_model(common.Settings(wheel=str(tmp_path / name)))


def test_arms_are_trained_once(tiny_world, monkeypatch):
    """A rerun that trains again would take its hour and a half again."""
    arm = dict(loss="topr")
    first = common.run_arm(0, arm, 1e-3, "test")
    monkeypatch.setattr(train, "train", None)
    assert common.run_arm(0, arm, 1e-3, "test") == first
    with pytest.raises(TypeError):
        common.run_arm(1, arm, 1e-3, "test")


def test_the_rate_comes_from_validation_questions_and_the_report_from_test_questions():
    """A rate chosen on the test questions would flatter every arm."""
    asked = []

    def arm_of(seed, arm, rate, split):
        asked.append((seed, split))
        return {"score": rate * (split == "validation"), "pass@1": 0.1 * seed, "right": [1, 2]}

    arms = {"one": {"loss": "topr"}}
    found = common.compare(common.Settings(seeds=3), in_this_process, arm_of, arms, "")
    assert found["one"]["learning_rate"] == max(common.RATES)
    assert found["one"]["pass@1"] == [0.0, 0.1, 0.2] and "right" not in found["one"]
    assert {seed for seed, split in asked if split == "validation"} == {0, 1}
    asked.clear()
    settings = common.Settings(seeds=1, quick=True)
    quick = common.compare(settings, in_this_process, arm_of, arms, "")
    assert asked == [(0, "test")] and quick["one"]["learning_rate"] == common.WORKING_RATE
    assert quick["one"]["settings"] == {"loss": "topr", "epochs": 1}


def test_test_and_validation_and_training_questions_are_different():
    """What was trained on must not be measured."""

    def questions(split, count, seed):
        apples = load_task("apples")
        rows = tasks.load_questions(apples, split, count, seed, None, train.Settings())
        return [row["question"] for row in rows]

    held_out = questions("test", common.QUESTIONS["validation"].stop, 1)
    training = set(questions("train", 512, 0))
    assert len(held_out[common.QUESTIONS["test"]]) == 500 and len(set(held_out)) == 750
    assert not training & set(held_out)


def test_a_data_set_has_its_share_of_positives(tiny_world):
    rows = read_rollouts(common.data_set(common.rollouts_of(0), 0, 0.3))
    assert len(rows) == 10 and sum(row["reward"] > 0 for row in rows) == 3
    with pytest.raises(Problem, match="9 positives and 1 negatives are needed, it has 6 and 44"):
        common.data_set(common.rollouts_of(1), 1, 0.9)


def test_an_answer_has_one_spelling():
    """Then the vote does not depend on how spellings are grouped, and old figures of maj@k stand."""
    for task in (apples, long_apples):
        for problem in itertools.islice(task.questions("train", 0), 20):
            for text in ("7", "07", " 7", "7.0", problem["gold"], f"0{problem['gold']}", "x"):
                answer, reward = task.grade(problem, f"The answer is {text} .")
                assert (reward > 0) == (answer == problem["gold"])


def test_two_processes_work_through_the_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with common.workers(common.Settings(processes=2)) as each:
        assert each(divmod, [(7, 2), (9, 5), (1, 1)], "dividing") == [(3, 1), (1, 4), (1, 0)]
        with pytest.raises(ZeroDivisionError):
            each(divmod, [(1, 0)], "dividing")


SLEEP = """
import os, sys, time
from experiments import common
if __name__ == "__main__":
    with common.workers(common.Settings(processes=1)) as each:
        each(print, [("ready",)], "starting")
        print(*[child.pid for child in common.multiprocessing.active_children()], flush=True)
        each(time.sleep, [(300,), (300,)], "sleeping")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigterm_ends_the_workers_too(tmp_path):
    """They went on with their queue, and nobody knew of them."""
    (tmp_path / "sleep.py").write_text(SLEEP)
    process = subprocess.Popen([sys.executable, tmp_path / "sleep.py"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    worker = process.stdout.readline().split()[0]
    assert os.path.exists(f"/proc/{worker}")
    process.terminate()
    assert process.wait(30) == 143 and not os.path.exists(f"/proc/{worker}")


@pytest.mark.parametrize("words, message", [
    (["colapse"], "no such finding; there are collapse"), (["--seeds", "0"], "1 or more"),
    (["shares", "--show"], "nowhere"), (["--show"], "there are no results")])
def test_a_mistake_is_one_line(words, message, tmp_path):
    result = in_process(ROOT / "experiments/run.py", *words, "--out", tmp_path / "nowhere")
    assert result.returncode == 2 and message in result.stdout, result.stdout
    assert "Traceback" not in result.stdout, result.stdout
    assert not (tmp_path / "nowhere").exists()


def test_torchrun_and_a_dead_process_are_one_line_each(tmp_path, monkeypatch):
    result = shell(sys.executable, ROOT / "experiments/run.py", RANK="0", WORLD_SIZE="1")
    assert "not with torchrun" in result.stdout, result.stdout
    assert "Traceback" not in result.stdout, result.stdout
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Problem, match="a process died"):
        with common.workers(common.Settings(processes=1)) as each:
            each(os._exit, [(9,)], "dying")


# ---- the committed results, and what the README says of them ----


def test_the_results_are_complete():
    for name in run.FINDINGS:
        result = read_json(str(RESULTS / f"{name}.json"))
        assert result["seeds"] == 5 and not result["quick"] and (RESULTS / f"{name}.png").exists()
        for arm in result["arms"].values():
            assert all(len(values) == 5 for values in arm.values() if isinstance(values, list))


def test_the_claims_of_the_readme_are_those_of_the_results():
    text = run.as_markdown(run.claims(str(RESULTS)))
    assert (RESULTS / "claims.md").read_text() == text
    assert text in README


def test_the_tables_can_be_shown_again(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "kept")
    kept = tmp_path / "kept"
    result = shell(sys.executable, ROOT / "experiments/run.py", "--show", "--out", kept)
    assert result.returncode == 0 and "reproduces" in result.stdout, result.stdout
    assert (tmp_path / "kept/claims.md").read_text() == (RESULTS / "claims.md").read_text()


def verdicts_of(finding, **values):
    """The verdicts of a committed result with some lists changed: path -> every seed's value."""
    result = read_json(str(RESULTS / f"{finding.__name__.rpartition('.')[2]}.json"))
    for path, value in values.items():
        *way, last = path.split("/")
        part = result
        for step in way:
            part = part[step]
        part[last] = [value] * 5
    return [verdict for _, _, verdict in finding.claims(result)]


def peak(best):
    """pass@1 of all data sets and shares, highest at a share."""
    return {f"arms/{data}, share {share}/pass@1": 0.6 - abs(share - best)
            for data in shares.DATA for share in shares.SHARES}


def test_verdicts_follow_from_the_numbers():
    """A verdict that does not depend on the numbers would say "reproduces" for ever."""
    yes, part, no = "reproduces", "in part", "does not at this size"
    working = f"along/{common.WORKING_RATE:g}/naive REINFORCE"
    low = f"along/{collapse.LOW_RATE:g}/naive REINFORCE"
    fallen = {f"{working}/pass@1": 0.0, f"{working}/invalid": 1.0, f"{low}/pass@1": 0.0}
    assert verdicts_of(collapse, **fallen)[0] == yes
    assert verdicts_of(collapse, **{f"{working}/pass@1": 0.3, f"{low}/pass@1": 0.4})[0] == no
    assert verdicts_of(collapse, **{"arms/PPO/pass@1": 0.5})[1] == no
    assert verdicts_of(collapse, **{"arms/PPO/pass@1": 0.0})[1] == no
    assert verdicts_of(collapse, **{"arms/PPO/pass@1": 0.9})[2] == part  # DPO well, TOPR not best
    assert verdicts_of(collapse, **{"arms/TOPR/invalid": 0.9})[3] == no
    assert verdicts_of(negatives, **{"arms/positives only/pass@1": 0.9})[0] == no
    assert verdicts_of(shares, **peak(0.1)) == [yes] * 2
    assert verdicts_of(shares, **peak(0.33)) == [part] * 2
    assert verdicts_of(shares, **peak(0.75)) == verdicts_of(shares, **peak(1.0)) == [no] * 2
    loose = "arms/importance sampling, clipped loose"
    assert verdicts_of(importance, **{f"{loose}/pass@1": 0.05})[0] == yes
    better = {f"{loose}/pass@1": 0.99, f"{loose}/invalid": 0.0}
    assert verdicts_of(importance, **better)[0] == no
    assert verdicts_of(rounds, **{"arms/TOPR, Anna Karenina/pass@1": 0.99})[1] == yes
    assert verdicts_of(rounds, **{"arms/five times larger, positives only/pass@1": 0.99})[2] == no
    assert verdicts_of(verdicts, **{"arms/TOPR/accuracy": 0.1})[0] == no
    assert verdicts_of(queries, **{"arms/TOPR/sampled": 0.0})[0] == no


def test_results_of_different_sizes_are_not_mixed(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "kept")
    path = str(tmp_path / "kept/shares.json")
    common.write_json(path, {**read_json(path), "seeds": 1})
    with pytest.raises(Problem, match="different numbers of seeds"):
        run.claims(str(tmp_path / "kept"))


def test_what_was_found_holds():
    """The findings that everything else here leans on, with the bars that they should clear."""
    kept = {name: read_json(str(RESULTS / f"{name}.json")) for name in run.FINDINGS}
    best = kept["negatives"]["best"]
    passed = common.by_arm(kept["negatives"], "pass@1")
    votes = common.by_arm(kept["negatives"], "maj@16")
    gain = passed[best] - passed["positives only"]
    assert gain.mean() >= 0.05 and gain.min() > 0
    assert votes[best].mean() >= votes["positives only"].mean()
    naive = kept["collapse"]["along"][f"{common.WORKING_RATE:g}"]["naive REINFORCE"]
    assert max(naive["pass@1"]) < 0.02 and min(naive["invalid"]) > 0.9
    passed = common.by_arm(kept["collapse"], "pass@1")
    assert abs(passed["PPO"].mean() - passed["base"].mean()) < 0.1
    passed = common.by_arm(kept["shares"], "pass@1")
    for data in shares.DATA:
        means = {share: passed[f"{data}, share {share}"].mean() for share in shares.SHARES}
        assert max(list(means.values())[1:-1]) > max(means[0.1], means[1.0]) + 0.02
        assert max(means, key=means.get) in (0.33, 0.5)
        assert "at 0.33 to 0.5, lies between" in README
        if data == "10%":
            assert means[0.1] < means[1.0]
            assert (f"reaches a pass@1 of {means[0.1]:.3f}, positives only {means[1.0]:.3f}, and TOPR with share 0.33 "
                    f"{means[0.33]:.3f}") in README
    passed = common.by_arm(kept["importance"], "pass@1")
    votes = common.by_arm(kept["importance"], "maj@16")
    topr, truncated = "TOPR, clipped loose", "truncated importance sampling, clipped loose"
    assert passed[truncated].mean() > passed[topr].mean()
    assert votes[truncated].mean() <= votes[topr].mean()
