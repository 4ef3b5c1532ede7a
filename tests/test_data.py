"""The rollout file and the embedded task."""

import itertools
import json
import random

import pytest

from conftest import ROOT, in_process
from data import apples
from engine.rollouts import as_labels, read_batches, read_rollouts, write_rollouts
from engine.tokens import all_token_ids, prompt_tokens
from engine.common import Problem, table, whole_file

GOOD = {"id": "q", "prompt": "2 + 2 ?", "completion": "The answer is 4 .", "reward": 1.0}


def problems_of(split, seed, count):
    return list(itertools.islice(apples.questions(split, seed), count))


def written(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps({**GOOD, **line}).encode() + b"\n" for line in lines))
    return str(path)


def test_round_trip_keeps_every_field(tmp_path):
    rows = [{**GOOD, "prompt_ids": [1, 2], "completion_ids": [3, 2], "logprobs": [-0.5, -1e-8], "gold": None, "mine": {"x": ["ü\u2028"]}},
            {**GOOD, "completion": "line\nbreak \x00 and \"quotes\"", "reward": -0.3}]
    write_rollouts(tmp_path / "r.jsonl", rows)
    assert read_rollouts(tmp_path / "r.jsonl") == rows


def test_blank_lines_do_not_count(tmp_path):
    path = written(tmp_path / "r.jsonl", {"id": "a"}, b"\n", {"id": "b", "reward": -1}, b"  \r\n", {"id": "c"})
    rows = [row for batch in read_batches(path, []) for row in batch]
    assert [(line, row["id"], row["reward"]) for line, row in rows] == [(1, "a", 1), (3, "b", -1), (5, "c", 1)]


@pytest.mark.parametrize("line, words", [
    (b"{broken\n", "not a JSON object"), (b'{"id": "q", "prom', "torn"), (b"[1]\n", "not a JSON object"),
    (b'{"id": "\xff"}\n', "not UTF-8"), ({"reward": None}, '"reward" is missing'), ({"reward": "1"}, "not a number"),
    ({"reward": True}, "not a number"), ({"reward": float("nan")}, "NaN"), ({"reward": 10**400}, "too large"),
    ({"id": 7}, '"id" is not a string'), ({"completion": ""}, "completion is empty"), ({"prompt": None}, '"prompt" is not a string'),
    ({"completion_ids": [1, -2]}, "whole numbers"), ({"completion_ids": [1.5]}, "whole numbers"), ({"completion_ids": []}, "is empty"),
    ({"prompt_ids": "12"}, "a str, not a list"), ({"logprobs": [-1]}, 'without "completion_ids"'),
    ({"completion_ids": [5, 2], "logprobs": [-1]}, "1 logprobs for 2"), ({"completion_ids": [5], "logprobs": [0.5]}, "logprob 0 is 0.5"),
    ({"completion_ids": [5], "logprobs": [None]}, "logprob 0 is None"), ({"sampling": "t=1"}, "a str, not a dict"),
])
def test_bad_lines_are_named(tmp_path, line, words):
    path = written(tmp_path / "r.jsonl", {}, {}, line)
    with pytest.raises(Problem) as error:
        read_rollouts(path)
    assert str(error.value).startswith(f"{path}:3: ") and words in str(error.value) and len(str(error.value).splitlines()) == 1


def test_up_to_ten_bad_lines_at_once(tmp_path):
    path = written(tmp_path / "r.jsonl", *[{"reward": "no"}] * 25)
    with pytest.raises(Problem) as error:
        read_rollouts(path)
    assert len(str(error.value).splitlines()) == 10


