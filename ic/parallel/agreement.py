"""What one rank wants to do at the end of a step, all do: a wish is shared over gloo."""

from __future__ import annotations

import torch
import torch.distributed as dist


class Agreement:
    """A group of all ranks for wishes; with one process alone its own wish counts.

    A collective of the training's own group inside a signal handler would hang when another rank is
    elsewhere. So handlers only set a flag, and the ranks agree on it where all of them come by.
    """

    def __init__(self, num_ranks: int) -> None:
        self._group = dist.new_group(backend="gloo") if num_ranks > 1 else None

    def largest(self, wish: int) -> int:
        """The largest wish of all ranks; every rank must call."""
        if self._group is None:
            return wish
        value = torch.tensor(wish)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group)
        return int(value)
