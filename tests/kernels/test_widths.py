"""Which widths the attention kernels take, and what is proposed instead of others."""

from __future__ import annotations

import pytest

from ic.kernels.widths import nearest_widths, one_tile, refusal, takes_latent


@pytest.mark.parametrize(
    ("rank", "rope", "tile"),
    [
        (192, 64, 256),
        (512, 64, 0),  # a tile each
        (128, 64, 0),
        (64, 64, 128),
        (48, 32, 128),
        (8, 16, 32),
        (8, 0, 16),
        (192, 192, 512),  # the exact form of three KV heads of 64
    ],
)
def test_a_row_is_one_tile_or_two(rank: int, rope: int, tile: int) -> None:
    assert one_tile(rank, rope) == tile
    assert takes_latent(rank, rope)


@pytest.mark.parametrize(("rank", "rope"), [(12, 16), (4, 16), (48, 20), (520, 64), (480, 40)])
def test_other_rows(rank: int, rope: int) -> None:
    assert not takes_latent(rank, rope)
    why = refusal(64 - rope, rope, 64, rank) if rope < 64 else refusal(64, 64, 64, rank)
    assert str(why).startswith(f"kv_lora_rank={rank} and qk_rope_head_dim={rope}: the Triton decod")


def test_the_nearest_widths_are_taken_and_near() -> None:
    assert "=72: the Triton attention takes a power of two or a sum" in str(refusal(64, 8, 64, 16))
    assert nearest_widths(64, 8, 64, 16) == [(8, 16), (16, 16), (24, 16)]
    assert nearest_widths(64, 16, 64, 20) == [(8, 16), (16, 16), (24, 16)]
    for rank, rope in nearest_widths(64, 48, 64, 100):
        assert refusal(64, rope, 64, rank) is None
        assert abs(rank - 100) + abs(rope - 48) <= 20
    assert nearest_widths(64, 16, 24, 32) == []  # of heads of 24 none
