"""What `export` is asked."""

from __future__ import annotations

from dataclasses import dataclass

from ic.checkpoint.card.licence import check_licence


@dataclass
class ExportOptions:
    """The verb `export`: a source as Hugging Face safetensors.

    Attributes:
        checkpoint: the source, in any form that `ic.checkpoint.source` knows.
        output: folder to make: config.json, tokenizer, model.safetensors or several with an index.
        dtype: float32, bfloat16 or float16; null keeps what the checkpoint holds.
        max_shard_size: largest safetensors file, such as 5GB; host memory holds one at a time.
        overwrite: replace an existing output.
        tokenizer: `bytes`, or a folder with the tokenizer to save; null keeps the source's own.
        licence: of the model, for its card, such as apache-2.0; null takes the source's, if it
            says one.
    """

    checkpoint: str = "???"
    output: str = "???"
    dtype: str | None = None
    max_shard_size: str = "5GB"
    overwrite: bool = False
    tokenizer: str | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        check_licence(self.licence)
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                f"dtype={self.dtype!r}: choose one of float32, bfloat16, float16, or null to keep "
                "the checkpoint's"
            )
