"""Run the launchers on a processor up to Triton's boundary, and print what would be launched.

Triton's own argument handling and compiler run as on a Hopper GPU; only its driver is replaced, by
one that notes kernel, grid and arguments. Run by test_launch.py in a process of its own, because
the interpreter mode of the other tests replaces `triton.jit`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
import torch
import triton
import triton.language
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

os.environ["TRITON_INTERPRET"] = "1"  # so that the checks take tensors on the CPU
import ic.kernels.arguments

os.environ["TRITON_INTERPRET"] = "0"  # so that the kernels are compiled
from ic.kernels import mla_decode_plan, triton_append_latent, triton_rmsnorm, triton_rope
from ic.kernels.triton_append_latent import append_latent
from ic.kernels.triton_mla_flash_decode import mla_decode
from ic.kernels.triton_rmsnorm import add_rms_norm, rms_norm
from ic.kernels.triton_rope import apply_rope

os.environ["TRITON_INTERPRET"] = "1"
assert ic.kernels.arguments.INTERPRETED
Launched = tuple[str, tuple[int, ...], tuple[Any, ...]]
launched: list[Launched] = []
inputs: list[torch.Tensor] = []


class Launcher:
    """In place of the one that calls `cuLaunchKernelEx`."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kernel = f"{metadata.name} {metadata.hash}"

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *arguments: Any) -> None:
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments[4:]]
        launched.append((self.kernel, (x, y, z), tuple(values)))


class Driver:
    """A Hopper GPU as far as Triton's front end asks."""

    launcher_cls = Launcher

    class utils:  # noqa: N801  # the name that Triton asks for
        @staticmethod
        def load_binary(*arguments: Any) -> tuple[int, int, int, int, int]:
            return 1, 1, 32, 0, 1024

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

        @staticmethod
        def unload_module(module: int) -> None:
            pass

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def kept(x: torch.Tensor) -> torch.Tensor:
    """An input, whose address may be compared: it is freed for no other tensor."""
    inputs.append(x)
    return x


def half(*shape: int) -> torch.Tensor:
    return kept(torch.zeros(shape, dtype=torch.float16))


def norms() -> list[Callable[[], Any]]:
    """Rows of many numbers, dense and strided, alone and summed, aligned and not."""
    weight = half(96)
    calls: list[Callable[[], Any]] = []
    for rows in (1, 5, 16, 17, 1000):
        x, wide = half(rows, 96), half(rows, 160)
        calls += [
            lambda x=x: rms_norm(x, weight, 1e-6),
            lambda x=x: add_rms_norm(x, x, weight, 1e-6),
            lambda x=wide[:, :96]: rms_norm(x, weight, 1e-6),
            lambda x=wide[:, 1:97]: rms_norm(x, weight, 1e-6),
        ]
    return calls


def rotations() -> list[Callable[[], Any]]:
    calls: list[Callable[[], Any]] = []
    for batch, tokens in ((1, 1), (1, 16), (2, 7)):
        q, k = half(batch, tokens, 4, 48)[..., 16:], half(batch, tokens, 1, 32)
        cos = kept(torch.ones(1, tokens, 16))
        calls.append(lambda q=q, k=k, cos=cos: apply_rope(q, k, cos, cos, True))
    return calls


def appends() -> list[Callable[[], Any]]:
    weight, pages = half(48), half(3, 16, 64)
    calls: list[Callable[[], Any]] = []
    for tokens in (1, 16):
        new, table = half(tokens, 64), kept(torch.ones(tokens, 8))
        slots = kept(torch.arange(tokens))
        calls.append(
            lambda new=new, table=table, slots=slots: append_latent(
                new[:, :48], new[:, 48:], weight, table, table, pages, slots, check_indices=False
            )
        )
    return calls


def decodes() -> list[Callable[[], Any]]:
    """A cache that grows in its buffer, and pages in a table that grows."""
    q, q_rope, buffer = half(1, 1, 4, 48), half(1, 1, 4, 16), half(1, 512, 64)
    pages, table = half(9, 32, 64), kept(torch.zeros(2, 64, dtype=torch.int32))
    calls: list[Callable[[], Any]] = []
    for tokens in (1, 16, 33, 64, 400, 401):
        lengths = kept(torch.full((1,), tokens, dtype=torch.int32))
        calls.append(
            lambda cache=buffer[:, :tokens], lengths=lengths: mla_decode(
                q, q_rope, cache, lengths, softmax_scale=0.1, check_indices=False
            )
        )
    for width in (1, 5, 16, 48):
        calls.append(
            lambda table=table[:, :width]: mla_decode(
                q.expand(2, -1, -1, -1), q_rope.expand(2, -1, -1, -1), pages,
                torch.full((2,), 3, dtype=torch.int32), block_table=table, softmax_scale=0.1,
                check_indices=False,
            )
        )  # fmt: skip
    return calls


def launches_of(call: Callable[[], Any]) -> list[Launched]:
    launched.clear()
    call()
    return list(launched)


def is_new(value: Any) -> bool:
    """Whether it is the address of a tensor that the call made."""
    return (
        isinstance(value, int)
        and value > 2**32
        and not any(x.data_ptr() <= value < x.data_ptr() + x.nbytes for x in inputs)
    )


def without_outputs(of: Sequence[Launched]) -> list[Any]:
    """Addresses of new tensors differ from call to call."""
    return [
        (kernel, grid, ["new" if is_new(value) else value for value in values])
        for kernel, grid, values in of
    ]


def main() -> None:
    driver.set_active(Driver())
    kept = (
        triton_rmsnorm._forward_launches, triton_rope._launches, triton_append_latent._launches,
        mla_decode_plan._plans,
    )  # fmt: skip
    own_way = triton.runtime.jit.JITFunction.run
    asked: list[str] = []

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(self.__name__)
        return own_way(self, *arguments, **options)

    triton.runtime.jit.JITFunction.run = run
    report = []
    for name, calls in (
        ("norm", norms()),
        ("rotation", rotations()),
        ("append", appends()),
        ("decode", decodes()),
    ):
        for call in calls:
            call()
        for index, call in enumerate(calls):
            asked.clear()
            ready = launches_of(call)
            by_triton = list(asked)
            before = [dict(launches) for launches in kept]
            for launches in kept:
                launches.clear()
            fresh = launches_of(call)
            for launches, held in zip(kept, before, strict=True):
                launches.clear()
                launches.update(held)
            report.append(
                {
                    "call": f"{name} {index}",
                    "by_triton": by_triton,
                    "ready": without_outputs(ready),
                    "fresh": without_outputs(fresh),
                }
            )
    print(json.dumps(report))


if __name__ == "__main__":
    with torch.no_grad():
        main()
