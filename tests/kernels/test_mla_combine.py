"""The second pass of split-KV decode against sums in float64."""

from __future__ import annotations

import math

import pytest
import torch

from ic.kernels.mla_decode_launch import combine_blocks
from ic.kernels.triton_mla_combine import Combine

ROWS, R = 3, 40


@pytest.mark.parametrize("num_splits", [1, 16, 17, 128, 129, 132, 300])
@pytest.mark.parametrize("rising", [True, False])
def test_splits_of_any_number(device: torch.device, num_splits: int, rising: bool) -> None:
    """Above 128 splits there are several blocks: what is summed so far is scaled to each maximum.

    The weights rise or fall over the splits, so that the largest is in the last block or the first;
    some splits are empty, and of one row all are.
    """
    generator = torch.Generator().manual_seed(num_splits)
    partial = torch.randn(2, num_splits, ROWS, R, generator=generator)
    slope = torch.linspace(-8, 8, num_splits) * (1 if rising else -1)
    lse = torch.randn(2, num_splits, ROWS, generator=generator) + slope[:, None]
    lse[0, ::5, 0] = -math.inf
    lse[1, :, 2] = -math.inf
    out, out_lse = torch.empty(2, ROWS, R), torch.empty(2, ROWS)
    on = [tensor.to(device) for tensor in (partial, lse, out, out_lse)]
    Combine(num_splits, R, is_early=False)(*on, 2, ROWS)
    log_weight = lse.double() * math.log(2)
    expected = torch.einsum("bsn,bsnr->bnr", log_weight.softmax(1).nan_to_num(0), partial.double())
    torch.testing.assert_close(on[2].cpu().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(on[3].cpu().double(), log_weight.logsumexp(1), rtol=1e-5, atol=1e-5)


def test_more_than_128_splits_take_several_blocks() -> None:
    """The case that the test above is for."""
    assert combine_blocks(132, 512)[0] == 128
