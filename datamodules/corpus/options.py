"""What `prepare_corpus` is asked. Imports no library, so that help and errors come at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ic.datamodules.options import COMPRESSIONS, SUFFIXES


@dataclass
class PrepareCorpusOptions:
    """The verb `prepare_corpus`: long documents out of folders, as JSON Lines for `data=text`.

    Attributes:
        books: folders of books as Markdown or text, compressed or not, with their subfolders.
        code: source trees, each a repository: the files of a directory become one document.
        rfcs: folders of RFCs as text, compressed or not, with their subfolders.
        output: the file for training, `.jsonl`, with `.gz`, `.bz2`, `.xz` or `.zst` behind it to be
            compressed. `NAME-heldout`, `NAME-counts.json` and `NAME-lengths.png` go beside it.
        held_out: share of the authors whose documents go to `NAME-heldout`; at least one author,
            where there are two. A hash of the name decides, so another book moves no author.
        held_out_authors: these instead, by name.
        licence: of documents that do not state theirs.
        least_bytes: shorter documents are left out.
        least_compressed: documents are left out that zlib makes smaller than this share of their
            size: tables, logs, what repeats itself.
        most_compressed: and those that it leaves larger than this share: encoded data, random text.
        near_duplicate: documents are left out that share this much of their five-word sequences
            with an earlier one (Jaccard similarity, estimated by MinHash); 1 keeps near-duplicates.
        boilerplate_documents: paragraphs of 200 bytes or more that stand in so many documents are
            cut out of all of them, as licences and standing notices do; 0 keeps them.
        overwrite: replace files that are there.
    """

    books: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    rfcs: list[str] = field(default_factory=list)
    output: str = "???"
    held_out: float = 0.05
    held_out_authors: list[str] = field(default_factory=list)
    licence: str | None = None
    least_bytes: int = 2000
    least_compressed: float = 0.15
    most_compressed: float = 0.65
    near_duplicate: float = 0.7
    boilerplate_documents: int = 5
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not (self.books or self.code or self.rfcs):
            raise ValueError(
                "no text is named: give folders, for example books=[FOLDER], code=[FOLDER] or "
                "rfcs=[FOLDER]"
            )
        for name, least, most in (
            ("held_out", 0.0, 0.9),
            ("least_compressed", 0.0, 1.0),
            ("most_compressed", 0.0, 2.0),
            ("near_duplicate", 0.3, 1.0),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name}={getattr(self, name)}: must be between {least:g} and {most:g}"
                )
        if self.least_compressed >= self.most_compressed:
            raise ValueError(
                f"least_compressed={self.least_compressed}: must be below "
                f"most_compressed={self.most_compressed}"
            )
        if self.least_bytes < 1:
            raise ValueError(f"least_bytes={self.least_bytes}: must be at least 1")
        if self.boilerplate_documents < 0 or self.boilerplate_documents == 1:
            raise ValueError(
                f"boilerplate_documents={self.boilerplate_documents}: must be 0, or at least 2"
            )
        if self.output != "???":
            self._check_output()

    def _check_output(self) -> None:
        name = Path(self.output).name
        compressed = next((end for end in COMPRESSIONS if name.endswith(end)), "")
        if Path(name.removesuffix(compressed)).suffix not in SUFFIXES["jsonl"]:
            raise ValueError(
                f"output={self.output}: name a file that ends in .jsonl, and in "
                f"{', '.join(COMPRESSIONS)} behind that to compress it"
            )
        for path in (self.train_file, self.heldout_file):
            if path.is_dir():
                raise ValueError(f"output={self.output}: {path} is a folder; name a file")
            if path.exists() and not self.overwrite:
                raise ValueError(
                    f"output={self.output}: {path} exists; choose another name, or replace it with "
                    "overwrite=true"
                )

    @property
    def train_file(self) -> Path:
        return Path(self.output)

    @property
    def heldout_file(self) -> Path:
        stem, rest = self._stem_and_suffixes()
        return self.train_file.with_name(f"{stem}-heldout{rest}")

    @property
    def counts_file(self) -> Path:
        return self.train_file.with_name(f"{self._stem_and_suffixes()[0]}-counts.json")

    @property
    def lengths_file(self) -> Path:
        return self.train_file.with_name(f"{self._stem_and_suffixes()[0]}-lengths.png")

    def _stem_and_suffixes(self) -> tuple[str, str]:
        """`books.v2.jsonl.xz` -> `books.v2` and `.jsonl.xz`."""
        name = self.train_file.name
        compressed = next((end for end in COMPRESSIONS if name.endswith(end)), "")
        plain = Path(name.removesuffix(compressed))
        return plain.stem, plain.suffix + compressed
