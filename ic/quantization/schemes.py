"""Weights rounded and packed by compressed-tensors, and what `config.json` says of them.

Legend: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ic.errors import UsageError
from ic.model.quantised_linear import WeightScheme
from ic.quantization.gptq import compensated

# Read by the losses and by programs that tie it to the embedding.
HEAD = "lm_head"
# MLA multiplies queries and outputs by its halves while it decodes, and never the layer itself:
# servers widen it for that, so that codes would save nothing and cost accuracy.
ABSORBED = "kv_b_proj"


def library_scheme(scheme: WeightScheme) -> Any:
    """A scheme as compressed-tensors describes it, for every linear layer.

    Raises:
        UsageError: the package is not installed.
    """
    try:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    except ImportError as error:
        raise UsageError(
            f"scheme={scheme.name}: writing quantised weights needs compressed-tensors ({error}): "
            "pip install 'infinite-context[quantize]'"
        ) from error
    kind = {"type": "float" if scheme.name == "fp8" else "int", "symmetric": True}
    if scheme.name == "int4":
        weights = QuantizationArgs(
            **kind, num_bits=4, strategy="group", group_size=scheme.group_size
        )
        return QuantizationScheme(targets=["Linear"], weights=weights)
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**kind, num_bits=8, strategy="channel"),
        input_activations=QuantizationArgs(**kind, num_bits=8, strategy="token", dynamic=True),
    )


def compress(
    weight_NK: Tensor, scheme: WeightScheme, moment_KK: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors that stand for a weight in the file, by the last part of their names.

    Scales are float32 for a channel, and in the weight's dtype for a group, in which servers keep
    them: the codes are rounded for the scale as it is saved.

    Args:
        moment_KK: of the layer's inputs, for rounding by GPTQ; None rounds to nearest.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    described = library_scheme(scheme)
    wide_NK = weight_NK.float()
    if scheme.group_size is None:
        low, high = wide_NK.aminmax(dim=1, keepdim=True)
    else:
        low, high = wide_NK.unflatten(1, (-1, scheme.group_size)).aminmax(dim=2)
    scale, _ = calculate_qparams(low, high, described.weights)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    if scheme.group_size is not None:
        scale = scale.to(weight_NK.dtype)
    if moment_KK is not None:
        assert scheme.group_size is not None
        wide_NK = compensated(wide_NK, moment_KK, scale, scheme.group_size)
    state = {"weight": wide_NK, "weight_scale": scale}
    compressed: dict[str, Tensor] = compressor(scheme).compress(state, described)
    return {name: tensor.contiguous() for name, tensor in compressed.items()}


def compressor(scheme: WeightScheme) -> Any:
    """The library's reader and writer of a scheme's layout."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format

    layout = infer_module_format(torch.nn.Linear, library_scheme(scheme))
    return BaseCompressor.get_value_from_registry(layout.value)


def quantization_config(scheme: WeightScheme, kept: list[str]) -> dict[str, Any]:
    """`quantization_config` of `config.json`.

    Args:
        kept: names of layers that stay, or patterns behind `re:`.
    """
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    described = library_scheme(scheme)
    layout = infer_module_format(torch.nn.Linear, described).value
    described.format = layout
    config = QuantizationConfig(
        config_groups={"group_0": described},
        format=layout,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=kept,
    )
    values: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return values
