"""Muon with AdamW against PyTorch's own two optimizers; the schedule by hand."""

from __future__ import annotations

import pytest
import torch

from ic.training.optimizers import MuonWithAdamW, build_optimizer, is_muon_parameter, lr_factor
from ic.training.options import OptimizerOptions


def gradients(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_equals_two_separate_optimizers(make_model) -> None:
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
        assert a.equal(b), name


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
