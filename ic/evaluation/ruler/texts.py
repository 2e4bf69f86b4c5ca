"""Texts that RULER takes from elsewhere: prose for haystacks, questions with their documents."""

from __future__ import annotations

import hashlib
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

from ic.datamodules.compressed import without_compression
from ic.datamodules.options import SUFFIXES
from ic.datamodules.text_files import TextFiles, detect_format, expand_folders, resolve_files
from ic.evaluation.ruler.grid import Config
from ic.evaluation.ruler.questions import SHIPPED, Questions, hotpotqa, shipped_paragraphs, squad

# As many as a million tokens can hold. A longer haystack is repeated, as in RULER.
_MOST_WORDS = 2**20
_SETTING = "suite.ruler.haystack"
_KNOWN = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)


class Texts:
    """The texts of a configuration, read when they are asked for.

    Raises:
        ValueError: (by each property) a file is missing, unreadable, empty or of another form.
    """

    def __init__(self, config: Config) -> None:
        self._config = config

    @cached_property
    def essay(self) -> tuple[str, ...]:
        """The words of the prose."""
        path = self._config.haystack
        if path is not None:
            return _read_words(path)
        pairs = shipped_paragraphs()
        return tuple(" ".join(pair[part]["text"] for pair in pairs for part in ("a", "b")).split())

    @cached_property
    def squad(self) -> Questions:
        return squad(self._config.squad)

    @cached_property
    def hotpotqa(self) -> Questions:
        return hotpotqa(self._config.hotpotqa)

    @property
    def digests(self) -> dict[str, str]:
        """What identifies each."""
        essay = hashlib.sha256(" ".join(self.essay).encode()).hexdigest()[:16]
        return {"haystack": essay, "squad": self.squad.digest, "hotpotqa": self.hotpotqa.digest}


def name_of(config: Config, task: str) -> str | None:
    """Where a task's text comes from: a file or folder name, `shipped`, or None: it is made."""
    if task in ("qa_1", "qa_2"):
        path = config.squad if task == "qa_1" else config.hotpotqa
    elif task.startswith("niah") and task not in (
        "niah_single_1",
        "niah_multikey_2",
        "niah_multikey_3",
    ):
        path = config.haystack
    else:
        return None
    return SHIPPED if path is None else Path(path).name


def _read_words(path: str) -> tuple[str, ...]:
    where = f"{_SETTING}={path}"
    files = resolve_files(expand_folders([path], _SETTING), _SETTING)
    for file in files:
        if not without_compression(file).lower().endswith(_KNOWN):
            raise ValueError(
                f"{where}: {Path(file).name} is neither text, JSON Lines nor parquet "
                f"({', '.join(_KNOWN)})"
            )
    documents = chain.from_iterable(
        TextFiles([file], detect_format([file], "auto", where), "text", "file").documents(0)
        for file in files
    )
    words = tuple(islice((word for _, text in documents for word in text.split()), _MOST_WORDS))
    if not words:
        raise ValueError(f"{where}: holds no word; give prose, the longer the better")
    return words
