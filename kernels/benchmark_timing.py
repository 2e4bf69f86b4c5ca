"""Clocks and ceilings: how a call is timed on the GPU and what the machine can do at best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

Call = Callable[[], Any]
CALLS_IN_A_GRAPH = 8


def l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def rotations(bytes_moved: int, device: torch.device) -> int:
    """How many input sets make a rotation that the L2 cache cannot hold, at least two."""
    return max(2, math.ceil(3 * l2_bytes(device) / max(bytes_moved, 1)) + 1)


def _events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


def _sample(step: Callable[[int], Any], calls_a_step: int, repeats: int) -> list[float]:
    for index in range(3):
        step(index)
    marks = _events(repeats + 1)
    torch.cuda.synchronize()
    marks[0].record()
    for index in range(repeats):
        step(index)
        marks[index + 1].record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e3 / calls_a_step for before, after in pairwise(marks)]


def time_with_events(calls: Sequence[Call], repeats: int = 30) -> list[float]:
    """Microseconds of single calls launched from Python, walking through the rotation."""
    return _sample(lambda index: calls[index % len(calls)](), 1, repeats)


def time_with_graph(calls: Sequence[Call], repeats: int = 20) -> list[float]:
    """Microseconds a call of a replayed CUDA graph that holds several rotations of the inputs."""
    rounds = math.ceil(CALLS_IN_A_GRAPH / len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return _sample(lambda _: graph.replay(), rounds * len(calls), repeats)


def time_best(calls: Sequence[Call], *, graph: bool = True) -> dict[str, Any]:
    """Median of the better of the two ways, how it was taken, n and the middle half's width.

    Without `graph` only calls launched from Python are timed.
    """
    ways: dict[str, list[float]] = {"events": time_with_events(calls)}
    try:
        if graph:
            ways["graph"] = time_with_graph(calls)
    except (RuntimeError, NotImplementedError):  # a peer that synchronises cannot be captured
        torch.cuda.synchronize()
    how = min(ways, key=lambda name: statistics.median(ways[name]))
    samples = ways[how]
    quartiles = statistics.quantiles(samples, n=4)
    return {
        "timed_with": how,
        "n": len(samples),
        "median_us": statistics.median(samples),
        "spread_us": quartiles[2] - quartiles[0],
    }


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """The bandwidth of a copy and the rate of the bf16 matrix product, on random data.

    The copy counts bytes read and written and is the best of three sizes, each by memcpy and by a
    kernel over fp32 elements: it is a ceiling only if no kernel beats it.
    """
    copy = max(_copy_tb_per_s(1 << shift, device) for shift in (28, 29, 30))
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    matmul_us = statistics.median(time_with_graph([lambda: a @ b]))
    return {"copy_tb_per_s": copy, "matmul_bf16_tflop_per_s": 2 * size**3 / matmul_us / 1e6}


def _copy_tb_per_s(num_bytes: int, device: torch.device) -> float:
    count = rotations(2 * num_bytes, device)
    sources = [torch.randn(num_bytes // 4, device=device) for _ in range(count)]
    targets = [torch.empty_like(source) for source in sources]
    pairs = list(zip(sources, targets, strict=True))
    ways = {
        "memcpy": [lambda s=s, t=t: t.copy_(s) for s, t in pairs],
        "kernel": [lambda s=s, t=t: torch.neg(s, out=t) for s, t in pairs],
    }
    copy_us = min(statistics.median(time_with_graph(calls)) for calls in ways.values())
    return 2 * num_bytes / copy_us / 1e6
