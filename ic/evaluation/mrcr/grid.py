"""What an ordering evaluation measures: how many similar pieces, at which lengths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ic.errors import check_once
from ic.evaluation.options import SuiteOptions


@dataclass
class Config(SuiteOptions):
    """One of several similar pieces of a conversation, asked for by its place among them.

    Attributes:
        needles: how many pieces have the same request; a task for each number, as 2, 4 and 8 in
            OpenAI's MRCR.
        piece_lines: lines of each piece, each of about 50 letters.
    """

    suite: ClassVar[str] = "mrcr"

    needles: list[int] = field(default_factory=lambda: [2, 4, 8])
    piece_lines: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.needles or min(self.needles) < 2:
            raise ValueError(f"{self.key('needles')}: at least one number, each at least 2")
        check_once("suite.mrcr.needles", self.needles)
        if self.piece_lines < 2:
            raise ValueError(f"{self.key('piece_lines')}: must be at least 2")
