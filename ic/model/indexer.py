"""DeepSeek-V3.2's lightning indexer: which of the earlier tokens a query attends to.

    I[t, s] = sum over j of w[t, j] relu(q[t, j] . k[s])

with J index heads of few dimensions, one key per token, and weights from the hidden state scaled by
J^-1/2 I^-1/2. Query and key are rotated in their first dimensions, in pairs (i, i + half): not
interleaved, whatever the model's own are (DeepSeek-V3.2-Exp, `inference/model.py`; arXiv
2512.02556). The Hadamard transform in front of DeepSeek's FP8 product is left out: it changes no
product of query and key.

Legend: B batch, T new tokens, D hidden, L the query's input, J index heads, I index head dim,
F rotated pairs of the model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ic.model.config import MLAConfig
from ic.model.indexer_options import index_rope_dim, num_indexers
from ic.model.rope import apply_rope


class IndexInputs(NamedTuple):
    """What scores are made of.

    Attributes:
        q_BTJI: index queries, rotated.
        w_BTJ: float32, weights of the heads, the scale within.
        k_BTI: index keys of the new tokens, rotated.
    """

    q_BTJI: Tensor
    w_BTJ: Tensor
    k_BTI: Tensor


class Indexer(nn.Module):
    """The indexer of a group of layers, in the first of them, with DeepSeek's weight names.

    It learns from its own loss alone: its inputs are detached from the model.

    Attributes:
        group: its place among the model's indexers.
        cache_place: of its keys among a cache's layers, counted from the end: they stand behind
            the latents of all layers.
        cache_layers: layers of a cache that has places for index keys.
    """

    def __init__(self, config: MLAConfig, layer_idx: int) -> None:
        super().__init__()
        heads, dim = config.index_n_heads, config.index_head_dim
        indexers = num_indexers(config)
        self.num_heads, self.head_dim = heads, dim
        self.group = layer_idx // config.index_group_size
        self.cache_place = self.group - indexers
        self.cache_layers = config.num_hidden_layers + indexers
        self.rotates = layer_idx not in (config.nope_layers or [])
        self.rope_dim = index_rope_dim(config)
        # Of the model's pairs every so many: the frequencies that fewer dimensions would have.
        part = config.qk_rope_head_dim // config.rope_repeats
        self._pairs = slice(0, part // 2, part // self.rope_dim)
        self.wq_b = nn.Linear(config.q_lora_rank or config.hidden_size, heads * dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, dim, bias=False)
        self.k_norm = nn.LayerNorm(dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, heads, bias=False)

    def forward(
        self, hidden_BTD: Tensor, query_BTL: Tensor, cos_BTF: Tensor, sin_BTF: Tensor
    ) -> IndexInputs:
        """Queries, weights and keys of new tokens.

        Args:
            query_BTL: what the attention's queries are made of: the normalised low-rank part, or
                the hidden state.
        """
        hidden_BTD, query_BTL = hidden_BTD.detach(), query_BTL.detach()
        q_BTJI = self.wq_b(query_BTL).unflatten(-1, (self.num_heads, self.head_dim))
        k_BT1I = self.k_norm(self.wk(hidden_BTD)).to(q_BTJI.dtype)[:, :, None]
        if self.rotates:
            cos, sin = cos_BTF[..., self._pairs], sin_BTF[..., self._pairs]
            q_BTJI, k_BT1I = (self._rotate(x, cos, sin) for x in (q_BTJI, k_BT1I))
        scale = self.num_heads**-0.5 * self.head_dim**-0.5
        return IndexInputs(q_BTJI, self.weights_proj(hidden_BTD).float() * scale, k_BT1I[:, :, 0])

    def _rotate(self, x_BTJI: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> Tensor:
        rotated, rest = x_BTJI.split([self.rope_dim, self.head_dim - self.rope_dim], -1)
        return torch.cat((apply_rope(rotated, cos_BTF, sin_BTF, interleave=False), rest), dim=-1)
