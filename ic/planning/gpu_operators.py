"""The model's GPU operators on fake CPU tensors.

Fake tensors of a CPU build of PyTorch cannot claim to be on a GPU (autograd asks for a device
guard), so the model would take its CPU paths. Within `gpu_operators` the places that choose by
device take the GPU's choice: cuDNN attention, the fused RMSNorm, and Liger's kernels, whose Triton
code cannot run on fake tensors and is replaced by what it allocates and keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ic.model.mlp
import ic.model.modeling_mla
import ic.model.sdpa
import ic.model.targets
from ic.planning.live_memory import LiveMemory


@contextmanager
def gpu_operators(memory: LiveMemory, *, liger: bool) -> Iterator[None]:
    """Run the model as on a GPU, with or without Liger's kernels."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return _CudnnAttention.apply(memory, q, k, v).transpose(1, 2)

    with ExitStack() as stack:
        # Not by a TorchFunctionMode: checkpointing recomputes where none is active.
        stack.enter_context(_replaced(F, "rms_norm", _rms_norm))
        stack.enter_context(_replaced(ic.model.sdpa, "_sdpa", sdpa))
        stack.enter_context(_replaced(ic.model.modeling_mla, "document_segments", _two_documents))
        if liger:
            stack.enter_context(_replaced(ic.model.mlp, "_silu_mul", _LigerSiLUMul.apply))
            stack.enter_context(
                _replaced(ic.model.targets, "summed_linear_cross_entropy", _liger_loss)
            )
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _two_documents(document_ids_BT: Tensor) -> ic.model.sdpa.Segments:
    """Fake ids have no values to find runs in; the memory does not depend on how many there are."""
    rows, tokens = document_ids_BT.shape
    half = tokens // 2
    return [piece for b in range(rows) for piece in ((b, 0, half), (b, half, tokens))]


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    return _RMSNorm.apply(x, weight)


class _RMSNorm(torch.autograd.Function):
    """aten::_fused_rms_norm, which fake tensors would take apart: keeps the input, the weight and
    one float32 a row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _CudnnAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and a float32 log-sum-exp a query and head."""

    @staticmethod
    def forward(ctx: Any, memory: LiveMemory, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, _ = q.shape
        # The output has the query's layout, (B, T, H, V) in memory.
        out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        ctx.memory = memory
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        # The query's gradient is summed over blocks of keys in float32.
        ctx.memory.extra("attention_workspace", 4 * q.numel())
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _LigerSiLUMul(torch.autograd.Function):
    """liger_kernel.ops.swiglu: keeps both inputs and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        return gate, up


class _LigerLoss(torch.autograd.Function):
    """liger_kernel.ops.fused_linear_cross_entropy: makes both gradients in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_WD: Tensor) -> Tensor:
        tokens, dim = hidden_MD.shape
        vocabulary = len(weight_WD)
        gradients = torch.empty_like(hidden_MD), torch.empty_like(weight_WD)
        # Chunks of logits about as large as the hidden states.
        num_chunks = -(-vocabulary // dim)
        chunk = min(tokens, 1 << (-(-tokens // num_chunks) - 1).bit_length())
        logits = hidden_MD.new_empty(chunk, vocabulary)
        del logits
        ctx.save_for_backward(*gradients)
        return hidden_MD.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        hidden, weight = ctx.saved_tensors
        return hidden, weight


def _liger_loss(hidden_MD: Tensor, weight_WD: Tensor, labels_M: Tensor) -> Tensor:
    return _LigerLoss.apply(hidden_MD, weight_WD.to(hidden_MD.dtype))
