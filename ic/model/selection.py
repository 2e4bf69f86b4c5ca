"""Which keys each query sees, and which of them an indexer chose.

Legend: B batch, T query tokens, S key tokens, J index heads, I index head dim, K chosen keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rank of a key that a query does not see: below that of every score.
HIDDEN = torch.iinfo(torch.int64).min
_PLACE = 2**32 - 1


@dataclass(frozen=True)
class VisibleKeys:
    """The keys that queries see: a range each, or what a mask leaves.

    Attributes:
        first_BT, last_BT: int64 (B or 1, T), places of the first and the last one.
        mask_BTS: bool (B or 1, T, S), in place of the range, or None.
    """

    first_BT: Tensor
    last_BT: Tensor
    mask_BTS: Tensor | None = None

    @classmethod
    def of(cls, visible_BT: Tensor, mask_BTS: Tensor | None, *, in_texts: bool) -> VisibleKeys:
        """Of queries that see so many keys each, themselves included.

        Args:
            in_texts: of packed texts, without a cache: the keys end in the query itself. Else they
                are the first of their row.
        """
        last_BT = visible_BT - 1
        if in_texts:
            last_BT = torch.arange(visible_BT.shape[1], device=visible_BT.device)[None]
        return cls(last_BT - visible_BT + 1, last_BT, mask_BTS)

    def piece(self, part: slice) -> VisibleKeys:
        """Of some of the queries."""
        mask = None if self.mask_BTS is None else self.mask_BTS[:, part]
        return VisibleKeys(self.first_BT[:, part], self.last_BT[:, part], mask)

    def matrix(self, num_keys: int) -> Tensor:
        """(B or 1, T, S) bool, True where a key is visible."""
        if self.mask_BTS is not None:
            return self.mask_BTS[..., :num_keys]
        index_S = torch.arange(num_keys, device=self.last_BT.device)
        return (index_S >= self.first_BT[..., None]) & (index_S <= self.last_BT[..., None])


@dataclass(frozen=True)
class Selection:
    """The keys that each query attends to.

    Attributes:
        index_BTK: int64, their places among S keys, in an order that the backend fixes. Behind
            `count_BT` of them the first is repeated.
        count_BT: int64, how many they are: at least 1.
    """

    index_BTK: Tensor
    count_BT: Tensor

    def piece(self, part: slice) -> Selection:
        """Of some of the queries."""
        return Selection(self.index_BTK[:, part], self.count_BT[:, part])

    @property
    def is_chosen(self) -> Tensor:
        """(B, T, K) bool, False where a place is a repetition."""
        place_K = torch.arange(self.index_BTK.shape[-1], device=self.index_BTK.device)
        return place_K < self.count_BT[..., None]

    def matrix(self, num_keys: int) -> Tensor:
        """(B, T, S) bool, True where a key is chosen."""
        chosen = self.index_BTK.new_zeros(*self.count_BT.shape, num_keys, dtype=torch.bool)
        return chosen.scatter_(-1, self.index_BTK, True)


def index_scores(q_BTJI: Tensor, w_BTJ: Tensor, k_BSI: Tensor) -> Tensor:
    """I[t, s] of all keys, (B, T, S) float32; differentiable."""
    k_BIS = k_BSI.float().transpose(1, 2)
    total = None
    for q_BTI, w_BT in zip(q_BTJI.float().unbind(2), w_BTJ.unbind(-1), strict=True):
        # One head at a time: all of them would hold J times the memory of the result.
        head = w_BT[..., None] * (q_BTI @ k_BIS).relu()
        total = head if total is None else total + head
    assert total is not None
    return total


def ranks_of(scores_BTS: Tensor, visible_BTS: Tensor) -> Tensor:
    """Scores as int64 that are ordered alike, equal ones by their place: the later key is higher.

    The upper half orders as the float does, the lower half is the key's place. So no two keys of a
    query are equal, and what is chosen does not depend on how a prompt was cut into pieces: a score
    is exactly zero where no head's product is positive, and such keys are many.
    """
    bits = (scores_BTS + 0.0).view(torch.int32)  # the sum has no negative zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index_S = torch.arange(scores_BTS.shape[-1], device=scores_BTS.device)
    ranks = (ordered.long() << 32) | index_S
    return ranks.masked_fill_(~visible_BTS, HIDDEN)


def choose(ranks_BTS: Tensor, top_k: int) -> Selection:
    """The `top_k` keys of the highest ranks, as many as a query sees of them."""
    best_BTK = ranks_BTS.topk(min(top_k, ranks_BTS.shape[-1]), dim=-1).values
    index_BTK = best_BTK & _PLACE
    is_hidden = best_BTK == HIDDEN
    index_BTK = torch.where(is_hidden, index_BTK[..., :1], index_BTK)
    return Selection(index_BTK, (~is_hidden).sum(-1))
