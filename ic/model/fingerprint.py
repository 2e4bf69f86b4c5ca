"""The identity of a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def fingerprint(model: torch.nn.Module) -> str:
    """Identity of the weights: exact integer sums over their bits, the same on every device; with
    the name of a quantised cache behind it, over which the same weights answer differently.

    Collective if the weights are `DTensor`s.
    """
    cache: str = getattr(getattr(model, "config", None), "cache_dtype", "auto")
    weights = fingerprint_state(model.state_dict())
    return weights if cache == "auto" else f"{weights}-{cache}"


def fingerprint_state(state: Mapping[str, Tensor]) -> str:
    """`fingerprint` of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(
            tensor.element_size(), torch.int8
        )
        bits = tensor.detach().contiguous().view(kind).flatten().long()
        weights = torch.arange(len(bits), device=bits.device) % 8191 + 1
        digest.update(
            f"{name}{tuple(tensor.shape)}{int(bits.sum())}{int((bits * weights).sum())}".encode()
        )
    return digest.hexdigest()[:16]
