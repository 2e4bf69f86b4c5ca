"""How many tokens the cache gets."""

from __future__ import annotations

import pytest
import torch

from ic.inference.engine.memory import num_pages, tokens_within
from ic.inference.engine.options import EngineOptions
from ic.model import MLAConfig
from ic.model.attention import EXPANDED_BYTES
from tests.inference.engine.serving import SIZES, Make

GIB = 2**30


@pytest.mark.parametrize(
    ("codes", "token_bytes"), [(None, 16 * 512), (torch.float8_e4m3fn, 16 * (256 + 4))]
)
def test_tokens_within_a_memory(codes: torch.dtype | None, token_bytes: int) -> None:
    """Of the 1B shape in bfloat16, where a token takes 8 KiB, or codes and scales."""
    config, dtype = MLAConfig(), torch.bfloat16
    found = {size: tokens_within(size * GIB, config, dtype, codes) for size in (1, 2, 8, 60)}
    assert found[1] == found[2] == 0  # not even the expanded keys fit
    gathered = 512 + token_bytes // 16
    one_head = 2 * (128 + 128 + 192)
    for size in (8, 60):
        tokens = found[size]
        taken = tokens * (token_bytes + gathered) + max(EXPANDED_BYTES, tokens * one_head)
        assert taken <= size * GIB < taken + 2 * (token_bytes + gathered + one_head)
    # Where one head of all tokens takes more than EXPANDED_BYTES, it counts.
    assert found[60] * one_head > EXPANDED_BYTES > found[8] * one_head


def test_on_a_cpu(make_model: Make) -> None:
    model = make_model(**SIZES, max_position_embeddings=500)
    assert num_pages(model, EngineOptions(), None) == 4 * 500 // 64
    assert num_pages(model, EngineOptions(cache_tokens=200, page_tokens=16), None) == 12
    long = make_model(**SIZES, max_position_embeddings=10**6)
    assert num_pages(long, EngineOptions(), None) == 65536 // 64
