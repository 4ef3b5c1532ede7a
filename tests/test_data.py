"""The rollout file and the embedded task."""

import itertools
import random

import pytest

from data import apples
from engine.common import table, whole_file
from engine.rollouts import read_rollouts, write_rollouts
from engine.tokens import is_foreign, prompt_tokens, token_ids

GOOD = {"id": "q", "prompt": "2 + 2 ?", "completion": "The answer is 4 .", "reward": 1.0}


def problems_of(split, seed, count):
    return list(itertools.islice(apples.questions(split, seed), count))


# ---- the file (what is wrong with one: test_faults.py) ----


def test_round_trip_keeps_every_field(tmp_path):
    rows = [
        {
            **GOOD,
            "prompt_ids": [1, 2],
            "completion_ids": [3, 2],
            "logprobs": [-0.5, -1e-8],
            "gold": None,
            "mine": {"x": ["ü\u2028"]},
        },
        {**GOOD, "completion": 'line\nbreak \x00 and "quotes"', "reward": -0.3},
    ]
    write_rollouts(tmp_path / "r.jsonl", rows)
    assert read_rollouts(tmp_path / "r.jsonl") == rows


def test_half_a_file_never_appears(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with whole_file(tmp_path / "new.jsonl") as file:
            file.write("something")
            1 / 0
    assert list(tmp_path.iterdir()) == []


def test_table():
    assert table(("name", "mean"), [("pass@1", 0.5), ("n", 12)]) == (
        "name     mean\n-------------\npass@1  0.500\nn          12"
    )


# ---- tokens ----


@pytest.fixture(scope="module")
def tokenizer():
    return apples.make_tokenizer(apples.vocabulary())


def test_ids_from_text_are_the_samplers(tokenizer):
    """The end token is learned when it was sampled, absent when the completion was cut, and never
    doubled; nor is the start token."""
    row, end = {**GOOD, "prompt": "Tom has 12 apples ."}, tokenizer.eos_token_id

    def ids(**changes):
        return token_ids({**row, **changes}, tokenizer, end)

    prompt, completion = ids()
    assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id
    assert completion[-1] == end and len(completion) == 6
    assert ids(finish="length") == (prompt, completion[:-1])
    assert ids(completion="The answer is 4 .</s>") == (prompt, completion)
    assert ids(prompt_ids=[9], completion_ids=[8]) == ([9], [8])
    assert ids(prompt="<s>Tom has 12 apples .") == (prompt, completion)
    assert prompt_tokens(row["prompt"], tokenizer) == prompt


def test_ids_that_fit_their_text_are_read_whoever_wrote_them(tokenizer):
    """vLLM keeps or drops special tokens and spaces, and cuts stop words off."""
    text = "3 + 2 = 5 . The answer is 5 ."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for near in (text, text + "</s>", f" {text}\n", text[:-2], "<s>" + text, "3 + 2", ""):
        assert not is_foreign({"completion": near, "completion_ids": ids}, tokenizer), near
    for other in ("No", "Something else is written here .", "Die Antwort ist 5"):
        assert is_foreign({"completion": other, "completion_ids": ids}, tokenizer), other
    assert not is_foreign({"completion": "only text"}, tokenizer)


# ---- the embedded task ----


def test_every_word_is_one_token(tokenizer):
    """Every seeded figure hangs on the order of the words too."""
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == ["<unk>", "<s>", "</s>", "*", "+"]
    rng = random.Random(0)
    for problem in problems_of("train", 1, 200):
        text = problem["question"] + " " + apples.demonstrate(problem, rng, apples.HABITS)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_questions_for_testing_are_never_trained_on():
    train, test = (
        {problem["question"] for seed in range(3) for problem in problems_of(split, seed, 1000)}
        for split in ("train", "test")
    )
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
