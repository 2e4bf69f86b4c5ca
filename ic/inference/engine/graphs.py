"""Decode passes recorded as CUDA graphs: one launch for all of a pass.

A graph is recorded when a pass of its size is first asked for. A batch is filled up to the next
recorded size, and the table of pages to the next power of two, which bounds how much the kernels
look at.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SMALL_BATCHES = (1, 2, 4, 8)
_BATCH_STEP = 8
_SMALLEST_WIDTH = 16


def padded_batch(rows: int) -> int:
    """The size of the graph for so many rows."""
    for size in _SMALL_BATCHES:
        if rows <= size:
            return size
    return -(-rows // _BATCH_STEP) * _BATCH_STEP


def padded_width(pages: int, max_pages: int) -> int:
    """The width of the table for rows of up to so many pages."""
    width = _SMALLEST_WIDTH
    while width < pages:
        width *= 2
    return min(width, max_pages)


class DecodeGraphs:
    """Graphs by batch and width of the table.

    Args:
        run: launches a pass for so many rows and pages, which reads and writes buffers that never
            move, and returns logits.
    """

    def __init__(self, run: Callable[[int, int], Tensor]) -> None:
        self._run = run
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def replay(self, rows: int, width: int) -> Tensor:
        """The logits of a pass; the next pass of the same size overwrites them."""
        found = self._graphs.get((rows, width))
        if found is None:
            found = self._graphs[rows, width] = self._record(rows, width)
        graph, logits = found
        graph.replay()
        return logits

    def _record(self, rows: int, width: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # The first run compiles kernels and makes workspaces, which a recording must not. It writes
        # the same latents to the same places as the replay after it.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run(rows, width)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, a server's, may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._run(rows, width)
        return graph, logits
