"""Lightning strategy: fully sharded parameters (FSDP2) over a mesh data x context."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from ic.checkpoint.sharded_checkpoint import ShardedCheckpointStrategy
from ic.model import MLAForCausalLM
from ic.parallel.context_parallel import ContextParallel
from ic.parallel.meeting import all_met
from ic.parallel.mesh import ParallelMesh, build_mesh


class FSDP2Strategy(ShardedCheckpointStrategy, ModelParallelStrategy):
    """`fully_shard` for each decoder layer and for the rest of each `MLAForCausalLM`.

    Parameters, gradients and optimizer state are `DTensor`s, cut along their first dimension over
    all ranks. With a bf16 precision, parameters travel and compute in bf16 and gradients are
    reduced in float32; the parameters that the optimizer holds stay as they are (float32 unless
    `bf16-true`). Accumulation micro-batches before the last are not reduced.

    Args:
        context_parallel_size: ranks that share each sequence; must divide the number of processes.
        process_group_backend: null for the device's usual one.
        rendezvous_timeout_s: how long the ranks wait for each other at the start.
    """

    def __init__(
        self,
        context_parallel_size: int = 1,
        process_group_backend: str | None = None,
        rendezvous_timeout_s: float = 600.0,
    ) -> None:
        self.rendezvous_timeout_s = rendezvous_timeout_s
        super().__init__(process_group_backend=process_group_backend)
        self.context_parallel_size = context_parallel_size
        self._mesh: ParallelMesh | None = None

    @property
    def mesh(self) -> ParallelMesh:
        assert self._mesh is not None, "the mesh exists once the processes are set up"
        return self._mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Rank and number of data-parallel replicas: ranks that share a sequence share its data."""
        return {"num_replicas": self.mesh.data_size, "rank": self.mesh.data_rank}

    def setup_environment(self) -> None:
        self.set_world_ranks()
        with all_met(self.cluster_environment, self.rendezvous_timeout_s):
            self._setup_distributed()
        self._mesh = build_mesh(self.root_device.type, self.world_size, self.context_parallel_size)
        self._device_mesh = self._mesh.batch
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._mesh.batch

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = cast(LightningModule, self.model)
        module = cast(LightningModule, self.precision_plugin.convert_module(module))
        module.to(self.root_device)
        for model in self._language_models(module):
            if not isinstance(model, FSDPModule):
                shard_model(model, self.mesh.shard, self._parameter_dtype())
            if self.context_parallel_size > 1:
                model.model.context_parallel = ContextParallel(self.mesh.context_group)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Gradients of the backward passes inside stay on their rank, unsharded and in float32."""
        roots = self._language_models(cast(nn.Module, self.model))
        for root in roots:
            _set_sync(root, False)
        try:
            yield
        finally:
            for root in roots:
                _set_sync(root, True)

    @contextmanager
    def gathered(self) -> Generator[None, None, None]:
        """See `ShardedStrategy`."""
        layers = [
            cast(FSDPModule, layer)
            for root in self._language_models(cast(nn.Module, self.model))
            for layer in root.model.layers
        ]
        for layer in layers:
            layer.set_reshard_after_forward(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(True)
                layer.reshard()

    def _parameter_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if "bf16" in str(self.precision_plugin.precision) else None

    @staticmethod
    def _language_models(module: nn.Module) -> list[MLAForCausalLM]:
        return [m for m in module.modules() if isinstance(m, MLAForCausalLM)]


def shard_model(
    model: MLAForCausalLM, mesh: DeviceMesh, parameter_dtype: torch.dtype | None
) -> None:
    """Shard a model in place over a mesh of one axis; its parameters become `DTensor`s."""
    # The model casts its hidden states itself; cast inputs would include the rotations, which bf16
    # rounds to 8 bits.
    policy = (
        MixedPrecisionPolicy()
        if parameter_dtype is None
        else MixedPrecisionPolicy(
            param_dtype=parameter_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Embedding, final norm and head: needed from the start of the forward pass to its end, and then
    # for the backward pass, which a frozen model does not have.
    trains = any(parameter.requires_grad for parameter in model.parameters())
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=not trains)
    for method in ("target_sums", "target_log_probs", "with_head"):
        register_fsdp_forward_method(model, method)


def _set_sync(model: MLAForCausalLM, sync: bool) -> None:
    sharded = cast(FSDPModule, model)
    sharded.set_requires_gradient_sync(sync)
    sharded.set_is_last_backward(sync)
