"""What `quantize` is asked. Imports no PyTorch: help and refusals come at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from ic.checkpoint.card.licence import check_licence
from ic.datamodules.options import FORMATS
from ic.errors import check_choice
from ic.model.options import CACHE_DTYPES

NONE = "none"
SCHEMES = ("fp8", "int8", "int4", NONE)
GROUP_SIZES = (128, 64, 32)  # that the servers' kernels take
GPTQ = "gptq"
ROUNDINGS = ("nearest", GPTQ)
# Folder of the report in the output.
PARITY = "parity"


@dataclass
class QuantizeOptions:
    """Weights of a model in eight or four bits.

    Attributes:
        source: the model: a run, a checkpoint, an export, a Hugging Face folder or a GGUF file with
            Multi-head Latent Attention, in float32, bfloat16 or float16.
        output: folder to make: an export in compressed-tensors' form with `quantization.json`.
        scheme: fp8 (e4m3 weights and inputs), int8 (the same in int8), int4 (weights alone), or
            none, which leaves the weights in their precision and is for `cache` alone.
        cache: what the latent cache holds when the folder is loaded: fp8, int8, or auto for the
            model's own precision.
        group_size: of int4, inputs that share a scale: 128, 64 or 32; null is the largest of them
            that divides the inputs of every layer.
        rounding: nearest, or gptq for int4, which makes up for the errors of each input by the
            inputs behind it, as `calibration` tells how they go together.
        calibration: text for rounding=gptq, and for cache=int8 to bring the numbers of a row to
            like size: paths or globs of text, JSON Lines or parquet, compressed or not. gptq needs
            it. With cache=int8 the largest numbers are made smaller and multiplied back where they
            are read, which changes nothing but what rounding loses. float16 is
            refused.
        calibration_rows: sequences that are taken from it, of different documents where it has
            them.
        calibration_tokens: tokens of each.
        format: of these files: auto (by suffix), text, jsonl or parquet.
        text_column: key or column that holds the text.
        keep: names of linear layers to leave as they are beside `lm_head` and `kv_b_proj`, such as
            `down_proj`, or `re:` and a pattern for the whole name.
        tokenizer: `bytes`, or a folder with the tokenizer to save; null is the source's.
        max_shard_size: largest safetensors file, such as 5GB; host memory holds one at a time.
        overwrite: replace an existing output, if it is an export and nothing else.
        licence: of the model, for its card, such as apache-2.0; null takes the source's, if it
            says one.
    """

    source: str = "???"
    output: str = "???"
    scheme: str = "???"
    cache: str = "auto"
    group_size: int | None = None
    rounding: str = "nearest"
    calibration: list[str] = field(default_factory=list)
    calibration_rows: int = 32
    calibration_tokens: int = 2048
    format: str = "auto"
    text_column: str = "text"
    keep: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    max_shard_size: str = "5GB"
    overwrite: bool = False
    licence: str | None = None

    def __post_init__(self) -> None:
        check_licence(self.licence)
        check_choice("cache", self.cache, CACHE_DTYPES)
        if self.scheme != "???":
            check_choice("scheme", self.scheme, SCHEMES)
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("format", self.format, FORMATS)
        for name, least in (("calibration_rows", 1), ("calibration_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.scheme == NONE and self.cache == "auto":
            raise ValueError(
                "scheme=none: leaves the weights as they are, and cache=auto the cache; set "
                "cache=int8 or fp8, or another scheme"
            )
        if self.scheme == NONE and self.keep:
            raise ValueError(f"keep={self.keep}: scheme=none quantises no layer; leave it out")
        if self.rounding == GPTQ and self.scheme not in ("???", "int4"):
            raise ValueError(
                f"rounding=gptq: goes with scheme=int4, and not with scheme={self.scheme}; "
                "leave it out"
            )
        if self.rounding == GPTQ and not self.calibration:
            raise ValueError(
                "calibration=[]: rounding=gptq measures a layer's inputs on text such as the model "
                "will read: name files, or leave rounding out"
            )
        if self.calibration and self.rounding != GPTQ and self.cache != "int8":
            raise ValueError(
                f"calibration={self.calibration}: rounding={self.rounding} and cache={self.cache} "
                "read none; set rounding=gptq with scheme=int4, or cache=int8, or leave it out"
            )
        if self.group_size is not None and self.scheme not in ("???", "int4"):
            raise ValueError(
                f"group_size={self.group_size}: goes with scheme=int4, and scheme={self.scheme} "
                "has no groups; leave it out"
            )
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size={self.group_size}: choose one of "
                f"{', '.join(map(str, GROUP_SIZES))}, or null"
            )
