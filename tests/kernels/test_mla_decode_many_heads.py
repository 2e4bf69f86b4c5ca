"""Decode of more than 16 query rows, for which Hopper has kernels of its own, against the reference."""

from __future__ import annotations

import pytest
import torch

from ic.kernels.reference import quantize_per_token
from ic.kernels.triton_mla_flash_decode import mla_decode
from tests.kernels.test_mla_flash_decode import (
    CUDA,
    TOLERANCE,
    TOLERANCE_WIDENED,
    assert_matches,
    make_case,
    quantize_case,
)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("page_size", "num_query", "heads"),
    [
        (64, 1, 128),
        (64, 1, 64),
        (None, 1, 100),
        (128, 2, 32),
        (None, 4, 32),
        (64, 3, 64),
        (64, 1, 17),
        (None, 2, 16),
        (128, 3, 21),
    ],
)
def test_quantized_cache_of_many_heads(
    device: torch.device, kind: torch.dtype, page_size: int | None, num_query: int, heads: int
) -> None:
    """On Hopper this is `gluon_mla_decode_codes`."""
    lengths = [0, 1, 63, 64, 65, 300] if CUDA else [0, 1, 65]
    for dtype in (torch.float16, torch.bfloat16) if CUDA else (torch.float16,):
        case = make_case(
            device, lengths, dtype=dtype, heads=heads, latent=512, rope=64, page_size=page_size,
            num_query=num_query,
        )  # fmt: skip
        quantize_case(case, kind)
        for num_splits in (1, 4):
            result = mla_decode(**case, num_splits=num_splits)
            assert_matches(result, case, TOLERANCE_WIDENED)


@pytest.mark.skipif(not CUDA, reason="the interpreter takes minutes for so many tokens")
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantized_cache_of_many_heads_and_tokens(device: torch.device, kind: torch.dtype) -> None:
    case = make_case(
        device, [4096, 2049, 4095], dtype=torch.bfloat16, heads=128, latent=512, rope=64,
        page_size=64,
    )  # fmt: skip
    quantize_case(case, kind)
    for num_splits in (None, 1, 7):
        result = mla_decode(**case, num_splits=num_splits)
        assert_matches(result, case, TOLERANCE_WIDENED)


@pytest.mark.gpu
@pytest.mark.parametrize("latent", [128, 192, 256, 448, 512])
@pytest.mark.parametrize(
    ("heads", "num_query", "page_size", "dtype"),
    [
        (64, 1, 64, torch.bfloat16),
        (128, 1, 64, torch.bfloat16),
        (80, 1, None, torch.float16),
        (130, 1, 128, torch.float16),
        (96, 2, 64, torch.float16),
        (128, 4, 128, torch.bfloat16),
        (64, 3, None, torch.bfloat16),
        (17, 1, 64, torch.float16),
        (16, 2, 64, torch.bfloat16),
        (32, 1, None, torch.bfloat16),
        (21, 3, 128, torch.float16),
    ],
)
def test_many_heads(
    device: torch.device,
    latent: int,
    heads: int,
    num_query: int,
    page_size: int | None,
    dtype: torch.dtype,
) -> None:
    """On Hopper these are `gluon_mla_decode` and `gluon_mla_decode_pairs`."""
    case = make_case(
        device,
        [0, 1, 63, 64, 65, 130, 1000],
        dtype=dtype,
        heads=heads,
        latent=latent,
        rope=64,
        page_size=page_size,
        num_query=num_query,
    )
    for num_splits in (1, 4, 40):
        result = mla_decode(**case, num_splits=num_splits)
        assert_matches(result, case, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_lengths_and_pages_of_many_heads_are_clamped(
    device: torch.device, kind: torch.dtype
) -> None:
    case = make_case(device, [130, 64], heads=64, latent=512, rope=64, page_size=64)
    cache = case["cache"].float().nan_to_num(1)
    case["cache"], case["cache_scale"] = quantize_per_token(cache, kind)
    last = len(cache) - 1
    tables = [[[-5, 2**30, 1], [2, -1, 3]], [[0, last, 1], [2, 0, 3]]]
    lying, right = (torch.tensor(x, dtype=torch.int32, device=device) for x in tables)
    lengths = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([2**30, -3], [192, 0])]
    result = mla_decode(
        **case | {"block_table": lying, "seq_lens_B": lengths[0]}, check_indices=False
    )
    case |= {"block_table": right, "seq_lens_B": lengths[1]}
    assert_matches(result, case, TOLERANCE_WIDENED)
