"""LoRA adapters through PEFT, injected into the model in place.

The model stays an `MLAForCausalLM`; each adapted layer keeps its weight as `base_layer`, frozen,
beside `lora_A` and `lora_B`. PEFT comes with the extra `align` and is imported where it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ic.model.options import AdapterOptions

_BASE, _NAME = ".base_layer.", "default"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Prefix of PEFT's own files, which name tensors from its wrapper downwards.
_PEFT_PREFIX = "base_model.model."


def add_adapter(model: nn.Module, config: AdapterOptions) -> None:
    """Inject trainable LoRA layers and freeze everything else, in place.

    `lora_B` starts at zero, so the model computes what it did before.

    Raises:
        ValueError: PEFT is not installed, or a target names no linear layer of the decoder. The
            head is none of them: it may be the embedding's matrix.
    """
    peft = _peft()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    }
    if unknown := sorted(set(config.target_modules) - linear):
        raise ValueError(
            f"model.adapter.target_modules: the decoder has no linear layer {', '.join(unknown)}; "
            f"choose from {', '.join(sorted(linear))}"
        )
    peft.inject_adapter_in_model(peft.LoraConfig(**asdict(config)), model, adapter_name=_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))


def has_adapter(model: nn.Module) -> bool:
    """Whether LoRA layers were injected."""
    return any(_is_adapter(name) for name, _ in model.named_parameters())


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Within it, the model computes without its adapter; what trains stays marked as such."""
    layers = _layers(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    # PEFT freezes what it disables, and FSDP remembers from the first forward pass what trains.
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merge_adapter(model: nn.Module) -> None:
    """Add each update to its weight and put the plain linear layers back, in place.

    The model then computes what it did with its adapter, up to rounding, and its state dict has the
    names of a model that never had one. Does nothing without an adapter.
    """
    for name, layer in list(model.named_modules()):
        if not hasattr(layer, "lora_A"):
            continue
        layer.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    # transformers' `save_pretrained` would write the adapter alone as long as this is set.
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False  # type: ignore[assignment]


def merged_tensor(
    name: str, tensor: Tensor, adapter: Mapping[str, Tensor], config: AdapterOptions
) -> Tensor:
    """A base model's tensor with its update, if it has one, added in float32."""
    layer, _, leaf = name.rpartition(".")
    down = adapter.get(f"{layer}.lora_A.{_NAME}.weight")
    if down is None or leaf != "weight":
        return tensor
    up = adapter[f"{layer}.lora_B.{_NAME}.weight"]
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return (tensor.float() + scale * up.float() @ down.float()).to(tensor.dtype)


def split_adapter(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict -> the base model's under its own names, and the adapter's tensors."""
    base = {name.replace(_BASE, "."): t for name, t in state.items() if not _is_adapter(name)}
    return base, {name: t for name, t in state.items() if _is_adapter(name)}


def join_adapter(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `split_adapter`."""
    adapted = {name.partition(".lora_")[0] for name in adapter}
    state = dict(adapter)
    for name, tensor in base.items():
        layer, _, leaf = name.rpartition(".")
        state[f"{layer}{_BASE}{leaf}" if layer in adapted else name] = tensor
    return state


def save_adapter(adapter: Mapping[str, Tensor], config: AdapterOptions, folder: Path) -> None:
    """Write the adapter as PEFT does, so that `peft.PeftModel.from_pretrained` reads it too."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _PEFT_PREFIX + name.replace(f".{_NAME}.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in adapter.items()
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    values = {**asdict(config), "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def load_adapter(folder: Path) -> tuple[dict[str, Tensor], AdapterOptions]:
    """What `save_adapter` wrote: tensors under the injected model's names, and the configuration.

    Raises:
        ValueError: a configuration that is not LoRA's, or lacks a value.
    """
    values = json.loads((folder / CONFIG).read_text())
    known = AdapterOptions.__dataclass_fields__
    if values.get("peft_type") != "LORA" or not set(known) <= set(values):
        raise ValueError(f"{folder / CONFIG}: not the LoRA configuration of a checkpoint of ours")
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        layer, _, leaf = name.removeprefix(_PEFT_PREFIX).rpartition(".")
        tensors[f"{layer}.{_NAME}.{leaf}"] = tensor
    return tensors, AdapterOptions(**{key: values[key] for key in known})


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "model/adapter=lora needs PEFT, which is not installed: pip install "
            "'infinite-context[align]'"
        ) from error
    return peft
