"""A latent of small rank for keys and values together, by principal components of their covariance.

What a component is worth is how much of the scores and of the layer's output it carries, not how
large it is: keys are weighted by the root of the covariance of the queries that read them, values
by the root of the Gram matrix of `o_proj`'s columns that read them (CARE, arXiv 2603.17946, weights
by covariances).

Legend: Y rows of keys and values, X the layer's input with a 1 behind it, R rank, N rows of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Directions whose share of a weight is smaller are left as they are: nothing reads them.
_SMALLEST = 1e-10
# How much larger than all other components of a latent the steady one is.
STEADINESS = 8.0
# Of the mean square of an input, added to each: calibration may have fewer tokens than dimensions.
_RIDGE = 1e-4


@dataclass(frozen=True)
class Weighting:
    """The root of a symmetric matrix (Y, Y), and its inverse."""

    root_YY: Tensor
    inverse_YY: Tensor

    @classmethod
    def of(cls, matrices_GNN: Tensor) -> Weighting:
        """Of a block for each head."""
        values, vectors = torch.linalg.eigh(matrices_GNN)
        floor = values.amax(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny) * _SMALLEST
        roots_GN = values.clamp(min=floor).sqrt()
        root = (vectors * roots_GN[:, None]) @ vectors.mT
        inverse = (vectors / roots_GN[:, None]) @ vectors.mT
        return cls(torch.block_diag(*root), torch.block_diag(*inverse))

    def scaled(self, factor: Tensor) -> Weighting:
        return Weighting(self.root_YY * factor, self.inverse_YY / factor)

    def beside(self, other: Weighting) -> Weighting:
        """Of the rows of both."""
        return Weighting(
            torch.block_diag(self.root_YY, other.root_YY),
            torch.block_diag(self.inverse_YY, other.inverse_YY),
        )


@dataclass(frozen=True)
class Latent:
    """Projections to the latent and back.

    Attributes:
        down_RX: from the layer's input.
        up_YR: to the rows that were compressed.
        kept: share of the weighted moment that the latent holds, 0 to 1.
        norm_R: weight of the latent's RMSNorm; None without one.
    """

    down_RX: Tensor
    up_YR: Tensor
    kept: float
    norm_R: Tensor | None = None


def weighted_energy(rows_YX: Tensor, second_XX: Tensor, weighting: Weighting) -> Tensor:
    """Mean square of weighted rows, summed over them."""
    weighted = weighting.root_YY @ rows_YX
    return torch.einsum("yx,xz,yz->", weighted, second_XX, weighted)


def compress(rows_YX: Tensor, second_XX: Tensor, weighting: Weighting, rank: int) -> Latent:
    """The latent of a rank that leaves the least mean square of weighted rows."""
    weighted_YX = weighting.root_YY @ rows_YX
    moment_YY = weighted_YX @ second_XX @ weighted_YX.T
    values, vectors = torch.linalg.eigh(moment_YY)
    values, vectors_YR = values.flip(-1).clamp(min=0), vectors.flip(-1)[:, :rank]
    kept = float(values[:rank].sum() / values.sum().clamp(min=torch.finfo(values.dtype).tiny))
    return Latent(vectors_YR.T @ weighted_YX, weighting.inverse_YY @ vectors_YR, kept)


def steadied(latent: Latent, second_XX: Tensor, *, has_bias: bool) -> Latent:
    """The latent with one more component, which is large and the same for every token.

    MLA normalises the latent, which the original does not do to its keys and values: a token whose
    latent is twice as large would lose half of it. Beside a component that outweighs all others the
    norm divides every token by the same. Its weight is 0 there, so that nothing reads it, and
    elsewhere takes the division back. The other components have a root mean square of one.

    Where the projection has no bias, the component is the linear function of the input that comes
    nearest to 1 (ridge regression): residual streams hold directions that hardly change from token
    to token.
    """
    components = len(latent.down_RX)
    mean_square = torch.einsum("rx,xz,rz->", latent.down_RX, second_XX, latent.down_RX) / components
    size = mean_square.sqrt() if mean_square > 0 else torch.ones_like(mean_square)
    down_RX = latent.down_RX / size
    height = STEADINESS * components**0.5
    steady_X = torch.zeros_like(down_RX[0])
    if has_bias:
        steady_X[-1] = 1.0
    else:
        inner_DD, mean_D = second_XX[:-1, :-1], second_XX[:-1, -1]
        ridge = _RIDGE * inner_DD.diagonal().mean() * torch.eye(len(mean_D)).to(inner_DD)
        steady_X[:-1] = torch.linalg.solve(inner_DD + ridge, mean_D)
    weight = ((height**2 + components) / (components + 1)) ** 0.5
    norm_R = down_RX.new_full((components + 1,), weight)
    norm_R[-1] = 0
    return Latent(
        torch.cat((down_RX, height * steady_X[None])),
        torch.nn.functional.pad(latent.up_YR * size, (0, 1)),
        latent.kept,
        norm_R,
    )
