"""What `convert` is asked. Imports no PyTorch: help and refusals come at once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from ic.checkpoint.card.licence import check_licence
from ic.conversion.parity.options import (
    CACHE,
    INSTRUCTIONS,
    PASSKEY,
    SPEED,
    TURNS,
    WEIGHTS,
    ParityConfig,
    ParityOptions,
)
from ic.datamodules.options import FORMATS
from ic.errors import check_choice
from ic.inference.options import ACCELERATORS

# Folder of the report in the output.
PARITY = "parity"
# What `parity` measures where there is no text to read.
WITHOUT_TEXT = [WEIGHTS, CACHE, PASSKEY, INSTRUCTIONS, TURNS, SPEED]


@dataclass
class ConvertOptions:
    """A model with grouped-query attention becomes one with Multi-head Latent Attention.

    Without `rank`, `cache` and `rope_dim` the result computes the same as the original, with a
    cache of the same size (the exact form).

    Attributes:
        source: the model: a Hugging Face folder or a GGUF file of a Llama, Qwen2, Qwen3 or Mistral.
        output: folder to make: an export with `conversion.json`.
        rank: rank of the latent, numbers per token and layer; or give `cache`.
        cache: share of the original's cache that the result may take, between 0 and 1; the rank
            follows from it.
        rope_dim: dimensions of the shared rotary key, a multiple of the original's head dimension,
            or fewer than it has: an even number; some of the frequencies are then kept, chosen on
            the text. null is one head's, fewer where that is more than half of what `cache` leaves,
            or those of all KV heads in the exact form and with QK norms.
        calibration: files of text to measure keys, values and queries on: paths or globs of text,
            JSON Lines or parquet, compressed or not.
        calibration_chats: files of conversations, such as an instruct model will read: JSON Lines
            or parquet with `messages`, in the tokenizer's chat template. They serve alone, or give
            half of the rows, and `calibration` the others.
        calibration_rows: sequences that are taken, of different documents where there are as many.
        calibration_tokens: tokens of each.
        format: auto (by suffix), text, jsonl or parquet.
        text_column: key or column that holds the text.
        tokenizer: `bytes`, or a folder with the tokenizer to use and save; null is the source's.
        accelerator: auto (a GPU if there is one), cpu or gpu.
        dtype: of the weights that are written: float32, bfloat16 or float16; null is the source's,
            and float32 for a GGUF file.
        max_shard_size: largest safetensors file, such as 5GB.
        overwrite: replace an existing output, if it is an export and nothing else.
        licence: of the model, for its card, such as apache-2.0; null takes the source's, if it
            says one.
        parity: what is measured of original and result, as by the verb `parity`, into the folder
            `parity` of the output; without a text of its own it reads `calibration`. null measures
            nothing.

    Raises:
        ValueError: a value out of its range, or `rank` and `cache` both.
    """

    source: str = "???"
    output: str = "???"
    rank: int | None = None
    cache: float | None = None
    rope_dim: int | None = None
    calibration: list[str] = field(default_factory=list)
    calibration_chats: list[str] = field(default_factory=list)
    calibration_rows: int = 32
    calibration_tokens: int = 2048
    format: str = "auto"
    text_column: str = "text"
    tokenizer: str | None = None
    accelerator: str = "auto"
    dtype: str | None = None
    max_shard_size: str = "5GB"
    overwrite: bool = False
    licence: str | None = None
    parity: ParityOptions | None = field(default_factory=ParityOptions)

    def __post_init__(self) -> None:
        check_licence(self.licence)
        if self.rank is not None and self.cache is not None:
            raise ValueError(f"rank={self.rank} and cache={self.cache}: give one of them")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if self.cache is not None and not 0 < self.cache < 1:
            raise ValueError(
                f"cache={self.cache}: must be above 0 and below 1; leave out rank and cache for "
                "the exact form, whose cache is as large as the original's"
            )
        if self.rope_dim is not None and self.rope_dim < 2:
            raise ValueError(f"rope_dim={self.rope_dim}: must be at least 2")
        if self.calibration_rows < 1:
            raise ValueError(f"calibration_rows={self.calibration_rows}: must be at least 1")
        if self.calibration_tokens < 2:
            raise ValueError(f"calibration_tokens={self.calibration_tokens}: must be at least 2")
        check_choice("format", self.format, FORMATS)
        check_choice("accelerator", self.accelerator, ACCELERATORS)
        if self.dtype is not None:
            check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))

    def parity_config(self) -> ParityConfig | None:
        """What is measured of original and result, if anything.

        Raises:
            ValueError: options that do not fit.
        """
        if self.parity is None:
            return None
        given = {each.name: getattr(self.parity, each.name) for each in fields(ParityOptions)}
        if not given["text"] and self.calibration:
            given |= {
                "text": self.calibration,
                "format": self.format,
                "text_column": self.text_column,
            }
        if not given["text"] and not given["parts"]:
            given["parts"] = WITHOUT_TEXT
        return ParityConfig(
            **given,
            original=self.source,
            converted=self.output,
            output=str(Path(self.output) / PARITY),
            tokenizer=self.tokenizer,
            accelerator=self.accelerator,
        )
