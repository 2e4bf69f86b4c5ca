"""Training data: what is asked can be answered, and it is a function of (seed, step, rank) alone."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ic.datamodules import synthetic
from ic.datamodules.needles import KEYS, answer_keys
from ic.datamodules.options import SLOT_BYTES, PasskeyDataOptions
from ic.datamodules.passkey import PasskeyDataModule, make_batch
from ic.model.byte_tokenizer import ByteTokenizer

ALL_TASKS = {"single": 1.0, "multi_key": 1.0, "multi_value": 1.0, "multi_query": 1.0}


def batch(config: PasskeyDataOptions, **changes: object) -> dict:
    given = {"split": "train", "step": 3, "rank": 0, "context_length": 1024, **changes}
    return make_batch(config, **given)


@pytest.mark.parametrize("length", [128, 256, 1000, 2048])
def test_every_answer_stands_earlier_in_the_text(length: int) -> None:
    config = PasskeyDataOptions(task_weights=ALL_TASKS, tokens_per_batch=32768)
    data = batch(config, context_length=length)
    assert data["input_ids"].shape == (32768 // length, length)
    assert data["labels"].equal(data["input_ids"])
    training_keys = set(KEYS["train"].tolist())
    questions = set()
    for ids, marks in zip(data["input_ids"], data["answer_mask"], strict=True):
        text = bytes(ids.tolist()).decode()
        spans = re.finditer("1+", "".join("01"[m] for m in marks))
        answers = [(s.start(), text[s.start() : s.end()]) for s in spans]
        assert len(answers) >= 1
        for start, answer in answers:
            assert re.fullmatch(r"\d{5}(, \d{5})*\.", answer)
            for key in answer_keys(answer):
                assert key in text[:start]
                assert int(key) in training_keys
        assert answers[-1][0] > length - 130  # the last question ends the sequence
        questions.add(text[:].rsplit("What ", 1)[-1].split("?")[0].split(" for ")[0])
    expected = {"is the pass key"} | (
        {"are all the pass keys", "are the pass keys"} if length >= 1000 else set()
    )
    assert expected <= questions


def test_named_pairs_repeat_their_statement() -> None:
    data = batch(PasskeyDataOptions(tokens_per_batch=8192), context_length=2048)
    for ids in data["input_ids"]:
        text = bytes(ids.tolist()).decode()
        pairs = re.findall(r"The pass key for ([a-z]{3}) is (\d{5})\.", text)
        assert len(pairs) >= 12
        assert all(pairs.count(pair) >= 2 for pair in pairs)


def test_pure_function_of_seed_step_rank() -> None:
    config = PasskeyDataOptions()
    same = batch(config)
    assert all(torch.equal(same[k], v) for k, v in batch(config).items() if k != "step")
    for change in ({"step": 4}, {"rank": 1}, {"split": "validation"}):
        assert not torch.equal(same["input_ids"], batch(config, **change)["input_ids"])
    assert not torch.equal(same["input_ids"], batch(PasskeyDataOptions(seed=1))["input_ids"])


def test_validation_asks_for_keys_that_training_never_sees() -> None:
    config = PasskeyDataOptions(tokens_per_batch=65536, context_length=1024)
    for split in ("validation", "test"):
        text = bytes(batch(config, split=split)["input_ids"].flatten().tolist()).decode()
        keys = {int(key) for key in answer_keys(text)}
        assert len(keys) > 100
        assert keys <= set(KEYS[split].tolist())


def test_each_loader_asks_for_the_keys_of_its_own_split() -> None:
    config = PasskeyDataOptions(tokens_per_batch=16384, context_length=1024, val_batches=2)
    data = PasskeyDataModule(config, ByteTokenizer())
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={})  # type: ignore[assignment]
    loaders = {"validation": data.val_dataloader(), "test": data.test_dataloader()}
    assert data.predict_dataloader.__func__ is data.test_dataloader.__func__
    for split, loader in loaders.items():
        batches = list(loader)
        assert len(batches) == 2
        ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
        keys = {int(key) for key in answer_keys(bytes(ids.tolist()).decode())}
        assert len(keys) > 40
        assert keys <= set(KEYS[split].tolist())


def test_position_skips() -> None:
    config = PasskeyDataOptions(tokens_per_batch=65536, max_position=2**20, num_skips=3)
    positions = batch(config)["position_ids"]
    steps = positions.diff(dim=-1)
    assert (steps >= 1).all()
    assert positions.min() >= 0
    assert positions.max() < 2**20
    skipping = (positions[:, 0] > 0) | (steps > 1).any(-1)
    assert 0.6 < skipping.float().mean() < 0.95
    assert ((steps > 1).sum(-1) <= 3).all()
    assert positions.max() > 0.9 * 2**20
    plain = batch(PasskeyDataOptions(skip_probability=0.0))["position_ids"]
    assert plain.equal(torch.arange(1024).expand(4, -1))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_steps_in_order(workers: int) -> None:
    config = PasskeyDataOptions(context_length=256, tokens_per_batch=512, num_workers=workers)
    data = PasskeyDataModule(config, ByteTokenizer())
    data.load_state_dict({"next_step": 5, "context_length": 128})
    for expected, got in zip(range(5, 12), data.train_dataloader(), strict=False):
        assert got["step"] == expected
        reference = batch(config, step=expected, context_length=128)
        assert got["input_ids"].equal(reference["input_ids"])
        assert got["position_ids"].equal(reference["position_ids"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 100}, "data.context_length=100: must be at least 128"),
        ({"tokens_per_batch": 1000}, "data.tokens_per_batch=1000"),
        ({"max_position": 100}, "data.max_position=100"),
        ({"skip_probability": 1.5}, r"must be in \[0, 1\]"),
        ({"task_weights": {"triple": 1.0}}, "unknown \\['triple'\\]"),
        ({"task_weights": {"single": 0.0}}, "one above 0"),
        ({"num_needles": 9}, "at most 8"),
        ({"num_workers": -1}, "data.num_workers=-1"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PasskeyDataOptions(**changes)


def test_context_length_is_checked() -> None:
    data = PasskeyDataModule(PasskeyDataOptions(), ByteTokenizer())
    with pytest.raises(ValueError, match="must lie between 128 and data.context_length=2048"):
        data.set_context_length(4096)


def test_a_task_of_weight_zero_is_not_drawn_and_changes_no_draw() -> None:
    config = PasskeyDataOptions(task_weights={"single": 1.0}, tokens_per_batch=8192)
    with_zero = PasskeyDataOptions(
        task_weights={"single": 1.0, "multi_key": 0.0}, tokens_per_batch=8192
    )
    assert batch(with_zero)["input_ids"].equal(batch(config)["input_ids"])


def test_a_pair_stands_anywhere_within_its_slot() -> None:
    """Also at its very end: else a model could learn where to look from the position alone."""
    rng, slots = np.random.default_rng(0), 64
    tokens = np.zeros(slots * SLOT_BYTES, dtype=np.uint8)
    found: set[int] = set()
    for _ in range(200):
        is_answer = np.zeros(len(tokens), dtype=bool)
        synthetic._write_pairs(rng, tokens, is_answer, rng.permutation(slots), slots, 0, "train")
        ends = np.flatnonzero(is_answer[:-1] & ~is_answer[1:])
        width = synthetic.KEY_DIGITS + 1
        starts = ends - (width - 1) - synthetic._KEY_AT
        found |= set((starts % SLOT_BYTES).tolist())
    assert found == set(range(SLOT_BYTES - len(synthetic._PAIR) + 1))
