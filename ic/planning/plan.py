"""Memory by part and tokens a second of a run on GPUs that are not here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ic.datamodules.options import PreferenceDataOptions
from ic.datamodules.tokenizers import build_tokenizer, vocabulary_size
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.machine.gpus import GPUS
from ic.model.config import MLAConfig
from ic.model.cost import cache_bytes_per_token, forward_flops_per_token, train_flops_per_token
from ic.planning.measurements import RECOMPUTED, Measurements
from ic.planning.options import PlanConfig
from ic.planning.simulate import FakeRun, Peak


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
        tokenizer = build_tokenizer(config.tokenizer, config.chat_template)
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

    @property
    def least_rows(self) -> int:
        """Rows of the smallest micro-batch: a preference pair that repeats its prompt takes two."""
        data = self.config.data
        return 2 if isinstance(data, PreferenceDataOptions) and not data.share_prompt else 1

    def least_tokens_per_batch(self, tokens: int) -> int:
        """`data.tokens_per_batch` of the smallest micro-batch of this length."""
        return tokens * (2 if isinstance(self.config.data, PreferenceDataOptions) else 1)

    def evaluation(
        self, grid: PasskeyGridConfig | None = None, layout: Layout | None = None
    ) -> Peak | None:
        """Peak of the passkey evaluation within training, or None without one. It runs on one GPU
        with the whole cache. The run's own grid and layout count if none is given.
        """
        if self.config.callbacks.passkey is None:
            return None
        grid, layout = grid or self.config.evaluation, layout or self.layout
        rows, tokens = evaluation_shape(grid)
        peak = self.fake.prefill(rows, tokens, grid.prefill_chunk_tokens, shards=layout.shards)
        return self._with_exchange(peak, layout)

    def fits(self, peak: Peak) -> bool:
        """Whether the GPU has what a peak needs."""
        return self.needed_bytes(peak) <= self.memory_bytes

    def needed_bytes(self, peak: Peak) -> int:
        """What the GPU must have for a peak: tensors, the allocator's slack and the context."""
        return int(peak.total_bytes * (1 + self.overhead.slack_share) + self.overhead.context_bytes)

    def speed(self) -> dict[str, Any]:
        """Tokens a second of the training run, and of decoding one sequence as memory allows."""
        _, tokens = self.batch_shape()
        used = self.measurements.utilisation(
            self.config.model, tokens, preference=self.config.preference is not None
        )
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


def evaluation_shape(grid: PasskeyGridConfig) -> tuple[int, int]:
    """Rows and tokens of a grid's largest prefill."""
    return max(
        ((max(1, grid.tokens_per_batch // n), n) for n in grid.lengths),
        key=lambda shape: (shape[0] * shape[1], shape[1]),
    )


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
