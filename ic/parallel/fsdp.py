"""Lightning's FSDP strategy with gradient clipping by norm and a policy for this model."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.optim import Optimizer

from ic.checkpoint.sharded_checkpoint import ShardedCheckpointStrategy
from ic.model.decoder_layer import MLADecoderLayer
from ic.parallel.meeting import all_met


class ClippingFSDPPrecision(FSDPPrecision):
    """`FSDPPrecision` that clips by norm through the root module, which alone knows the shards."""

    root: FullyShardedDataParallel | None = None

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        assert self.root is not None, "the strategy sets the root when it wraps the model"
        self.root.clip_grad_norm_(clip_val)


class LayerFSDPStrategy(ShardedCheckpointStrategy, FSDPStrategy):
    """One FSDP unit a decoder layer, the rest in the root.

    In a mixed precision, parameters compute in 16 bits and gradients are reduced in float32.
    Inputs of the layers are not cast: the rotation's cosines stay float32.
    """

    def __init__(
        self, precision: str, process_group_backend: str | None, rendezvous_timeout_s: float
    ) -> None:
        self.rendezvous_timeout_s = rendezvous_timeout_s
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        super().__init__(
            precision_plugin=ClippingFSDPPrecision(cast(Any, precision)),
            process_group_backend=process_group_backend,
            auto_wrap_policy={MLADecoderLayer},
            mixed_precision=MixedPrecision(
                param_dtype=dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
                cast_root_forward_inputs=False,
            ),
        )

    def setup_environment(self) -> None:
        self.set_world_ranks()
        with all_met(self.cluster_environment, self.rendezvous_timeout_s):
            super().setup_environment()

    def _setup_model(self, model: nn.Module) -> nn.Module:
        wrapped = super()._setup_model(model)
        cast(ClippingFSDPPrecision, self.precision_plugin).root = cast(
            FullyShardedDataParallel, wrapped
        )
        return wrapped

    @contextmanager
    def gathered(self) -> Generator[None, None, None]:
        """See `ShardedStrategy`; the layers gather their own parameters call by call."""
        root = cast(FullyShardedDataParallel, self.model)
        with FullyShardedDataParallel.summon_full_params(root, recurse=False, writeback=False):
            yield
