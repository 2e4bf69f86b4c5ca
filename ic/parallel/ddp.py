"""Lightning's DDP strategies, whose processes first meet within a time of their own."""

from __future__ import annotations

from datetime import timedelta

from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from ic.parallel.meeting import all_met


class MeetingDDPStrategy(DDPStrategy):
    """DDP of a training run.

    Args:
        process_group_backend: null for the device's usual one.
        rendezvous_timeout_s: how long the ranks wait for each other at the start.
    """

    def __init__(self, process_group_backend: str | None, rendezvous_timeout_s: float) -> None:
        super().__init__(process_group_backend=process_group_backend)
        self.rendezvous_timeout_s = rendezvous_timeout_s

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        with all_met(self.cluster_environment, self.rendezvous_timeout_s):
            super().setup_distributed()

    def _setup_model(self, model: Module) -> DistributedDataParallel:
        """Wrapped on the stream that the steps run on.

        Lightning's makes a stream of its own for it, which capturing a step in a CUDA graph would
        need. Gradients then are added up there: every backward pass waits for that stream, and
        PyTorch warns of it.
        """
        return DistributedDataParallel(
            model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs
        )


class MeetingFabricDDPStrategy(FabricDDPStrategy):
    """DDP of a verb that trains nothing.

    Args:
        timeout: how long the ranks wait for each other later on.
    """

    def __init__(
        self, process_group_backend: str, rendezvous_timeout_s: float, timeout: timedelta
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.rendezvous_timeout_s = rendezvous_timeout_s

    def setup_environment(self) -> None:
        self._set_world_ranks()
        with all_met(self.cluster_environment, self.rendezvous_timeout_s):
            super().setup_environment()
