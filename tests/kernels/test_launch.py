"""Entry points launch without the operator where nothing else is wanted, and only there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ic.kernels.launch import MAX_LAUNCHES, Launches, is_eager
from ic.kernels.triton_append_latent import append_latent
from ic.kernels.triton_mla_flash_decode import mla_decode
from ic.kernels.triton_rmsnorm import add_rms_norm, rms_norm
from ic.kernels.triton_rope import apply_rope

REPOSITORY = Path(__file__).parents[2]


class Watched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def arguments(device: torch.device) -> dict[str, tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, q, k = randn(3, 64), randn(2, 5, 4, 32), randn(2, 5, 1, 32)
    angle, latent = randn(1, 5, 16), randn(6, 64)
    lengths = torch.tensor([7, 32], dtype=torch.int32, device=device)
    return {
        "norm": (x, randn(3, 64), randn(64)),
        "rotation": (q, k, angle.cos(), angle.sin()),
        "append": (
            latent[:, :48], latent[:, 48:], randn(48), randn(6, 8), randn(6, 8),
            torch.zeros(2, 16, 64, device=device), torch.arange(6, device=device),
        ),
        "decode": (randn(2, 1, 4, 48), randn(2, 1, 4, 16), randn(2, 32, 64), lengths),
    }  # fmt: skip


def append(*given: Tensor) -> Tensor:
    cache = given[5].clone()
    append_latent(*given[:5], cache, given[6], check_indices=False)
    return cache


CALLS: dict[str, Callable[..., Any]] = {
    "norm": lambda x, residual, weight: (
        rms_norm(x, weight, 1e-6),
        *add_rms_norm(x, residual, weight, 1e-6),
    ),
    "rotation": lambda q, k, cos, sin: apply_rope(q, k, cos, sin, True),
    "append": append,
    "decode": lambda *given: mla_decode(*given, softmax_scale=0.2, check_indices=False),
}


@pytest.mark.parametrize("name", CALLS)
def test_without_the_operator_it_is_the_same(device: torch.device, name: str) -> None:
    """No operator of ours where nothing watches, ours under a mode and compiled, equal results."""
    call, given = CALLS[name], arguments(device)[name]
    plain = call(*given)
    with Watched() as mode:
        watched = call(*given)
    assert any(operator.startswith("ic::") for operator in mode.operators)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(*given)
    for other in (watched, compiled):
        torch.testing.assert_close(other, plain, rtol=0, atol=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*given)
    assert not [event.key for event in profile.key_averages() if event.key.startswith("ic::")]


def test_what_is_not_eager(device: torch.device) -> None:
    x = torch.ones(2, device=device)
    asked: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        asked.append(is_eager(x, None))
        return x * 1

    class Subclass(Tensor):
        pass

    ask(x)
    ask(torch.nn.Parameter(x))
    assert asked == [True, True]
    asked.clear()
    with Watched():
        ask(x)
    ask(x.as_subclass(Subclass))
    ask(x.to("meta"))
    torch.func.vmap(ask)(x)
    torch.jit.trace(ask, x, check_trace=False)
    with FakeTensorMode() as fake:
        ask(fake.from_tensor(x))
    assert asked
    assert not any(asked)


def test_a_checked_kind_vouches_for_no_other(device: torch.device) -> None:
    """After a good call: what differs from it in one way is refused."""
    given = arguments(device)
    x, residual, weight = given["norm"]
    q, k, cos, sin = given["rotation"]
    new, pages, slots = given["append"][:5], *given["append"][5:]
    query, rope, cache, lengths = given["decode"]
    for name, call in CALLS.items():
        call(*given[name])
    for message, bad in (
        ("^residual: shape", lambda: add_rms_norm(x, residual[:2], weight, 1e-6)),
        ("^residual: dtype", lambda: add_rms_norm(x, residual.half(), weight, 1e-6)),
        ("^weight: shape", lambda: rms_norm(x, weight[:32], 1e-6)),
        ("^weight: the last stride", lambda: rms_norm(x, weight.repeat(2)[::2], 1e-6)),
        ("^x: the last stride", lambda: rms_norm(x.repeat(1, 2)[:, ::2], weight, 1e-6)),
        ("^eps", lambda: rms_norm(x, weight, -1.0)),
        ("^k: shape", lambda: apply_rope(q, k[:1], cos, sin, True)),
        ("^cos: dtype", lambda: apply_rope(q, k, cos.half(), sin, True)),
        ("^sin: shape", lambda: apply_rope(q, k, cos, sin[:, :4], True)),
        ("^slot_mapping", lambda: append(*new, pages, slots.int())),
        ("^cache has shape", lambda: append(*new, pages[..., :48], slots)),
        ("^cache is", lambda: append(*new, pages.to(torch.int8), slots)),
        ("^seq_lens", lambda: CALLS["decode"](query, rope, cache, lengths.long())),
        ("^seq_lens", lambda: CALLS["decode"](query, rope, cache, lengths[:1])),
        ("^cache holds", lambda: CALLS["decode"](query, rope, cache[:1], lengths)),
        ("^cache has shape", lambda: CALLS["decode"](query, rope, cache[..., :48], lengths)),
        ("^cache has shape", lambda: CALLS["decode"](query, rope, cache[0], lengths)),
        ("^q_rope is", lambda: CALLS["decode"](query, rope.half(), cache, lengths)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bad()


def test_autograd_sees_the_append(device: torch.device) -> None:
    given = arguments(device)["append"]
    cache = given[5]
    before = cache._version
    append_latent(*given, check_indices=False)
    assert cache._version == before + 1
    with torch.inference_mode():
        append_latent(*given[:5], cache.clone(), given[6], check_indices=False)


@pytest.mark.parametrize("name", ["norm", "rotation"])
def test_second_derivatives_are_refused(device: torch.device, name: str) -> None:
    """They are not implemented, and a missing graph would count as zero."""
    first, *others = arguments(device)[name]
    first.requires_grad_()
    out = CALLS[name](first, *others)[0]
    gradient = torch.autograd.grad(out.square().sum(), first, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_launches_are_bounded() -> None:
    launches = Launches()
    for key in range(3 * MAX_LAUNCHES):
        launches[key] = key
        assert len(launches) <= MAX_LAUNCHES
    assert launches[key] == key


@pytest.mark.compile
def test_ready_launches_are_tritons_own() -> None:
    """The second launch of a kind: Triton's argument handling is not asked, and the kernel, grid
    and arguments are those that it would have chosen. Where a tensor is not aligned it is asked.
    """
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("launch_boundary.py"))],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 35
    assert {row["call"] for row in rows if row["by_triton"]} == {
        f"norm {index}" for index in range(3, 20, 4)
    }
    for row in rows:
        assert row["ready"], row["call"]
        assert row["ready"] == row["fresh"], row["call"]
