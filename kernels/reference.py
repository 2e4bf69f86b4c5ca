"""What the kernels must compute, in plain PyTorch: the specification, slow on purpose.

Every function works in the dtype of its inputs' widest accumulator: fp32, or fp64 when the inputs are fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """First position and one past the last position of each position's document, (B, S) int32.

    A document is a maximal run of equal ids: an id that comes back later starts a new document.
    """
    num_positions = document_ids.shape[1]
    position = torch.arange(num_positions, device=document_ids.device, dtype=torch.int32)
    position = position.expand_as(document_ids)
    new = torch.ones_like(document_ids, dtype=torch.bool)
    new[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    start = torch.where(new, position, 0).cummax(1).values
    last = torch.ones_like(new)
    last[:, :-1] = new[:, 1:]
    end = torch.where(last, position + 1, num_positions).flip(1).cummin(1).values.flip(1)
    return start.int().contiguous(), end.int().contiguous()


def attention_reference(
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHV: Tensor,
    *,
    scale: float,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents; returns out (B, T, H, V) and log-sum-exp (B, H, T).

    The queries are the last T of the S positions; document_ids is (B, S).
    """
    num_queries, num_keys = q_BTHD.shape[1], k_BSHD.shape[1]
    query = torch.arange(num_keys - num_queries, num_keys, device=q_BTHD.device)
    key = torch.arange(num_keys, device=q_BTHD.device)
    visible = (key[None, :] <= query[:, None])[None]
    if document_ids is not None:
        start = document_bounds(document_ids)[0][:, num_keys - num_queries :]
        visible = visible & (key[None, None, :] >= start[:, :, None])
    score = torch.einsum("bthd,bshd->bhts", _wide(q_BTHD), _wide(k_BSHD)) * scale
    score = score.masked_fill(~visible[:, None], float("-inf"))
    out = torch.einsum("bhts,bshv->bthv", score.softmax(-1), _wide(v_BSHV))
    return out.to(q_BTHD.dtype), score.logsumexp(-1)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normed rows, and what was normed: x, or x + residual rounded to the dtype of x."""
    total = x if residual is None else x + residual
    wide = _wide(total)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * _wide(weight)).to(x.dtype), total


def rope_reference(x_BTHP: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate pairs (2i, 2i+1) when interleaved (DeepSeek's view_as_complex), else (i, i + P/2).

    cos and sin are (B or 1, T, P/2); the result keeps the layout of the input.
    """
    wide = _wide(x_BTHP)
    c, s = cos.to(wide.dtype)[:, :, None, :], sin.to(wide.dtype)[:, :, None, :]
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        out = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
    else:
        a, b = wide.chunk(2, dim=-1)
        out = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
    return out.to(x_BTHP.dtype)
