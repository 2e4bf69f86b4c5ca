"""Sharded checkpoints of a model that is spread over several ranks.

    step=100/
        config.json, tokenizer files, adapter/          as in `ic.checkpoint.folder`
        .metadata, __R_0.distcp, __R_0.distcp.sha256    weights and optimizer state, by name
        trainer.pt                                      schedule, loops, callbacks, data position,
                                                        random states, optimizer settings

Every rank copies its shards to host memory and goes on training; a thread of its own writes them.
When all ranks have written, rank 0 renames the folder. Names do not depend on how the tensors were
spread, so a checkpoint of four ranks loads on two, or in one process without a process group.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ic.checkpoint.checksums import check_intact
from ic.checkpoint.commit import partial_path
from ic.checkpoint.errors import CheckpointError, not_finite_error, save_error
from ic.checkpoint.finite import first_not_finite
from ic.checkpoint.folder import (
    MODULE_PREFIX,
    TRAINER_STATE,
    FolderCheckpointIO,
    read_trainer_state,
)
from ic.checkpoint.storage import (
    OPTIMIZER,
    ShardReader,
    ShardWriter,
    first_failure,
    is_sharded,
    load_into,
    tensor_metadata,
)
from ic.model.adapter import split_adapter


@dataclass
class _Pending:
    """A save whose files are being written."""

    future: Future[Any]
    partial: Path
    target: Path


class ShardedCheckpointStrategy(ParallelStrategy):
    """Saves and loads the checkpoints above; to be mixed into a strategy that shards.

    It comes first among the bases: `class S(ShardedCheckpointStrategy, ModelParallelStrategy)`.
    The trainer needs a `FolderCheckpointIO` plugin, which knows configuration and tokenizer.
    `save_checkpoint` returns once the state is copied; `settle` tells when it is on disk.
    """

    _pending: _Pending | None = None
    _io_group: dist.ProcessGroup | None = None
    _vote_group: dist.ProcessGroup | None = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The tensors to load into exist only once the model is sharded."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """`load_checkpoint` does it."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """State and settings by parameter name, on the device and sharded as they train."""
        assert self.model is not None
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return get_optimizer_state_dict(self.model, plain)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Copy this rank's state and start writing it; every rank must call.

        Raises:
            CheckpointError: the save before this one failed.
        """
        assert storage_options is None
        self.settle(wait_for_it=True)
        target = Path(self.broadcast(str(filepath)))
        partial = Path(self.broadcast(str(partial_path(target))))
        folder_io = self._folder_io()
        folder_io.note_trained_length(checkpoint)
        base, adapter = split_adapter(folder_io.weights(checkpoint.pop("state_dict")))
        adapter = {name: _whole(tensor) for name, tensor in adapter.items()}
        state: dict[str, Any] = {"model": base}
        if "optimizer_states" in checkpoint:
            (optimizer,) = checkpoint.pop("optimizer_states")
            state["optimizer"] = _without_prefix(optimizer["state"])
            checkpoint["optimizer_groups"] = optimizer["param_groups"]
        rest = io.BytesIO()  # written out now: the trainer changes it while the shards are written
        if self.is_global_zero:
            torch.save(checkpoint, rest)

        def write_rest(folder: Path) -> None:
            (folder / TRAINER_STATE).write_bytes(rest.getbuffer())
            folder_io.save_description(folder, adapter)

        writer = ShardWriter(partial, target, write_rest)
        future = dcp.async_save(state, storage_writer=writer, process_group=self._groups()[0])
        assert isinstance(future, Future)
        self._pending = _Pending(future, partial, target)

    def settle(self, *, wait_for_it: bool) -> bool:
        """Whether no save is under way any more on any rank; every rank must call.

        Raises:
            CheckpointError: on every rank, if the save failed; its partial folder is removed.
        """
        if self._pending is None:
            return True
        if wait_for_it:
            wait([self._pending.future])
        else:
            done = torch.tensor(int(self._pending.future.done()))
            dist.all_reduce(done, dist.ReduceOp.MIN, group=self._groups()[1])
            if not done:
                return False
        pending, self._pending = self._pending, None
        error = pending.future.exception()
        if error is None:
            return True
        if self.is_global_zero:
            shutil.rmtree(pending.partial, ignore_errors=True)
        cause = first_failure(error, "write") if isinstance(error, CheckpointException) else error
        raise save_error(pending.target, cause) from error

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load weights and optimizer state in place, whatever world size wrote them.

        Checkpoints of one device (`FolderCheckpointIO`) are spread over the ranks.

        Raises:
            CheckpointError: missing, damaged, of another architecture or optimizer, or with
                weights that are NaN or infinite.
        """
        folder = Path(self.broadcast(str(checkpoint_path)))
        folder_io = self._folder_io()
        if not is_sharded(folder):
            return self._load_whole(folder_io.load_checkpoint(folder))
        check_intact(folder)
        folder_io.check_config(folder)
        rest = read_trainer_state(folder)
        assert self.model is not None
        adapter = folder_io.read_adapter(folder)
        base, _ = split_adapter(folder_io.weights(self.lightning_module_state_dict()))
        state: dict[str, Any] = {"model": base}
        optimizer_state: Any = None
        if self.optimizers:
            (optimizer,) = self.optimizers
            optimizer_state = self.optimizer_state(optimizer)
            state["optimizer"] = _without_prefix(optimizer_state["state"])
        reader = ShardReader(folder)
        if self.optimizers:
            _check_optimizer(state["optimizer"], reader)
        load_into(state, reader, self._groups()[0])
        name = first_not_finite({**base, **adapter})
        if not self.reduce_boolean_decision(name is None):  # a rank sees its own part
            raise not_finite_error(folder, name or "a part of another rank")
        if adapter:
            self._set_weights({MODULE_PREFIX + name: tensor for name, tensor in adapter.items()})
        if self.optimizers:
            optimizer_state["param_groups"] = rest["optimizer_groups"]
            set_optimizer_state_dict(self.model, optimizer, optimizer_state)
        return rest

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has loaded in place."""

    def _load_whole(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        assert self.model is not None
        self._set_weights(checkpoint.pop("state_dict"))
        if self.optimizers:
            (optimizer,) = self.optimizers
            groups = self.optimizer_state(optimizer)["param_groups"]
            (saved,) = checkpoint.pop("optimizer_states")
            by_name = name_parameters(saved, [name for g in groups for name in g["params"]])
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model, optimizer, by_name, options=options)
        return checkpoint

    def _set_weights(self, whole: dict[str, Any]) -> None:
        """Give each rank its part of tensors that every rank has whole; others stay as they are."""
        assert self.model is not None
        set_model_state_dict(self.model, whole, options=StateDictOptions(full_state_dict=True))

    def _folder_io(self) -> FolderCheckpointIO:
        assert isinstance(self.checkpoint_io, FolderCheckpointIO)
        return self.checkpoint_io

    def _groups(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        # Two, because the writing thread and the training loop may talk at the same time.
        if self._io_group is None or self._vote_group is None:
            self._io_group = dist.new_group(backend="gloo")
            self._vote_group = dist.new_group(backend="gloo")
        return self._io_group, self._vote_group


def name_parameters(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's `state_dict` with parameter names in place of their indices."""
    return {
        "state": {names[index]: entry for index, entry in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[index] for index in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor in host memory; collective if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def _check_optimizer(state: dict[str, dict[str, Tensor]], reader: ShardReader) -> None:
    found = tensor_metadata(reader, OPTIMIZER)
    for name, entry in state.items():
        for key in entry:
            if f"{name}.{key}" not in found:
                raise CheckpointError(
                    f"{reader.folder} holds no optimizer state {key!r} of {name}: resume with the "
                    "optimizer that it was trained with, or begin with its weights by "
                    "model.init_from="
                )


def _without_prefix(state: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    assert all(isinstance(t, Tensor) for entry in state.values() for t in entry.values())
    return {name.removeprefix(MODULE_PREFIX): dict(entry) for name, entry in state.items()}
