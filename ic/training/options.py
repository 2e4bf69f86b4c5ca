"""Optimizer and objectives. Imports no PyTorch, so that help and errors come at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from ic.errors import check_choice
from ic.files.saved_config import MAY_CHANGE

OPTIMIZERS = ("muon", "adamw")
INDEXER_TRAINING = ("none", "alone", "with_model")
# What training an indexer logs of a whole set beside what the data make known.
INDEXER_METRICS = ("index_loss",)
LOSS_TYPES = (
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "sft",
)
# What preference training logs of a set of pairs, of the whole and by length.
PREFERENCE_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "kl/chosen",
    "kl/rejected",
)
# What distillation logs of a whole set beside what the data make known.
DISTILLATION_METRICS = ("kl", "agreement")
SMOOTHED = ("robust", "exo_pair")


@dataclass
class OptimizerOptions:
    """Optimizer and schedule.

    Attributes:
        name: `muon` (block matrices; AdamW for embedding, head, norms, vectors, LoRA) or `adamw`
            for all.
        lr: peak rate of both; Muon's update is scaled to AdamW's size (`match_rms_adamw`).
        weight_decay: decoupled from the gradient, of everything that is trained.
        betas: AdamW's two averaging factors.
        momentum: share of Muon's running mean of gradients that stays at each step.
        warmup_steps: linear warm-up.
        decay_fraction: last share of the run over which the rate falls linearly to zero.
    """

    name: str = "muon"
    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    momentum: float = 0.95
    warmup_steps: int = 100
    decay_fraction: float = 0.25

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer.name={self.name!r}: choose one of {', '.join(OPTIMIZERS)}")
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr={self.lr}: must be above 0")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay}: must be at least 0")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optimizer.betas={self.betas}: two numbers in [0, 1)")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum={self.momentum}: must be in [0, 1)")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps={self.warmup_steps}: must be at least 0")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"optimizer.decay_fraction={self.decay_fraction}: must be in [0, 1]")


@dataclass
class ObjectiveOptions:
    """Loss of a batch that marks answers: mean over answer tokens + all_tokens_weight x mean over
    all.

    Without answer marks the loss is the mean over all targets. Each mean is over the targets of a
    whole optimizer step: all ranks, all micro-batches.

    Attributes:
        all_tokens_weight: weight of the loss over all tokens beside that over the answers'.
        indexer: how the indexer of a model that has one is trained (docs/sparse_attention.md):
            `none`, it is frozen; `alone`, it learns to rank tokens as attention weighs them, and
            all else is frozen; `with_model`, it learns so while the model learns from this loss.
    """

    all_tokens_weight: float = 0.1
    indexer: str = "none"

    def __post_init__(self) -> None:
        check_choice("objective.indexer", self.indexer, INDEXER_TRAINING)
        if self.all_tokens_weight < 0:
            raise ValueError(
                f"objective.all_tokens_weight={self.all_tokens_weight}: must be at least 0"
            )


@dataclass
class DistillationOptions:
    """Learning the next-token distributions of another model.

    Attributes:
        teacher: the frozen model, in any form that `ic.checkpoint.source` knows, with the
            vocabulary of the one that learns. It runs in bfloat16 on a GPU and float32 on a CPU.
        temperature: both models' logits are divided by it; the KL is multiplied by its square, as
            Hinton's (arXiv 1503.02531), so that gradients keep their size.
        cross_entropy_weight: in [0, 1], of the text's own next tokens; the rest is the KL's.
        chunk_tokens: tokens whose logits of both models are held at once.
        offload: keep the teacher's weights in the host's memory between uses.
        compile: the teacher's layers and the loss by torch.compile.
    """

    teacher: str = "???"
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0
    chunk_tokens: int = field(default=2048, metadata=MAY_CHANGE)
    offload: bool = field(default=False, metadata=MAY_CHANGE)
    compile: bool = field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"distillation.temperature={self.temperature}: must be above 0")
        if not 0 <= self.cross_entropy_weight <= 1:
            raise ValueError(
                f"distillation.cross_entropy_weight={self.cross_entropy_weight}: must be in [0, 1]"
            )
        if self.chunk_tokens < 1:
            raise ValueError(f"distillation.chunk_tokens={self.chunk_tokens}: must be at least 1")


@dataclass
class PreferenceOptions:
    """The preference objective; names and meanings are those of TRL's `DPOConfig`.

    Attributes:
        loss_type: one or more of `LOSS_TYPES`; `sft` is the mean over the chosen completions'
            tokens.
        loss_weights: a weight for each; all 1 if null.
        beta: strength of the pull towards the reference (tau of `ipo`).
        label_smoothing: probability that a label is flipped (`robust`), epsilon of `exo_pair`.
        ld_alpha: weight in [0, 1] of the tokens beyond the shorter completion's length (LD-DPO,
            arXiv 2409.06411); null for 1.
        precompute_ref_log_probs: write the reference's log-probabilities to `reference_cache` once
            and train without a second model; otherwise a frozen copy stays in memory (with LoRA,
            the model without its adapter).
        reference_cache: the file; default `reference.jsonl` in the run directory.
        length_buckets: metrics are also logged for pairs up to each of these tokens, and beyond.
    """

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    ld_alpha: float | None = None
    precompute_ref_log_probs: bool = True
    reference_cache: str | None = None
    length_buckets: list[int] = field(default_factory=lambda: [4096, 16384, 65536])

    def __post_init__(self) -> None:
        unknown = [name for name in self.loss_type if name not in LOSS_TYPES]
        if unknown or not self.loss_type:
            raise ValueError(
                f"preference.loss_type={self.loss_type}: one or more of {', '.join(LOSS_TYPES)}"
            )
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"preference.loss_weights={self.loss_weights}: one weight for each of "
                f"preference.loss_type={self.loss_type}"
            )
        if not self.beta > 0:
            raise ValueError(f"preference.beta={self.beta}: must be above 0")
        smoothed = [name for name in self.loss_type if name in SMOOTHED]
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"preference.label_smoothing={self.label_smoothing}: must be in [0, 0.5)"
            )
        if self.label_smoothing and not smoothed:
            raise ValueError(
                f"preference.label_smoothing={self.label_smoothing}: only "
                f"{' and '.join(SMOOTHED)} use it; set 0 or add one of them to loss_type"
            )
        if "exo_pair" in smoothed and not self.label_smoothing:
            raise ValueError("preference.label_smoothing=0: exo_pair needs more than 0 (try 1e-3)")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"preference.ld_alpha={self.ld_alpha}: must be in [0, 1], or null")
        if sorted(set(self.length_buckets)) != list(self.length_buckets) or not all(
            edge > 0 for edge in self.length_buckets
        ):
            raise ValueError(
                f"preference.length_buckets={self.length_buckets}: rising numbers of tokens"
            )
        if self.reference_cache is not None and not self.precompute_ref_log_probs:
            raise ValueError(
                "preference.reference_cache: used with preference.precompute_ref_log_probs=true "
                "alone; set one of them back"
            )

    @property
    def metric_names(self) -> list[str]:
        """Names of what is logged of a set, those over all pairs first."""
        buckets = ["", *(f"/to_{edge}" for edge in self.length_buckets)]
        if self.length_buckets:
            buckets.append(f"/above_{self.length_buckets[-1]}")
        return [f"{name}{bucket}" for bucket in buckets for name in PREFERENCE_METRICS]
