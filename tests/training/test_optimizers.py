"""Muon with AdamW against PyTorch's own two optimizers; the schedule by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ic.training.muon import BatchedMuon, newton_schulz_dtype, orthogonalize, stacks
from ic.training.optimizers import MuonWithAdamW, build_optimizer, is_muon_parameter, lr_factor
from ic.training.options import OptimizerOptions


def gradients(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_equals_two_separate_optimizers(make_model, monkeypatch) -> None:
    monkeypatch.setattr(BatchedMuon, "dtype", torch.bfloat16)  # theirs on every CPU
    config = OptimizerOptions(lr=3e-3, weight_decay=0.1, betas=[0.8, 0.9], momentum=0.9)
    ours, theirs = make_model(), make_model()
    optimizer = build_optimizer(ours, config)
    assert isinstance(optimizer, MuonWithAdamW)
    named = list(theirs.named_parameters())
    muon = torch.optim.Muon(
        [p for n, p in named if is_muon_parameter(n, p)],
        lr=3e-3,
        weight_decay=0.1,
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [p for n, p in named if not is_muon_parameter(n, p)],
        lr=3e-3,
        weight_decay=0.1,
        betas=(0.8, 0.9),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        for group in muon.param_groups + adamw.param_groups:
            group["lr"] = 3e-3 / (1 + step)
        optimizer.step()
        muon.step()
        adamw.step()
        schedule.step()
        if step == 1:  # a saved and loaded state continues the same
            state = optimizer.state_dict()
            optimizer = build_optimizer(ours, config)
            optimizer.load_state_dict(state)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: 1 / (1 + step), last_epoch=1
            )
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if is_muon_parameter(name, a):
            equal_but_for_rounding(a, b, steps=4, rate=3e-3 * 0.2 * max(a.shape) ** 0.5)
        else:
            assert a.equal(b), name


def equal_but_for_rounding(a, b, *, steps: int, rate: float) -> None:
    """A product of a stack may round a number of bfloat16 the other way than that of a matrix.

    Such a bit is 0.4 % of a number, and moved an update by 0.55 % at most of 1,820 random ones, 8
    of which differed at all.
    """
    rank = min(a.shape)
    update = rate * rank**0.5  # the norm of an orthogonal matrix
    assert (a - b).norm() <= 0.01 * steps * update


class Launches(TorchDispatchMode):
    """Counts PyTorch's operators, without those that only give another view of a tensor.

    What they call in turn differs between CPUs and is not counted.
    """

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("nesterov", [True, False])
def test_stacks_of_matrices_equal_one_by_one(nesterov: bool, monkeypatch) -> None:
    """Tall, wide and square ones, one alone, one without a gradient; in stacks of three at most.

    A gradient of zeros stays one, as there.
    """
    monkeypatch.setattr("ic.training.muon.STACK_NUMBERS", 3 * 8 * 24)
    monkeypatch.setattr(BatchedMuon, "dtype", torch.bfloat16)  # theirs on every CPU
    shapes = [(24, 8), (8, 24)] * 4 + [(16, 16), (1, 5), (24, 8)]
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    settings = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    one, other = BatchedMuon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for step in range(3):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = None if index == 2 else torch.randn_like(a) * (index != 3 or step > 1)
            b.grad = None if a.grad is None else a.grad.clone()
        one.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        equal_but_for_rounding(a, b, steps=3, rate=0.1 * max(1, a.shape[0] / a.shape[1]) ** 0.5)
    # What either saved continues in the other.
    state = other.state_dict()
    assert {key: value.keys() for key, value in one.state_dict()["state"].items()} == {
        key: value.keys() for key, value in state["state"].items()
    }
    one.load_state_dict(copy.deepcopy(state))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    one.step()
    other.step()
    for a, b in zip(ours, theirs, strict=True):
        equal_but_for_rounding(a, b, steps=4, rate=0.1 * max(1, a.shape[0] / a.shape[1]) ** 0.5)


def test_stacks_are_bounded() -> None:
    matrices = [torch.empty(4, 4)] * 5 + [torch.empty(4, 8)] * 2 + [torch.empty(4, 4).double()]
    assert list(stacks(matrices, 33)) == [[0, 1], [2, 3], [4], [5], [6], [7]]
    assert list(stacks(matrices, 10**9)) == [[0, 1, 2, 3, 4], [5, 6], [7]]


def test_launches_of_muon_do_not_grow_with_layers() -> None:
    def muon(kind: type[torch.optim.Optimizer], num_layers: int) -> int:
        matrices = [torch.nn.Parameter(torch.randn(16, 8)) for _ in range(num_layers)]
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        optimizer = kind(matrices, lr=0.1)
        optimizer.step()
        with Launches() as launches:
            optimizer.step()
        return launches.count

    assert 5 * 3 < muon(BatchedMuon, 20) == muon(BatchedMuon, 2)
    assert muon(torch.optim.Muon, 20) > 20 * 16


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_in_the_order_of_the_matrices(
    dtype: torch.dtype, weights: torch.dtype, monkeypatch
) -> None:
    """Tall matrices too, which are orthogonalised transposed; a GPU adds others one by one."""
    add, strides = torch._foreach_add_, []

    def spy(matrices: list, updates: tuple, alpha: float) -> None:
        assert {update.dtype for update in updates} == {weights}
        strides.extend((m.stride(), u.stride()) for m, u in zip(matrices, updates, strict=True))
        add(matrices, updates, alpha=alpha)

    monkeypatch.setattr(torch, "_foreach_add_", spy)
    matrices = [torch.nn.Parameter(torch.randn(16, 8, dtype=weights)) for _ in range(2)]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    optimizer = BatchedMuon(matrices, lr=0.1)
    optimizer.dtype = dtype
    optimizer.step()
    assert strides == [((8, 1), (8, 1))] * 2


def exactly(matrix_MN: torch.Tensor, group: dict) -> torch.Tensor:
    """The Newton-Schulz polynomial of a matrix's singular values, in float64."""
    a, b, c = group["ns_coefficients"]
    u_MK, s_K, v_KN = torch.linalg.svd(matrix_MN.double(), full_matrices=False)
    s_K = s_K / s_K.norm()
    for _ in range(group["ns_steps"]):
        s_K = a * s_K + b * s_K**3 + c * s_K**5
    return u_MK @ s_K.diag() @ v_KN


