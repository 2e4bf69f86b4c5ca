"""What a folder in Hugging Face's format is made of: a configuration and safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

from ic.checkpoint.errors import CheckpointError, damaged_error

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Of weights in other formats.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")

# One of them is in every folder that holds a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "byte_vocab.json",
)
# What decides how a text becomes tokens, how turns are written and where an answer ends.
TOKENIZER_PARTS = (
    *TOKENIZER_FILES,
    *("special_tokens_map.json", "added_tokens.json", "vocab.txt", "merges.txt"),
    *("sentencepiece.bpe.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)


def folder_model_type(folder: Path) -> str | None:
    """`model_type` of a folder's configuration; None if it cannot be read or does not say."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, or its only one.

    Raises:
        CheckpointError: there is none, or one of the index is missing.
    """
    if (folder / INDEX).is_file():
        try:
            named = json.loads((folder / INDEX).read_text())["weight_map"].values()
        except (OSError, ValueError, KeyError) as error:
            raise damaged_error(folder / INDEX, error) from error
        files = [folder / name for name in sorted(set(named))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of the {len(files)} files of its {INDEX}, the "
                f"first is {missing[0]}"
            )
        return files
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    others = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in (".safetensors", *OTHER_WEIGHTS) and path.name != "trainer.pt"
    )
    found = f", but {', '.join(others[:3])}" if others else ""
    raise CheckpointError(
        f"{folder} is not a checkpoint: it holds no {WEIGHTS} and no {INDEX}{found}"
    )
