"""How `triton_mla_flash_decode` is launched: tile configurations and split counts.

Tiles are looked up, never tuned at run time: a serving process must not measure on its first
request. The table's entries are the fastest of the sweeps described in docs/kernels.md.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton

from ic.kernels.widths import one_tile

LOG2E = 1.4426950408889634
MAX_QUERY_TOKENS = 4
MAX_SPLITS = 1024
# Query rows that the tiles of few rows take on Hopper; more go to the kernels of 64 rows.
FEW_ROWS = 16


@dataclass(frozen=True)
class DecodeConfig:
    """One tiling. `programs_per_sm` is how many fit on a multiprocessor at once."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    swap: bool = False
    combined: bool = False
    pairs: bool = False
    max_registers: int | None = None
    pdl: bool = False
    e4m3_bits: bool = False
    many_heads: bool = False
    e4m3_codes: bool = False
    many_heads_codes: bool = False


@dataclass(frozen=True)
class Device:
    capability: int
    num_sms: int
    shared_bytes: int
    interpreted: bool = False


@functools.lru_cache
def _device(index: int | None) -> Device:
    if index is None:  # the interpreter: pretend to be one small H100
        return Device(capability=90, num_sms=4, shared_bytes=232448, interpreted=True)
    properties = torch.cuda.get_device_properties(index)
    return Device(
        capability=properties.major * 10 + properties.minor,
        num_sms=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def device_of(tensor: torch.Tensor) -> Device:
    return _device(tensor.device.index if tensor.is_cuda else None)


def decode_config(
    rows: int, latent_dim: int, rope_dim: int, itemsize: int, device: Device
) -> DecodeConfig:
    """The tiling for `rows` query rows of a sequence on a device.

    H100 entries were measured; the others are chosen to fit the chip's shared memory.
    """
    tile = one_tile(latent_dim, rope_dim)
    combined, width = bool(tile), tile or latent_dim
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    hopper = device.capability == 90
    large = device.shared_bytes >= 160 * 1024
    if itemsize == 4:  # fp32, for tests
        config = DecodeConfig(16, 16, 4, 1, 1)
    elif itemsize == 1:
        if width <= 256:
            if block_m == 16 and hopper and combined:
                config = DecodeConfig(16, 64, 4, 1, 3, swap=True, max_registers=168)
            else:
                config = DecodeConfig(min(block_m, 32), 32, 4, 1, 2)
        elif hopper:
            config = DecodeConfig(16, 32, 4, 1, 2)
        elif large:
            config = DecodeConfig(16, 64, 8, 1, 1)
        else:
            config = DecodeConfig(16, 32, 8, 1, 1)
    elif width <= 256:
        if block_m == 64:
            config = DecodeConfig(64, 64, 8, 3, 1) if large else DecodeConfig(32, 32, 4, 2, 1)
        elif hopper:
            config = DecodeConfig(block_m, 64, 4, 3, 2, swap=True)
        else:
            config = DecodeConfig(block_m, 64 if large else 32, 4, 3, 1)
    elif block_m == 64:
        if hopper:
            config = DecodeConfig(64, 64, 8, 2, 1)
        elif device.shared_bytes >= 224 * 1024:
            config = DecodeConfig(64, 32, 8, 2, 1)
        else:
            config = DecodeConfig(32, 32, 8, 3 if large else 2, 1)
    elif device.shared_bytes >= 224 * 1024:
        config = DecodeConfig(block_m, 64, 8, 3, 1)
    else:
        config = DecodeConfig(block_m, 32, 8, 3 if large or block_m == 16 else 2, 1)
    return replace(
        config,
        combined=combined,
        many_heads=hopper and not device.interpreted,
        pdl=device.capability >= 90 and not device.interpreted,
        e4m3_bits=device.capability < 89 or device.interpreted,
    )


MANY_HEADS_CODES = DecodeConfig(64, 64, 4, 2, 1, many_heads_codes=True)


def e4m3_codes_config(latent_dim: int, rope_dim: int) -> DecodeConfig:
    """The tiling of `gluon_mla_decode_e4m3`, measured on an H100."""
    combined = bool(one_tile(latent_dim, rope_dim))
    stages = 3 if combined and latent_dim + rope_dim <= 256 else 2
    return DecodeConfig(16, 64, 4, stages, stages, combined=combined, pdl=True, e4m3_codes=True)


def e4m3_codes_applies(
    q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, paged: bool
) -> bool:
    """Whether `gluon_mla_decode_e4m3` takes the shape and the device."""
    device = device_of(cache)
    latent_dim, rope_dim = q_latent.shape[3], q_rope.shape[3]
    width = latent_dim + rope_dim
    return (
        device.capability == 90
        and not device.interpreted
        and q_latent.shape[1] * q_latent.shape[2] <= FEW_ROWS
        and (width in (128, 256, 512) or (latent_dim in (128, 256, 512) and rope_dim in (32, 64)))
        and cache.dtype == torch.float8_e4m3fn
        and _is_in_tiles_of_64(cache, paged)
    )


def many_heads_codes_applies(
    q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, paged: bool
) -> bool:
    """Whether `gluon_mla_decode_codes` takes the shape and the device."""
    device = device_of(cache)
    return (
        device.capability == 90
        and not device.interpreted
        and q_latent.shape[1] * q_latent.shape[2] > FEW_ROWS
        and (q_latent.shape[3], q_rope.shape[3]) == (512, 64)
        and q_latent.dtype in (torch.bfloat16, torch.float16)
        and cache.dtype in (torch.float8_e4m3fn, torch.int8)
        and _is_in_tiles_of_64(cache, paged)
    )


def choose_decode_config(
    q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, paged: bool
) -> DecodeConfig:
    if pairs_applies(q_latent, q_rope, cache, paged):
        return pairs_config(q_latent.shape[1] * q_latent.shape[2], q_latent.shape[3])
    if e4m3_codes_applies(q_latent, q_rope, cache, paged):
        return e4m3_codes_config(q_latent.shape[3], q_rope.shape[3])
    if many_heads_codes_applies(q_latent, q_rope, cache, paged):
        return MANY_HEADS_CODES
    rows = q_latent.shape[1] * q_latent.shape[2]
    return decode_config(
        rows, q_latent.shape[3], q_rope.shape[3], cache.element_size(), device_of(cache)
    )


def many_heads_applies(
    q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, paged: bool
) -> bool:
    """Whether `gluon_mla_decode` takes the shape; the configuration says if the device does."""
    widths = q_latent.shape[3], q_rope.shape[3]
    return widths in ((512, 64), (448, 64)) and _are_many_over_16_bits(q_latent, cache, paged)


def pairs_applies(
    q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, paged: bool
) -> bool:
    """Whether `gluon_mla_decode_pairs` takes the shape and the device."""
    device = device_of(cache)
    return (
        device.capability == 90
        and not device.interpreted
        and (q_latent.shape[3], q_rope.shape[3]) in ((128, 64), (192, 64), (256, 64))
        and _are_many_over_16_bits(q_latent, cache, paged)
    )


def pairs_config(rows: int, latent_dim: int) -> DecodeConfig:
    """The tiling of `gluon_mla_decode_pairs`: as many buffers as Hopper's shared memory holds
    beside the queries, and 1 KiB for barriers.
    """
    groups = 1 if rows <= 64 else 2
    tile_bytes = 64 * (latent_dim + 64) * 2
    stages = (227 * 1024 - 1024) // tile_bytes - groups
    return DecodeConfig(64 * groups, 64, 4, stages, 1, pairs=True)


def _are_many_over_16_bits(q_latent: torch.Tensor, cache: torch.Tensor, paged: bool) -> bool:
    """Whether rows are many, and the cache one of 16 bits in tiles of 64 tokens."""
    return (
        q_latent.shape[1] * q_latent.shape[2] > FEW_ROWS
        and cache.dtype == q_latent.dtype
        and cache.dtype in (torch.bfloat16, torch.float16)
        and _is_in_tiles_of_64(cache, paged)
    )


def _is_in_tiles_of_64(cache: torch.Tensor, paged: bool) -> bool:
    """Whether the Gluon kernels can fetch the cache in tiles of 64 tokens, by TMA or 16 bytes at a
    time. `find_plan` keeps what this asks of an address and a size in its key.
    """
    return (
        cache.is_contiguous()
        and cache.data_ptr() % 16 == 0
        and cache.shape[0] * cache.shape[1] < 2**31
        and (not paged or cache.shape[1] % 64 == 0)
        and cache.numel() > 0
    )


@functools.lru_cache(maxsize=4096)
def split_count(groups: int, tiles: int, slots: int) -> int:
    """Splits that minimise the time of `groups` (sequences times row blocks) on `slots`.

    In units of a tile: every wave of programs costs its tiles and a start of about two tiles; every
    split costs a little in the combine pass.
    """
    best, best_cost = 1, math.inf
    for splits in range(1, min(tiles, MAX_SPLITS) + 1):
        waves = math.ceil(groups * splits / slots)
        cost = waves * (math.ceil(tiles / splits) + 2) + 0.02 * splits + (splits > 1)
        if cost < best_cost - 1e-9:
            best, best_cost = splits, cost
    return best


def outer_stride(cache: torch.Tensor) -> int:
    """The stride between sequences or pages; 0 where there is one, whose capacity says nothing."""
    return cache.stride(0) if cache.shape[0] > 1 else 0


def combine_blocks(num_splits: int, latent_dim: int) -> tuple[int, int, int]:
    """(splits at once, columns at once, warps) of the combine pass."""
    if num_splits <= 16:
        return triton.next_power_of_2(num_splits), min(triton.next_power_of_2(latent_dim), 256), 2
    return min(triton.next_power_of_2(num_splits), 128), 32, 4
