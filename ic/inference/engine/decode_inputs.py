"""What a decode pass reads beside the cache, at addresses that never change.

Legend: B rows, N pages of a row, F = qk_rope_head_dim / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The host writes the numbers of a step while the device may still read those of the step before.
_STEPS_AT_ONCE = 3
_ALIGNMENT = 16


@dataclass(frozen=True)
class StepNumbers:
    """Numbers of each row that change with each step: views of one buffer.

    Attributes:
        slots_B: int64, where the new token goes in the cache.
        visible_B: int64, tokens that it sees, itself included.
        lengths_B: int32, the same.
        cos_BF, sin_BF: float32, its rotation.
    """

    slots_B: Tensor
    visible_B: Tensor
    lengths_B: Tensor
    cos_BF: Tensor
    sin_BF: Tensor


class DecodeInputs:
    """Buffers on the device, and how they are filled.

    Args:
        max_rows: most rows of a pass.
        max_pages: most pages of a row.
        num_frequencies: F.

    Attributes:
        tokens_B: int64, the token of each row.
        table_BN: int32, the pages of each row.
        numbers: on the device.
    """

    def __init__(
        self, max_rows: int, max_pages: int, num_frequencies: int, device: torch.device
    ) -> None:
        self.tokens_B = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.table_BN = torch.zeros(max_rows, max_pages, dtype=torch.int32, device=device)
        self._pinned = device.type == "cuda"
        self._packed, self.numbers = _packed(max_rows, num_frequencies, device, pinned=False)
        cpu = torch.device("cpu")
        self._hosts = [
            _packed(max_rows, num_frequencies, cpu, pinned=self._pinned)
            for _ in range(_STEPS_AT_ONCE)
        ]
        self._next = 0

    def host_numbers(self) -> StepNumbers:
        """The next step's numbers, to be filled on the host and then sent."""
        self._next = (self._next + 1) % _STEPS_AT_ONCE
        return self._hosts[self._next][1]

    def send_numbers(self) -> None:
        """Copy what the host filled, in one transfer."""
        self._packed.copy_(self._hosts[self._next][0], non_blocking=True)

    def set_pages(self, row: int, first: int, pages: list[int]) -> None:
        """Write pages of a row from its place `first` on."""
        host = torch.tensor(pages, dtype=torch.int32, pin_memory=self._pinned)
        self.table_BN[row, first : first + len(pages)].copy_(host, non_blocking=True)

    def set_token(self, row: int, token: int) -> None:
        """Write the token of a row that the host knows."""
        host = torch.tensor([token], pin_memory=self._pinned)
        self.tokens_B[row : row + 1].copy_(host, non_blocking=True)

    def move_row(self, source: int, target: int, num_pages: int) -> None:
        """Row `source` becomes row `target`."""
        self.tokens_B[target].copy_(self.tokens_B[source])
        self.table_BN[target, :num_pages].copy_(self.table_BN[source, :num_pages])


def _packed(
    rows: int, frequencies: int, device: torch.device, *, pinned: bool
) -> tuple[Tensor, StepNumbers]:
    shapes = [
        ((rows,), torch.int64),
        ((rows,), torch.int64),
        ((rows,), torch.int32),
        ((rows, frequencies), torch.float32),
        ((rows, frequencies), torch.float32),
    ]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    whole = torch.zeros(starts[-1], dtype=torch.uint8, device=device, pin_memory=pinned)
    views = [
        whole[start : start + size].view(dtype).view(shape)
        for start, size, (shape, dtype) in zip(starts, sizes, shapes, strict=False)
    ]
    return whole, StepNumbers(*views)
