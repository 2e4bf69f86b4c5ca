"""How much of a rotation is left on average over the distances that a head looks back.

A key that loses its rotation meets the query as if both stood at the same position. What it should
have been turned by depends on the distance; the one number for all distances that leaves the least
error of the scores is the mean of exp(i * frequency * distance), each distance weighted by the
attention that it gets. Its size is near 1 for slow frequencies and near 0 for those that turn many
times within the distances that matter, whose keys without a rotation would be noise.

Legend: T tokens, S some of them that look back, G KV heads, s query heads of a KV head, d head_dim,
F = d / 2 frequencies, X the layer's input with a 1 behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ic.conversion.grouped import GroupedWeights
from ic.conversion.rotary import to_complex

# Queries of a row whose attention is looked at, spread over the row.
_QUERIES = 256


class Turns:
    """Adds up exp(i * frequency * (key's position - query's)), weighted by attention.

    Args:
        weights: of the layer.
        rotation_TF: exp(i * frequency * position) of each position, complex.
        scale: on the scores before softmax, YaRN's factor on cos and sin squared in it.
    """

    def __init__(self, weights: GroupedWeights, rotation_TF: Tensor, scale: float) -> None:
        self._weights = weights
        self._rotation_TF = rotation_TF
        self._scale = scale
        groups, per_group, dim = weights.q_GsdX.shape[:3]
        shape = (groups, per_group, dim // 2)
        self._sum_GsF = torch.zeros(shape, dtype=torch.complex128, device=rotation_TF.device)
        self._weight_Gs1 = self._sum_GsF.new_zeros(groups, per_group, 1).real

    def add(self, x_TD: Tensor) -> None:
        """The layer's inputs at positions 0 to T - 1 of one row."""
        tokens = len(x_TD)
        x_TX = torch.nn.functional.pad(x_TD.float(), (0, 1), value=1.0)
        turn_TF = self._rotation_TF.to(torch.complex64)
        asking_S = torch.arange(tokens // 8, tokens, max(1, tokens // _QUERIES)).to(x_TD.device)
        seen_ST = torch.arange(tokens, device=x_TD.device) <= asking_S[:, None]
        for group, (q_sdX, k_dX) in enumerate(
            zip(self._weights.q_GsdX.float(), self._weights.k_GdX.float(), strict=True)
        ):
            key_TF = to_complex(k_dX @ x_TX.T).T * turn_TF
            query_sSF = to_complex(q_sdX @ x_TX[asking_S].T).mT * turn_TF[asking_S]
            score_sST = (query_sSF.conj() @ key_TF.T).real * self._scale
            attention_sST = score_sST.masked_fill(~seen_ST, float("-inf")).softmax(-1)
            # The first token takes what a head has no use for, wherever it stands.
            attention_sST[..., 0] = 0
            turned_sSF = (attention_sST.to(turn_TF.dtype) @ turn_TF) * turn_TF[asking_S].conj()
            self._sum_GsF[group] += turned_sSF.sum(1)
            self._weight_Gs1[group] += attention_sST.sum((1, 2), dtype=torch.float64)[:, None]

    @property
    def mean(self) -> Tensor:
        """(G, s, F) complex, of size 1 at most; 1 for a head that reads the first token alone."""
        mean_GsF = self._sum_GsF / self._weight_Gs1
        return torch.where(self._weight_Gs1 > 0, mean_GsF, torch.ones_like(mean_GsF))
