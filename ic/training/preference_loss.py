"""Preference losses on sums of log-probabilities, under the names of TRL 1.16's `DPOConfig`.

Everything a loss needs of a sequence are three sums over its completion tokens, formed in
`sum_per_sequence` and nowhere else. Where a sequence is spread over ranks (context parallelism),
reducing that tensor over them, before anything nonlinear, makes every loss here exact.

Legend: B pairs, S = 2B sequences (the chosen ones first, then the rejected), M completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class PreferenceConfig:
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


def sum_per_sequence(
    log_probs_M: Tensor, sequence_M: Tensor, is_tail_M: Tensor, num_sequences: int
) -> Tensor:
    """Sums over each sequence's completion tokens: (3, S) float32.

    Row 0: log-probabilities of the tokens within the shorter completion's length; row 1: of those
    beyond it; row 2: number of tokens. The sums of parts of a sequence add up to the whole's.

    Args:
        sequence_M: the sequence of each token, int64.
        is_tail_M: whether the token lies beyond the shorter completion of its pair.
    """
    parts_3M = torch.stack(
        [
            log_probs_M.masked_fill(is_tail_M, 0),
            log_probs_M.masked_fill(~is_tail_M, 0),
            torch.ones_like(log_probs_M),
        ]
    )
    return parts_3M.new_zeros(3, num_sequences).index_add(1, sequence_M, parts_3M)


@dataclass(frozen=True)
class PairLogProbs:
    """Log-probabilities (B,) of completions under the policy and the reference; tokens (B,)."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    # Without ld_alpha: `sft` is a plain mean over tokens.
    chosen_plain: Tensor

    @classmethod
    def from_sums(
        cls, policy_3S: Tensor, reference_2S: Tensor, ld_alpha: float | None
    ) -> PairLogProbs:
        """From `sum_per_sequence` of the policy and the first two rows of the reference's."""
        alpha = 1.0 if ld_alpha is None else ld_alpha
        chosen, rejected = (policy_3S[0] + alpha * policy_3S[1]).chunk(2)
        ref_chosen, ref_rejected = (reference_2S[0] + alpha * reference_2S[1]).chunk(2)
        chosen_tokens, rejected_tokens = policy_3S[2].detach().chunk(2)
        plain = (policy_3S[0] + policy_3S[1]).chunk(2)[0]
        return cls(
            chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens, plain
        )

    @property
    def chosen_log_ratios(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_log_ratios(self) -> Tensor:
        return self.rejected - self.ref_rejected


def preference_losses(pairs: PairLogProbs, config: PreferenceConfig) -> Tensor:
    """Weighted sum of the configured losses of each pair (B,), whose mean is the loss of a batch.

    `sft`, a mean over the tokens of the batch, is the same for all of them.
    """
    weights = config.loss_weights or [1.0] * len(config.loss_type)
    terms = [
        weight * LOSS_TYPES[name](pairs, config).expand_as(pairs.chosen)
        for name, weight in zip(config.loss_type, weights, strict=True)
    ]
    return torch.stack(terms).sum(0)


@torch.no_grad()
def preference_metrics(pairs: PairLogProbs, beta: float) -> dict[str, Tensor]:
    """Metrics of each pair (B,), named as TRL's.

    `kl` is the log-ratio of policy to reference a completion token: an estimate of their divergence
    on the data's completions, which the policy did not sample, so it can be negative.
    """
    chosen, rejected = beta * pairs.chosen_log_ratios, beta * pairs.rejected_log_ratios
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": pairs.chosen.detach(),
        "logps/rejected": pairs.rejected.detach(),
        "kl/chosen": pairs.chosen_log_ratios / pairs.chosen_tokens,
        "kl/rejected": pairs.rejected_log_ratios / pairs.rejected_tokens,
    }


def _difference(p: PairLogProbs) -> Tensor:
    return p.chosen_log_ratios - p.rejected_log_ratios


def _normalized_difference(p: PairLogProbs) -> Tensor:
    return p.chosen_log_ratios / p.chosen_tokens - p.rejected_log_ratios / p.rejected_tokens


def _sigmoid(p: PairLogProbs, c: PreferenceConfig) -> Tensor:
    """DPO, arXiv 2305.18290."""
    return -F.logsigmoid(c.beta * _difference(p))


def _sigmoid_norm(p: PairLogProbs, c: PreferenceConfig) -> Tensor:
    """DPO on log-ratios a token (the length-normalised form of Tulu 3, arXiv 2411.15124)."""
    return -F.logsigmoid(c.beta * _normalized_difference(p))


def _hinge(p: PairLogProbs, c: PreferenceConfig) -> Tensor:
    """SLiC, arXiv 2305.10425."""
    return torch.relu(1 - c.beta * _difference(p))


def _ipo(p: PairLogProbs, c: PreferenceConfig) -> Tensor:
    """IPO, arXiv 2310.12036, on log-ratios a token."""
    return (_normalized_difference(p) - 1 / (2 * c.beta)) ** 2


def _exo_pair(p: PairLogProbs, c: PreferenceConfig) -> Tensor:
    """EXO, arXiv 2402.00856, equation 16."""
    logits = c.beta * _difference(p)
    epsilon = torch.tensor(c.label_smoothing, device=logits.device)
    return torch.sigmoid(logits) * (F.logsigmoid(logits) - torch.log1p(-epsilon)) + torch.sigmoid(
        -logits
    ) * (F.logsigmoid(-logits) - torch.log(epsilon))


def _robust(p: PairLogProbs, c: PreferenceConfig) -> Tensor:
    """Robust DPO, arXiv 2403.00409."""
    logits, flip = c.beta * _difference(p), c.label_smoothing
    kept = -(1 - flip) * F.logsigmoid(logits)
    return (kept + flip * F.logsigmoid(-logits)) / (1 - 2 * flip)


def _nca_pair(p: PairLogProbs, c: PreferenceConfig) -> Tensor:
    """NCA, arXiv 2402.05369."""
    chosen, rejected = c.beta * p.chosen_log_ratios, c.beta * p.rejected_log_ratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _bco_pair(p: PairLogProbs, c: PreferenceConfig) -> Tensor:
    """BCO without its running shift, arXiv 2404.04656."""
    chosen, rejected = c.beta * p.chosen_log_ratios, c.beta * p.rejected_log_ratios
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def _sppo_hard(p: PairLogProbs, c: PreferenceConfig) -> Tensor:
    """SPPO with probabilities 1 and 0, arXiv 2405.00675."""
    half = 0.5 / c.beta
    return (p.chosen_log_ratios - half) ** 2 + (p.rejected_log_ratios + half) ** 2


def _apo_zero(p: PairLogProbs, c: PreferenceConfig) -> Tensor:
    """APO for chosen answers better than the model's own, arXiv 2408.06266, equation 7."""
    chosen, rejected = c.beta * p.chosen_log_ratios, c.beta * p.rejected_log_ratios
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def _apo_down(p: PairLogProbs, c: PreferenceConfig) -> Tensor:
    """APO for chosen answers worse than the model's own, arXiv 2408.06266, equation 8."""
    return torch.sigmoid(c.beta * p.chosen_log_ratios) + 1 - torch.sigmoid(c.beta * _difference(p))


def _sft(p: PairLogProbs, c: PreferenceConfig) -> Tensor:
    return -p.chosen_plain.sum() / p.chosen_tokens.sum()


LOSS_TYPES: dict[str, Callable[[PairLogProbs, PreferenceConfig], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "robust": _robust,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "sft": _sft,
}
SMOOTHED = ("robust", "exo_pair")
