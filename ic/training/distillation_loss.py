"""The distance of a student's next-token distribution from a teacher's, without all logits of
either.

Tokens are taken in chunks. A chunk's logits of both models are made, compared, and turned into the
gradients of the student's hidden states and head, all in the forward pass. So the backward pass
only scales them, and one chunk of logits is the largest tensor of both passes. Liger's fused losses
do the same (arXiv 2410.10989).

Legend: M tokens (flattened), C tokens of a chunk, D the student's hidden size, E the teacher's, W
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ic.model.labels import IGNORE_INDEX
from ic.training.options import DistillationOptions


class DistillationSums(NamedTuple):
    """Sums over the targets, float32 scalars.

    Attributes:
        loss: (1 - w) x temperature^2 x KL + w x cross-entropy, w being `cross_entropy_weight`; the
            gradient flows through it alone.
        kl: KL(teacher || student) in nats at the temperature.
        cross_entropy: of the labels, in nats, at temperature 1.
        agreeing: targets before which both models find the same token most likely; 0 if not asked.
    """

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor
    agreeing: Tensor


class _Compared(NamedTuple):
    """Of one chunk: the three sums, and the loss's gradient of the student's logits (C, W), which
    is empty if not asked for.
    """

    sums_3: Tensor
    gradient_CW: Tensor


Compare = Callable[..., _Compared]


def distillation_sums(
    hidden_MD: Tensor,
    weight_WD: Tensor,
    teacher_hidden_ME: Tensor,
    teacher_weight_WE: Tensor,
    labels_M: Tensor,
    options: DistillationOptions,
    *,
    agreement: bool = False,
    compare: Compare | None = None,
) -> DistillationSums:
    """Sums over the tokens whose label is not -100.

    Args:
        hidden_MD, weight_WD: the student's hidden states and head.
        teacher_hidden_ME, teacher_weight_WE: the teacher's, which get no gradients.
        labels_M: the token that follows each.
        agreement: count where both find the same token most likely.
        compare: `compare_chunk`, or that compiled.
    """
    loss, sums_3 = _Distilled.apply(
        hidden_MD,
        weight_WD,
        teacher_hidden_ME,
        teacher_weight_WE,
        labels_M,
        (options, torch.is_grad_enabled(), agreement, compare or compare_chunk),
    )
    return DistillationSums(loss, *sums_3)


def compare_chunk(
    logits_CW: Tensor,
    teacher_logits_CW: Tensor,
    labels_C: Tensor,
    temperature: float,
    cross_entropy_weight: float,
    with_gradient: bool,
    agreement: bool,
) -> _Compared:
    """The sums of a chunk, and the gradient in the logits' dtype."""
    is_target_C = labels_C != IGNORE_INDEX
    label_C1 = labels_C.clamp(min=0)[:, None]
    student_CW, teacher_CW = logits_CW.float(), teacher_logits_CW.float()
    log_q_CW = student_CW.log_softmax(-1)
    cross_entropy_C = -log_q_CW.gather(-1, label_C1).squeeze(-1)
    soft_CW = log_q_CW if temperature == 1 else (student_CW / temperature).log_softmax(-1)
    log_p_CW = (teacher_CW / temperature).log_softmax(-1)
    p_CW = log_p_CW.exp()
    # A token that the teacher excludes (a logit of -inf) adds nothing.
    terms_CW = torch.where(p_CW > 0, p_CW * (log_p_CW - soft_CW), 0)
    agreeing_C = torch.zeros_like(is_target_C)
    if agreement:
        agreeing_C = logits_CW.argmax(-1) == teacher_logits_CW.argmax(-1)
    sums_3 = torch.stack(
        [
            torch.where(is_target_C, terms_CW.sum(-1), 0).sum(),
            torch.where(is_target_C, cross_entropy_C, 0).sum(),
            (agreeing_C & is_target_C).sum().float(),
        ]
    )
    if not with_gradient:
        return _Compared(sums_3, sums_3.new_empty(0))
    gradient_CW = (1 - cross_entropy_weight) * temperature * (soft_CW.exp() - p_CW)
    if cross_entropy_weight:
        one_hot_CW = torch.arange(logits_CW.shape[-1], device=logits_CW.device) == label_C1
        gradient_CW = gradient_CW + cross_entropy_weight * (log_q_CW.exp() - one_hot_CW.float())
    gradient_CW = torch.where(is_target_C[:, None], gradient_CW, 0)
    return _Compared(sums_3, gradient_CW.to(logits_CW.dtype))


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_WD: Tensor,
        teacher_hidden_ME: Tensor,
        teacher_weight_WE: Tensor,
        labels_M: Tensor,
        how: tuple[DistillationOptions, bool, bool, Compare],
    ) -> tuple[Tensor, Tensor]:
        options, recorded, agreement, compare = how
        needs_hidden, needs_weight = (recorded and needed for needed in ctx.needs_input_grad[:2])
        weight = weight_WD.to(hidden_MD.dtype)
        grad_hidden = torch.empty_like(hidden_MD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_WD, dtype=torch.float32) if needs_weight else None
        sums_3 = hidden_MD.new_zeros(3, dtype=torch.float32)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            for start in range(0, len(hidden_MD), options.chunk_tokens):
                chunk = slice(start, start + options.chunk_tokens)
                part_3, gradient = compare(
                    F.linear(hidden_MD[chunk], weight),
                    F.linear(teacher_hidden_ME[chunk], teacher_weight_WE),
                    labels_M[chunk],
                    options.temperature,
                    options.cross_entropy_weight,
                    needs_hidden or needs_weight,
                    agreement,
                )
                sums_3 += part_3
                if grad_hidden is not None:
                    grad_hidden[chunk] = gradient @ weight
                if grad_weight is not None:
                    grad_weight += (gradient.T @ hidden_MD[chunk]).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_WD.dtype
        ctx.mark_non_differentiable(sums_3)
        share = options.cross_entropy_weight
        loss = (1 - share) * options.temperature**2 * sums_3[0] + share * sums_3[1]
        return loss, sums_3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled_hidden = None if grad_hidden is None else grad_hidden * grads[0]
        scaled_weight = None
        if grad_weight is not None:
            scaled_weight = (grad_weight * grads[0]).to(ctx.weight_dtype)
        return scaled_hidden, scaled_weight, None, None, None, None
