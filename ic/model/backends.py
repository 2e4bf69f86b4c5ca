"""Which implementation of attention, norm and rotation runs, and in which precision.

The Triton kernels need sm_80: before it a GPU has no bf16, 64 KiB of shared memory and no tensor
cores from Triton. There PyTorch's operators run instead, in float16, and one line says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import ModuleType

from ic.errors import check_choice
from ic.model.dimensions import BACKENDS

FIRST_CAPABILITY = (8, 0)
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
        attention, norm, rope: `torch` or `triton`, each on its own.
        precision: `lightning.Trainer`'s precision, or the name of a dtype for inference.

    Raises:
        ValueError: a backend that is neither.
    """

    attention: str = "torch"
    norm: str = "torch"
    rope: str = "torch"
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("attention", "norm", "rope"):
            check_choice(name, getattr(self, name), BACKENDS)

    @property
    def on_triton(self) -> list[str]:
        """Names of the parts that run on our kernels."""
        return [name for name, value in asdict(self).items() if value == "triton"]


ON_TORCH = Backends()


def resolve_backends(
    requested: Backends, capability: tuple[int, int] | None
) -> tuple[Backends, str | None]:
    """What runs on a GPU of this compute capability (None: a CPU), and a line if it differs.

    Raises:
        ValueError: Triton asked for without a GPU.
    """
    on_triton = requested.on_triton
    if capability is None:
        if on_triton:
            raise ValueError(
                f"{on_triton[0]}=triton: PyTorch sees no CUDA GPU here, or accelerator=cpu hides "
                f"it; use {on_triton[0]}=torch"
            )
        return requested, None
    if capability >= FIRST_CAPABILITY:
        return requested, None
    precision = _FLOAT16.get(requested.precision, requested.precision)
    resolved = Backends(precision=precision)
    changes = [f"{name}=torch in place of triton" for name in on_triton]
    if precision != requested.precision:
        changes.append(f"{precision} in place of {requested.precision}")
    if not changes:
        return resolved, None
    major, minor = capability
    return resolved, f"this GPU is sm_{major}{minor}, below sm_80: {', '.join(changes)}"


def gpu_capability(accelerator: str) -> tuple[int, int] | None:
    """Compute capability of the oldest visible GPU; None without one or with `accelerator=cpu`."""
    import torch  # late: choices are checked without it

    if accelerator == "cpu" or not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


def triton_kernels() -> ModuleType:
    """`ic.model.triton_backend`, imported when first used: Triton is not everywhere installed."""
    from ic.model import triton_backend

    return triton_backend
