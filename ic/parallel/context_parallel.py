"""Context parallelism for MLA: ranks share a sequence and exchange latents.

The sequence is cut into 2N chunks; rank r of N holds chunks r and 2N - 1 - r, so that every rank
has the same number of visible (query, key) pairs under a causal mask. A layer gathers the latents
of the sequence, R + P numbers a token, and each rank expands them to keys and values itself;
expanded, a token has H x (N + P + V) numbers (InfiniteContext-1B: 5120 instead of 256). The
backward pass sums the latents' gradients over the ranks and hands each rank its own.

Legend: B batch, T tokens of a rank, S tokens of the sequence, C = R + P latent width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ic.model.sharing import Chunk
from ic.parallel.sharded_cache import ShardedLatentCache


class ContextParallel:
    """This rank's part of every sequence, and the exchange with the ranks that hold the others; the
    model's `SequenceSharing`.

    Args:
        group: ranks that share each sequence; all processes by default.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def chunks(self, tokens: int) -> tuple[Chunk, Chunk]:
        """The two chunks of a sequence of `tokens` that this rank holds.

        Raises:
            ValueError: the length does not divide into 2N chunks.
        """
        num_chunks = 2 * self.size
        if tokens % num_chunks:
            nearest = max(1, tokens // num_chunks) * num_chunks
            raise ValueError(
                f"a sequence of {tokens} tokens does not divide into the {num_chunks} chunks of "
                f"strategy.context_parallel_size={self.size}; choose a length that is a multiple "
                f"of {num_chunks}, such as {nearest}, or another context_parallel_size"
            )
        length = tokens // num_chunks
        first, second = self.rank * length, (num_chunks - 1 - self.rank) * length
        return (
            Chunk(first, first + length, slice(0, length)),
            Chunk(second, second + length, slice(length, 2 * length)),
        )

    def split(self, whole_BS: Tensor) -> Tensor:
        """(B, S, ...) -> this rank's (B, T, ...)."""
        chunks = self.chunks(whole_BS.shape[1])
        return torch.cat([whole_BS[:, chunk.start : chunk.end] for chunk in chunks], dim=1)

    def all_gather(self, own: Tensor) -> Tensor:
        """(...) of each rank -> (N, ...); gradients are summed over the ranks and scattered."""
        parts: Tensor = _AllGather.apply(own, self.group)
        return parts

    def gather(self, own_BT: Tensor) -> Tensor:
        """The parts (B, T, ...) of all ranks -> (B, S, ...) in the sequence's order.

        Differentiable: gradients are summed over the ranks and scattered.
        """
        parts_GBT = self.all_gather(own_BT)
        head, tail = parts_GBT.chunk(2, dim=2)
        return torch.cat((*head.unbind(0), *reversed(tail.unbind(0))), dim=1)

    def gather_last(self, own_BT: Tensor, count: int) -> Tensor:
        """The last `count` of all tokens (all of them if 0), on every rank."""
        if 0 < count <= own_BT.shape[1] // 2:
            # Rank 0 holds the last chunk.
            parts_GBT = self.all_gather(own_BT[:, -count:].contiguous())
            return parts_GBT[0]
        return self.gather(own_BT)[:, -count:]

    def sum(self, own: Tensor) -> Tensor:
        """Each rank's tensor added up, the same to the last bit on every rank.

        Differentiable: the gradients of all ranks are added too, as those of `gather` are. If every
        rank goes on with the same loss, the mean over all ranks that a sharding strategy takes of
        the parameters' gradients is then the mean over its data-parallel replicas.
        """
        parts = self.all_gather(own)
        return parts.sum(0)

    def gather_unordered(self, own_BT: Tensor) -> Tensor:
        """As `gather`, in any order: enough for keys that every query sees."""
        parts_GBT = self.all_gather(own_BT)
        return parts_GBT.transpose(0, 1).flatten(1, 2)

    def merge(self, out_BTHR: Tensor, lse_BTH: Tensor) -> Tensor:
        """Attention over all keys from each rank's attention over its own.

        Args:
            out_BTHR: softmax-weighted mean over the rank's keys.
            lse_BTH: log-sum-exp of the rank's scores, -inf without keys.
        """
        packed = torch.cat((out_BTHR.float(), lse_BTH.float()[..., None]), dim=-1)
        parts_GBTHR = self.all_gather(packed)
        weights_GBTH1 = parts_GBTHR[..., -1:].softmax(dim=0)
        return (parts_GBTHR[..., :-1] * weights_GBTH1).sum(0).to(out_BTHR.dtype)

    def new_cache(self, num_layers: int, capacity_tokens: int) -> ShardedLatentCache:
        """A cache of which this rank holds its part of the tokens."""
        return ShardedLatentCache(
            num_layers, -(-capacity_tokens // self.size), holds_replicated=self.rank == 0
        )


class _AllGather(torch.autograd.Function):
    """(...) of each rank -> (G, ...); the gradient is reduce-scattered."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        size = dist.get_world_size(group)
        parts = own.new_empty(size, *own.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), own.contiguous(), group=group)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        own = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous().flatten(0, 1), group=ctx.group)
        return own, None
