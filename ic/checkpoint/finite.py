"""Whether weights are numbers: a checkpoint of NaN is none to go back to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or an infinity; None if none does.

    Of a tensor that is spread over several ranks each looks at its own part.
    """
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    # One wait for the device, not one for each tensor.
    finite = [_own_part(tensors[name]).isfinite().all() for name in names]
    every = torch.stack(finite).tolist() if finite else []
    return next((name for name, good in zip(names, every, strict=True) if not good), None)


def _own_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
