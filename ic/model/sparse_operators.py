"""What sparse attention asks of a backend, and PyTorch's answer.

Legend: B batch, T new tokens, S key tokens, H heads, R kv_lora_rank, P qk_rope, C = R + P,
J index heads, I index head dim, K chosen keys, M tokens of all rows behind each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ic.model.paged_cache import gather_pages
from ic.model.quantised_latents import dequantise
from ic.model.selection import Selection, VisibleKeys, choose, index_scores, ranks_of

# Most numbers that a piece of the queries may gather: 256 MiB of float32.
PIECE_NUMBERS = 2**26


def pieces(tokens: int, numbers: int) -> list[slice]:
    """Parts of the queries of which each has `numbers`, as long as `PIECE_NUMBERS` allow."""
    step = max(PIECE_NUMBERS // max(numbers, 1), 1)
    return [slice(start, start + step) for start in range(0, tokens, step)]


class SparseOperators:
    """The two steps of sparse attention in PyTorch; a backend overrides what it does itself."""

    def choose_keys(
        self,
        q_BTJI: Tensor,
        w_BTJ: Tensor,
        keys: Tensor,
        visible: VisibleKeys,
        top_k: int,
        *,
        key_scale: Tensor | None = None,
        block_table_BN: Tensor | None = None,
    ) -> Selection:
        """The `top_k` keys of the highest index score of each query, as many as it sees; of equal
        ones the later. Without gradients.

        Args:
            keys: (B, S, I); with a block table (pages, tokens of a page, I), and S is what the
                table holds.
            key_scale: float32, factors on the keys of a quantised cache.
        """
        if block_table_BN is not None:
            # With the places that no query sees emptied: there may be what is no number.
            keys, key_scale = gather_pages(keys, key_scale, block_table_BN, visible.last_BT + 1)
        if key_scale is not None:
            keys = dequantise(keys, key_scale, torch.float32)
        scores_BTS = index_scores(q_BTJI, w_BTJ, keys)
        return choose(ranks_of(scores_BTS, visible.matrix(keys.shape[1])), top_k)

    def attend_chosen(
        self,
        q_latent_BTHR: Tensor,
        q_rope_BTHP: Tensor,
        rows_MC: Tensor,
        slot_BTK: Tensor,
        count_BT: Tensor,
        *,
        scale: float,
        row_scale_M: Tensor | None = None,
    ) -> Tensor:
        """Attention (B, T, H, R) of each query over the latents in its own slots; differentiable.

        Args:
            slot_BTK: int64, places in `rows_MC`; those behind `count_BT` repeat a place.
            row_scale_M: float32, factors on a quantised cache's rows.
        """
        q_BTHC = torch.cat((q_latent_BTHR, q_rope_BTHP), dim=-1)
        batch, tokens, heads, _ = q_BTHC.shape
        parts = pieces(tokens, batch * slot_BTK.shape[-1] * (rows_MC.shape[-1] + 2 * heads))
        rank, out = q_latent_BTHR.shape[-1], []
        for part in parts:
            given = (
                q_BTHC[:, part], rows_MC, slot_BTK[:, part], count_BT[:, part], scale, row_scale_M,
                rank,
            )  # fmt: skip
            if torch.is_grad_enabled() and len(parts) > 1:
                # What a piece gathers is gathered again for its gradient.
                out.append(checkpoint(_attend_piece, *given, use_reentrant=False))
            else:
                out.append(_attend_piece(*given))
        return torch.cat(out, dim=1)


def gather_rows(
    rows_MC: Tensor, slot_BTK: Tensor, row_scale_M: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The rows in these slots, (B, T, K, C), multiplied by their scales."""
    # Not by indexing, whose gradient adds up rows twelve times as slowly on a CPU.
    slots = slot_BTK.flatten()
    if row_scale_M is None:
        return rows_MC.index_select(0, slots).unflatten(0, slot_BTK.shape).to(dtype)
    codes = rows_MC.view(torch.uint8).index_select(0, slots).view(rows_MC.dtype)
    return dequantise(codes.unflatten(0, slot_BTK.shape), row_scale_M[slot_BTK], dtype)


def chosen_weights(q_BTHC: Tensor, rows_BTKC: Tensor, count_BT: Tensor, scale: float) -> Tensor:
    """softmax of the scaled products over the chosen keys, (B, T, H, K) float32."""
    scores = torch.einsum("bthc,btkc->bthk", q_BTHC, rows_BTKC) * scale
    place_K = torch.arange(scores.shape[-1], device=scores.device)
    is_repeated = place_K >= count_BT[..., None, None]
    return scores.masked_fill(is_repeated, -torch.inf).softmax(-1, dtype=torch.float32)


def _attend_piece(
    q_BTHC: Tensor,
    rows_MC: Tensor,
    slot_BTK: Tensor,
    count_BT: Tensor,
    scale: float,
    row_scale_M: Tensor | None,
    rank: int,
) -> Tensor:
    rows_BTKC = gather_rows(rows_MC, slot_BTK, row_scale_M, q_BTHC.dtype)
    weights = chosen_weights(q_BTHC, rows_BTKC, count_BT, scale).to(rows_BTKC.dtype)
    return torch.einsum("bthk,btkr->bthr", weights, rows_BTKC[..., :rank])
