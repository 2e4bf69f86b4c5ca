"""Bytes alive while code runs on fake tensors: what a GPU's allocator would count, without a GPU.

Every storage that an operator returns counts from its creation until Python and autograd let go of
it, as in PyTorch's caching allocator, rounded up to its 512 bytes. Nothing is allocated.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALLOCATION_BYTES = 512
# What a sharding strategy spreads over the ranks.
SHARDED_PARTS = ("parameters", "gradients", "optimizer", "optimizer_step")


class LiveMemory(TorchDispatchMode):
    """Counts live storages by part, and keeps the parts at the highest total.

    A storage belongs to the part that was named when it was made (`part`), until it is moved to
    another one (`move`). A copy of a weight in another dtype, which autocast makes and keeps,
    belongs to `weight_copies`.

    Attributes:
        live: bytes alive, by part.
        peak_bytes, peak: the highest total since `forget_peak`, and its parts.
        shards: number of ranks that share `SHARDED_PARTS`; the peak counts one rank's share.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.peak_bytes = 0
        self.shards = 1
        self._part = "other"
        self._held: dict[int, tuple[str, int]] = {}
        self._weights: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        part = self._part
        if func is torch.ops.aten._to_copy.default and self._is_weight(args[0]):
            part = "weight_copies"
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf, part)
        return out

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What the body makes belongs to `name`."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def hold_weight(self, weight: Tensor) -> None:
        """Let a counted tensor belong to `parameters`, and its copies to `weight_copies`."""
        self._weights.add(weight.untyped_storage()._cdata)
        self.move(weight, "parameters")

    def move(self, tensor: Tensor, part: str) -> None:
        """Let a counted tensor belong to another part."""
        key = tensor.untyped_storage()._cdata
        old, size = self._held[key]
        self._held[key] = (part, size)
        self.live[old] -= size
        self.live[part] += size

    def forget_peak(self, shards: int = 1) -> None:
        """Begin anew from what is alive now, for one of `shards` ranks."""
        self.shards, self.peak_bytes, self.peak = shards, 0, {}
        self._look()

    def extra(self, part: str, nbytes: int) -> None:
        """Count `nbytes` that a kernel takes and returns within one call."""
        self.live[part] += nbytes
        self._look()
        self.live[part] -= nbytes

    def _is_weight(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._weights

    def _count(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._held or not nbytes:
            return
        size = -(-nbytes // _ALLOCATION_BYTES) * _ALLOCATION_BYTES
        self._held[key] = (part, size)
        self.live[part] += size
        weakref.finalize(storage, self._release, key)
        self._look()

    def _release(self, key: int) -> None:
        part, size = self._held.pop(key)
        self.live[part] -= size

    def _look(self) -> None:
        held = one_share(self.live, self.shards)
        total = sum(held.values())
        if total > self.peak_bytes:
            self.peak_bytes, self.peak = total, {k: v for k, v in held.items() if v}


def one_share(parts_bytes: Mapping[str, int], shards: int) -> dict[str, int]:
    """Bytes by part on one of `shards` ranks."""
    return {
        part: -(-size // shards) if part in SHARDED_PARTS else size
        for part, size in parts_bytes.items()
    }
