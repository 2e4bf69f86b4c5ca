"""Attention of new tokens over themselves and over what the cache holds of their request.

On a GPU from sm_80 on, and in Triton's interpreter, our kernels attend, and a long context passes
in pieces of bounded memory. Elsewhere PyTorch's attend, to the whole context at once.

Legend: T new tokens of one or several requests, S visible tokens, H heads of this rank, K width of
queries and keys, V v_head_dim, R kv_lora_rank, P qk_rope_head_dim, C = R + P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ic.model.operators import load_operators


def gather_rows(
    cache: Tensor, pages: Tensor, first: int, last: int, scale: Tensor | float
) -> Tensor:
    """Rows `first` to `last` of one request, (last - first, C); of an e4m3 cache in float32.

    Args:
        cache: (pages, page_tokens, C).
        pages: the request's pages in order, integers on the cache's device.
        scale: what the rows of an e4m3 cache are multiplied by.
    """
    page_tokens = cache.shape[1]
    begin, end = first // page_tokens, -(-last // page_tokens)
    # Bytes: PyTorch indexes no e4m3 on a CPU.
    is_quantised = cache.dtype == torch.float8_e4m3fn
    held = cache.view(torch.uint8) if is_quantised else cache
    rows = held.index_select(0, pages[begin:end].long()).flatten(0, 1)
    rows = rows[first - begin * page_tokens : last - begin * page_tokens]
    return rows.view(torch.float8_e4m3fn).float() * scale if is_quantised else rows


def merge(one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to two pieces of the keys, each (out (T, H, V), lse (H, T)) -> to both of them,
    in float32.
    """
    out_THV, lse_HT = other[0].float(), other[1]
    if one is None:
        return out_THV, lse_HT
    both_HT = torch.logaddexp(one[1], lse_HT)
    shares = ((lse - both_HT).exp().T[..., None] for lse in (one[1], lse_HT))
    return one[0] * next(shares) + out_THV * next(shares), both_HT


@dataclass(frozen=True)
class PrefillAttention:
    """How the new tokens of one layer attend.

    Attributes:
        scale: what the scores are multiplied by.
        expand: keys (S, H, K) and values (S, H, V) of latents (S, R) and rotated keys (S, P).
        piece_tokens: most cached tokens whose keys and values are held at once.
        widths: K and V.
    """

    scale: float
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    piece_tokens: int
    widths: tuple[int, int]

    def fresh(
        self, q_THK: Tensor, latent_TR: Tensor, k_rope_TP: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """Attention (T, H, V) within each of several requests without cached tokens.

        Args:
            lengths: tokens of each request; they lie one after the other.
        """
        q, k, v = (x[None] for x in (q_THK, *self.expand(latent_TR, k_rope_TP)))
        if not takes(q_THK, *self.widths):
            segments, last = [], 0
            for length in lengths:
                segments.append((0, last, last := last + length))
            out = load_operators("torch").expanded(q, k, v, scale=self.scale, segments=segments)
            return out[0]
        from ic.kernels.triton_mla_attention import mla_attention

        ids = None
        if len(lengths) > 1:
            length_B = torch.tensor(lengths, pin_memory=q.is_cuda)
            length_B = length_B.to(q.device, non_blocking=True)
            index_B = torch.arange(len(lengths), dtype=torch.int32, device=q.device)
            ids = index_B.repeat_interleave(length_B, output_size=sum(lengths))[None]
        return mla_attention(q, k, v, scale=self.scale, document_ids=ids)[0]

    def continued(
        self,
        q_THK: Tensor,
        latent_TR: Tensor,
        k_rope_TP: Tensor,
        context: Callable[[int, int], Tensor],
        context_tokens: int,
    ) -> Tensor:
        """Attention (T, H, V) of one request's new tokens over its cached ones and themselves.

        Args:
            context: gives rows `first` to `last` of the cache, (last - first, C), in any dtype.
        """
        new_TC = torch.cat((latent_TR, k_rope_TP), dim=-1)
        parts = [latent_TR.shape[1], k_rope_TP.shape[1]]
        q = q_THK[None]

        def rows(first: int, last: int) -> tuple[Tensor, Tensor]:
            """Keys and values of places in the request, where the new tokens come last."""
            cached_SC = context(first, min(last, context_tokens)).to(new_TC.dtype)
            if last > context_tokens:
                cached_SC = torch.cat((cached_SC, new_TC))
            k_SHK, v_SHV = self.expand(*cached_SC.split(parts, -1))
            return k_SHK[None], v_SHV[None]

        tokens = context_tokens + len(q_THK)
        if not takes(q_THK, *self.widths):
            out = load_operators("torch").expanded(q, *rows(0, tokens), scale=self.scale)
            return out[0]
        from ic.kernels.triton_mla_attention import attend_piece

        # The last piece goes with the new tokens.
        *before, last = range(0, context_tokens, self.piece_tokens)
        whole = None
        for first in before:
            piece = rows(first, first + self.piece_tokens)
            out, lse = attend_piece(q, *piece, scale=self.scale, causal=False)
            whole = merge(whole, (out[0], lse[0]))
        out, lse = attend_piece(q, *rows(last, tokens), scale=self.scale, causal=True)
        return out[0] if whole is None else merge(whole, (out[0], lse[0]))[0]


def takes(q_THK: Tensor, width: int, v_width: int) -> bool:
    """Whether our kernels attend with these widths on this device."""
    from ic.kernels import arguments
    from ic.kernels.widths import is_power, split_width

    capability = arguments.compute_capability(q_THK)
    if not (capability >= 80 if q_THK.is_cuda else arguments.INTERPRETED):
        return False
    try:
        split_width(width)
    except ValueError:
        return False
    return is_power(v_width)
