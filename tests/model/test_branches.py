"""Two continuations in one row give what each gives in a row of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ic.model import MLAForCausalLM
from ic.model.branches import num_visible_in_branches

Make = Callable[..., MLAForCausalLM]
# Lengths of the beginning and of both continuations; a row of the batch each.
SHAPES = [(13, 5, 9), (20, 1, 3), (0, 4, 6), (7, 11, 2)]


def draw() -> tuple[torch.Tensor, list[tuple[int, int]], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Rows padded on the right, their bounds, and the two sequences that each row holds."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(len(SHAPES), max(map(sum, SHAPES)), dtype=torch.long)
    bounds, sequences = [], []
    for row, (shared, first, second) in enumerate(SHAPES):
        ids = torch.randint(3, 97, (shared + first + second,), generator=generator)
        rows[row, : len(ids)] = ids
        bounds.append((shared, shared + first))
        sequences.append((ids[: shared + first], torch.cat((ids[:shared], ids[shared + first :]))))
    return rows, bounds, sequences


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"length_temperature": "ssmax", "nope_layers": [1]},
        {"q_lora_rank": None, "rope_interleave": False},
        {
            "attention_backend": "triton",
            "length_temperature": "llama4",
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        },
    ],
)
def test_equal_to_rows_of_their_own(make_model: Make, settings: dict[str, Any]) -> None:
    model = make_model(**settings)
    rows, bounds, sequences = draw()
    weights = torch.randn(3, 100, 256, generator=torch.Generator().manual_seed(1))

    def loss(hidden_TD: torch.Tensor, part: int) -> torch.Tensor:
        return (hidden_TD * weights[part, : len(hidden_TD), : hidden_TD.shape[1]]).sum()

    got = model.model(input_ids=rows, branches=bounds, use_cache=False).last_hidden_state
    total = torch.zeros(())
    expected_total = torch.zeros(())
    for row, (shape, pair) in enumerate(zip(SHAPES, sequences, strict=True)):
        shared = shape[0]
        whole = [model.model(input_ids=ids[None], use_cache=False)[0][0] for ids in pair]
        expected = torch.cat((whole[0], whole[1][shared:]))
        torch.testing.assert_close(got[row, : sum(shape)], expected, atol=2e-5, rtol=0)
        total = total + loss(got[row, : sum(shape)], row % 3)
        expected_total = expected_total + loss(expected, row % 3)
    names = [name for name, _ in model.model.named_parameters()]
    ours = torch.autograd.grad(total, list(model.model.parameters()))
    theirs = torch.autograd.grad(expected_total, list(model.model.parameters()))
    for name, our, their in zip(names, ours, theirs, strict=True):
        scale = their.abs().max().clamp(min=1)
        torch.testing.assert_close(our / scale, their / scale, atol=2e-5, rtol=0, msg=name)


def test_number_of_visible_keys() -> None:
    got = num_visible_in_branches([(2, 5), (0, 3)], 7, torch.device("cpu"))
    assert got.tolist() == [[1, 2, 3, 4, 5, 3, 4], [1, 2, 3, 1, 2, 3, 4]]


def test_longer_than_the_positions(make_model: Make) -> None:
    """A row may be longer than the model's positions; neither of its sequences is."""
    model = make_model(max_position_embeddings=24)
    rows = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(2))
    got = model.model(input_ids=rows, branches=[(18, 24)], use_cache=False).last_hidden_state
    expected = model.model(input_ids=rows[:, [*range(18), *range(24, 30)]], use_cache=False)[0]
    torch.testing.assert_close(got[0, 24:], expected[0, 18:], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branches": [(2, 4)]}, "branches has 1 rows, the input 2"),
        ({"branches": [(2, 4), (5, 3)]}, r"branches \(5, 3\): must rise from 0 to the 8 tokens"),
        ({"branches": [(2, 4), (5, 9)]}, r"branches \(5, 9\): must rise from 0 to the 8 tokens"),
        (
            {"branches": [(2, 4)] * 2, "document_ids": torch.zeros(2, 8, dtype=torch.int32)},
            "branches go without cache, attention_mask and document_ids",
        ),
    ],
)
def test_bad_bounds(make_model: Make, arguments: dict[str, Any], message: str) -> None:
    rows = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        make_model().model(input_ids=rows, use_cache=False, **arguments)
