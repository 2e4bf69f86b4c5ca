"""How much of a rotation is left on average over the distances that a head looks back.

A key that loses its rotation meets the query as if both stood at the same position. What it should
have been turned by depends on the distance; the one number for all distances that leaves the least
error of the scores is the mean of exp(i * frequency * distance), each distance weighted by the
attention that it gets. Its size is near 1 for slow frequencies and near 0 for those that turn many
times within the distances that matter, whose keys without a rotation would be noise. The same holds
for a key that turns with another frequency than its own, with the difference of both.

Legend: T tokens, S some of them that look back, G KV heads, s query heads of a KV head, d head_dim,
F = d / 2 frequencies, K of them that others turn with, X the layer's input with a 1 behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ic.conversion.grouped import GroupedWeights
from ic.conversion.rotary import to_complex

# Queries of a row whose attention is looked at, spread over the row.
_QUERIES = 256


class Turns:
    """Adds up the attention that each distance gets, and says what a key is turned by on average.

    Args:
        weights: of the layer.
        rotation_TF: exp(i * frequency * position) of each position, complex.
        scale: on the scores before softmax, YaRN's factor on cos and sin squared in it.
    """

    def __init__(self, weights: GroupedWeights, rotation_TF: Tensor, scale: float) -> None:
        self._weights = weights
        self._rotation_TF = rotation_TF
        self._scale = scale
        groups, per_group = weights.q_GsdX.shape[:2]
        shape = (groups, per_group, len(rotation_TF))
        self._sum_GsT = torch.zeros(shape, dtype=torch.float64, device=rotation_TF.device)

    def add(self, x_TD: Tensor) -> None:
        """The layer's inputs at positions 0 to T - 1 of one row."""
        tokens = len(x_TD)
        x_TX = torch.nn.functional.pad(x_TD.float(), (0, 1), value=1.0)
        turn_TF = self._rotation_TF.to(torch.complex64)
        asking_S = torch.arange(tokens // 8, tokens, max(1, tokens // _QUERIES)).to(x_TD.device)
        distance_ST = asking_S[:, None] - torch.arange(tokens, device=x_TD.device)
        behind_N = distance_ST.clamp(min=0).flatten()
        for group, (q_sdX, k_dX) in enumerate(
            zip(self._weights.q_GsdX.float(), self._weights.k_GdX.float(), strict=True)
        ):
            key_TF = to_complex(k_dX @ x_TX.T).T * turn_TF
            query_sSF = to_complex(q_sdX @ x_TX[asking_S].T).mT * turn_TF[asking_S]
            score_sST = (query_sSF.conj() @ key_TF.T).real * self._scale
            attention_sST = score_sST.masked_fill(distance_ST < 0, float("-inf")).softmax(-1)
            # The first token takes what a head has no use for, wherever it stands.
            attention_sST[..., 0] = 0
            self._sum_GsT[group].index_add_(1, behind_N, attention_sST.flatten(1).double())

    @property
    def mean(self) -> Tensor:
        """(G, s, F) complex, of size 1 at most: of keys without a rotation. 1 for a head that reads
        the first token alone.
        """
        return self._mean(self._rotation_TF.conj())

    def beside(self, pairs: Sequence[int]) -> Tensor:
        """(G, s, K, F) complex, of size 1 at most: of keys of each of F frequencies that turn with
        each of K others, or with their own, which leaves 1.
        """
        others_TK = self._rotation_TF[:, list(pairs)]
        turns_TKF = others_TK[:, :, None] * self._rotation_TF.conj()[:, None]
        return self._mean(turns_TKF.flatten(1)).unflatten(-1, turns_TKF.shape[1:])

    def _mean(self, turns_TN: Tensor) -> Tensor:
        weight_Gs1 = self._sum_GsT.sum(-1, keepdim=True)
        mean_GsN = self._sum_GsT.to(turns_TN.dtype) @ turns_TN / weight_Gs1
        return torch.where(weight_Gs1 > 0, mean_GsN, torch.ones_like(mean_GsN))
