"""Which implementation of attention, norm and rotation runs, and in which precision.

The Triton kernels need sm_80: before it a GPU has no bf16, 64 KiB of shared memory and no tensor
cores from Triton. There PyTorch's operators run instead, in float16, and one line says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from ic.errors import check_choice
from ic.model.registry import PARTS, backend_names, find_backend

FIRST_BF16 = (8, 0)
# Float16 has five exponent bits: weights and their updates stay float32, gradients are scaled.
_FLOAT16 = {
    "bf16": "16-mixed",
    "bf16-mixed": "16-mixed",
    "bf16-true": "16-mixed",
    "bfloat16": "float16",
}


@dataclass(frozen=True)
class Backends:
    """What a user asks for, or what a machine can run.

    Attributes:
        attention, norm, rope: names of backends (`ic.model.registry`), each on its own.
        precision: `lightning.Trainer`'s precision, or the name of a dtype for inference.

    Raises:
        ValueError: no backend of this name.
    """

    attention: str = "torch"
    norm: str = "torch"
    rope: str = "torch"
    precision: str = "float32"

    def __post_init__(self) -> None:
        for part in PARTS:
            check_choice(part, getattr(self, part), backend_names())


ON_TORCH = Backends()


def resolve_backends(
    requested: Backends, capability: tuple[int, int] | None
) -> tuple[Backends, str | None]:
    """What runs on a GPU of this compute capability (None: a CPU), and a line if it differs.

    Raises:
        ValueError: a backend that needs a GPU, without one.
    """
    precision, needed = requested.precision, []
    replaced: dict[str, str] = {}
    for part in PARTS:
        name = getattr(requested, part)
        first = find_backend(name).first_capability
        if first is None:
            continue
        if capability is None:
            raise ValueError(
                f"{part}={name}: PyTorch sees no CUDA GPU here, or accelerator=cpu hides it; use "
                f"{part}=torch"
            )
        if capability < first:
            replaced[part] = name
            needed.append(first)
    if capability is not None and capability < FIRST_BF16:
        precision = _FLOAT16.get(precision, precision)
    changes = [f"{part}=torch in place of {name}" for part, name in replaced.items()]
    if precision != requested.precision:
        changes.append(f"{precision} in place of {requested.precision}")
        needed.append(FIRST_BF16)
    if capability is None or not changes:
        return requested, None
    names = {part: "torch" if part in replaced else getattr(requested, part) for part in PARTS}
    line = f"this GPU is {_sm(capability)}, below {_sm(max(needed))}: {', '.join(changes)}"
    return Backends(**names, precision=precision), line


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def gpu_capability(accelerator: str) -> tuple[int, int] | None:
    """Compute capability of the oldest visible GPU; None without one or with `accelerator=cpu`."""
    import torch  # late: choices are checked without it

    if accelerator == "cpu" or not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
