"""Tokenizers by name or by folder; the byte tokenizer is registered with `transformers` here."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ic.datamodules.byte_tokenizer import VOCAB_SIZE, ByteTokenizer


def build_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """`bytes`, or a folder with a Hugging Face tokenizer.

    Raises:
        ValueError: neither.
    """
    if name == "bytes":
        return ByteTokenizer()
    if not Path(name).is_dir():
        raise ValueError(f"tokenizer={name!r}: write bytes, or a folder that holds a tokenizer")
    return load_tokenizer(Path(name))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a folder holds; no code of the folder's is run."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the embedding: the tokenizer's, a multiple of 64."""
    return VOCAB_SIZE if isinstance(tokenizer, ByteTokenizer) else -(-len(tokenizer) // 64) * 64
