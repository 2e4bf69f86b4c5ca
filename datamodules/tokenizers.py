"""Tokenizers by name or by folder; the byte tokenizer is registered with `transformers` here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ic.checkpoint.hugging_face import TOKENIZER_FILES
from ic.checkpoint.source import tokenizer_folder
from ic.datamodules.chat_templates import set_chat_template
from ic.model.byte_tokenizer import VOCAB_SIZE, ByteTokenizer


def build_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """`bytes`, or a folder with a Hugging Face tokenizer: of a run, that of its last checkpoint.

    Args:
        chat_template: in place of the tokenizer's own, as `set_chat_template` takes it.

    Raises:
        ValueError: neither.
    """
    if name == "bytes":
        tokenizer: PreTrainedTokenizerBase = ByteTokenizer()
    elif name and Path(name).is_dir():
        tokenizer = load_tokenizer(tokenizer_folder(Path(name)))
    else:
        raise ValueError(f"tokenizer={name!r}: write bytes, or a folder that holds a tokenizer")
    if chat_template is not None:
        set_chat_template(tokenizer, chat_template)
    return tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a folder holds; no code of the folder's is run.

    Raises:
        ValueError: it holds none, or one that cannot be loaded.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); say which to use with "
            "tokenizer=bytes or tokenizer=FOLDER"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"the tokenizer in {folder} cannot be loaded: {error}; say which to use instead with "
            "tokenizer=bytes or tokenizer=FOLDER"
        ) from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of the tokens that plain text becomes: of the vocabulary without what was added to
    it, such as the marks of a chat template.
    """
    added = tokenizer.get_added_vocab()
    plain = sorted(item for item in tokenizer.get_vocab().items() if item[0] not in added)
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sum of everything that decides which tokens a text becomes."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    known = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab()))
    return hashlib.sha256(f"{type(tokenizer).__name__}\0{known}".encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the embedding: the tokenizer's with its added tokens, a multiple of 64."""
    rows = -(-len(tokenizer) // 64) * 64
    return max(VOCAB_SIZE, rows) if isinstance(tokenizer, ByteTokenizer) else rows
