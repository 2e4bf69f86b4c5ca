"""Muon for matrices that are sharded by rows over ranks (FSDP2).

Muon orthogonalises whole matrices. Of each stack of equal shapes a rank gathers its share of whole
matrices, orthogonalises them, and hands the rows back: no matrix is worked on twice, and what
travels is the update in the type in which it is orthogonalised, bfloat16 on a GPU: 4 bytes a number
and step in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from ic.training.muon import STACK_NUMBERS, BatchedMuon, orthogonalize, stacks


class ShardedMuon(BatchedMuon):
    """`torch.optim.Muon` with the same settings, state and result for sharded matrices.

    Its `step` is collective over the matrices' mesh.

    Raises:
        ValueError: a matrix that is not sharded by rows over one mesh axis.
    """

    def _stacks(self, matrices: list[Tensor]) -> Iterator[list[int]]:
        if matrices:
            _, num_ranks = _mesh_of(matrices)
            yield from stacks(matrices, STACK_NUMBERS * num_ranks)

    def _own(self, tensors: list[Tensor]) -> list[Tensor]:
        return [cast(DTensor, tensor).to_local() for tensor in tensors]

    def _orthogonalize(
        self, group: dict[str, Any], matrices: list[Tensor], directions: list[Tensor]
    ) -> Tensor:
        process_group, num_ranks = _mesh_of(matrices)
        rank, (num_rows, width) = dist.get_rank(process_group), matrices[0].shape
        own_LmN = torch.stack(directions).to(self._dtype_of(matrices))
        # How many whole matrices a rank works on, and how many rows of each are its own.
        wholes = [(len(matrices) + num_ranks - 1 - r) // num_ranks for r in range(num_ranks)]
        most = -(-num_rows // num_ranks)  # as torch.chunk deals rows out
        rows = [max(0, min(most, num_rows - r * most)) for r in range(num_ranks)]
        num_whole = wholes[rank]
        sent_sizes = [number * rows[rank] * width for number in wholes]
        received_sizes = [num_whole * number * width for number in rows]

        received = own_LmN.new_empty(sum(received_sizes))
        dist.all_to_all_single(
            received, own_LmN.flatten(), received_sizes, sent_sizes, group=process_group
        )
        if num_whole:
            pieces = received.split(received_sizes)
            whole_KMN = torch.cat(
                [p.view(num_whole, n, width) for p, n in zip(pieces, rows, strict=True)], dim=1
            )
            pieces = orthogonalize(whole_KMN, group, whole_KMN.dtype).split(rows, dim=1)
            received = torch.cat([piece.flatten() for piece in pieces])
        back = torch.empty_like(own_LmN)
        dist.all_to_all_single(
            back.view(-1), received, sent_sizes, received_sizes, group=process_group
        )
        return back


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
