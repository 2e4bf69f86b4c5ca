"""The calibration text on its way through the layers of a model, each of which is converted as the
text comes by.

Legend: M rows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ic.conversion.distance import Turns
from ic.conversion.grouped import GroupedWeights, grouped_weights
from ic.conversion.layer import convert_layer
from ic.conversion.layout import Layout
from ic.conversion.moments import Moments
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.attention import MLAAttention

# Rows whose attention is looked at, to see how far each head looks.
_ATTENTION_ROWS = 4


class Stream:
    """Converts a model layer by layer.

    A layer is on the device while it is measured, in float32; the rows' hidden states stay there.

    Args:
        model: the original, of `transformers`, on the CPU.
        config: of the result.
        rows_MT: token ids to measure on, or None where nothing has to be measured.
    """

    def __init__(
        self,
        model: Any,
        config: MLAConfig,
        layout: Layout,
        rows_MT: Tensor | None,
        device: torch.device,
    ) -> None:
        self._model = model
        self._layout = layout
        self._device = device
        with torch.device("meta"):
            self._ours = MLAForCausalLM(config).model
        self._hidden_M: list[Tensor] = []
        self._their_position: dict[str, Any] = {}
        self._our_context: Any = None
        if rows_MT is not None:
            # Of the others, some take no mask for a look at everything.
            model.set_attn_implementation("sdpa")
            self._begin(rows_MT)

    def layers(self) -> Iterator[tuple[dict[str, Tensor], dict[str, float]]]:
        """For each layer the tensors of its attention, float64 on the CPU, and its errors:

        `left_out` of the weighted moment of keys and values, and `output_error` of the attention's
        output on the first row, relative to the original's.
        """
        for index, layer in enumerate(self._model.model.layers):
            saved = next(layer.parameters()).dtype
            layer.to(device=self._device, dtype=torch.float32)
            weights = grouped_weights(layer.self_attn, self._layout.geometry)
            second_XX = self._measure(layer) if self._hidden_M else None
            turn_GsF = self._turns(layer, weights) if self._hidden_M else None
            converted = convert_layer(weights, second_XX, self._layout, turn_GsF)
            errors = {"left_out": max(0.0, 1 - converted.kept)}
            if self._hidden_M:
                attention = self._attention(index, converted.tensors)
                errors["output_error"] = self._output_error(layer, attention)
                attention.to("meta")
                self._advance(layer)
            layer.to(device="cpu", dtype=saved)
            yield {name: tensor.cpu() for name, tensor in converted.tensors.items()}, errors

    def _begin(self, rows_MT: Tensor) -> None:
        embed = self._model.model.embed_tokens
        self._hidden_M = [
            embed(row_T[None]).to(device=self._device, dtype=torch.float32) for row_T in rows_MT
        ]
        tokens = rows_MT.shape[1]
        position_1T = torch.arange(tokens, device=self._device)[None]
        rotary = self._model.model.rotary_emb.to(self._device)
        self._their_position = {
            "position_ids": position_1T,
            "position_embeddings": rotary(self._hidden_M[0], position_1T),
            "attention_mask": None,  # causal
        }
        self._our_context = self._ours.make_context(1, tokens, self._device)

    def _measure(self, layer: Any) -> Tensor:
        moments = Moments(self._layout.geometry.hidden_size, self._device)
        for hidden_1TD in self._hidden_M:
            moments.add(layer.input_layernorm(hidden_1TD)[0])
        return moments.second

    def _turns(self, layer: Any, weights: GroupedWeights) -> Tensor | None:
        """Mean turns of keys without a rotation; None where all keys keep theirs."""
        layout, geometry = self._layout, self._layout.geometry
        if layout.keeps_keys:
            return None
        cos_TF, sin_TF = (
            each_1TP[0, :, : geometry.head_dim // 2].double() / geometry.rotation_scale
            for each_1TP in self._their_position["position_embeddings"]
        )
        scale = geometry.rotation_scale**2 * geometry.head_dim**-0.5
        turns = Turns(weights, torch.complex(cos_TF, sin_TF), scale)
        for hidden_1TD in self._hidden_M[:_ATTENTION_ROWS]:
            turns.add(layer.input_layernorm(hidden_1TD)[0])
        return turns.mean

    def _advance(self, layer: Any) -> None:
        self._hidden_M = [layer(each_1TD, **self._their_position) for each_1TD in self._hidden_M]

    def _attention(self, index: int, tensors: dict[str, Tensor]) -> MLAAttention:
        attention: MLAAttention = self._ours.layers[index].self_attn
        attention.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
        return attention.eval()

    def _output_error(self, layer: Any, attention: MLAAttention) -> float:
        x_1TD = layer.input_layernorm(self._hidden_M[0])
        theirs_1TD = layer.self_attn(x_1TD, **self._their_position)[0]
        ours_1TD = attention(x_1TD, self._our_context)
        return float((ours_1TD - theirs_1TD).norm() / theirs_1TD.norm())
