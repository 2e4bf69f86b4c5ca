"""Keys, tasks and filler."""

from __future__ import annotations

import numpy as np
import pytest

from ic.datamodules.needle_names import TASKS
from ic.datamodules.needles import KEYS, NOISE, answer_keys, draw_filler, draw_sample


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_splits_share_no_key_and_cover_all() -> None:
    sets = {split: set(keys.tolist()) for split, keys in KEYS.items()}
    assert not sets["train"] & sets["validation"]
    assert not sets["train"] & sets["test"]
    assert not sets["validation"] & sets["test"]
    assert set().union(*sets.values()) == set(range(100000))
    assert len(sets["validation"]) > 9000


def test_training_keys_have_every_digit_in_every_place() -> None:
    for place in range(5):
        assert set(KEYS["train"] // 10**place % 10) == set(range(10))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_samples_are_consistent(task: str, split: str) -> None:
    for seed in range(20):
        sample = draw_sample(rng(seed), task, split, num_needles=3)
        expected = {"single": 1, "multi_key": 1, "multi_value": 3, "multi_query": 3}[task]
        assert len(sample.keys) == expected
        assert len(sample.others) == {"single": 0, "multi_key": 3}.get(task, 2)
        text = sample.needle + "".join(sample.others)
        stated = answer_keys(text)
        assert set(sample.keys) <= set(stated)
        assert {int(key) for key in stated} <= set(KEYS[split].tolist())
        assert answer_keys(sample.question) == []
        if task == "multi_key":  # the name asked for is the one beside the key
            name = sample.question.split()[-2]
            assert f"for {name} is {sample.keys[0]}." in sample.needle
            assert all(f"for {name} " not in other for other in sample.others)


def test_answer_keys_wants_exactly_five_digits() -> None:
    assert answer_keys(" 01234, 56789. 123456 and 1234") == ["01234", "56789"]


def test_filler() -> None:
    noise = draw_filler(rng(), "noise", 500).tobytes()
    assert noise in NOISE * 8
    random = draw_filler(rng(), "random", 5000)
    assert set(random.tobytes()) == set(b" abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(ValueError, match="choose one of noise, random"):
        draw_filler(rng(), "lorem", 5)
    with pytest.raises(ValueError, match="choose one of single"):
        draw_sample(rng(), "double", "train")
