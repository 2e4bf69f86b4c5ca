"""Muon for matrices that are sharded by rows over ranks (FSDP2).

Muon orthogonalises whole matrices. Each rank gathers every W-th matrix of W ranks, orthogonalises
it, and hands the rows back: no matrix is worked on twice, and what travels is the update in
bfloat16, in which `torch.optim.Muon` orthogonalises as well: 4 bytes a number and step in all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with the same settings, state and result for sharded matrices.

    Raises:
        ValueError: a matrix that is not sharded by rows over one mesh axis.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; collective over the matrices' mesh."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            if not matrices:
                continue
            updates = [self._momentum(matrix, group) for matrix in matrices]
            process_group, num_ranks = _mesh_of(matrices)
            for start in range(0, len(matrices), num_ranks):
                some = slice(start, start + num_ranks)
                orthogonal = _orthogonalize(
                    [matrix.shape for matrix in matrices[some]],
                    updates[some],
                    process_group,
                    partial(
                        _zeropower_via_newtonschulz,
                        ns_coefficients=group["ns_coefficients"],
                        ns_steps=group["ns_steps"],
                        eps=group["eps"],
                    ),
                )
                for matrix, update in zip(matrices[some], orthogonal, strict=True):
                    rate = _adjust_lr(float(group["lr"]), group["adjust_lr_fn"], matrix.shape)
                    own = cast(DTensor, matrix).to_local()
                    own.mul_(1 - float(group["lr"]) * group["weight_decay"])
                    own.add_(update, alpha=-rate)
        return loss

    def _momentum(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        """This rank's rows of what is to be orthogonalised."""
        state, sharded = self.state[matrix], cast(DTensor, matrix.grad)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(sharded)
        buffer, gradient = state["momentum_buffer"].to_local(), sharded.to_local()
        buffer.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def _mesh_of(matrices: list[Tensor]) -> tuple[dist.ProcessGroup, int]:
    mesh = cast(DTensor, matrices[0]).device_mesh
    for matrix in matrices:
        placed = isinstance(matrix, DTensor) and matrix.device_mesh == mesh and mesh.ndim == 1
        if not placed or cast(DTensor, matrix).placements != (Shard(0),):
            raise ValueError(
                f"optimizer.name=muon: a matrix of shape {tuple(matrix.shape)} is not sharded by "
                "rows over one mesh axis as the others are; use optimizer=adamw, or fully_shard "
                "with its default placement"
            )
    return mesh.get_group(), mesh.size()


def _orthogonalize(
    shapes: list[torch.Size],
    own_rows: list[Tensor],
    group: dist.ProcessGroup,
    function: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """`function` of each whole matrix, of which this rank gives and receives its rows.

    Args:
        shapes: of at most W matrices; rank i of W works on the i-th.
        own_rows: this rank's rows of each.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    sent = torch.cat([rows.bfloat16().flatten() for rows in own_rows])
    sent_sizes = [rows.numel() for rows in own_rows] + [0] * (num_ranks - len(own_rows))
    received_sizes = [0] * num_ranks
    if rank < len(shapes):
        num_rows, width = shapes[rank]
        most = -(-num_rows // num_ranks)  # rows of a rank, as torch.chunk deals them out
        received_sizes = [width * max(0, min(most, num_rows - r * most)) for r in range(num_ranks)]
    received = sent.new_empty(sum(received_sizes))
    dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=group)
    if rank < len(shapes):
        received = function(received.view(shapes[rank])).contiguous().flatten()
    dist.all_to_all_single(sent, received, sent_sizes, received_sizes, group=group)
    pieces = sent.split([rows.numel() for rows in own_rows])
    return [piece.view_as(rows) for piece, rows in zip(pieces, own_rows, strict=True)]
