"""Muon for the matrices of the blocks with AdamW for everything else, and the learning-rate
schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ic.training.muon import BatchedMuon
from ic.training.options import OptimizerOptions
from ic.training.sharded_muon import ShardedMuon


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and `torch.optim.AdamW` behind one optimizer with one state.

    Muon is `BatchedMuon`, or `ShardedMuon` for matrices that are sharded over ranks; both have the
    settings, the state and the result of `torch.optim.Muon`.

    One object keeps what Lightning, gradient clipping, schedulers and sharded checkpoints expect:
    groups and a state keyed by parameter. Group 0 is Muon's, group 1 AdamW's.

    Attributes:
        muon: the one of the two that has the matrices.
    """

    def __init__(
        self, muon: Iterable[nn.Parameter], adamw: Iterable[nn.Parameter], config: OptimizerOptions
    ) -> None:
        matrices = list(muon)
        sharded = any(isinstance(matrix, DTensor) for matrix in matrices)
        self.muon = (ShardedMuon if sharded else BatchedMuon)(
            matrices,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = torch.optim.AdamW(
            list(adamw),
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=(config.betas[0], config.betas[1]),
        )
        super().__init__(self.muon.param_groups + self._adamw.param_groups, {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self._adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        # Both write into this object's state and read the rates that a scheduler sets on its
        # groups.
        self.muon.param_groups = self.param_groups[:1]
        self._adamw.param_groups = self.param_groups[1:]
        self.muon.state = self._adamw.state = self.state


def build_optimizer(model: nn.Module, config: OptimizerOptions) -> torch.optim.Optimizer:
    """The configured optimizer over the parameters that train.

    AdamW alone where Muon has no matrix to train, as with LoRA.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if is_muon_parameter(name, p)]
    if config.name == "adamw" or not muon:
        return torch.optim.AdamW(
            [p for _, p in named],
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=(config.betas[0], config.betas[1]),
        )
    adamw = [p for name, p in named if not is_muon_parameter(name, p)]
    return MuonWithAdamW(muon, adamw, config)


def is_muon_parameter(name: str, parameter: Tensor) -> bool:
    """Matrices inside the decoder layers; embedding and head are lookups and stay with AdamW.

    So do the factors of LoRA: to orthogonalize a factor's update is not to orthogonalize that of
    the product.
    """
    return parameter.dim() == 2 and "layers." in name and ".lora_" not in name


def lr_factor(config: OptimizerOptions, step: int, progress: float) -> float:
    """Share of the peak rate: warm-up by step, then constant, then linear decay by progress in [0,
    1].
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = 1.0
    if config.decay_fraction:
        decay = min(1.0, max(0.0, 1 - progress) / config.decay_fraction)
    return min(warmup, decay)
