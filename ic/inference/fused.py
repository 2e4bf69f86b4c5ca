"""A model's layers at inference: weights of one input in one matrix, additions in the norms.

A decode step reads every weight once, and what else it launches costs time that no byte explains.
So the projections of query and latent become one product, and so do gate and up, each with the
norm before it and the residual addition before that in the hands of `FusedOperators`.

Legend: B batch, T new tokens, D hidden, H heads, K key, C latent and shared key, F intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ic.model import MLAForCausalLM
from ic.model.attention import MLAAttention
from ic.model.context import AttentionContext
from ic.model.decoder_layer import MLADecoderLayer
from ic.model.mlp import INFERENCE_CHUNK_TOKENS, MLAMLP
from ic.model.modeling_mla import MLAModel
from ic.model.norm import MLARMSNorm
from ic.model.operators import Operators
from ic.model.plain_layers import is_bare, plain_weight

_GATE_UP = "gate_proj", "up_proj"


class _SideBySide:
    """Linear layers of a module whose weights lie below each other in one matrix, of which they are
    views.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.module, self.names = module, names
        layers: list[Any] = [getattr(module, name) for name in names]
        self.weight_XD = torch.cat([layer.weight.detach() for layer in layers])
        self.widths = [len(layer.weight) for layer in layers]
        for layer, part in zip(layers, self.weight_XD.split(self.widths), strict=True):
            layer.weight.data = part

    def is_whole(self) -> bool:
        """Whether the module's layers still are these weights, and nothing else."""
        address = self.weight_XD.data_ptr()
        for name in self.names:
            weight = plain_weight(getattr(self.module, name))
            if weight is None or weight.data_ptr() != address:
                return False
            address += weight.nbytes
        return True


class _FusedLayer:
    """A decoder layer, as long as nothing has changed what it computes."""

    def __init__(self, layer: MLADecoderLayer, operators: Operators) -> None:
        self.attention: Any = layer.self_attn
        self.mlp: Any = layer.mlp
        self.layer: Any = layer
        self.operators = operators.fused
        self.has_low_rank = self.attention.config.q_lora_rank is not None
        self.projections = _SideBySide(self.attention, _projections(self.attention))
        self.gate_up = _SideBySide(self.mlp, _GATE_UP)

    def is_whole(self) -> bool:
        layer = self.layer
        return (
            is_bare(layer, MLADecoderLayer)
            and layer.self_attn is self.attention
            and is_bare(self.attention, MLAAttention)
            and layer.mlp is self.mlp
            and is_bare(self.mlp, MLAMLP)
            and is_bare(layer.input_layernorm, MLARMSNorm)
            and is_bare(layer.post_attention_layernorm, MLARMSNorm)
            and self.projections.is_whole()
            and self.gate_up.is_whole()
        )

    def __call__(
        self, x_BTD: Tensor, residual_BTD: Tensor | None, context: AttentionContext, cache: Cache
    ) -> tuple[Tensor, Tensor]:
        """What the layer adds to its input, which is x + residual, and what it is added to."""
        before, after = self.layer.input_layernorm, self.layer.post_attention_layernorm
        both, total_BTD = self.operators.norm_linear(
            x_BTD, residual_BTD, before.weight, before.eps, self.projections.weight_XD
        )
        attention = self.attention
        q_BTX, kv_BTC = both.split(self.projections.widths, -1)
        if self.has_low_rank:
            q_BTX = attention.q_b_proj(attention.q_a_layernorm(q_BTX))
        out_BTHV = attention.attend(q_BTX, kv_BTC, context, cache, is_fused=True)
        act_BTF, total_BTD = self.operators.norm_swiglu(
            self._apply(attention.o_proj, out_BTHV.flatten(2)), total_BTD, after.weight, after.eps,
            self.gate_up.weight_XD,
        )  # fmt: skip
        return self._apply(self.mlp.down_proj, act_BTF), total_BTD

    def _apply(self, layer: nn.Module, x_BTX: Tensor) -> Tensor:
        """Of a layer that stands alone, which may be wrapped, quantised or biased."""
        weight = plain_weight(layer)
        return layer(x_BTX) if weight is None else self.operators.linear(x_BTX, weight)


class FusedLayers:
    """All layers of a model and its final norm. Made by `fuse_for_inference`."""

    def __init__(self, model: MLAModel) -> None:
        self.model = model
        layers: Any = model.layers
        self.layers = [_FusedLayer(layer, model.operators) for layer in layers]

    def serve(self, tokens: int, cache: Cache | None) -> bool:
        """Whether they compute a pass of so many new tokens a row: over a cache, without gradients
        and compilation, dense, and as long as no layer was wrapped, moved or left out.
        """
        return (
            cache is not None
            and tokens <= INFERENCE_CHUNK_TOKENS
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(self.model.device.type)
            and self.model.config.num_hidden_layers == len(self.layers)
            and self.model.context_parallel is None
            and self.model.config.indexer != "sparse"
            and all(layer.is_whole() for layer in self.layers)
        )

    def __call__(self, hidden_BTD: Tensor, context: AttentionContext, cache: Cache) -> Tensor:
        """The final norm's output (B, T, D) of embeddings (B, T, D)."""
        x_BTD, residual_BTD = hidden_BTD, None
        for layer in self.layers:
            x_BTD, residual_BTD = layer(x_BTD, residual_BTD, context, cache)
        normed_BTD, _ = self.model.norm(x_BTD, residual=residual_BTD)
        return normed_BTD


def fuse_for_inference(model: MLAForCausalLM) -> bool:
    """Lay the weights of a model side by side, and have passes over a cache use them.

    The memory and the names of the parameters stay the same.
    Results differ from those before as rounding does. A layer that is wrapped, or whose weights are
    moved later, has the whole model computed as before.

    Returns:
        whether it was done: not for a model with adapters or quantised or biased layers, with
        weights that are not loaded, or where those of a pair have several devices or dtypes.
    """
    inner: Any = model.model
    if not all(_can_be_fused(layer) for layer in inner.layers):
        return False
    inner.fused = FusedLayers(inner)
    return True


def _projections(attention: Any) -> tuple[str, str]:
    """The layers that take the hidden state."""
    has_low_rank = attention.config.q_lora_rank is not None
    return "q_a_proj" if has_low_rank else "q_proj", "kv_a_proj_with_mqa"


def _can_be_fused(layer: Any) -> bool:
    attention = layer.self_attn
    for module, names in ((attention, _projections(attention)), (layer.mlp, _GATE_UP)):
        weights = [plain_weight(getattr(module, name)) for name in names]
        if any(type(weight) is not nn.Parameter or weight.is_meta for weight in weights):
            return False
        if len({(weight.dtype, weight.device) for weight in weights if weight is not None}) > 1:
            return False
    return is_bare(layer, MLADecoderLayer)
