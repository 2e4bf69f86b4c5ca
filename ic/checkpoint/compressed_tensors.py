"""Folders of quantised weights in compressed-tensors' form: what `config.json` says, and their
model. https://github.com/vllm-project/compressed-tensors

The package itself is needed to make such a folder (`ic.quantization`), and not to read one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ic.checkpoint.architecture import check_names
from ic.checkpoint.errors import CheckpointError, damaged_error
from ic.checkpoint.hugging_face import weight_files
from ic.errors import lacks_memory
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.quantised_linear import WeightScheme, replace_linear_layers

METHOD = "compressed-tensors"
SUPPORTED = (
    "fp8 (e4m3 weights per channel, activations per token), int8 (the same in int8) and int4 "
    "(weights alone, in groups)"
)
_FORMATS = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}


@dataclass(frozen=True)
class Quantisation:
    """Which layers of a model are quantised, and how.

    Attributes:
        groups: for each scheme the names of its layers: `Linear` for all, or a name, or a pattern
            behind `re:`.
        ignored: names of layers that stay, written likewise.
    """

    groups: tuple[tuple[WeightScheme, tuple[str, ...]], ...]
    ignored: tuple[str, ...]

    def scheme_of(self, layer: str) -> WeightScheme | None:
        """The scheme of a linear layer by its name; None where it stays."""
        if any(_names(target, layer) for target in self.ignored):
            return None
        for scheme, targets in self.groups:
            if any(target == "Linear" or _names(target, layer) for target in targets):
                return scheme
        return None

    @property
    def name(self) -> str:
        """The names of the schemes: `fp8`."""
        return ", ".join(sorted({scheme.name for scheme, _ in self.groups}))


def read_quantisation(values: Mapping[str, Any], folder: Path) -> Quantisation:
    """What a folder's `quantization_config` says.

    Raises:
        CheckpointError: another method than compressed-tensors, or a form not computed here.
    """
    method = values.get("quant_method")
    if method != METHOD:
        raise CheckpointError(
            f"{folder} holds weights quantised by {method}; of quantised weights {METHOD} are "
            "loaded, and GGUF files; else give weights in float32, bfloat16 or float16"
        )
    groups: dict[str, Any] = values.get("config_groups") or {}
    if not groups:
        raise CheckpointError(f"{folder}: its quantization_config has no config_groups")
    try:
        found = tuple(
            (_scheme(group), tuple(map(str, group["targets"]))) for group in groups.values()
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: its quantization_config cannot be read: {error!r}"
        ) from error
    for scheme, _ in found:
        if scheme is None:
            raise CheckpointError(
                f"{folder} is quantised in a form that is not computed here; supported of "
                f"{METHOD} are {SUPPORTED}"
            )
        formats = {values.get("format"), *(group.get("format") for group in groups.values())}
        if not formats & {None, _FORMATS[scheme.name]}:
            raise CheckpointError(
                f"{folder}: its weights are {values.get('format')}, and {scheme.name} is read as "
                f"{_FORMATS[scheme.name]}"
            )
    known = tuple((scheme, targets) for scheme, targets in found if scheme is not None)
    return Quantisation(known, tuple(map(str, values.get("ignore") or ())))


def quantisation_of(config: MLAConfig, folder: Path) -> Quantisation | None:
    """What a configuration from `folder` says of quantised weights; None of others.

    Raises:
        CheckpointError: as `read_quantisation`.
    """
    values = getattr(config, "quantization_config", None)
    return read_quantisation(values, folder) if values else None


def load_quantised_model(
    folder: Path, config: MLAConfig, quantisation: Quantisation
) -> MLAForCausalLM:
    """The model of a folder with the weights as they are there, on the CPU.

    Raises:
        CheckpointError: tensors that cannot be read, are missing or do not fit.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            weights |= load_file(file)
        except (OSError, RuntimeError, SafetensorError) as error:
            if lacks_memory(error):
                raise
            raise damaged_error(file, error) from error
    with torch.device("meta"):
        model = MLAForCausalLM(config)
        replace_linear_layers(model, quantisation.scheme_of)
        wanted = model.state_dict()
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    check_names(folder, wanted.keys() - weights.keys(), weights.keys() - wanted.keys())
    for name, tensor in weights.items():
        if quantisation.name != "int4" and name.endswith(".weight_scale"):
            weights[name] = tensor.float()  # others write them in the model's dtype
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{folder} does not fit its configuration: {name} is {tuple(wanted[name].shape)} "
                f"by the configuration, and {tuple(tensor.shape)} in the weights"
            )
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def _scheme(group: Mapping[str, Any]) -> WeightScheme | None:
    """The scheme of a config group; None if it is none of ours."""
    weights, inputs = group["weights"], group.get("input_activations")
    if group.get("output_activations") or not weights.get("symmetric", True):
        return None
    kind = weights["type"], weights["num_bits"], weights["strategy"]
    by_token = inputs is not None and (
        (inputs["type"], inputs["num_bits"], inputs["strategy"]) == (*kind[:2], "token")
        and inputs.get("dynamic") is True
        and inputs.get("symmetric", True)
    )
    if kind == ("float", 8, "channel") and by_token:
        return WeightScheme("fp8")
    if kind == ("int", 8, "channel") and by_token:
        return WeightScheme("int8")
    if kind == ("int", 4, "group") and inputs is None and not weights.get("actorder"):
        return WeightScheme("int4", int(weights["group_size"]))
    return None


def _names(target: str, layer: str) -> bool:
    """Whether a target is a layer's name, or a pattern that its beginning matches."""
    pattern = target.removeprefix("re:")
    return target == layer if pattern == target else re.match(pattern, layer) is not None
