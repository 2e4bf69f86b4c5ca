"""RMSNorm of query and rotary key as in Qwen3; the rotary key may hold the keys of several heads.

The rotary dimensions are G blocks of E = `qk_norm_dim`, which are E/2 pairs of the rotation each:
with `rope_interleave` E dimensions side by side, else a piece of each half. Legend: B batch,
T tokens, H heads, P qk_rope = G * E.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ic.model.config import MLAConfig
from ic.model.operators import NormOperators


class BlockNorm(nn.Module):
    """What both norms have: a weight (E,), in the order of a block's dimensions."""

    def __init__(self, config: MLAConfig, operators: NormOperators) -> None:
        super().__init__()
        assert config.qk_norm_dim is not None
        self.weight = nn.Parameter(torch.ones(config.qk_norm_dim))
        self.eps = config.rms_norm_eps
        self.num_blocks = config.qk_rope_head_dim // config.qk_norm_dim
        self.interleave = config.rope_interleave
        self.operators = operators

    def extra_repr(self) -> str:
        return f"{self.num_blocks} blocks of {self.weight.shape[0]}, eps={self.eps}"


class KeyNorm(BlockNorm):
    """Each block of the shared key is one head's, and normalised by itself."""

    def forward(self, key_BTP: Tensor) -> Tensor:
        dim = self.weight.shape[0]
        if self.interleave:
            key_BTGE = key_BTP.unflatten(-1, (self.num_blocks, dim))
            return self.operators.rms_norm(key_BTGE, self.weight, self.eps).flatten(-2)
        halves = key_BTP.unflatten(-1, (2, self.num_blocks, dim // 2)).transpose(-3, -2)
        normed = self.operators.rms_norm(halves.flatten(-2), self.weight, self.eps)
        return normed.unflatten(-1, (2, dim // 2)).transpose(-3, -2).flatten(-3)


class QueryNorm(BlockNorm):
    """A head's query lies in the block of the key that it reads, and the others are zero: it is
    divided by the root of its sum of squares over E, wherever it lies. With a norm of each block
    the gradient of the zeros would be that of a division by the root of eps.
    """

    def forward(self, query_BTHP: Tensor) -> Tensor:
        # sum / E = G * mean, and the G comes out of the root.
        if self.interleave:
            weight_P = self.weight.repeat(self.num_blocks)
        else:
            weight_P = self.weight.unflatten(0, (2, 1, -1)).expand(2, self.num_blocks, -1).flatten()
        scale = self.num_blocks**-0.5
        return self.operators.rms_norm(query_BTHP, weight_P * scale, self.eps / self.num_blocks)
