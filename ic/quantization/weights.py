"""The weights of a source, of which linear layers are quantised as they are read.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ic.checkpoint.weights import Weights
from ic.errors import UsageError
from ic.model.quantised_linear import WeightScheme, quantised_linear
from ic.quantization.schemes import compress

Row = dict[str, Any]


class QuantisedWeights:
    """`ic.checkpoint.weights.Weights` with codes and scales in place of the weights of layers.

    Args:
        weights: the source's.
        schemes: the layers that are quantised, by name.
        moments: of the inputs of each, for rounding by GPTQ; None rounds to nearest.

    Attributes:
        sizes: of what is written, the embedding first.
        rows: of each layer that has been read, its relative error and its bytes before and after.
    """

    def __init__(
        self,
        weights: Weights,
        schemes: Mapping[str, WeightScheme],
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._weights, self._schemes, self._moments = weights, schemes, moments
        self._layers: dict[str, str] = {}
        self._read: tuple[str, dict[str, Tensor]] = ("", {})
        self.rows: dict[str, Row] = {}
        sizes: dict[str, Tensor] = {}
        for name in sorted(weights.sizes, key=lambda name: "embed_tokens" not in name):
            tensor = weights.sizes[name]
            layer = name.removesuffix(".weight")
            if layer not in schemes or layer == name:
                sizes[name] = tensor
                continue
            for part, size in _compressed_sizes(tensor, schemes[layer]).items():
                sizes[f"{layer}.{part}"] = size
                self._layers[f"{layer}.{part}"] = layer
        self.sizes: Mapping[str, Tensor] = sizes

    def read(self, name: str) -> Tensor:
        """The tensor of a name; a layer's tensors come of one compression.

        Raises:
            UsageError: a weight that is not finite.
        """
        layer = self._layers.get(name)
        if layer is None:
            return self._weights.read(name)
        if self._read[0] != layer:
            self._read = layer, self._compress(layer)
        return self._read[1][name.removeprefix(f"{layer}.")]

    def _compress(self, layer: str) -> dict[str, Tensor]:
        weight_NK = self._weights.read(f"{layer}.weight")
        if not weight_NK.isfinite().all():
            raise UsageError(
                f"{layer}.weight holds numbers that are NaN or infinite: the source is damaged"
            )
        scheme = self._schemes[layer]
        found = compress(weight_NK, scheme, self._moments[layer] if self._moments else None)
        self.rows[layer] = {
            "layer": layer,
            "scheme": scheme.name,
            "relative_error": _relative_error(weight_NK, scheme, found),
            "bytes_before": weight_NK.nbytes,
            "bytes_after": sum(tensor.nbytes for tensor in found.values()),
        }
        return found


def _compressed_sizes(tensor: Tensor, scheme: WeightScheme) -> dict[str, Tensor]:
    """What `compress` makes of a weight, on `meta`."""
    outputs, inputs = tensor.shape
    with torch.device("meta"):
        layer = quantised_linear(inputs, outputs, False, scheme)
    sizes = {name: part.to("meta") for name, part in layer.state_dict().items()}
    if scheme.group_size is not None:
        sizes["weight_scale"] = sizes["weight_scale"].to(tensor.dtype)
    return sizes


def _relative_error(weight_NK: Tensor, scheme: WeightScheme, found: dict[str, Tensor]) -> float:
    """||dequantised - weight|| / ||weight||."""
    outputs, inputs = weight_NK.shape
    layer = quantised_linear(inputs, outputs, False, scheme)
    layer.load_state_dict(found, assign=True)
    wide_NK = weight_NK.float()
    error = (layer.dequantised() - wide_NK).norm() / wide_NK.norm().clamp_min(1e-30)
    return float(error)
