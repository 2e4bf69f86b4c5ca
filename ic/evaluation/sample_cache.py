"""Samples that were drawn before, kept on disk: those of a million tokens take long to draw.

A sample is a file of its own, in a folder for each suite, its settings, the tokenizer and the code
that draws, so that a change of any of them draws anew. Files are written whole, so several
processes may share the folder; what cannot be read is drawn again.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Generic

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.datamodules.tokenizers import tokenizer_identity
from ic.evaluation.suite import C, Sample, Suite
from ic.files.atomic_write import replacing

FOLDER = "samples"  # of `sample_cache=auto`


class SampleCache(Generic[C]):
    """The samples of one suite and tokenizer.

    Args:
        folder: of all suites.
    """

    def __init__(self, folder: Path, suite: Suite[C], tokenizer: PreTrainedTokenizerBase) -> None:
        self._suite, self._tokenizer = suite, tokenizer
        template = str(tokenizer.chat_template)
        shaping = [suite.settings(), tokenizer_identity(tokenizer), template, _code_identity()]
        key = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]
        self._folder = folder / suite.name / key

    def sample(self, cell: C, index: int) -> Sample:
        """Sample `index` of a cell, from its file if there is one, else drawn and kept."""
        key = json.dumps([asdict(cell), index], sort_keys=True)
        file = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
        if (kept := _read(file, key)) is not None:
            return kept
        drawn = self._suite.sample(self._tokenizer, cell, index)
        rest = json.dumps([key, drawn.expected, drawn.new_tokens])
        if type(drawn) is Sample and json.loads(rest)[1] == drawn.expected:
            ids = drawn.ids.astype(np.min_scalar_type(int(drawn.ids.max(initial=0))))
            # A full or unwritable disk, or another host's process of the same id, ends no
            # evaluation: the sample is there.
            with suppress(OSError), replacing(file) as partial, partial.open("wb") as opened:
                np.savez(opened, ids=ids, rest=np.frombuffer(rest.encode(), dtype=np.uint8))
        return drawn


def _read(file: Path, key: str) -> Sample | None:
    try:
        with np.load(file) as arrays:
            kept_key, expected, new_tokens = json.loads(arrays["rest"].tobytes())
            ids = arrays["ids"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Sample(ids, expected, new_tokens) if kept_key == key else None


@cache
def _code_identity() -> str:
    """Of everything that draws samples: the code and the words of evaluation and datamodules."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for part in ("evaluation", "datamodules"):
        folder = (root / part).resolve()  # one of them is a link
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".py", ".json", ".txt") and file.is_file():
                digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
