"""Lightning's strategy, and ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ic.parallel.options import StrategyOptions

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


class StrategyConfig(StrategyOptions):
    def build(self, precision: str) -> str | Strategy:
        """The strategy, or the name of Lightning's own choice.

        Args:
            precision: the trainer's.
        """
        backend = self.process_group_backend
        if self.name == "ddp":
            from lightning.pytorch.strategies import DDPStrategy

            return DDPStrategy(process_group_backend=backend)
        if self.name == "fsdp":
            from ic.parallel.fsdp import LayerFSDPStrategy

            return LayerFSDPStrategy(precision, backend)
        if self.name == "fsdp2":
            from ic.parallel.fsdp2 import FSDP2Strategy

            return FSDP2Strategy(self.context_parallel_size, backend)
        return "auto"
