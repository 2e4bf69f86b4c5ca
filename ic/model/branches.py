"""Rows of two continuations of one beginning, which is worked on once.

A row is a shared beginning, a first branch and a second one; padding may follow. Causal attention
serves the beginning and the first branch. The second branch sees the beginning and itself, and its
positions go on where the beginning ends. Preference pairs have this form
(`ic.datamodules.preference`): a prompt is most of a pair, and otherwise goes through the model
twice.

Legend: B batch, T query tokens (the last of S), S key tokens, H heads, K qk_head_dim, V v_head_dim,
R kv_lora_rank, P qk_rope.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (tokens of the beginning, start of the second branch), for each row.
Branches = list[tuple[int, int]]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def branched_attention(
    attend: Attend, q_BTHK: Tensor, latent_BSR: Tensor, k_rope_BSP: Tensor, branches: Branches
) -> Tensor:
    """Attention (B, T, H, V) of the last T of S positions.

    Args:
        attend: causal attention of queries, latents and rotated keys of one row; its queries are
            the last of its keys.
    """
    keys = latent_BSR.shape[1]
    first = keys - q_BTHK.shape[1]
    rows = []
    for row, (shared, second) in enumerate(branches):
        q_1THK, latent_1SR, k_rope_1SP = (x[row, None] for x in (q_BTHK, latent_BSR, k_rope_BSP))
        pieces = []
        if first < second:
            end = min(second, keys)
            pieces.append(
                attend(q_1THK[:, : end - first], latent_1SR[:, :end], k_rope_1SP[:, :end])
            )
        if keys > second:
            pieces.append(
                attend(
                    q_1THK[:, max(second - first, 0) :],
                    _without_first(latent_1SR, shared, second),
                    _without_first(k_rope_1SP, shared, second),
                )
            )
        rows.append(torch.cat(pieces, dim=1))
    return torch.cat(rows)


def num_visible_in_branches(branches: Branches, tokens: int, device: torch.device) -> Tensor:
    """Keys that each token sees, itself included: (B, T)."""
    count_T = torch.arange(1, tokens + 1, device=device)
    return torch.stack(
        [
            torch.where(count_T > second, count_T - (second - shared), count_T)
            for shared, second in branches
        ]
    )


def check_branches(branches: Branches, batch: int, tokens: int) -> None:
    """Raises ValueError unless there is one pair of bounds a row, in order and within the row."""
    if len(branches) != batch:
        raise ValueError(f"branches has {len(branches)} rows, the input {batch}")
    for shared, second in branches:
        if not 0 <= shared <= second <= tokens:
            raise ValueError(
                f"branches ({shared}, {second}): must rise from 0 to the {tokens} tokens of the row"
            )


def _without_first(x_1SC: Tensor, shared: int, second: int) -> Tensor:
    return torch.cat((x_1SC[:, :shared], x_1SC[:, second:]), dim=1)