def test_files_that_are_none(tmp_path):
    for path, words in ((tmp_path, "directory"), (tmp_path / "none", "No such file"), (written(tmp_path / "empty"), "no rollouts")):
        with pytest.raises(Problem, match=words):
            read_rollouts(str(path))
    with pytest.raises(Problem, match="byte order mark"):
        read_rollouts(written(tmp_path / "bom", b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n"))
    with pytest.raises(Problem, match="byte"):
        read_rollouts(written(tmp_path / "long", b"x" * (64 * 2**20 + 5)))


def test_half_a_file_never_appears(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with whole_file(tmp_path / "new.jsonl") as file:
            file.write("something")
            1 / 0
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tokenizer():
    return apples.make_tokenizer(apples.vocabulary())


def test_ids_from_text_are_the_samplers(tokenizer):
    """The end token is learned when it was sampled, absent when the completion was cut, and never doubled."""
    row = {**GOOD, "prompt": "Tom has 12 apples . How many ?", "completion": "The answer is 12 ."}
    prompt_ids, completion_ids = all_token_ids([row], tokenizer, tokenizer.eos_token_id)[0]
    assert prompt_ids[0] == tokenizer.bos_token_id and prompt_ids.count(tokenizer.bos_token_id) == 1
    assert completion_ids[-1] == tokenizer.eos_token_id and len(completion_ids) == 6
    assert all_token_ids([{**row, "finish": "length"}], tokenizer, tokenizer.eos_token_id)[0][1] == completion_ids[:-1]
    assert all_token_ids([{**row, "completion": "The answer is 12 .</s>"}], tokenizer, tokenizer.eos_token_id)[0][1] == completion_ids
    assert all_token_ids([{**row, "prompt_ids": [9], "completion_ids": [8]}], tokenizer, tokenizer.eos_token_id)[0] == ([9], [8])
    assert prompt_tokens("<s>Tom has 12 apples", tokenizer) == prompt_tokens("Tom has 12 apples", tokenizer)


def test_every_word_is_one_token(tokenizer):
    """Every seeded figure hangs on the order of the words too."""
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == ["<unk>", "<s>", "</s>", "▁*", "▁+"]
    rng = random.Random(0)
    for problem in problems_of("train", 1, 200):
        text = problem["question"] + " " + apples.demonstrate(problem, rng, apples.HABITS)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_questions_for_testing_are_never_trained_on():
    train, test = ({problem["question"] for seed in range(3)
                    for problem in problems_of(split, seed, 1000)} for split in ("train", "test"))
    assert not train & test
    problems = problems_of("test", 0, 500)
    for field in ("question", "id"):
        assert len({problem[field] for problem in problems}) == 500
    assert problems[:100] == problems_of("test", 0, 100)


def test_solutions_without_bad_habits_are_right():
    for problem in problems_of("train", 2, 300):
        answer, reward = apples.grade(problem, apples.demonstrate(problem, random.Random(0), {}))
        assert reward == 1.0 and answer == problem["gold"]


def test_demonstrations_are_deliberately_imperfect():
    rows = apples.demonstrations(3000, 0)
    gold = {problem["id"]: problem["gold"] for problem in problems_of("train", 0, 3000)}
    graded = [apples.grade({"gold": gold[row["id"]]}, row["completion"]) for row in rows]
    right = sum(reward > 0 for _, reward in graded) / 3000
    invalid = sum(answer is None for answer, _ in graded) / 3000
    assert 0.3 < right < 0.5 and 0.12 < invalid < 0.25


def test_table():
    assert table(("name", "mean"), [("pass@1", 0.5), ("n", 12)]) == "name     mean\n-------------\npass@1  0.500\nn          12"


def test_export_for_other_trainers(tmp_path):
    """Columns of one type in every row: prompt, completion, label; or pairs of one question and one prompt."""
    path = written(tmp_path / "r.jsonl", {"id": "a", "completion": "4"}, {"id": "a", "completion": "5", "reward": -1, "answer": "5"},
                   {"id": "a", "completion": "6", "reward": -0.5}, {"id": "b", "completion": "7", "reward": -1},
                   {"id": "c", "completion": "8"}, {"id": "c", "completion": "9", "reward": -1, "prompt": "another"})
    run = lambda *options: in_process(ROOT / "data/rollouts.py", *options)
    read = lambda name: [json.loads(line) for line in open(tmp_path / name)]
    assert run("export", path, tmp_path / "labels.jsonl").returncode == 0
    assert read("labels.jsonl")[:2] == [{"prompt": "2 + 2 ?", "completion": "4", "label": True},
                                        {"prompt": "2 + 2 ?", "completion": "5", "label": False}]
    assert len(read("labels.jsonl")) == 6
    assert run("export", path, tmp_path / "pairs.jsonl", "--pairs").returncode == 0
    assert read("pairs.jsonl") == [{"prompt": "2 + 2 ?", "chosen": "4", "rejected": "5"}]
    none = written(tmp_path / "none.jsonl", {"id": "a"}, {"id": "b", "reward": -1})
    for options, words in ((("export", none, tmp_path / "x", "--pairs"), "both a correct and a wrong"), (("export", path), "usage"),
                           (("export", tmp_path / "nothing", tmp_path / "x"), "cannot be read")):
        result = run(*options)
        assert result.returncode == 2 and words in result.stdout.splitlines()[-1], result.stdout
    assert not (tmp_path / "x").exists()


def test_datasets_reads_both(tmp_path):
    """Null answers and null settings of the sampling beside others; skips where `datasets` is not installed."""
    datasets = pytest.importorskip("datasets")
    path = written(tmp_path / "r.jsonl", {"answer": None, "sampling": {"top_k": None, "seed": 1}},
                   {"answer": "5", "reward": -1, "sampling": {"top_k": 5, "seed": None}, "prompt_ids": [1], "completion_ids": [2], "logprobs": [-1.5]})
    write_rollouts(tmp_path / "labels.jsonl", as_labels(read_rollouts(path)))
    load = lambda name: datasets.load_dataset("json", data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache"))
    assert load("r.jsonl")["answer"][:] == [None, "5"] and load("r.jsonl")[1]["sampling"] == {"top_k": 5, "seed": None}
    assert load("labels.jsonl").features["label"].dtype == "bool"
