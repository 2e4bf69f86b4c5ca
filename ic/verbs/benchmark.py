"""check the Triton kernels against their reference and time them on a GPU"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ic.errors import UsageError


@dataclass
class Config:
    """What to measure.

    Attributes:
        kernels: names of kernels; empty for all.
        match: only cases whose name contains this.
        output: JSON file, with a plot beside it; null shows the table alone.
        peers: time other implementations of the same cases in the same run, where their package
            imports: flash_mla, fa3_fwd_interface (FlashAttention-3), flashinfer and, for training,
            flash_attn.cute (FlashAttention-4), liger_kernel, and PyTorch's own cuDNN attention,
            FlexAttention and torch.compile. Those that are missing are named below the table.
        list_cases: name the cases and leave; needs no GPU.
    """

    kernels: list[str] = field(default_factory=list)
    match: str = ""
    output: str | None = None
    peers: bool = True
    list_cases: bool = False

    def __post_init__(self) -> None:
        if self.output is not None and not self.output.endswith(".json"):
            raise ValueError(f"output={self.output!r}: must end in .json")


def run(config: Config) -> int:
    try:
        import ic.studies.benchmark_layer  # noqa: F401  # registers the cases of `layer`
        from ic.kernels.benchmark_mla import benchmark, selected_cases

        cases = selected_cases(config.kernels, config.match)  # imports the kernels
    except ModuleNotFoundError as error:
        raise UsageError(f"benchmark needs Triton, which is not installed here: {error}") from error
    if config.list_cases:
        print("\n".join(f"{case.kernel}: {case.name}" for case in cases))
        return 0
    return benchmark(
        config.kernels,
        match=config.match,
        output=None if config.output is None else Path(config.output),
        peers=config.peers,
        command="python -m ic " + shlex.join(sys.argv[1:]),
    )
