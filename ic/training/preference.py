"""LightningModule for preference optimization (DPO and its relatives) at long context.

Legend: B pairs, S = 2B sequences (the chosen ones first), T tokens, M completion tokens.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ic.datamodules.batch import Batch
from ic.datamodules.preference import PreferenceDataModule, TokenizedPair
from ic.files.run_folder import RunFolder
from ic.model import MLAForCausalLM
from ic.model.adapter import adapter_disabled, has_adapter, split_adapter
from ic.model.fingerprint import fingerprint_state
from ic.parallel.replica import data_replica, sharing_ranks
from ic.training.language_modeling import LanguageModelingModule
from ic.training.metrics import BucketMeans
from ic.training.options import ObjectiveOptions, OptimizerOptions, PreferenceOptions
from ic.training.preference_loss import (
    PairLogProbs,
    preference_losses,
    preference_metrics,
    sum_per_sequence,
)
from ic.training.reference_cache import ReferenceCache

# What of the model's configuration does not change its log-probabilities.
_NEUTRAL = (
    "attention_backend",
    "norm_backend",
    "rope_backend",
    "transformers_version",
    "dtype",
    "architectures",
    "use_cache",
)


class PreferenceModule(LanguageModelingModule):
    """Trains `MLAForCausalLM` on the batches of `PreferenceDataModule`.

    The reference is the model as it was built (`model.init_from`), or with LoRA the model without
    its adapter. Its log-probabilities come from a file that is written before the first step, or
    from a frozen model in memory. The loss is the mean over the micro-batches and data-parallel
    replicas of an optimizer step.

    Logs `loss` and the metrics of `preference_metrics`: means over the pairs of an optimizer step
    under `train/`, over whole sets under `val/` and `test/`, each also for the pairs up to each
    length of `length_buckets`.

    Raises:
        ValueError: at the start of `fit`, if the cache belongs to another reference.
    """

    def __init__(
        self,
        model: MLAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: OptimizerOptions,
        preference: PreferenceOptions,
    ) -> None:
        super().__init__(model, tokenizer, optimizer, ObjectiveOptions())
        self.preference = preference
        self.cache: ReferenceCache | None = None
        self._identity: dict[str, str] = {}
        self.reference: MLAForCausalLM | None = None
        if not preference.precompute_ref_log_probs and not has_adapter(model):
            self.reference = copy.deepcopy(model).requires_grad_(False).eval()
            # It is built anew from `model.init_from`; checkpoints do not repeat it.
            self.strict_loading = False
        self.train_means = BucketMeans(preference.length_buckets)
        self.eval_metrics = torch.nn.ModuleDict(
            {stage: BucketMeans(preference.length_buckets) for stage in ("val", "test")}
        )

    def setup(self, stage: str) -> None:
        # Here the weights are those that the run begins with; a checkpoint is restored later.
        if stage == "fit" and self.preference.precompute_ref_log_probs:
            base, _ = split_adapter(self.model.state_dict())
            self._identity = {
                "weights": fingerprint_state(base),
                "config": _config_hash(self.model.config.to_dict()),
                "precision": str(self.trainer.precision),
            }
        elif stage != "fit" and not self.preference.precompute_ref_log_probs:
            raise ValueError(
                f"{stage} compares with the reference that fit wrote to disk: it needs "
                "preference.precompute_ref_log_probs=true"
            )

    def on_fit_start(self) -> None:
        if not self.preference.precompute_ref_log_probs:
            return
        pairs = self._datamodule.all_pairs()
        self.cache = ReferenceCache(self.cache_path, self._identity)
        self.trainer.strategy.barrier("reference cache read")
        missing = self.cache.missing(pair.key for pair in pairs)
        if not missing:
            return
        if self.trainer.ckpt_path is not None and not has_adapter(self.model):
            where = next(pair.where for pair in pairs if pair.key == missing[0])
            raise ValueError(
                f"{self.cache_path} lacks {len(missing)} pairs, the first is {where}, and a "
                "resumed run no longer has the reference's weights. Resume with the data that the "
                "run began with, or begin a new run with model.init_from"
            )
        by_key = {pair.key: pair for pair in reversed(pairs)}  # of equal pairs the first
        self._precompute([by_key[key] for key in missing])
        strategy = self.trainer.strategy
        self.cache.gather(
            (pair.key for pair in pairs), self.trainer.is_global_zero, strategy.barrier
        )
        rank_zero_info(f"reference log-probabilities: {self.cache_path}")

    @property
    def cache_path(self) -> Path:
        """The reference cache's file."""
        chosen = self.preference.reference_cache
        return Path(chosen) if chosen else RunFolder(self.trainer.default_root_dir).reference

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        pairs = self._pair_log_probs(batch)
        losses = preference_losses(pairs, self.preference)
        self._add(self.train_means, pairs, losses, batch)
        if self.ends_step(batch_idx):
            self._log_means("train", self.train_means)
            self.log("train/context_length", batch["pair_tokens"].max().float(), batch_size=1)
        return losses.mean()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One row a pair: where it comes from, its metrics."""
        metrics = preference_metrics(self._pair_log_probs(batch), self.preference.beta)
        return [
            {"row": where, **{name: float(value[i]) for name, value in metrics.items()}}
            for i, where in enumerate(batch["pair_rows"][: batch["pairs_counted"]])
        ]

    def on_validation_epoch_end(self) -> None:
        self._log_means("val", self.eval_metrics["val"])

    def on_test_epoch_end(self) -> None:
        self._log_means("test", self.eval_metrics["test"])

    def _evaluate(self, batch: Batch, stage: str) -> None:
        pairs = self._pair_log_probs(batch)
        self._add(self.eval_metrics[stage], pairs, preference_losses(pairs, self.preference), batch)

    def _add(self, means: Any, pairs: PairLogProbs, losses_B: Tensor, batch: Batch) -> None:
        metrics = {"loss": losses_B, **preference_metrics(pairs, self.preference.beta)}
        counted = slice(batch["pairs_counted"])
        means.update(
            {name: value[counted] for name, value in metrics.items()}, batch["pair_tokens"][counted]
        )

    def _log_means(self, stage: str, means: Any) -> None:
        """Log and begin anew; every rank must call."""
        for name, value in means.compute().items():
            shown = name == "loss" or (stage != "train" and name == "rewards/accuracies")
            # `compute` has reduced over the ranks: to do it again changes nothing, but Lightning
            # asks for it where it would take a mean over an epoch.
            self.log(
                f"{stage}/{name}", value, prog_bar=shown, batch_size=1, sync_dist=stage != "train"
            )
        means.reset()

    def _pair_log_probs(self, batch: Batch) -> PairLogProbs:
        policy_3S = completion_sums(self.model, batch)
        return PairLogProbs.from_sums(
            policy_3S, self._reference_sums(batch, policy_3S), self.preference.ld_alpha
        )

    @torch.no_grad()
    def _reference_sums(self, batch: Batch, like: Tensor) -> Tensor:
        if not self.preference.precompute_ref_log_probs:
            return self._reference_forward(batch)[:2]
        if self.cache is None:  # validate, test, predict: whatever reference fit began with
            self.cache = ReferenceCache(self.cache_path, None)
        rows = []
        for key, where in zip(batch["pair_keys"], batch["pair_rows"], strict=True):
            if key not in self.cache.rows:
                raise ValueError(
                    f"{where}: {self.cache.path} holds no log-probabilities of this pair; run fit "
                    "with this data first, or give its file as preference.reference_cache"
                )
            rows.append(self.cache.rows[key])
        sums = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        return torch.tensor(sums, dtype=like.dtype, device=like.device).T

    @torch.no_grad()
    def _reference_forward(self, batch: Batch) -> Tensor:
        model = self.model if self.reference is None else self.reference
        was_training = model.training
        with adapter_disabled(model) if has_adapter(model) else nullcontext():
            sums = completion_sums(model.eval(), batch)
        model.train(was_training)
        return sums

    def _precompute(self, pairs: Sequence[TokenizedPair]) -> None:
        """Append a row for each pair, a share of them on each data-parallel replica."""
        assert self.cache is not None
        replica, num_replicas = data_replica(self.trainer)
        place, _ = sharing_ranks(self.trainer)
        mine = list(pairs[replica::num_replicas])
        # Under sharding every rank takes part in every forward pass: the same number each.
        rounds = -(-len(pairs) // num_replicas)
        columns = (TextColumn("reference"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console()
        quiet = not self.trainer.is_global_zero or not console.is_terminal
        with (
            Progress(*columns, console=console, disable=quiet) as bar,
            self.trainer.precision_plugin.forward_context(),
        ):
            for index in bar.track(range(rounds)):
                # One pair at a time: its sums then do not depend on which others were left to do.
                pair = mine[index] if index < len(mine) else pairs[0]
                batch = self._datamodule.collate([pair])
                batch = self.trainer.strategy.batch_to_device(batch)
                sums = self._reference_forward(batch)[:2].T.tolist()
                if index < len(mine) and place == 0:
                    row = {"row": pair.where, "chosen": sums[0], "rejected": sums[1]}
                    self.cache.append(pair.key, row, replica)

    @property
    def _datamodule(self) -> PreferenceDataModule:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(datamodule, PreferenceDataModule):
            raise ValueError(
                f"preference training needs data=preference, not {type(datamodule).__name__}"
            )
        return datamodule


def completion_sums(model: MLAForCausalLM, batch: Batch) -> Tensor:
    """`sum_per_sequence` of a batch of `PreferenceDataModule`: (3, S) float32.

    Under context parallelism of whole sequences, on every rank that shares them.
    """
    targets = model.target_log_probs(
        batch["input_ids"], batch["labels"], batch["position_ids"], batch["branches"]
    )
    # The number of completion tokens up to each, and the sequence that each belongs to.
    index_M = batch["completion_index"][targets.row, targets.position]
    sequence_M = batch["completion_sequence"][targets.row, targets.position]
    shared_S = torch.minimum(*batch["completion_tokens"].chunk(2)).repeat(2)
    is_tail_M = index_M > shared_S[sequence_M]
    sums_3S = sum_per_sequence(targets.log_probs, sequence_M, is_tail_M, len(shared_S))
    parallel = model.model.context_parallel
    return sums_3S if parallel is None else parallel.sum(sums_3S)


def _config_hash(config: dict[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key not in _NEUTRAL}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