@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (33, 33)])
def test_float32_is_closer_to_the_exact_iteration(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    stack_LMN = torch.randn(3, *shape)
    group = BatchedMuon([torch.nn.Parameter(stack_LMN[0])]).param_groups[0]
    exact_LMN = torch.stack([exactly(matrix, group) for matrix in stack_LMN])

    def error(dtype: torch.dtype) -> float:
        found_LMN = orthogonalize(stack_LMN, group, dtype)
        assert found_LMN.dtype == dtype
        return float((found_LMN - exact_LMN).norm() / exact_LMN.norm())

    assert error(torch.float32) < 1e-5
    assert 1e-3 < error(torch.bfloat16) < 0.1


@pytest.mark.parametrize(
    ("instructions", "has_onednn", "expected"),
    [
        ({"avx512_bf16": True, "avx512_bw": True}, True, torch.bfloat16),
        ({"avx512_bf16": False, "avx512_bw": True}, True, torch.float32),
        ({"bf16": True, "neon": True}, True, torch.bfloat16),
        ({"bf16": True, "neon": True}, False, torch.float32),
        ({"bf16": False, "neon": True}, True, torch.float32),
        ({"architecture": "unknown"}, True, torch.float32),
    ],
)
def test_cpus_that_do_not_multiply_bfloat16_use_float32(
    instructions: dict, has_onednn: bool, expected: torch.dtype, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    assert newton_schulz_dtype(torch.device("cpu")) == expected
    assert newton_schulz_dtype(torch.device("cuda", 1)) == torch.bfloat16

    def after_a_step(dtype: torch.dtype | None) -> torch.Tensor:
        torch.manual_seed(0)
        matrix = torch.nn.Parameter(torch.randn(16, 8))
        matrix.grad = torch.randn_like(matrix)
        optimizer = BatchedMuon([matrix], lr=0.1)
        optimizer.dtype = dtype
        optimizer.step()
        return matrix.detach()

    equal = {
        dtype: after_a_step(None).equal(after_a_step(dtype))
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert equal == {dtype: dtype == expected for dtype in equal}


def test_adamw_is_pytorchs(make_model) -> None:
    """With settings that are nobody's defaults."""
    config = OptimizerOptions(name="adamw", lr=3e-3, weight_decay=0.2, betas=[0.7, 0.8])
    ours, theirs = make_model(), make_model()
    optimizer = build_optimizer(ours, config)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.2, betas=(0.7, 0.8))
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.step()
        adamw.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.equal(b), name


def test_split_of_parameters(make_model) -> None:
    names = {n for n, p in make_model().named_parameters() if is_muon_parameter(n, p)}
    assert len(names) == 3 * 8
    assert not any("norm" in n or "embed" in n or "lm_head" in n for n in names)


def test_schedule() -> None:
    config = OptimizerOptions(warmup_steps=10, decay_fraction=0.25)
    assert lr_factor(config, 0, 0.0) == pytest.approx(0.1)
    assert lr_factor(config, 9, 0.1) == 1
    assert lr_factor(config, 500, 0.75) == 1
    assert lr_factor(config, 500, 0.875) == pytest.approx(0.5)
    assert lr_factor(config, 500, 1.0) == 0
    assert lr_factor(OptimizerOptions(decay_fraction=0.0, warmup_steps=0), 0, 1.0) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "choose one of muon, adamw"),
        ({"lr": 0.0}, "optimizer.lr=0.0"),
        ({"betas": [0.9]}, "two numbers"),
        ({"momentum": 1.0}, "optimizer.momentum"),
        ({"decay_fraction": 2.0}, "optimizer.decay_fraction"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerOptions(**changes)
