"""Preference losses on sums of log-probabilities, under the names of TRL 1.16's `DPOConfig`.

Everything a loss needs of a sequence are three sums over its completion tokens, formed in
`sum_per_sequence` and nowhere else. Where a sequence is spread over ranks (context parallelism),
reducing that tensor over them, before anything nonlinear, makes every loss here exact.

Legend: B pairs, S = 2B sequences (the chosen ones first, then the rejected), M completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ic.training.options import PreferenceOptions


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


def preference_losses(pairs: PairLogProbs, config: PreferenceOptions) -> Tensor:
    """Weighted sum of the configured losses of each pair (B,), whose mean is the loss of a batch.

    `sft`, a mean over the tokens of the batch, is the same for all of them.
    """
    weights = config.loss_weights or [1.0] * len(config.loss_type)
    terms = [
        weight * LOSSES[name](pairs, config).expand_as(pairs.chosen)
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


def _sigmoid(p: PairLogProbs, c: PreferenceOptions) -> Tensor:
    """DPO, arXiv 2305.18290."""
    return -F.logsigmoid(c.beta * _difference(p))


def _sigmoid_norm(p: PairLogProbs, c: PreferenceOptions) -> Tensor:
    """DPO on log-ratios a token (the length-normalised form of Tulu 3, arXiv 2411.15124)."""
    return -F.logsigmoid(c.beta * _normalized_difference(p))


def _hinge(p: PairLogProbs, c: PreferenceOptions) -> Tensor:
    """SLiC, arXiv 2305.10425."""
    return torch.relu(1 - c.beta * _difference(p))


def _ipo(p: PairLogProbs, c: PreferenceOptions) -> Tensor:
    """IPO, arXiv 2310.12036, on log-ratios a token."""
    return (_normalized_difference(p) - 1 / (2 * c.beta)) ** 2


def _exo_pair(p: PairLogProbs, c: PreferenceOptions) -> Tensor:
    """EXO, arXiv 2402.00856, equation 16."""
    logits = c.beta * _difference(p)
    epsilon = torch.tensor(c.label_smoothing, device=logits.device)
    return torch.sigmoid(logits) * (F.logsigmoid(logits) - torch.log1p(-epsilon)) + torch.sigmoid(
        -logits
    ) * (F.logsigmoid(-logits) - torch.log(epsilon))


def _robust(p: PairLogProbs, c: PreferenceOptions) -> Tensor:
    """Robust DPO, arXiv 2403.00409."""
    logits, flip = c.beta * _difference(p), c.label_smoothing
    kept = -(1 - flip) * F.logsigmoid(logits)
    return (kept + flip * F.logsigmoid(-logits)) / (1 - 2 * flip)


def _nca_pair(p: PairLogProbs, c: PreferenceOptions) -> Tensor:
    """NCA, arXiv 2402.05369."""
    chosen, rejected = c.beta * p.chosen_log_ratios, c.beta * p.rejected_log_ratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _bco_pair(p: PairLogProbs, c: PreferenceOptions) -> Tensor:
    """BCO without its running shift, arXiv 2404.04656."""
    chosen, rejected = c.beta * p.chosen_log_ratios, c.beta * p.rejected_log_ratios
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def _sppo_hard(p: PairLogProbs, c: PreferenceOptions) -> Tensor:
    """SPPO with probabilities 1 and 0, arXiv 2405.00675."""
    half = 0.5 / c.beta
    return (p.chosen_log_ratios - half) ** 2 + (p.rejected_log_ratios + half) ** 2


def _apo_zero(p: PairLogProbs, c: PreferenceOptions) -> Tensor:
    """APO for chosen answers better than the model's own, arXiv 2408.06266, equation 7."""
    chosen, rejected = c.beta * p.chosen_log_ratios, c.beta * p.rejected_log_ratios
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def _apo_down(p: PairLogProbs, c: PreferenceOptions) -> Tensor:
    """APO for chosen answers worse than the model's own, arXiv 2408.06266, equation 8."""
    return torch.sigmoid(c.beta * p.chosen_log_ratios) + 1 - torch.sigmoid(c.beta * _difference(p))


def _sft(p: PairLogProbs, c: PreferenceOptions) -> Tensor:
    return -p.chosen_plain.sum() / p.chosen_tokens.sum()


LOSSES: dict[str, Callable[[PairLogProbs, PreferenceOptions], Tensor]] = {
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
