"""Configuration of the strategy, and the combinations with the rest of the run that cannot work."""

from __future__ import annotations

from dataclasses import dataclass

STRATEGIES = ("auto", "ddp", "fsdp", "fsdp2")
_PRECISIONS = {
    "fsdp": ("32-true", "bf16-mixed", "16-mixed"),
    "fsdp2": ("32-true", "bf16-mixed", "bf16-true"),
}


@dataclass
class StrategyOptions:
    """Lightning strategy.

    Attributes:
        name: `auto` (one device alone, else DDP), `ddp`, `fsdp` (Lightning's, GPU only) or `fsdp2`
            (fully sharded over a mesh data x context, docs/parallel.md).
        process_group_backend: `nccl` or `gloo`; null for the device's usual one.
        context_parallel_size: ranks that share each sequence; `fsdp2` alone takes more than 1.
        rendezvous_timeout_s: how long the ranks wait for each other at the very start.
    """

    name: str = "auto"
    process_group_backend: str | None = None
    context_parallel_size: int = 1
    rendezvous_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ValueError(f"strategy.name={self.name!r}: choose one of {', '.join(STRATEGIES)}")
        size = self.context_parallel_size
        if size < 1:
            raise ValueError(f"strategy.context_parallel_size={size}: must be at least 1")
        if not self.rendezvous_timeout_s > 0:
            raise ValueError(
                f"strategy.rendezvous_timeout_s={self.rendezvous_timeout_s}: must be above 0"
            )
        if size > 1 and self.name != "fsdp2":
            raise ValueError(
                f"strategy.context_parallel_size={size} needs strategy=fsdp2, not {self.name!r}; "
                "choose strategy=fsdp2 or context_parallel_size=1"
            )

    def check_run(self, *, accelerator: str, gpus: int, precision: str, optimizer: str) -> None:
        """Refuse what this strategy cannot run with.

        Args:
            accelerator: the trainer's, `auto` included.
            gpus: number of GPUs that PyTorch sees.

        Raises:
            ValueError: naming both settings and what to change.
        """
        on_cpu = accelerator == "cpu" or (accelerator == "auto" and not gpus)
        if self.name == "fsdp" and on_cpu:
            raise ValueError(
                f"strategy.name=fsdp with trainer.accelerator={accelerator} on {gpus} GPUs: "
                "FSDP needs GPUs; choose strategy=fsdp2 or ddp on a CPU"
            )
        if self.process_group_backend == "nccl" and on_cpu:
            raise ValueError(
                f"strategy.process_group_backend=nccl with trainer.accelerator={accelerator} on "
                f"{gpus} GPUs: NCCL needs GPUs; choose gloo, or null for the device's own"
            )
        if precision not in _PRECISIONS.get(self.name, (precision,)):
            raise ValueError(
                f"trainer.precision={precision} with strategy.name={self.name}: choose one of "
                + ", ".join(_PRECISIONS[self.name])
            )
        if self.name == "fsdp" and optimizer == "muon":
            raise ValueError(
                "optimizer.name=muon with strategy.name=fsdp: FSDP flattens the matrices that Muon "
                "needs whole; choose strategy=fsdp2, or optimizer=adamw"
            )


@dataclass
class WatchdogOptions:
    """Barriers that name who is missing.

    Attributes:
        timeout_s: how long ranks wait for each other at the start and at a checkpoint.
        after_error_s: how long, once a collective has failed, to see who still answers.
    """

    timeout_s: float = 600.0
    after_error_s: float = 15.0

    def __post_init__(self) -> None:
        for name in ("timeout_s", "after_error_s"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"callbacks.watchdog.{name}={getattr(self, name)}: must be above 0"
                )
