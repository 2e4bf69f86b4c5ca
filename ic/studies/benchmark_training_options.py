"""What `benchmark training` measures."""

from __future__ import annotations

from dataclasses import dataclass, field

from ic.errors import check_choice, check_once
from ic.model.options import FP8_RECIPES

TRANSFORMERS = "transformers"
SIDES = ("ours", *(f"fp8 {recipe}" for recipe in FP8_RECIPES), TRANSFORMERS)


@dataclass
class TrainingBenchmarkOptions:
    """Every side trains the same weights on the same tokens.

    Attributes:
        lengths: tokens of a sequence; each is measured on every side.
        tokens_per_batch: tokens of a step, a multiple of each length.
        sides: ours in the usual precision, ours with FP8 products by recipe, and DeepSeek-V3 of
            transformers with dense feed-forward layers; null is all.
        preset: an option of the group `model`.
        vocab_size: rows of embedding and head, at least 320.
        attention, norm, rope: `torch` or `triton`, for our sides.
        compile: by torch.compile, each of our layers and the whole of transformers' model.
        fp8_keep_layers: decoder layers that FP8 leaves as they are, as `model.fp8_keep_layers`.
        fp8_keep: names of linear layers that FP8 leaves as they are, as `model.fp8_keep`.
        steps: steps timed, after `warmup` others.
        warmup: steps before the clock starts.
        output: results file.
        side: measure this side of the one length in this process and print its row; null measures
            all, each in a process of its own.
    """

    lengths: list[int] = field(default_factory=lambda: [4096, 32768])
    tokens_per_batch: int = 32768
    sides: list[str] | None = None
    preset: str = "mla_1b"
    vocab_size: int = 32768
    attention: str = "triton"
    norm: str = "triton"
    rope: str = "triton"
    compile: bool = True
    fp8_keep_layers: list[int] = field(default_factory=lambda: [0, -1])
    fp8_keep: list[str] = field(default_factory=list)
    steps: int = 20
    warmup: int = 5
    output: str = "runs/train-step.json"
    side: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 320), ("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths={self.lengths}: at least one, each at least 2")
        check_once("lengths", self.lengths)
        if odd := [length for length in self.lengths if self.tokens_per_batch % length]:
            raise ValueError(
                f"tokens_per_batch={self.tokens_per_batch}: must be a multiple of each of lengths, "
                f"and is none of {odd[0]}"
            )
        for side in self.sides or ():
            check_choice("sides", side, SIDES)
        if self.sides is not None:
            check_once("sides", self.sides)
        if not self.output.endswith(".json"):
            raise ValueError(f"output={self.output!r}: must end in .json")
        if self.side is not None and (self.side not in SIDES or len(self.lengths) != 1):
            raise ValueError(f"side={self.side!r}: one of {', '.join(SIDES)}, with a single length")
