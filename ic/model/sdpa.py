"""Causal attention of expanded queries, keys and values on PyTorch's fused operators.

Legend: B batch, T query tokens, S key tokens, H heads, K qk_head_dim, V v_head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

# cuDNN takes K != V without padding and is the fastest on Hopper; PyTorch's own flash kernel
# refuses K != V.
_CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# Queries that follow cached keys need a mask that is not square, for which the kernels take two to
# three and a half times as long (docs/log.md). So up to this many keys a query, empty queries in
# front, whose output is dropped, make it square.
_PAD_WITHIN = 2

Segments = list[tuple[int, int, int]]
# Query, key, value, scale and mask -> attention of one document, causal without a mask.
Attend = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


def scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask_BTS: Tensor | None
) -> Tensor:
    """PyTorch's fused attention (B, T, H, V) of the last T of S positions."""
    tokens, keys, v_dim = q.shape[1], k.shape[1], v.shape[-1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    on_cpu = q.device.type == "cpu"
    if on_cpu and v_dim < q.shape[-1]:
        # The CPU's flash kernel wants K == V; its other path holds all T x S scores.
        v = F.pad(v, (0, q.shape[-1] - v_dim))
    mask = None if mask_BTS is None else mask_BTS[:, None]
    if mask is None and tokens < keys <= _PAD_WITHIN * tokens:
        q = F.pad(q, (0, 0, keys - tokens, 0))
    causal = False
    if mask is None and q.shape[2] == keys:  # a branch, because a compiler's comparison is no bool
        causal = True
    if mask is None and not causal and tokens > 1:
        mask = causal_lower_right(tokens, keys)
        if on_cpu:
            mask = _lower_right_mask(tokens, keys)
    if on_cpu:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    else:
        with sdpa_kernel(_CUDA_BACKENDS, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    return out[:, :, -tokens:, :v_dim].transpose(1, 2)


def causal_attention(
    q_BTHK: Tensor,
    k_BSHK: Tensor,
    v_BSHV: Tensor,
    *,
    scale: float,
    mask_BTS: Tensor | None = None,
    segments: Segments | None = None,
    attend: Attend = scaled_dot_product,
) -> Tensor:
    """softmax(scale q k^T, causal) v -> (B, T, H, V).

    The queries are the last T of the S positions. With `mask_BTS` (True where a key is visible) the
    mask decides alone. With `segments` (row, start, end), which cover the S keys of every row in
    order, each document attends within itself. `attend` does each piece.
    """
    if segments is None:
        return attend(q_BTHK, k_BSHK, v_BSHV, scale, mask_BTS)
    if len(segments) == 1 and len(q_BTHK) == 1:
        return attend(q_BTHK, k_BSHK, v_BSHV, scale, None)
    # One call a document costs launches, but neither a (T, S) mask nor work outside the blocks.
    first = k_BSHK.shape[1] - q_BTHK.shape[1]
    pieces = [
        attend(
            q_BTHK[b, max(i - first, 0) : j - first][None],
            k_BSHK[b, i:j][None],
            v_BSHV[b, i:j][None],
            scale,
            None,
        )[0]
        for b, i, j in segments
        if j > first
    ]
    return torch.cat(pieces).view(*q_BTHK.shape[:3], v_BSHV.shape[-1])


def _lower_right_mask(tokens: int, keys: int) -> Tensor:
    return torch.ones(tokens, keys, dtype=torch.bool).tril_(keys - tokens)
