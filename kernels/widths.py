"""Which widths of MLA our attention kernels take. Imports nothing, so that it can be asked where no
kernel will run.

Legend: D width of a head's query and key, R kv_lora_rank, P qk_rope_head_dim, V v_head_dim.
"""

from __future__ import annotations

LARGEST_LATENT = 512
# Widest row of the cache that one tile holds with columns to spare.
_LARGEST_PADDED = 512
LATENT_RULE = (
    "the Triton decode takes ranks and rotary dimensions that are multiples of 8, a rank of 8 to "
    "512, and together at most 512 or each of them a power of two from 16 on"
)


def is_power(width: int) -> bool:
    """A power of two that fills a tile."""
    return width >= 16 and width & (width - 1) == 0


def split_width(width: int) -> tuple[int, int]:
    """D as D1 + D2: the largest power of two, and the rest (a power of two, or 0).

    Raises:
        ValueError: no such sum.
    """
    d1 = 1 << (width.bit_length() - 1) if width > 0 else 0
    d2 = width - d1
    if d1 < 16 or d2 & (d2 - 1) or 0 < d2 < 16:
        raise ValueError(
            f"q_BTHD: width {width} is neither a power of two nor a sum of two, each at least 16"
        )
    return d1, d2


def one_tile(latent_dim: int, rope_dim: int) -> int:
    """Width of the tile that holds latent and rope key side by side: the power of two from R + P
    on. 0 where each of them fills a tile of its own, and together they do not.
    """
    total = latent_dim + rope_dim
    width = max(16, 1 << (total - 1).bit_length())
    return 0 if width != total and is_power(latent_dim) and is_power(rope_dim) else width


def takes_latent(latent_dim: int, rope_dim: int) -> bool:
    """Whether decode takes a cache of these widths, as `LATENT_RULE` says."""
    apart = is_power(latent_dim) and is_power(rope_dim)
    return (
        8 <= latent_dim <= LARGEST_LATENT
        and latent_dim % 8 == 0
        and rope_dim % 8 == 0
        and (apart or one_tile(latent_dim, rope_dim) <= _LARGEST_PADDED)
    )


def refusal(nope_dim: int, rope_dim: int, value_dim: int, latent_dim: int) -> str | None:
    """Why the attention kernels do not take a model of these widths, in one line; None if they do.

    What is to be done instead follows in the caller's words.
    """
    try:
        split_width(nope_dim + rope_dim)
    except ValueError:
        return (
            f"qk_nope_head_dim + qk_rope_head_dim={nope_dim + rope_dim}: the Triton attention "
            "takes a power of two or a sum of two, each at least 16"
        )
    if not is_power(value_dim):
        return f"v_head_dim={value_dim}: the Triton attention takes powers of two from 16 on"
    if not takes_latent(latent_dim, rope_dim):
        return f"kv_lora_rank={latent_dim} and qk_rope_head_dim={rope_dim}: {LATENT_RULE}"
    return None


def nearest_widths(
    nope_dim: int, rope_dim: int, value_dim: int, latent_dim: int
) -> list[tuple[int, int]]:
    """Up to three (rank, rotary dimension) that the kernels take and that are closest to what they
    do not, those of a smaller cache first; empty where the other widths do not fit.
    """
    found = [
        (rank, rope)
        for rank in range(8, LARGEST_LATENT + 1, 8)
        for rope in range(8, 2 * rope_dim + 17, 8)
        if refusal(nope_dim, rope, value_dim, rank) is None
    ]
    nearest = sorted(found, key=lambda one: abs(one[0] - latent_dim) + abs(one[1] - rope_dim))[:3]
    return sorted(nearest, key=lambda one: (sum(one), one))
