"""The identity of a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def fingerprint(model: torch.nn.Module) -> str:
    """Identity of the weights: exact integer sums over their bits, the same on every device; with
    the name of a quantised cache behind it, and of sparse attention, with which the same weights
    answer differently.

    Collective if the weights are `DTensor`s.
    """
    config: Any = getattr(model, "config", None)
    parts = [fingerprint_state(model.state_dict())]
    if (cache := getattr(config, "cache_dtype", "auto")) != "auto":
        parts.append(cache)
    if getattr(config, "indexer", "off") == "sparse":
        parts += [f"sparse{config.index_topk}", config.index_cache_dtype]
    return "-".join(parts)


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
