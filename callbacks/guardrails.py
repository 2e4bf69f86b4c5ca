"""Bad steps are skipped, named, and after a few in a row undone.

A step is bad if its loss or gradient norm is not finite, or lies far above the running median of
the good steps before it. Far is a robust z-score, (x - median) / max(1.4826 MAD, 0.1 median), so
that one outlier does not hide the next and a flat loss does not make every ripple an outlier. Ranks
decide together: what they compare is reduced over all of them first.

A bad step drops its gradients before the optimizer sees them: weights and optimizer state stay as
they were, while the step count, the schedule and the data position move on. After `max_in_a_row`
bad steps the weights and the optimizer state return to the newest checkpoint saved before the first
of them, and training goes on with the data after the last of them.

Each bad step is a line of `guardrails.jsonl` with the batches of every rank. Looking at the values
costs one wait for the GPU a step.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ic.callbacks.options import GuardrailsOptions
from ic.checkpoint.finite import first_not_finite
from ic.checkpoint.sharded_checkpoint import ShardedCheckpointStrategy
from ic.datamodules.batch import Batch
from ic.errors import RunFailedError
from ic.files.json_lines import append_row, read_rows, write_rows
from ic.files.run_folder import RunFolder
from ic.training.continues_run import continues_run

# Standard deviations per median absolute deviation of a normal distribution.
_MAD_TO_STD = 1.4826
_LEAST_RELATIVE_SPREAD = 0.1


class TrainingDivergedError(RunFailedError):
    """Bad steps went on although the guardrails did what they could."""


class Guardrails(Callback):
    """Skips bad steps on all ranks alike; see the module's docstring.

    Attributes:
        num_rollbacks: of the run.
        num_bad_steps: since this process began to train.
        gradient_norm: of the newest step, over all ranks.

    Raises:
        TrainingDivergedError: a rollback is due, but no checkpoint is old enough or
            `max_rollbacks` is used up.
    """

    def __init__(self, config: GuardrailsOptions | None = None) -> None:
        self.config = config or GuardrailsOptions()
        self._losses: deque[float] = deque(maxlen=self.config.window_steps)
        self._norms: deque[float] = deque(maxlen=self.config.window_steps)
        self._context_length = 0
        self._micro_losses: list[Tensor] = []
        self._micro_batches: list[dict[str, Any]] = []
        self._bad_in_a_row = 0
        self._first_bad_step = 0
        self.num_rollbacks = 0
        self.num_bad_steps = 0
        self.gradient_norm: float | None = None
        self._rollback_due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the lines of steps that are taken again, or of a run that is begun anew."""
        file = RunFolder(trainer.default_root_dir).guardrails
        if not trainer.is_global_zero or not (rows := read_rows(file)):
            return
        first = trainer.global_step if continues_run(trainer) else 0
        write_rows(file, [row for row in rows if row["global_step"] < first])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        length = batch["input_ids"].shape[1]
        # The loss jumps where a curriculum goes on to longer texts. Other data mixes lengths, each
        # rank its own: windows that began anew with each of them would never fill, nor agree.
        has_curriculum = hasattr(trainer.datamodule, "set_context_length")  # type: ignore[attr-defined]
        if has_curriculum and length != self._context_length:
            self._context_length = length
            self._losses.clear()
            self._norms.clear()
        self._micro_batches.append(identity(batch))

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._micro_losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # Lightning has divided each micro-batch's loss by their number.
        own_loss = torch.stack(self._micro_losses).sum().float()
        batches, self._micro_batches, self._micro_losses = self._micro_batches, [], []
        norm = gradient_norm(pl_module)
        loss, norm_value, finite = _agree(own_loss, norm)
        self.gradient_norm = norm_value
        # With a GradScaler infinite gradients are part of its search for a scale, and its to skip.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        reason = self._judge(loss, norm_value, finite, scaled)
        if reason is None:
            self._bad_in_a_row = 0
            if math.isfinite(norm_value):
                self._losses.append(loss)
                self._norms.append(norm_value)
            return
        if not self._bad_in_a_row:
            self._first_bad_step = trainer.global_step
        self._bad_in_a_row += 1
        self.num_bad_steps += 1
        for parameter in pl_module.parameters():
            parameter.grad = None
        self._rollback_due = self._bad_in_a_row >= self.config.max_in_a_row
        self._record(trainer, reason, norm_value, float(own_loss), batches)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if self._rollback_due:
            self._rollback_due = False
            self._roll_back(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "context_length": self._context_length,
            "num_rollbacks": self.num_rollbacks,
            "bad_in_a_row": self._bad_in_a_row,
            "first_bad_step": self._first_bad_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses.extend(state_dict["losses"])
        self._norms.extend(state_dict["norms"])
        self._context_length = state_dict["context_length"]
        self.num_rollbacks = state_dict["num_rollbacks"]
        self._bad_in_a_row = state_dict["bad_in_a_row"]
        self._first_bad_step = state_dict["first_bad_step"]

    def _judge(self, loss: float, norm: float, finite: bool, scaled: bool) -> str | None:
        if not math.isfinite(loss):
            return "loss is not finite"
        if not finite and not scaled:
            return "gradient norm is not finite"
        for name, value, seen, threshold in (
            ("loss", loss, self._losses, self.config.loss_threshold),
            ("gradient norm", norm, self._norms, self.config.grad_norm_threshold),
        ):
            if threshold is None or len(seen) < self.config.min_steps or not math.isfinite(value):
                continue
            score = robust_z_score(value, list(seen))
            if score > threshold:
                return f"{name} {value:.4g} has z-score {score:.1f} (limit {threshold:g})"
        return None

    def _record(
        self,
        trainer: Trainer,
        reason: str,
        norm: float,
        own_loss: float,
        batches: list[dict[str, Any]],
    ) -> None:
        own = {"rank": trainer.global_rank, "loss": _json_number(own_loss), "batches": batches}
        ranks: list[Any] = [own]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            dist.all_gather_object(ranks, own)
        # Every rank must call this: the text data gathers its position over the ranks.
        position = trainer.datamodule.state_dict()  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            return
        line = {
            "global_step": trainer.global_step,
            "reason": reason,
            "in_a_row": self._bad_in_a_row,
            "grad_norm": _json_number(norm),
            "ranks": ranks,
            "data_position_after": position,
        }
        append_row(RunFolder(trainer.default_root_dir).guardrails, line)
        rank_zero_warn(
            f"step {trainer.global_step} skipped: {reason}; batches of the ranks: "
            + "; ".join(f"rank {r['rank']}: {r['batches']}" for r in ranks)
        )

    def _roll_back(self, trainer: Trainer) -> None:
        """Weights and optimizer state of the newest checkpoint before the bad steps."""
        strategy = trainer.strategy
        if isinstance(strategy, ShardedCheckpointStrategy):
            strategy.settle(wait_for_it=True)  # the newest may still be on its way to the disk
        run = RunFolder(trainer.default_root_dir)
        good = [step for step in run.saved_steps() if step <= self._first_bad_step]
        good = strategy.broadcast(good)
        what = f"{self._bad_in_a_row} bad steps in a row from step {self._first_bad_step}"
        where = f"see {run.guardrails}"
        if not good:
            raise TrainingDivergedError(
                f"{what}, and no checkpoint is older: save more often "
                f"(callbacks.checkpoint.every_n_steps); {where}"
            )
        if self.num_rollbacks >= self.config.max_rollbacks:
            raise TrainingDivergedError(
                f"{what} after {self.num_rollbacks} rollbacks (callbacks.guardrails."
                f"max_rollbacks): lower optimizer.lr or mend the data; {where}"
            )
        rates = [[group["lr"] for group in each.param_groups] for each in trainer.optimizers]
        checkpoint = strategy.load_checkpoint(run.checkpoint(good[-1]), weights_only=True)
        # Sharded strategies have loaded in place; to them these two are nothing.
        strategy.load_model_state_dict(checkpoint, strict=True)
        strategy.load_optimizer_state_dict(checkpoint)
        # The schedule does not go back: the checkpoint's rates would hold for one step.
        for optimizer, now in zip(trainer.optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, now, strict=True):
                group["lr"] = rate
        self.num_rollbacks += 1
        self._bad_in_a_row = 0
        rank_zero_warn(f"{what}: weights and optimizer state are again those of step {good[-1]}")
        strategy.barrier("rollback")


def first_bad_weight(trainer: Trainer) -> str | None:
    """Name of a weight that is NaN or infinite, on any rank; None if there is none.

    Every rank must call.
    """
    name = first_not_finite(dict(trainer.lightning_module.named_parameters()))
    # A rank sees its own part of what is sharded.
    if trainer.strategy.reduce_boolean_decision(name is None):
        return None
    return name or "a part of another rank"


def identity(batch: Batch) -> dict[str, Any]:
    """What names a batch: its step and everything else in it that is not a tensor."""
    return {name: value for name, value in batch.items() if not isinstance(value, Tensor)}


def gradient_norm(module: torch.nn.Module) -> Tensor:
    """Euclidean norm of all gradients, of all shards if they are sharded; a float32 scalar."""
    norm = get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()


def robust_z_score(value: float, seen: list[float]) -> float:
    """(value - median) / max(1.4826 MAD, 0.1 |median|); infinite if the spread is zero."""
    median = statistics.median(seen)
    deviation = statistics.median(abs(x - median) for x in seen)
    spread = max(_MAD_TO_STD * deviation, _LEAST_RELATIVE_SPREAD * abs(median))
    if spread == 0:
        return math.inf if value > median else 0.0
    return (value - median) / spread


def _agree(loss: Tensor, norm: Tensor) -> tuple[float, float, bool]:
    """Mean loss and norm over the ranks, and whether every rank's norm is finite."""
    values = torch.stack([loss, norm, (~norm.isfinite()).float()])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    mean_loss, mean_norm, bad_share = values.tolist()
    return mean_loss, mean_norm, bad_share == 0


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
