"""What a parity report measures of an original and its conversion.

Without PyTorch and NumPy, so that help and errors come at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ic.errors import check_choice, check_once
from ic.evaluation.niah.grid import TASKS as NIAH_TASKS
from ic.evaluation.niah.grid import Config as NiahConfig
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.evaluation.perplexity.grid import FULL
from ic.evaluation.perplexity.grid import Config as PerplexityConfig
from ic.inference.options import LoadOptions

LOGITS, WEIGHTS, CACHE, PASSKEY, NIAH, INSTRUCTIONS, TURNS, SPEED = (
    "logits",
    "weights",
    "cache",
    "passkey",
    "niah",
    "instructions",
    "turns",
    "speed",
)
PARTS = (LOGITS, WEIGHTS, CACHE, PASSKEY, NIAH, INSTRUCTIONS, TURNS, SPEED)
# That ask in the tokenizer's chat template.
TALKS = (INSTRUCTIONS, TURNS)
SUITES = (PASSKEY, NIAH)
# Instructions that the package has (`instructions.jsonl`).
MOST_INSTRUCTIONS = 50
_DEPTHS = 5  # of the needles: 0, 0.25, 0.5, 0.75, 1


class TextOptions(PerplexityConfig):
    """The documents, as the suite perplexity reads them, under the names that they have here."""

    _NAMES: ClassVar[dict[str, str]] = {
        "files": "text",
        "samples": "documents",
        "samples_by_length": "documents_by_length",
    }

    def setting(self, name: str) -> str:
        return self._NAMES.get(name, name)


@dataclass
class ParityOptions:
    """What is measured of two models; the defaults take a small model minutes on two cores.

    Attributes:
        text: texts that neither model was trained on: folders, paths or globs; text, JSON Lines or
            parquet, compressed or not. Documents for logits and perplexity, and what the needles of
            niah are hidden in.
        format: `text`, `jsonl`, `parquet`, or `auto` for the files' suffix.
        text_column: key (jsonl) or column (parquet) that holds the document.
        document_unit: what of a text file is one document: `file`, `paragraph` or `line`.
        parts: what is measured, of `logits` (with the perplexity), `weights` and `cache` (bytes),
            `passkey`, `niah`, `instructions`, `turns` (of conversations) and `speed`; an empty list
            is all of them, instructions and turns where the tokenizer has a chat template.
        lengths: in tokens, of the documents; those beyond the original's positions are read by the
            converted model alone.
        documents: of each length, drawn by `seed` from those that are as long; of each the
            beginning is read. At least 10 make the intervals narrow.
        documents_by_length: other counts for some lengths, `{131072: 2}`.
        bucket_tokens: positions of the first bucket of what is shown by position; the others each
            double the position.
        context_tokens: contexts whose caches are made, a layer of each kind, to be measured.
        retrieval_lengths: of the prompts of passkey and niah, in tokens; those beyond the
            original's positions are answered by the converted model alone.
        retrieval_samples: of each length, and of each task of niah; a multiple of 5, which is how
            many depths they are spread over. 60 or more tell a few per cent apart.
        niah_tasks: as `suite.niah.tasks`.
        instructions: how many of the package's 50 instructions are asked.
        answer_tokens: longest answer to an instruction.
        conversations: how many conversations are held, of `turns` of the instructions each.
        turns: questions and answers of a conversation.
        speed_tokens: lengths of the cache at which the speed is measured.
        speed_repeats: measurements of each, of which the median counts.
        decode_tokens: that are decoded for each measurement.
        prefill_chunk_tokens: longest piece of a prompt that is processed at once.
        seed: of the documents and the needles.
    """

    text: list[str] = field(default_factory=list)
    format: str = "auto"
    text_column: str = "text"
    document_unit: str = "file"
    parts: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [512, 2048])
    documents: int = 4
    documents_by_length: dict[int, int] = field(default_factory=dict)
    bucket_tokens: int = 128
    context_tokens: list[int] = field(default_factory=lambda: [8192, 131072])
    retrieval_lengths: list[int] = field(default_factory=lambda: [512, 1024])
    retrieval_samples: int = 5
    niah_tasks: list[str] = field(default_factory=lambda: ["own_words", "other_words"])
    instructions: int = 20
    answer_tokens: int = 40
    conversations: int = 5
    turns: int = 4
    speed_tokens: list[int] = field(default_factory=lambda: [128, 1024])
    speed_repeats: int = 3
    decode_tokens: int = 16
    prefill_chunk_tokens: int = 131072
    seed: int = 1234

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for name in ("parts", "lengths", "context_tokens", "retrieval_lengths", "speed_tokens"):
            check_once(name, getattr(self, name))
        for name, least in (
            ("documents", 1),
            ("answer_tokens", 1),
            ("conversations", 1),
            ("turns", 1),
            ("speed_repeats", 1),
            ("decode_tokens", 1),
            ("prefill_chunk_tokens", 1),
            ("bucket_tokens", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        for name, least in (
            ("lengths", 128),
            ("context_tokens", 1),
            ("retrieval_lengths", 128),
            ("speed_tokens", 1),
        ):
            if not getattr(self, name) or min(getattr(self, name)) < least:
                raise ValueError(f"{name}={getattr(self, name)}: one or more, each from {least} on")
        if self.retrieval_samples < _DEPTHS or self.retrieval_samples % _DEPTHS:
            raise ValueError(
                f"retrieval_samples={self.retrieval_samples}: must be a multiple of {_DEPTHS}, "
                "because they are spread over as many depths"
            )
        if not self.niah_tasks or not set(self.niah_tasks) <= set(NIAH_TASKS):
            raise ValueError(
                f"niah_tasks={self.niah_tasks}: one or more of {', '.join(NIAH_TASKS)}"
            )
        check_once("niah_tasks", self.niah_tasks)
        if not 1 <= self.instructions <= MOST_INSTRUCTIONS:
            raise ValueError(
                f"instructions={self.instructions}: must be from 1 to {MOST_INSTRUCTIONS}; to "
                "leave them out, name the other parts: "
                f"parts=[{','.join(part for part in PARTS if part not in TALKS)}]"
            )
        if self.conversations * self.turns > MOST_INSTRUCTIONS:
            raise ValueError(
                f"conversations={self.conversations} of turns={self.turns}: the package has "
                f"{MOST_INSTRUCTIONS} instructions for all of them together; choose fewer"
            )
        self.documents_options()

    @property
    def measured(self) -> tuple[str, ...]:
        """The parts that are asked for, in the order of the report."""
        return tuple(part for part in PARTS if not self.parts or part in self.parts)

    def documents_options(self) -> TextOptions:
        """Which documents are read.

        Raises:
            ValueError: options that do not fit.
        """
        return TextOptions(
            lengths=self.lengths,
            samples=self.documents,
            samples_by_length=self.documents_by_length,
            files=self.text,
            format=self.format,
            text_column=self.text_column,
            document_unit=self.document_unit,
            tasks=[FULL],
            bucket_tokens=self.bucket_tokens,
            seed=self.seed,
        )

    def passkey_options(self, lengths: list[int]) -> PasskeyGridConfig:
        """The suite passkey at these lengths: one needle in noise, five depths."""
        return PasskeyGridConfig(
            lengths=lengths,
            samples=self.retrieval_samples // _DEPTHS,
            fillers=["noise"],
            control_samples=0,
            prefill_chunk_tokens=self.prefill_chunk_tokens,
            seed=self.seed,
        )

    def niah_options(self, lengths: list[int]) -> NiahConfig:
        """The suite niah at these lengths, in words and with keys that no training has."""
        return NiahConfig(
            lengths=lengths,
            samples=self.retrieval_samples,
            tasks=self.niah_tasks,
            repeat=True,
            control_samples=0,
            prefill_chunk_tokens=self.prefill_chunk_tokens,
            seed=self.seed,
        )


@dataclass
class ParityConfig(LoadOptions, ParityOptions):
    """The verb `parity`: an original and its conversion, measured on the same inputs.

    Attributes:
        original: the source of the model that was converted, in any form that
            `ic.checkpoint.source` knows.
        converted: the source of the conversion; any other model with the same tokenizer does.
        output: folder of the report; it may hold an earlier one of the same two models, which is
            then continued.
        tokenizer: `bytes`, or a folder that holds the tokenizer of both; null is each one's own.
        dtype: of both: float32, bfloat16 or float16; auto is bfloat16 on a GPU (float16 below
            sm_80) and float32 on a CPU.
        cache_dtype: what the cache of the converted model holds: fp8 or int8; auto is what it was
            saved with. `converted` may be the original itself.
        attention, norm, rope: names of backends, for whichever of the two is ours.
    """

    original: str = "???"
    converted: str = "???"
    output: str = "???"

    def __post_init__(self) -> None:
        ParityOptions.__post_init__(self)
        LoadOptions.__post_init__(self)
        if LOGITS in self.measured and not self.text:
            raise ValueError(
                "text=[]: name long texts that neither model was trained on, folders or files "
                "(text, .jsonl, .parquet), for example text=['books/*.txt']; or leave logits out "
                f"of parts=[{','.join(PARTS[1:])}]"
            )
