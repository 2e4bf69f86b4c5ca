"""What `data=retrieval` is asked. Imports no PyTorch, so that help and errors come at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from ic.datamodules.needle_names import HAYSTACKS, QUESTION_PLACES, RETRIEVAL_TASKS
from ic.datamodules.options import GeneratedDataOptions, check_text_options, check_weights


@dataclass
class RetrievalDataOptions(GeneratedDataOptions):
    """Configuration of `RetrievalDataModule`.

    Attributes:
        task_weights: how often each task is drawn: `fact` (one, or several alike), `profile`
            (several facts of one entity), `block` (facts that stand together), `owner` (whose
            value it is), `values` (all of one entity), `entities` (several asked for at once),
            `order` (which of several comes first or last), `variables` (chains), `repeated` (words
            that occur several times), `nonliteral` (no word in common),
            `recall` (how a sentence of the haystack went on).
        key_families: what facts hold: `digits`, `hex`, `letters`, `words`, `pseudo-words`, `names`,
            `dates`, `amounts`, `codes`; all if empty.
        forms: kinds of statements and questions, such as `sentence`, `request` and `json`; all if
            empty.
        haystack_weights: how often a sequence consists of `noise` sentences, of `random` letters,
            of random English `words`, or of `text` of the files; without files `text` counts 0.
        facts_fraction: share of the sequences that have facts in them; the others are the haystack
            alone, of text several documents that do not see each other.
        fact_share: most of a sequence that facts and questions take.
        least_fact_share: least part of `fact_share` that they take; how much is drawn.
        question_weights: how often the questions of a sequence stand `along` the way, the last at
            its end; all at the `end`; or all at the end of the first turn of a conversation and in
            its following ones (`chat`), in the tokenizer's own chat template.
        train_files: paths or globs of text to strew facts into while training.
        val_files: the same for validation and test, which have no text of their own without it.
        format: `text`, `jsonl`, `parquet`, or `auto` for the files' suffix.
        text_column: key (jsonl) or column (parquet) that holds the document.
        document_unit: what of a text file is one document: `file`, `paragraph` or `line`.
        text_megabytes: most text that is used; a warning says when files have more.
        least_document_tokens: leave out documents of fewer tokens.
        token_cache: folder that keeps the tokens of the files for the next run; auto is
            ~/.cache/infinite-context/tokens, null keeps them in the memory of each process.
    """

    LEAST_LENGTH = 128

    name: str = "retrieval"
    task_weights: dict[str, float] = field(
        default_factory=lambda: {
            "fact": 6.0,
            "profile": 1.0,
            "block": 1.5,
            "owner": 0.5,
            "values": 1.0,
            "entities": 1.0,
            "order": 0.5,
            "variables": 1.0,
            "repeated": 0.5,
            "nonliteral": 0.25,
            "recall": 1.5,
        }
    )
    key_families: list[str] = field(default_factory=list)
    forms: list[str] = field(default_factory=list)
    haystack_weights: dict[str, float] = field(
        default_factory=lambda: {"noise": 1.0, "random": 1.0, "words": 1.0, "text": 3.0}
    )
    facts_fraction: float = 1.0
    fact_share: float = 0.75
    least_fact_share: float = 0.5
    question_weights: dict[str, float] = field(
        default_factory=lambda: {"along": 1.0, "end": 0.0, "chat": 0.0}
    )
    train_files: list[str] = field(default_factory=list)
    val_files: list[str] = field(default_factory=list)
    format: str = "auto"
    text_column: str = "text"
    document_unit: str = "file"
    text_megabytes: int = 512
    least_document_tokens: int = 0
    token_cache: str | None = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text_options(self, ("train_files", "val_files"))
        if not 0 < self.fact_share <= 0.9:
            raise ValueError(f"data.fact_share={self.fact_share}: must be above 0, at most 0.9")
        if not 0 <= self.facts_fraction <= 1:
            raise ValueError(f"data.facts_fraction={self.facts_fraction}: must be in [0, 1]")
        if not 0 < self.least_fact_share <= 1:
            raise ValueError(
                f"data.least_fact_share={self.least_fact_share}: must be above 0, at most 1"
            )
        for name, least in (("text_megabytes", 1), ("least_document_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least {least}")
        check_weights("data.question_weights", self.question_weights, QUESTION_PLACES)
        check_weights("data.task_weights", self.task_weights, RETRIEVAL_TASKS)
        check_weights("data.haystack_weights", self.haystack_weights, HAYSTACKS)
        if not sum(self.haystack_weights.get(name, 0.0) for name in HAYSTACKS[:-1]) and not (
            self.train_files and self.val_files
        ):
            raise ValueError(
                f"data.haystack_weights={self.haystack_weights} leaves nothing but text: give "
                "data.train_files and data.val_files, or another haystack a weight"
            )
