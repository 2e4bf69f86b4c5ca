"""Whether a layer's matrix says what the layer computes, for the places that read it themselves.

PEFT, quantisation, offloading and parametrizations all change what a layer computes, and each
leaves another trace. So a matrix is read only where nothing of theirs can be there.

Legend: X outputs, R inputs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_bare(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is of this very class, without hooks and with its class's `forward`.

    Parametrizations change the class; accelerate's offloading replaces `forward`. A layer that
    multiplies in FP8 while it trains is a plain linear layer in evaluation.
    """
    if type(layer) is not kind:
        in_evaluation = kind is nn.Linear and not layer.training
        if not (in_evaluation and getattr(type(layer), "is_linear_in_evaluation", False)):
            return False
    # Every decoded token asks every layer: nn.Module's own look-up takes longer than the rest.
    own = layer.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def plain_weight(layer: nn.Module) -> Tensor | None:
    """The weight (X, R) of a layer that computes `x @ weight.T` and nothing else; None if it may
    compute anything else.
    """
    if not is_bare(layer, nn.Linear):
        return None
    weight: Any = layer.weight
    is_quantised = type(weight) is not nn.Parameter and _is_quantised(weight)
    if is_quantised or layer.bias is not None:
        return None
    return weight


def matrix_of(layer: nn.Module, num_inputs: int, dtype: torch.dtype) -> Tensor | None:
    """The matrix (X, R) that a layer applies now, differentiable; None if it may apply none.

    Of a stock layer it is the weight. A LoRA layer is applied to the identity, whichever of its
    adapters are active, merged or switched off.
    """
    weight = plain_weight(layer)
    if weight is not None:
        return weight.to(dtype)
    if not _is_linear_lora(layer):
        return None
    device = next(layer.parameters()).device
    return layer(torch.eye(num_inputs, dtype=dtype, device=device)).T


def _is_quantised(weight: Tensor) -> bool:
    """Whether a stock layer holds one of torchao's tensors."""
    if not is_traceable_wrapper_subclass(weight):
        return False
    from torch.distributed.tensor import DTensor

    return not isinstance(weight, DTensor)


def _is_linear_lora(layer: Any) -> bool:
    """Whether a layer is PEFT's LoRA or DoRA on a stock layer, without dropout at work."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    if lora is None or not is_bare(layer, lora.Linear) or plain_weight(layer.base_layer) is None:
        return False
    variants = sys.modules["peft.tuners.lora.variants"]
    return (
        all(type(variant) is variants.DoraLinearVariant for variant in layer.lora_variant.values())
        and all(up.bias is None for up in layer.lora_B.values())
        and not (layer.training and any(_drops(drop) for drop in layer.lora_dropout.values()))
    )


def _drops(dropout: nn.Module) -> bool:
    return not isinstance(dropout, nn.Identity)
