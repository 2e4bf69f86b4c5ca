"""The bounds of the data's options, at them and just beyond."""

from __future__ import annotations

from typing import Any

import pytest

from ic.datamodules.needle_pairs_options import MakePreferencesOptions
from ic.datamodules.options import (
    PasskeyDataOptions,
    PreferenceDataOptions,
    SFTDataOptions,
    TextDataOptions,
    check_weights,
)
from tests.bounds import check_bounds

ALL = (PasskeyDataOptions, TextDataOptions, SFTDataOptions, PreferenceDataOptions)
LEAST = PasskeyDataOptions.LEAST_LENGTH


@pytest.mark.parametrize("options", ALL)
def test_bounds_of_all_data(options: Any) -> None:
    check_bounds(options, "data.", "worker_timeout_s", [1e-9], [0, float("inf")])
    check_bounds(options, "data.", "num_workers", [0], [-1])
    check_bounds(options, "data.", "seed", [0], [-1])


@pytest.mark.parametrize(
    ("options", "name", "allowed", "refused", "others"),
    [
        (PasskeyDataOptions, "context_length", [LEAST], [LEAST - 1], {}),
        (PasskeyDataOptions, "tokens_per_batch", [512], [511], {"context_length": 512}),
        (PasskeyDataOptions, "max_position", [512], [511], {"context_length": 512}),
        (PasskeyDataOptions, "skip_probability", [0, 1], [-1e-9, 1 + 1e-9], {}),
        (PasskeyDataOptions, "num_skips", [0], [-1], {}),
        (PasskeyDataOptions, "val_batches", [1], [0], {}),
        (PasskeyDataOptions, "num_needles", [1, 8], [0, 9], {}),
        (TextDataOptions, "val_fraction", [0, 0.999], [-1e-9, 1], {}),
        (TextDataOptions, "context_length", [2], [1], {"tokens_per_batch": 4}),
        (TextDataOptions, "shuffle_buffer", [0], [-1], {}),
        (TextDataOptions, "num_streams", [1], [0], {}),
        (TextDataOptions, "tokens_per_batch", [64, 128], [0, 32, 63, 96], {"context_length": 64}),
        (SFTDataOptions, "context_length", [2], [1], {"tokens_per_batch": 4}),
        (SFTDataOptions, "tokens_per_batch", [64, 128], [-64, 0, 63, 96], {"context_length": 64}),
        (PreferenceDataOptions, "context_length", [2], [1], {"tokens_per_batch": 4}),
        (PreferenceDataOptions, "tokens_per_batch", [128], [127], {"context_length": 64}),
    ],
)
def test_bounds(
    options: Any, name: str, allowed: list, refused: list, others: dict[str, Any]
) -> None:
    check_bounds(options, "data.", name, allowed, refused, **others)


@pytest.mark.parametrize(("length", "rows"), [(64, 8), (128, 4), (512, 1)])
def test_rows_of_a_batch(length: int, rows: int) -> None:
    """A pair takes two sequences' room."""
    sizes = {"context_length": length, "tokens_per_batch": 512}
    assert SFTDataOptions(**sizes).rows_per_batch == rows
    pairs = PreferenceDataOptions(context_length=length, tokens_per_batch=1024)
    assert pairs.rows_per_batch == rows
    assert pairs.mixes_lengths
    assert not SFTDataOptions(**sizes).mixes_lengths
    assert SFTDataOptions(**sizes, packing=False).mixes_lengths
    assert not TextDataOptions(**sizes).mixes_lengths


def test_positions_that_a_model_must_have() -> None:
    passkey = PasskeyDataOptions(context_length=512, tokens_per_batch=512, max_position=4096)
    assert passkey.positions == ("max_position", 4096)
    text = TextDataOptions(context_length=512, tokens_per_batch=512)
    assert text.positions == ("context_length", 512)


def test_the_nearest_batch_that_is_named_is_one() -> None:
    for given, named in ((63, 64), (100, 64), (191, 128)):
        with pytest.raises(ValueError, match=f"such as {named}$"):
            TextDataOptions(context_length=64, tokens_per_batch=given)


@pytest.mark.parametrize(
    "weights", [{}, {"a": 0}, {"a": -1, "b": 2}, {"c": 1}], ids=["none", "zero", "below", "unknown"]
)
def test_weights(weights: dict[str, float]) -> None:
    check_weights("data.mix", {"a": 0, "b": 0.5}, ("a", "b"))
    with pytest.raises(ValueError, match=r"^data\.mix"):
        check_weights("data.mix", weights, ("a", "b"))


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("lengths", [[128]], [[], [127], [512, 64]]),
        ("depths", [[0, 1]], [[], [-0.1], [1.1]]),
        ("samples", [1], [0]),
        ("tokens_per_length", [None, 1], [0]),
        ("num_distractors", [0, 1], [-1]),
        ("seed", [0], [-1]),
    ],
)
def test_bounds_of_made_preferences(name: str, allowed: list, refused: list) -> None:
    check_bounds(MakePreferencesOptions, "", name, allowed, refused)


def test_pairs_are_counted_by_length_and_depth() -> None:
    options = MakePreferencesOptions(lengths=[512, 2048], depths=[0.0, 0.5, 1.0], samples=7)
    assert options.num_pairs == 3 * (7 + 7)
    options = MakePreferencesOptions(
        lengths=[512, 2048], depths=[0.0, 0.5, 1.0], tokens_per_length=15360
    )
    assert [options.samples_of(length) for length in (512, 2048, 10**6)] == [10, 2, 1]
    assert options.num_pairs == 3 * (10 + 2)
