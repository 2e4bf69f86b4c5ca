"""The cells of a passkey grid, and the bounds of its settings."""

from __future__ import annotations

import pytest

from ic.evaluation.passkey.grid import CONTROL, Cell, PasskeyGridConfig
from tests.bounds import check_bounds


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("lengths", [[128]], [[], [127], [512, 64]]),
        ("depths", [[0, 1]], [[], [-0.1], [1.1]]),
        ("samples", [1], [0]),
        ("num_needles", [1], [0]),
        ("control_samples", [0], [-1]),
        ("tokens_per_batch", [1], [0]),
        ("prefill_chunk_tokens", [1], [0]),
        ("seed", [0], [-1]),
        ("samples_by_length", [{}, {512: 1}], [{512: 0}, {512: 3, 1024: 0}]),
    ],
)
def test_bounds(name: str, allowed: list, refused: list) -> None:
    check_bounds(PasskeyGridConfig, "evaluation.", name, allowed, refused)


def test_cells_are_those_of_every_length_filler_depth_and_a_control() -> None:
    grid = PasskeyGridConfig(
        lengths=[1024, 512],
        tasks=["single"],
        fillers=["noise"],
        fillers_by_length={1024: ["noise", "random"]},
        depths=[0.0, 1.0],
        samples=6,
        samples_by_length={1024: 2},
        control_samples=4,
    )
    assert list(grid.cells()) == [
        Cell("single", 512, 0.0, "noise", 6),
        Cell("single", 512, 1.0, "noise", 6),
        Cell("single", 512, CONTROL, "noise", 4),
        Cell("single", 1024, 0.0, "noise", 2),
        Cell("single", 1024, 1.0, "noise", 2),
        Cell("single", 1024, CONTROL, "noise", 2),  # no more than of the others
        Cell("single", 1024, 0.0, "random", 2),
        Cell("single", 1024, 1.0, "random", 2),
        Cell("single", 1024, CONTROL, "random", 2),
    ]
    grid.control_samples = 0
    assert CONTROL not in {cell.depth for cell in grid.cells()}
