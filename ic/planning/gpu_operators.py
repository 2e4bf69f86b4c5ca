"""The model's GPU operators on fake CPU tensors.

Fake tensors of a CPU build of PyTorch cannot claim to be on a GPU (autograd asks for a device
guard), so PyTorch's operators would take their CPU paths. `GpuOperators` takes the GPU's choice:
cuDNN attention, the fused RMSNorm, and Liger's kernels, whose Triton code cannot run on fake
tensors and is replaced by what it allocates and keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ic.model.sdpa import Segments, causal_attention
from ic.model.torch_operators import TorchOperators
from ic.planning.live_memory import LiveMemory


class GpuOperators(TorchOperators):
    """PyTorch's operators as on a GPU.

    Args:
        memory: counts what a kernel takes and returns within one call.
        liger: with Liger's kernels.
    """

    def __init__(self, memory: LiveMemory, *, liger: bool) -> None:
        self.memory, self.liger = memory, liger

    def document_segments(self, document_ids_BT: Tensor) -> Segments:
        """Fake ids have no values to find runs in; the memory does not depend on how many there
        are.
        """
        rows, tokens = document_ids_BT.shape
        half = tokens // 2
        return [piece for b in range(rows) for piece in ((b, 0, half), (b, half, tokens))]

    def expanded(
        self,
        q_BTHK: Tensor,
        k_BSHK: Tensor,
        v_BSHV: Tensor,
        *,
        scale: float,
        mask_BTS: Tensor | None = None,
        segments: Segments | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        # PyTorch's way to the kernel, padding and documents included; cuDNN's in its place.
        return causal_attention(
            q_BTHK,
            k_BSHK,
            v_BSHV,
            scale=scale,
            mask_BTS=mask_BTS,
            segments=segments,
            attend=self._cudnn_attention,
        )

    def _cudnn_attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask_BTS: Tensor | None
    ) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return _CudnnAttention.apply(self.memory, q, k, v).transpose(1, 2)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return _RMSNorm.apply(x, weight.to(x.dtype))

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return _LigerSiLUMul.apply(gate, up) if self.liger else super().silu_mul(gate, up)

    def summed_linear_cross_entropy(
        self, hidden_MD: Tensor, weight_WD: Tensor, labels_M: Tensor
    ) -> Tensor:
        if self.liger:
            return _LigerLoss.apply(hidden_MD, weight_WD.to(hidden_MD.dtype))
        return super().summed_linear_cross_entropy(hidden_MD, weight_WD, labels_M)


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
