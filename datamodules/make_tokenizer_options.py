"""What `make_tokenizer` is asked. Imports no library, so that help and errors come at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ic.datamodules.options import CHAT_TEMPLATES, FORMATS

# Every byte, bos, eos, pad, and up to four tokens of a chat template.
_LEAST_VOCABULARY = 256 + 3 + 4


@dataclass
class MakeTokenizerOptions:
    """The verb `make_tokenizer`: a BPE tokenizer trained on one's own text.

    Attributes:
        files: paths or globs of text, JSON Lines or parquet, compressed or not.
        output: folder to write, for `tokenizer=` of a run.
        vocab_size: tokens at most, special ones and the 256 bytes included; fewer if the text does
            not give as many.
        format: `text`, `jsonl`, `parquet`, or `auto` for the files' suffix.
        text_column: key (jsonl) or column (parquet) that holds the text.
        min_frequency: how often a pair must occur to become a token.
        chat_template: `ic`, `chatml`, a file with a Jinja template, or null for none.
        overwrite: replace a tokenizer that is in the output folder.
    """

    files: list[str] = field(default_factory=list)
    output: str = "???"
    vocab_size: int = 8192
    format: str = "auto"
    text_column: str = "text"
    min_frequency: int = 2
    chat_template: str | None = "ic"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files is empty: give paths or globs, for example files=[book.txt]")
        if self.vocab_size < _LEAST_VOCABULARY:
            raise ValueError(
                f"vocab_size={self.vocab_size}: must be at least {_LEAST_VOCABULARY}, for the 256 "
                "bytes and the special tokens"
            )
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r}: choose from {', '.join(FORMATS)}")
        if self.min_frequency < 1:
            raise ValueError(f"min_frequency={self.min_frequency}: must be at least 1")
        template = self.chat_template
        if template not in (None, *CHAT_TEMPLATES) and not Path(str(template)).is_file():
            raise ValueError(
                f"chat_template={template!r}: choose from {', '.join(CHAT_TEMPLATES)}, name a file "
                "that holds a Jinja template, or null"
            )
        folder = Path(self.output)
        if folder.exists():
            if not (folder / "tokenizer.json").is_file():
                raise ValueError(
                    f"output={self.output} exists and holds no tokenizer: choose another folder"
                )
            if not self.overwrite:
                raise ValueError(
                    f"output={self.output} exists: choose another folder, or replace the tokenizer "
                    "in it with overwrite=true"
                )
