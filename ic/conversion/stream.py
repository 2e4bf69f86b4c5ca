"""The calibration text on its way through the layers of a model, each of which is converted as the
text comes by.

Legend: M rows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ic.conversion.distance import Turns
from ic.conversion.folding import STILL_KEPT, Left, choose_frequencies
from ic.conversion.grouped import GroupedWeights, grouped_weights
from ic.conversion.layer import convert_layer
from ic.conversion.layout import Layout
from ic.conversion.moments import Moments
from ic.model import MLAForCausalLM
from ic.model.attention import MLAAttention

# Rows whose attention is looked at, to see how far each head looks.
_ATTENTION_ROWS = 4


class Stream:
    """Converts a model layer by layer.

    A layer is on the device while it is measured, in float32; the rows' hidden states stay there.

    Args:
        model: the original, of `transformers`, on the CPU.
        layout: of the result; frequencies that a narrow rotary key keeps are chosen here.
        rows_MT: token ids to measure on, or None where nothing has to be measured.
        on_layer: told of each layer that is done with.

    Attributes:
        layout: as given, with the frequencies chosen.
        config: of the result.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        rows_MT: Tensor | None,
        device: torch.device,
        on_layer: Callable[[], None],
    ) -> None:
        self._model = model
        self._device = device
        self._on_layer = on_layer
        self._hidden_M: list[Tensor] = []
        self._their_position: dict[str, Any] = {}
        self._our_context: Any = None
        self.layout = layout
        if rows_MT is not None:
            # Of the others, some take no mask for a look at everything.
            model.set_attn_implementation("sdpa")
            if layout.is_narrow:
                self._begin(rows_MT[:_ATTENTION_ROWS])
                self.layout = replace(layout, kept=self._choose_frequencies())
            self._begin(rows_MT)
        self.config = self.layout.mla_config(model.config)
        with torch.device("meta"):
            self._ours = MLAForCausalLM(self.config).model
        if rows_MT is not None:
            self._our_context = self._ours.make_context(1, rows_MT.shape[1], device)

    def layers(self) -> Iterator[tuple[dict[str, Tensor], dict[str, float]]]:
        """For each layer the tensors of its attention, float64 on the CPU, and its errors:

        `left_out` of the weighted moment of keys and values, and `output_error` of the attention's
        output on the first row, relative to the original's. A narrow rotary key is made in each of
        the ways of `STILL_KEPT`, and the one with the smallest error is taken.
        """
        for index, (layer, weights) in enumerate(self._visit()):
            second_XX = self._measure(layer) if self._hidden_M else None
            turns = self._turns(layer, weights) if self._hidden_M else None
            tried = []
            for still_kept in STILL_KEPT if self.layout.is_narrow else (1.0,):
                converted = convert_layer(weights, second_XX, self.layout, turns, still_kept)
                errors = {"left_out": max(0.0, 1 - converted.kept)}
                if self._hidden_M:
                    attention = self._attention(index, converted.tensors)
                    errors["output_error"] = self._output_error(layer, attention)
                    attention.to("meta")
                tried.append((errors, converted.tensors))
            errors, tensors = min(tried, key=lambda each: each[0].get("output_error", 0.0))
            yield {name: tensor.cpu() for name, tensor in tensors.items()}, errors

    def _visit(self) -> Iterator[tuple[Any, GroupedWeights]]:
        """Each layer on the device, before the rows have gone through it."""
        for layer in self._model.model.layers:
            saved = next(layer.parameters()).dtype
            layer.to(device=self._device, dtype=torch.float32)
            yield layer, grouped_weights(layer.self_attn, self.layout.geometry)
            if self._hidden_M:
                self._advance(layer)
            layer.to(device="cpu", dtype=saved)
            self._on_layer()

    def _choose_frequencies(self) -> tuple[int, ...]:
        """Those that a narrow rotary key keeps, for which all layers are gone through once."""
        count = self.layout.geometry.head_dim // 2
        still_F = torch.zeros(count, dtype=torch.float64, device=self._device)
        beside_FF = torch.zeros(count, count, dtype=torch.float64, device=self._device)
        for layer, weights in self._visit():
            turns = self._turns(layer, weights)
            assert turns is not None
            beside_GsFF = turns.beside(range(count))
            left = Left.of(weights, self._measure(layer), turns.mean, beside_GsFF)
            still_F += left.still_F / left.whole
            beside_FF += left.beside_KF / left.whole
        return choose_frequencies(still_F, beside_FF, self.layout.rope_dim // 2)

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

    def _measure(self, layer: Any) -> Tensor:
        moments = Moments(self.layout.geometry.hidden_size, self._device)
        for hidden_1TD in self._hidden_M:
            moments.add(layer.input_layernorm(hidden_1TD)[0])
        return moments.second

    def _turns(self, layer: Any, weights: GroupedWeights) -> Turns | None:
        """Mean turns of keys without their rotation; None where all keys keep theirs."""
        layout, geometry = self.layout, self.layout.geometry
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
        return turns

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
