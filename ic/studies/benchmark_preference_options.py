"""What `benchmark preference` measures."""

from __future__ import annotations

from dataclasses import dataclass, field

from ic.errors import check_once

TWICE = "ours, prompt twice"
SIDES = ("ours", TWICE, "trl")


@dataclass
class PreferenceBenchmarkOptions:
    """Both sides train the same model on the same pairs.

    Attributes:
        lengths: tokens of a pair's longer sequence; each is measured on every side.
        preset: an option of the group `model`.
        vocab_size: rows of embedding and head, 129280 in DeepSeek-V3; the text is bytes all the
            same, so at least 320.
        attention: `torch` or `triton`, for both sides.
        steps: steps timed, after `warmup` others.
        warmup: steps before the clock starts.
        output: results file.
        side: measure this side of the one length in this process and print its row; null measures
            all, each in a process of its own.
    """

    lengths: list[int] = field(default_factory=lambda: [32768, 65536])
    preset: str = "mla_1b"
    vocab_size: int = 129280
    attention: str = "torch"
    steps: int = 5
    warmup: int = 2
    output: str = "runs/preference-memory.json"
    side: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 320), ("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not self.lengths or min(self.lengths) < 128:
            raise ValueError(f"lengths={self.lengths}: at least one, each at least 128")
        check_once("lengths", self.lengths)
        if self.side is not None and (self.side not in SIDES or len(self.lengths) != 1):
            raise ValueError(f"side={self.side!r}: one of {', '.join(SIDES)}, with a single length")
