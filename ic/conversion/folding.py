"""A rotary key that is narrower than a head: which frequencies it keeps, and what turns with them.

A shared key of d dimensions rotates one component of the keys for each of d / 2 frequencies. A
narrower one keeps fewer frequencies. The keys of any other turn with the kept one that is nearest,
over the distances that a head looks back, and all that turn with one frequency give one component
together (FreqFold of TransMLA, arXiv 2502.07864). What they turn too much or too little on average
is taken into the queries (`Turns`), as it is of the rest, which does not turn at all.

Which frequencies are kept is chosen for the whole model, whose layers share their rotation:
greedily, such that as much as possible of the scores is left, where each frequency turns with the
kept one that suits it best, or not at all. On SmolLM2-135M at an eighth of the cache that lost less
than evenly spaced frequencies (TransMLA), and than the largest norms of query and key (MHA2MLA,
arXiv 2502.14837) or the largest loss without a rotation.

Legend: G KV heads, s query heads of a KV head, F frequencies, K of them kept, M that turn with one
of these, X the layer's input with a 1 behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ic.conversion.grouped import GroupedWeights
from ic.conversion.rotary import SharedKey, energy, to_complex

# Shares of a key that does not turn which the latent may be taken to keep, see `fold_rotary_key`: 0
# to 0.6 were alike on SmolLM2-135M at an eighth of the cache, 1 is right where the rank is large.
STILL_KEPT = (0.5, 1.0)


@dataclass(frozen=True)
class Left:
    """Of a layer's scores, what is left of each frequency's part (mean squares of queries times
    those of keys) where it does not turn as it did.

    Attributes:
        still_F: where it does not turn.
        beside_KF: where it turns with another.
    """

    still_F: Tensor
    beside_KF: Tensor

    @classmethod
    def of(
        cls, weights: GroupedWeights, second_XX: Tensor, turn_GsF: Tensor, beside_GsKF: Tensor
    ) -> Left:
        """
        Args:
            second_XX: second moment of the layer's input (`Moments.second`).
            turn_GsF, beside_GsKF: mean turns (`Turns.mean`, `Turns.beside`).
        """
        key_GFX = to_complex(weights.k_GdX)
        second = second_XX.to(key_GFX.dtype)
        query_GsF = energy(to_complex(weights.q_GsdX), second)
        part_GsF = query_GsF * energy(key_GFX, second)[:, None]
        return cls(
            (part_GsF * turn_GsF.abs().square()).sum((0, 1)),
            torch.einsum("gsf,gskf->kf", part_GsF, beside_GsKF.abs().square()),
        )

    @property
    def whole(self) -> Tensor:
        """Of all frequencies where each turns as it did; `beside_KF` must be of all."""
        return self.beside_KF.diagonal().sum()

    def homes(self) -> Tensor:
        """(F,) int64: the kept frequency that each turns with, as its index."""
        return self.beside_KF.argmax(0)


def choose_frequencies(still_F: Tensor, beside_FF: Tensor, count: int) -> tuple[int, ...]:
    """The frequencies to keep, ascending.

    Args:
        still_F, beside_FF: as in `Left`, in shares of `Left.whole`, summed over the layers.
    """
    left_F, kept = still_F, list[int]()
    for _ in range(count):
        gain_F = (beside_FF - left_F).clamp(min=0).sum(1)
        gain_F[kept] = -1
        kept.append(int(gain_F.argmax()))
        left_F = torch.maximum(left_F, beside_FF[kept[-1]])
    return tuple(sorted(kept))


def fold_rotary_key(
    weights: GroupedWeights,
    second_XX: Tensor,
    kept: tuple[int, ...],
    turn_GsF: Tensor,
    beside_GsKF: Tensor,
    still_kept: float,
) -> SharedKey:
    """Split keys into one shared component for each kept frequency and a rest.

    Args:
        second_XX: second moment of the layer's input (`Moments.second`).
        turn_GsF, beside_GsKF: mean turns (`Turns.mean`, `Turns.beside` of the kept).
        still_kept: share of a key that does not turn which the latent is taken to keep. A key is
            weighted by how much more is left of it where it turns with the kept frequency: with 1
            one that needs no rotation is left to the latent, whose rank may be too small for it.
    """
    query_GsFX, key_GFX = to_complex(weights.q_GsdX), to_complex(weights.k_GdX)
    second = second_XX.to(key_GFX.dtype)
    home_F = Left.of(weights, second_XX, turn_GsF, beside_GsKF).homes()
    home_F[list(kept)] = torch.arange(len(kept), device=home_F.device)
    rest_GFX = key_GFX.clone()
    keys, queries = [], []
    for index in range(len(kept)):
        members_M = (home_F == index).nonzero()[:, 0]
        turn_GsM = beside_GsKF[:, :, index, members_M]
        query_GsMX, key_GMX = query_GsFX[:, :, members_M], key_GFX[:, members_M]
        gain_GsM = turn_GsM.abs().square() - still_kept * turn_GsF[..., members_M].abs().square()
        size_GM = (energy(query_GsMX, second) * gain_GsM.clamp(min=0)).mean(1).sqrt()
        weighted_NX = (key_GMX * size_GM[..., None]).flatten(0, 1)
        across_NN = weighted_NX @ second @ weighted_NX.mH
        basis_N = torch.linalg.eigh(across_NN).eigenvectors[:, -1]
        shared_X = basis_N.conj() @ weighted_NX
        # What gains nothing keeps out of the component, however much of it lies along that.
        read_GM = (basis_N.unflatten(0, size_GM.shape) / size_GM).where(size_GM > 0, 0)
        turned_GsM = (turn_GsM * read_GM[:, None]).conj()
        keys.append(shared_X)
        queries.append(torch.einsum("gsmx,gsm->gsx", query_GsMX, turned_GsM))
        rest_GFX[:, members_M] -= read_GM[..., None] * shared_X
    return SharedKey(torch.stack(keys), torch.stack(queries, 2), rest_GFX, query_GsFX)
