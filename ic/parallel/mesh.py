"""The processes of a run as a mesh data x context.

Context-parallel ranks are neighbours (rank = data * C + context), so that they share a host's
NVLink. Parameters are sharded over all ranks, whatever axis they lie on.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DATA_AXIS, CONTEXT_AXIS, SHARD_AXIS = "data", "context", "shard"


@dataclass(frozen=True)
class ParallelMesh:
    """Meshes over the same ranks.

    Attributes:
        batch: (data, context); ranks of one row along `context` share a batch.
        shard: (data * context,), over which parameters, gradients and optimizer state are cut.
    """

    batch: DeviceMesh
    shard: DeviceMesh

    @property
    def data_rank(self) -> int:
        return self.batch.get_local_rank(DATA_AXIS)

    @property
    def data_size(self) -> int:
        return self.batch.size(0)

    @property
    def context_group(self) -> ProcessGroup:
        return self.batch.get_group(CONTEXT_AXIS)

    @property
    def context_size(self) -> int:
        return self.batch.size(1)


def build_mesh(device_type: str, world_size: int, context_parallel_size: int) -> ParallelMesh:
    """The mesh of all processes; collective.

    Raises:
        ValueError: the context size does not divide the number of processes.
    """
    if world_size % context_parallel_size:
        divisors = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"strategy.context_parallel_size={context_parallel_size} does not divide the "
            f"{world_size} processes; choose one of {', '.join(divisors)}, or change "
            "trainer.devices or trainer.num_nodes"
        )
    data = world_size // context_parallel_size
    return ParallelMesh(
        batch=init_device_mesh(
            device_type, (data, context_parallel_size), mesh_dim_names=(DATA_AXIS, CONTEXT_AXIS)
        ),
        shard=init_device_mesh(device_type, (world_size,), mesh_dim_names=(SHARD_AXIS,)),
    )
