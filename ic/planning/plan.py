"""Memory by part and tokens a second of a run on GPUs that are not here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ic.datamodules.options import PreferenceDataOptions
from ic.datamodules.tokenizers import build_tokenizer, vocabulary_size
from ic.display.numbers import gib
from ic.machine.gpus import GPUS
from ic.model.config import MLAConfig
from ic.model.cost import cache_bytes_per_token, forward_flops_per_token, train_flops_per_token
from ic.planning.measurements import RECOMPUTED, Measurements
from ic.planning.options import PlanConfig
from ic.planning.simulate import FakeRun, Peak

# A context that fits is rounded down to this.
_ROUND_TOKENS = 1024


@dataclass(frozen=True)
class Layout:
    """How the run is spread: `num_gpus` = replicas x `context_parallel`."""

    num_gpus: int
    strategy: str
    context_parallel: int

    @property
    def shards(self) -> int:
        """Ranks that parameters, gradients and optimizer state are spread over."""
        return 1 if self.strategy == "ddp" else self.num_gpus


class Planner:
    """Predictions for one configuration.

    Args:
        config: the run, and the machine to plan it for.
        measurements: what earlier runs took and reached; those of the package if not given.

    Raises:
        ValueError: a layout that does not divide, or a precision that plan does not know.
    """

    def __init__(self, config: PlanConfig, measurements: Measurements | None = None) -> None:
        self.config = config
        self.measurements = measurements or Measurements.packaged()
        tokenizer = build_tokenizer(config.tokenizer)
        self.model_config: MLAConfig = config.model.mla_config(vocabulary_size(tokenizer))
        self.gpu = GPUS[config.plan.gpu]
        self.layout = _layout(config)
        self.overhead = self.measurements.overhead()
        self.fake = FakeRun(config, self.model_config, liger=config.plan.liger)

    @cached_property
    def memory_bytes(self) -> int:
        """The GPU's memory: as a driver showed it, or the datasheet's."""
        return self.measurements.memory_bytes(self.gpu.device_name) or self.gpu.memory_bytes

    def batch_shape(self) -> tuple[int, int]:
        """Rows and tokens of one micro-batch and replica at full length."""
        data = self.config.data
        if isinstance(data, PreferenceDataOptions) and data.share_prompt:
            # A pair is a row, as long as one sequence if the prompt fills it.
            return data.rows_per_batch, data.context_length
        return max(1, data.tokens_per_batch // data.context_length), data.context_length

    def training(
        self,
        rows: int,
        tokens: int,
        layout: Layout | None = None,
        checkpointing: bool | None = None,
    ) -> Peak:
        """Peak of a training step on one GPU of the layout."""
        layout = layout or self.layout
        shared = layout.context_parallel
        tokens = -(-tokens // (2 * shared)) * 2 * shared  # as rows are padded
        peak = self.fake.training_step(
            rows,
            tokens,
            checkpointing=checkpointing,
            shards=layout.shards,
            context_parallel_size=shared,
        )
        return self._with_exchange(peak, layout)

    def evaluation(self) -> Peak | None:
        """Peak of the passkey evaluation within training, or None without one. It runs on one GPU
        with the whole cache."""
        if self.config.callbacks.passkey is None:
            return None
        grid = self.config.evaluation
        rows, tokens = max(
            ((max(1, grid.tokens_per_batch // n), n) for n in grid.lengths),
            key=lambda shape: (shape[0] * shape[1], shape[1]),
        )
        shards = self.layout.shards
        peak = self.fake.prefill(rows, tokens, grid.prefill_chunk_tokens, shards=shards)
        return self._with_exchange(peak, self.layout)

    def needed_bytes(self, peak: Peak) -> int:
        """What the GPU must have for a peak: tensors, the allocator's slack and the context."""
        return int(peak.total_bytes * (1 + self.overhead.slack_share) + self.overhead.context_bytes)

    def largest_context(self) -> int:
        """Longest training sequence that fits, one a batch; memory is affine in its length."""
        _, tokens = self.batch_shape()
        some = max(tokens // _ROUND_TOKENS, 4) * _ROUND_TOKENS
        low = self.needed_bytes(self.training(1, some // 2))
        slope = (self.needed_bytes(self.training(1, some)) - low) / (some - some // 2)
        longest = int(some // 2 + (self.memory_bytes - low) / slope)
        longest = min(longest, self.model_config.max_position_embeddings)
        return max(0, longest // _ROUND_TOKENS * _ROUND_TOKENS)

    def speed(self) -> dict[str, Any]:
        """Tokens a second of the training run, and of decoding one sequence as memory allows."""
        _, tokens = self.batch_shape()
        used = self.measurements.utilisation(self.config.model, tokens)
        weights = self.fake.model.num_parameters() * 2
        cache = cache_bytes_per_token(self.model_config) * tokens
        forward = forward_flops_per_token(self.model_config, tokens)
        report: dict[str, Any] = {
            "train_flops_per_token": train_flops_per_token(self.model_config, tokens),
            "attention_share_of_flops": 1 - forward_flops_per_token(self.model_config, 0) / forward,
            "peak_bf16_flops_per_gpu": self.gpu.peak_bf16_flops,
            "decode_tokens_per_s_at_most": self.gpu.bandwidth_bytes_per_s / (weights + cache),
            "tokens_per_s": None,
        }
        if used is None:
            return report | {"utilisation": None, "utilisation_source": "no run of this model yet"}
        recomputed = RECOMPUTED if self.config.model.gradient_checkpointing else 1.0
        per_gpu = used.share * self.gpu.peak_bf16_flops / recomputed
        return report | {
            "tokens_per_s": self.layout.num_gpus * per_gpu / report["train_flops_per_token"],
            "mfu": used.share / recomputed,
            "utilisation": used.share,
            "utilisation_source": used.source,
        }

    def advice(self, needed: int, evaluation: Peak | None) -> list[str]:
        """Settings that make the run fit, best first, or that it could do without."""
        rows, tokens = self.batch_shape()
        if evaluation and self.needed_bytes(evaluation) > self.memory_bytes:
            return [
                "the evaluation does not fit: lower evaluation.prefill_chunk_tokens="
                f"{self.config.evaluation.prefill_chunk_tokens}, or shorten evaluation.lengths"
            ]
        checkpointing = self.config.model.gradient_checkpointing
        if needed <= self.memory_bytes:
            if not checkpointing:
                return []
            without = self.needed_bytes(self.training(rows, tokens, checkpointing=False))
            if without > self.memory_bytes:
                return []
            return [f"model.gradient_checkpointing=false fits too ({gib(without)}) and is faster"]
        tried: list[tuple[str, Peak]] = []
        if rows > 1:
            tried.append((f"data.tokens_per_batch={tokens}", self.training(1, tokens)))
        if not checkpointing:
            peak = self.training(rows, tokens, checkpointing=True)
            tried.append(("model.gradient_checkpointing=true", peak))
        lines = self._fitting(tried)
        if not lines:
            tried = [
                (
                    f"model.gradient_checkpointing=true plan.strategy={layout.strategy} "
                    f"plan.num_gpus={layout.num_gpus} "
                    f"plan.context_parallel_size={layout.context_parallel}",
                    self.training(rows, tokens, layout, True),
                )
                for layout in _wider(self.layout)
            ]
            lines = self._fitting(tried)[:2]
        return [*lines, f"data.context_length={self.largest_context()} is the longest that fits"]

    def _fitting(self, tried: list[tuple[str, Peak]]) -> list[str]:
        needed = [(name, self.needed_bytes(peak)) for name, peak in tried]
        return [f"{name}: {gib(size)}" for name, size in needed if size <= self.memory_bytes]

    def report(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        rows, tokens = self.batch_shape()
        training, evaluation = self.training(rows, tokens), self.evaluation()
        needed = max(self.needed_bytes(p) for p in (training, evaluation) if p is not None)
        return {
            "experiment": self.config.name,
            "gpu": self.gpu.device_name,
            "gpu_memory_bytes": self.memory_bytes,
            "num_gpus": self.layout.num_gpus,
            "strategy": self.layout.strategy,
            "context_parallel_size": self.layout.context_parallel,
            "rows": rows,
            "context_length_tokens": tokens,
            "training_peak_bytes": training.total_bytes,
            "training_parts_bytes": training.parts_bytes,
            "evaluation_peak_bytes": evaluation.total_bytes if evaluation else None,
            "evaluation_parts_bytes": evaluation.parts_bytes if evaluation else None,
            "context_bytes": self.overhead.context_bytes,
            "allocator_slack_share": self.overhead.slack_share,
            "overhead_source": self.overhead.source,
            "needed_bytes": needed,
            "fits": needed <= self.memory_bytes,
            "largest_context_tokens": self.largest_context(),
            "advice": self.advice(needed, evaluation),
            **self.speed(),
        }

    def _with_exchange(self, peak: Peak, layout: Layout) -> Peak:
        """The peak, a frozen reference, and what a rank holds to exchange gradients or parameters
        with the others.
        """
        parts, model = dict(peak.parts_bytes), self.fake.model
        preference = self.config.preference
        if preference is not None and not preference.precompute_ref_log_probs:
            # A second model, as it is before its first step (`PreferenceModule`).
            parts["reference"] = -(-self.fake.parameter_bytes() // layout.shards)
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        if layout.strategy == "ddp" and layout.num_gpus > 1:
            # The reducer's buckets hold a second copy of the gradients.
            parts["communication"] = self.fake.parameter_bytes()
        elif layout.strategy != "ddp":
            # Two layers are whole at a time, this and the next: bf16 weights, fp32 gradients.
            root = model.num_parameters() - self.model_config.num_hidden_layers * layer
            parts["weight_copies"] = 2 * (2 * layer + root)
            parts["communication"] = 4 * 2 * layer
        return Peak(sum(parts.values()), parts)


def _layout(config: PlanConfig) -> Layout:
    asked, trainer = config.plan, config.trainer
    devices = trainer.devices if isinstance(trainer.devices, int) else 1
    num_gpus = asked.num_gpus or max(1, devices) * trainer.num_nodes
    own = "ddp" if config.strategy.name == "auto" else config.strategy.name
    shared = asked.context_parallel_size or config.strategy.context_parallel_size
    if num_gpus % shared:
        raise ValueError(
            f"plan.num_gpus={num_gpus}: must be a multiple of the context parallel size {shared}"
        )
    return Layout(num_gpus, asked.strategy or own, shared)


def _wider(layout: Layout) -> list[Layout]:
    """FSDP and context parallelism over the same GPUs, or over twice as many up to eight."""
    found = []
    for num_gpus in sorted({layout.num_gpus, 2, 4, 8}):
        if num_gpus >= max(2, layout.num_gpus):
            found.append(Layout(num_gpus, "fsdp2", 1))
            found.append(Layout(num_gpus, "fsdp2", num_gpus))
    return found
