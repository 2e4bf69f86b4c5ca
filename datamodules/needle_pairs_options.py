"""What `make_preferences` is asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from ic.datamodules.needle_names import FILLERS, PROMPTS, SPLITS
from ic.errors import check_once

REJECTED = ("distractor", "near_miss", "refusal")


@dataclass
class MakePreferencesOptions:
    """The verb `make-preferences`.

    Attributes:
        output: `.jsonl` or `.parquet`.
        lengths: tokens of a pair's longer sequence, prompt and completion.
        depths: needle positions, 0 the beginning and 1 right before the question.
        samples: pairs of each length and depth.
        tokens_per_length: pairs of about so many tokens of each length, many short ones and few
            long ones, instead of `samples`.
        prompt: `chat`, a question in a conversation, or `plain` text that the model continues, as
            pre-training and the passkey evaluation ask.
        num_distractors: other named keys in the text. With none, `plain` hides the one unnamed key
            of the task `single`.
        rejected: how often each kind is the rejected answer; empty for all kinds alike, of which
            `distractor` needs some.
        filler: `noise` sentences or `random` words,
        seed: of keys, names and fillers.
        text_files: or, if given, the user's own text files.
        split: keys of `train`, `validation` or `test`; the passkey evaluation uses the last two.
        tokenizer: `bytes`, or a folder with a Hugging Face tokenizer that has a chat template.
    """

    output: str = "???"
    lengths: list[int] = field(default_factory=lambda: [4096])
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    samples: int = 20
    tokens_per_length: int | None = None
    prompt: str = "chat"
    num_distractors: int = 8
    rejected: dict[str, float] = field(default_factory=dict)
    filler: str = "noise"
    text_files: list[str] = field(default_factory=list)
    split: str = "train"
    tokenizer: str = "bytes"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.output.endswith((".jsonl", ".parquet")) and self.output != "???":
            raise ValueError(f"output={self.output!r}: name a .jsonl or .parquet file")
        if not self.lengths or min(self.lengths) < 128:
            raise ValueError(f"lengths={self.lengths}: at least one, each at least 128")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={self.depths}: at least one, each in [0, 1]")
        check_once("lengths", self.lengths)
        check_once("depths", self.depths)
        for name, least in (
            ("samples", 1),
            ("tokens_per_length", 1),
            ("num_distractors", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        for name, allowed in (("filler", FILLERS), ("split", SPLITS), ("prompt", PROMPTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {', '.join(allowed)}")
        if unknown := sorted(set(self.rejected) - set(REJECTED)):
            raise ValueError(f"rejected: unknown {unknown}; choose from {', '.join(REJECTED)}")
        if not self.rejected:
            self.rejected = dict.fromkeys(REJECTED if self.num_distractors else REJECTED[1:], 1.0)
        if min(self.rejected.values()) < 0 or not sum(self.rejected.values()):
            raise ValueError(f"rejected={self.rejected}: weights >= 0, one above 0")
        if self.rejected.get("distractor") and not self.num_distractors:
            raise ValueError("rejected.distractor: needs num_distractors above 0, or weight 0")

    @property
    def num_pairs(self) -> int:
        return len(self.depths) * sum(self.samples_of(length) for length in self.lengths)

    def samples_of(self, length: int) -> int:
        """Pairs of a length and depth."""
        if self.tokens_per_length is None:
            return self.samples
        return max(1, round(self.tokens_per_length / (length * len(self.depths))))
