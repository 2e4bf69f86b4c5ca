"""Lightning's strategy, and ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ic.parallel.options import StrategyOptions

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


class StrategyConfig(StrategyOptions):
    def build(self, precision: str, num_processes: int) -> str | Strategy:
        """The strategy, or the name of Lightning's own choice for one process.

        Args:
            precision: the trainer's.
            num_processes: over all hosts.
        """
        backend, wait_s = self.process_group_backend, self.rendezvous_timeout_s
        if self.name == "ddp" or (self.name == "auto" and num_processes > 1):
            from ic.parallel.ddp import MeetingDDPStrategy

            return MeetingDDPStrategy(backend, wait_s)
        if self.name == "fsdp":
            from ic.parallel.fsdp import LayerFSDPStrategy

            return LayerFSDPStrategy(precision, backend, wait_s)
        if self.name == "fsdp2":
            from ic.parallel.fsdp2 import FSDP2Strategy

            return FSDP2Strategy(self.context_parallel_size, backend, wait_s)
        return "auto"
