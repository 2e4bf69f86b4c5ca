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
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from ic.datamodules.preference import PreferenceDataModule, TokenizedPair
from ic.evaluation.passkey import fingerprint_state
from ic.model import MLAForCausalLM
from ic.model.adapter import adapter_disabled, has_adapter, split_adapter
from ic.model.loss import IGNORE_INDEX, selective_log_probs, shift_labels
from ic.training.language_modeling import LanguageModelingModule, ObjectiveConfig
from ic.training.optimizers import OptimizerConfig
from ic.training.preference_loss import (
    PairLogProbs,
    PreferenceConfig,
    preference_loss,
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
    from a frozen model in memory.

    Logs `train/loss` and the metrics of `preference_metrics` under `train/`, over whole sets under
    `val/` and `test/`, each also for the pairs up to each length of `length_buckets`.

    Raises:
        ValueError: at the start of `fit`, if the cache belongs to another reference.
    """

    def __init__(
        self,
        model: MLAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: OptimizerConfig,
        preference: PreferenceConfig,
    ) -> None:
        super().__init__(model, tokenizer, optimizer, ObjectiveConfig())
        self.preference = preference
        self.cache: ReferenceCache | None = None
        self._identity: dict[str, str] = {}
        self.reference: MLAForCausalLM | None = None
        if not preference.precompute_ref_log_probs and not has_adapter(model):
            self.reference = copy.deepcopy(model).requires_grad_(False).eval()
            # It is built anew from `model.init_from`; checkpoints do not repeat it.
            self.strict_loading = False
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
        return Path(chosen) if chosen else Path(self.trainer.default_root_dir) / "reference.jsonl"

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        pairs = self._pair_log_probs(batch)
        loss = preference_loss(pairs, self.preference)
        metrics = preference_metrics(pairs, self.preference.beta)
        log = {f"train/{name}": value.mean() for name, value in metrics.items()}
        for label, inside in bucket_masks(
            batch["pair_tokens"], self.preference.length_buckets
        ).items():
            if inside.any():
                log |= {f"train/{name}/{label}": v[inside].mean() for name, v in metrics.items()}
        size = len(batch["pair_keys"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log("train/context_length", float(batch["input_ids"].shape[1]), batch_size=size)
        self.log_dict(log, batch_size=size)
        return loss

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """One row a pair: where it comes from, its metrics."""
        metrics = preference_metrics(self._pair_log_probs(batch), self.preference.beta)
        return [
            {"row": where, **{name: float(value[i]) for name, value in metrics.items()}}
            for i, where in enumerate(batch["pair_rows"])
        ]

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        pairs = self._pair_log_probs(batch)
        size = len(batch["pair_keys"])
        metrics = preference_metrics(pairs, self.preference.beta)
        metrics["loss"] = preference_loss(pairs, self.preference).expand(size)
        means: BucketMeans = self.eval_metrics[stage]  # type: ignore[assignment]
        means.update(metrics, batch["pair_tokens"])

    def _log_means(self, stage: str) -> None:
        means: BucketMeans = self.eval_metrics[stage]  # type: ignore[assignment]
        for name, value in means.compute().items():
            shown = name in ("loss", "rewards/accuracies")
            self.log(f"{stage}/{name}", value, prog_bar=shown, rank_zero_only=False)
        means.reset()

    def _pair_log_probs(self, batch: dict[str, Any]) -> PairLogProbs:
        policy_3S = completion_sums(self.model, batch)
        return PairLogProbs.from_sums(
            policy_3S, self._reference_sums(batch, policy_3S), self.preference.ld_alpha
        )

    @torch.no_grad()
    def _reference_sums(self, batch: dict[str, Any], like: Tensor) -> Tensor:
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
    def _reference_forward(self, batch: dict[str, Any]) -> Tensor:
        model = self.model if self.reference is None else self.reference
        was_training = model.training
        with adapter_disabled(model) if has_adapter(model) else nullcontext():
            sums = completion_sums(model.eval(), batch)
        model.train(was_training)
        return sums

    def _precompute(self, pairs: Sequence[TokenizedPair]) -> None:
        """Append a row for each pair, a share of them on each rank."""
        assert self.cache is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        mine = list(pairs[rank::world])
        # Under sharding every rank takes part in every forward pass: the same number each.
        rounds = -(-len(pairs) // world)
        columns = (TextColumn("reference"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console()
        quiet = rank > 0 or not console.is_terminal
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
                if index < len(mine):
                    row = {"row": pair.where, "chosen": sums[0], "rejected": sums[1]}
                    self.cache.append(pair.key, row, rank)

    @property
    def _datamodule(self) -> PreferenceDataModule:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(datamodule, PreferenceDataModule):
            raise ValueError(
                f"preference training needs data=preference, not {type(datamodule).__name__}"
            )
        return datamodule


def completion_sums(model: MLAForCausalLM, batch: dict[str, Any]) -> Tensor:
    """`sum_per_sequence` of a batch of `PreferenceDataModule`: (3, S) float32.

    Only the hidden states before completion tokens meet the head.
    """
    hidden_STD = model.model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    labels_ST = shift_labels(batch["labels"])
    is_target_ST = labels_ST != IGNORE_INDEX
    sequence_M, token_M = is_target_ST.nonzero(as_tuple=True)
    log_probs_M = selective_log_probs(
        hidden_STD[sequence_M, token_M], model.lm_head.weight, labels_ST[sequence_M, token_M]
    )
    # The number of completion tokens up to each; label i + 1 is the target of token i.
    index_M = batch["completion_index"][sequence_M, token_M + 1]
    shared_S = torch.minimum(*batch["completion_tokens"].chunk(2)).repeat(2)
    return sum_per_sequence(log_probs_M, sequence_M, index_M > shared_S[sequence_M], len(labels_ST))


def bucket_masks(tokens_B: Tensor, edges: Sequence[int]) -> dict[str, Tensor]:
    """Which pairs (B,) bool lie in a length bucket: `to_<edge>` inclusive, then `above_<last>`."""
    masks, low = {}, 0
    for edge in edges:
        masks[f"to_{edge}"] = (tokens_B > low) & (tokens_B <= edge)
        low = edge
    if edges:
        masks[f"above_{low}"] = tokens_B > low
    return masks


class BucketMeans(Metric):
    """Means over pairs of any number of named values, of all pairs and by length bucket.

    The names are those of `preference_metrics` and `loss`; a bucket without a pair has no mean.
    """

    NAMES = (
        "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "logps/chosen", "logps/rejected", "kl/chosen", "kl/rejected",
    )  # fmt: skip

    def __init__(self, edges: Sequence[int]) -> None:
        super().__init__()
        self.edges = list(edges)
        self.labels = ["", *(f"/{label}" for label in bucket_masks(torch.zeros(0), edges))]
        shape = (len(self.labels), len(self.NAMES))
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(shape[0]), dist_reduce_fx="sum")
        self.sums: Tensor
        self.counts: Tensor

    def update(self, values: dict[str, Tensor], tokens_B: Tensor) -> None:
        """Add pairs: each of `NAMES` (B,), and their lengths (B,)."""
        stacked_BN = torch.stack([values[name].detach().double() for name in self.NAMES], dim=1)
        masks = bucket_masks(tokens_B, self.edges)
        inside_KB = torch.stack([torch.ones_like(tokens_B, dtype=torch.bool), *masks.values()])
        self.sums += inside_KB.double() @ stacked_BN
        self.counts += inside_KB.sum(1)

    def compute(self) -> dict[str, Tensor]:
        """`name` and `name/bucket` -> mean."""
        return {
            name + label: (self.sums[k, n] / self.counts[k]).float()
            for k, label in enumerate(self.labels)
            if self.counts[k] > 0
            for n, name in enumerate(self.NAMES)
        }


def _config_hash(config: dict[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key not in _NEUTRAL}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
