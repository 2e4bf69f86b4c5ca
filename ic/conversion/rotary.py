"""One rotary key for all KV heads, by a complex rotation of the heads for each frequency.

Dimensions (i, i + d/2) of a key are one complex number that the position turns, by the same angle
in every head. So any complex matrix across the heads, one for each frequency, may be moved from the
keys to the queries: it commutes with the turning. It is chosen such that as much as possible of the
keys, as the queries see them, lies in its first components, which become the shared rotary key.
TransMLA (arXiv 2502.07864, RoRoPE) rotates by the keys' principal components; here the
components are those of the keys weighted by the queries' size.

Legend: G KV heads, s query heads of a KV head, d head_dim, F = d / 2 frequencies, m components,
S rotary pairs, X the layer's input with a 1 behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ic.conversion.grouped import GroupedWeights


@dataclass(frozen=True)
class SharedKey:
    """What of keys and queries goes into the rotary part, and what is left, as complex rows.

    Attributes:
        key_SX: the shared rotary key.
        query_GsSX: of each head, against it.
        rest_GFX: what is left of each KV head's key.
        plain_GsFX: each head's query as it was.
    """

    key_SX: Tensor
    query_GsSX: Tensor
    rest_GFX: Tensor
    plain_GsFX: Tensor


def share_rotary_key(weights: GroupedWeights, second_XX: Tensor, components: int) -> SharedKey:
    """Split keys into m shared components per frequency, component after component, and a rest.

    The scores conj(query) * key of both parts add up to the original's.

    Args:
        second_XX: second moment of the layer's input (`Moments.second`).
    """
    query_GsFX = to_complex(weights.q_GsdX)
    key_GFX = to_complex(weights.k_GdX)
    second = second_XX.to(key_GFX.dtype)
    size_GF = energy(query_GsFX, second).mean(1).sqrt()
    # A head that no query reads keeps a weight, so that it can be divided by.
    size_GF = size_GF.clamp(min=float(size_GF.max()) * 1e-6 or 1.0)
    weighted_GFX = key_GFX * size_GF[..., None]
    across_FGG = torch.einsum("gfx,xy,kfy->fgk", weighted_GFX, second, weighted_GFX.conj())
    basis_FGm = torch.linalg.eigh(across_FGG).eigenvectors.flip(-1)[..., :components]
    shared_mFX = torch.einsum("fgm,gfx->mfx", basis_FGm.conj(), weighted_GFX)
    read_mGF = basis_FGm.permute(2, 1, 0) / size_GF
    return SharedKey(
        key_SX=shared_mFX.flatten(0, 1),
        query_GsSX=torch.einsum("gsfx,mgf->gsmfx", query_GsFX, read_mGF.conj()).flatten(2, 3),
        rest_GFX=key_GFX - torch.einsum("mgf,mfx->gfx", read_mGF, shared_mFX),
        plain_GsFX=query_GsFX,
    )


def to_complex(rows: Tensor) -> Tensor:
    """Rows (..., d, X) that rotate as (i, i + d/2) -> (..., F, X) complex."""
    real, imaginary = rows.chunk(2, dim=-2)
    return torch.complex(real, imaginary)


def to_halves(rows: Tensor) -> Tensor:
    """The other way: real parts of all frequencies, then the imaginary ones."""
    return torch.cat((rows.real, rows.imag), dim=-2)


def to_pairs(rows: Tensor) -> Tensor:
    """(..., F, X) complex -> (..., d, X), real and imaginary part of a frequency side by side, as
    DeepSeek lays them out.
    """
    return torch.stack((rows.real, rows.imag), dim=-2).flatten(-3, -2)


def energy(rows: Tensor, second: Tensor) -> Tensor:
    """Mean square of complex rows (..., X)."""
    return torch.einsum("...x,xy,...y->...", rows, second, rows.conj()).real.clamp(min=0)
