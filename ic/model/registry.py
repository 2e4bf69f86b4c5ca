"""Backends of the model's operators by name, read without importing any of them.

A backend is a module with an object `OPERATORS` (`ic.model.operators`). A third one is that file
and its registration: a line in this table, or a call of `register_backend` before a configuration
is made (docs/backends.md).
"""

from __future__ import annotations

from dataclasses import dataclass

# What a user chooses a backend for, each on its own.
PARTS = ("attention", "norm", "rope")


@dataclass(frozen=True)
class Backend:
    """Where a backend is, and what it runs on.

    Attributes:
        module: dotted name of the module that holds `OPERATORS`.
        first_capability: oldest compute capability of a CUDA GPU that it runs on; None runs
            everywhere.
    """

    module: str
    first_capability: tuple[int, int] | None = None


_BACKENDS = {
    "torch": Backend("ic.model.torch_operators"),
    # Before sm_80 a GPU has no bf16, 64 KiB of shared memory and no tensor cores from Triton.
    "triton": Backend("ic.model.triton_operators", first_capability=(8, 0)),
}


def register_backend(
    name: str, module: str, *, first_capability: tuple[int, int] | None = None
) -> None:
    """Let `model.attention=NAME` (and `norm`, `rope`) mean the backend in `module`.

    Raises:
        ValueError: the name already means another backend.
    """
    backend = Backend(module, first_capability)
    known = _BACKENDS.setdefault(name, backend)
    if known != backend:
        raise ValueError(
            f"register_backend({name!r}, {module!r}): {name!r} is already the backend in "
            f"{known.module}; choose another name"
        )


def backend_names() -> tuple[str, ...]:
    """All names, `torch` first."""
    return tuple(_BACKENDS)


def find_backend(name: str) -> Backend:
    """The backend of a name that `backend_names` has."""
    return _BACKENDS[name]
