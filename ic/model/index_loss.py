"""The indexer's own loss: to rank keys as attention weighs them (arXiv 2512.02556, section 2.1).

For a query the target p is attention's weights, averaged over the heads. The loss is

    KL(p || softmax(I))

over all keys that the query sees (dense warm-up), or over those that were chosen (sparse training),
where attention's weights are those over the chosen keys. p is a constant; the gradient reaches the
indexer alone.

The softmax of T x S scores of all heads at once would not fit a GPU at 32k tokens. So the queries
are worked on in pieces, of which each gives its loss and its gradient at once; the backward pass
only scales the gradients.

Legend: B batch, T query tokens, S key tokens, H heads, C latent and rotated key, J index heads,
I index head dim, K chosen keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ic.model.selection import Selection, VisibleKeys, index_scores
from ic.model.sparse_operators import chosen_weights, gather_rows, pieces

# Index queries, weights and keys of a piece of the queries -> its summed loss.
PieceLoss = Callable[[Tensor, Tensor, Tensor, slice], Tensor]


def dense_index_loss(
    q_BTJI: Tensor,
    w_BTJ: Tensor,
    k_BSI: Tensor,
    q_BTHC: Tensor,
    rows_BSC: Tensor,
    visible: VisibleKeys,
    scale: float,
) -> Tensor:
    """KL over all visible keys, summed over the queries: float32 scalar.

    The keys are those of the queries' own tokens, S = T, of which none sees a later one: a piece of
    the queries is worked on with the keys up to its last.

    Args:
        q_BTHC, rows_BSC: attention's queries and latents, in absorbed form.
        scale: of attention's softmax.
    """
    batch, tokens, heads = q_BTHC.shape[:3]
    keys = rows_BSC.shape[1]

    def piece_loss(q: Tensor, w: Tensor, k: Tensor, part: slice) -> Tensor:
        end = min(part.stop, keys)
        is_visible = visible.piece(part).matrix(end)
        with torch.no_grad():
            rows = rows_BSC[:, :end]
            scores = torch.einsum("bthc,bsc->bths", q_BTHC[:, part], rows).float() * scale
            scores = scores.masked_fill(~is_visible[:, :, None], -torch.inf)
            target = scores.softmax(-1).mean(2)
        return _kl(target, index_scores(q, w, k[:, :end]), is_visible)

    # Scores and their softmax of the heads, and of the index heads what their gradient needs.
    width = batch * keys * (2 * heads + 3 * q_BTJI.shape[2])
    return _in_pieces(q_BTJI, w_BTJ, k_BSI, piece_loss, _pieces(tokens, width, q_BTHC.device))


def sparse_index_loss(
    q_BTJI: Tensor,
    w_BTJ: Tensor,
    k_BSI: Tensor,
    q_BTHC: Tensor,
    rows_BSC: Tensor,
    selection: Selection,
    scale: float,
) -> Tensor:
    """KL over the chosen keys, summed over the queries: float32 scalar. Arguments as above."""
    batch, tokens, heads = q_BTHC.shape[:3]
    first_B11 = torch.arange(batch, device=q_BTHC.device)[:, None, None] * rows_BSC.shape[1]

    def piece_loss(q: Tensor, w: Tensor, k: Tensor, part: slice) -> Tensor:
        chosen = selection.piece(part)
        slot_BTK = first_B11 + chosen.index_BTK
        with torch.no_grad():
            rows_BTKC = gather_rows(rows_BSC.flatten(0, 1), slot_BTK, None, q_BTHC.dtype)
            weights = chosen_weights(q_BTHC[:, part], rows_BTKC, chosen.count_BT, scale)
            target = weights.mean(2)
        k_BTKI = gather_rows(k.flatten(0, 1), slot_BTK, None, torch.float32)
        products = torch.einsum("btji,btki->btjk", q.float(), k_BTKI).relu()
        return _kl(target, torch.einsum("btj,btjk->btk", w, products), chosen.is_chosen)

    width = rows_BSC.shape[-1] + 2 * k_BSI.shape[-1] + 2 * heads + 2 * q_BTJI.shape[2]
    parts = _pieces(tokens, batch * selection.index_BTK.shape[-1] * width, q_BTHC.device)
    return _in_pieces(q_BTJI, w_BTJ, k_BSI, piece_loss, parts)


def _pieces(tokens: int, numbers: int, device: torch.device) -> list[slice]:
    """As `pieces`, of four times the numbers on a GPU: a quarter of the launches for 1 GiB."""
    return pieces(tokens, -(-numbers // 4) if device.type == "cuda" else numbers)


def _kl(target: Tensor, scores: Tensor, counts: Tensor) -> Tensor:
    """Sum of KL(target || softmax of the scores that count) over the queries."""
    log_index = scores.masked_fill(~counts, -torch.inf).log_softmax(-1)
    log_index = log_index.masked_fill(~counts, 0.0)
    target = target.masked_fill(~counts, 0.0)
    return (torch.special.xlogy(target, target) - target * log_index).sum()


def _in_pieces(
    q_BTJI: Tensor, w_BTJ: Tensor, k_BSI: Tensor, piece_loss: PieceLoss, parts: list[slice]
) -> Tensor:
    loss: Tensor = _InPieces.apply(q_BTJI, w_BTJ, k_BSI, piece_loss, parts)
    return loss


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTJI: Tensor,
        w_BTJ: Tensor,
        k_BSI: Tensor,
        piece_loss: PieceLoss,
        parts: list[slice],
    ) -> Tensor:
        total = q_BTJI.new_zeros((), dtype=torch.float32)
        needs_gradient = any(ctx.needs_input_grad[:3])
        gradients = [torch.zeros_like(x) for x in (q_BTJI, w_BTJ, k_BSI) if needs_gradient]
        with (
            torch.autocast(q_BTJI.device.type, enabled=False),
            torch.set_grad_enabled(needs_gradient),
        ):
            k = k_BSI.detach().requires_grad_(needs_gradient)
            for part in parts:
                q, w = (x[:, part].detach().requires_grad_(needs_gradient) for x in (q_BTJI, w_BTJ))
                loss = piece_loss(q, w, k, part)
                total += loss.detach()
                if needs_gradient:
                    grad_q, grad_w, grad_k = torch.autograd.grad(loss, (q, w, k))
                    gradients[0][:, part], gradients[1][:, part] = grad_q, grad_w
                    gradients[2] += grad_k
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        return (*(grad * x for x in ctx.saved_tensors), None, None)
