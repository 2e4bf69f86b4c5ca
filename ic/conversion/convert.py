"""A source with grouped-query attention -> an export with Multi-head Latent Attention.

Everything that a user may have got wrong is refused before the weights are loaded. The text then
goes through the model layer by layer: each layer is measured on its inputs and converted, so that a
GPU holds one layer at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ic.checkpoint.card.history import CONVERSION, data_files
from ic.checkpoint.card.outside import folder_source, gguf_source
from ic.checkpoint.export import check_space, copy_tokenizer, write_export
from ic.checkpoint.export_folder import check_output
from ic.checkpoint.folder import load_config
from ic.checkpoint.gguf_file import GGUFFile
from ic.checkpoint.hugging_face import INDEX, weight_files
from ic.checkpoint.source import Source, find_source
from ic.checkpoint.weights import DTYPES, check_sizes
from ic.conversion.calibration import calibration_rows
from ic.conversion.families import FAMILIES, read_geometry
from ic.conversion.layout import Layout, choose_layout
from ic.conversion.options import PARITY, ConvertOptions
from ic.conversion.parity.check import check_report
from ic.conversion.stream import Stream
from ic.datamodules.tokenizers import build_tokenizer, load_tokenizer
from ic.errors import UsageError
from ic.files.atomic_write import write_json
from ic.files.publishable import publishable
from ic.files.results import describe_run
from ic.inference.model_facts import model_end_tokens
from ic.inference.transformers_model import (
    gguf_tokenizer,
    is_ours,
    load_transformers_model,
    read_config,
)
from ic.machine.devices import check_accelerator
from ic.model import MLAConfig, MLAForCausalLM

OnLayer = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A conversion of which everything is known but the weights.

    Attributes:
        source: the original.
        config: the original's.
        layout: the dimensions of the result.
        tokenizer: the one that is saved with it.
        rows_MT: text to measure on, or None in the exact form.
    """

    source: Source
    config: Any
    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    rows_MT: Tensor | None


@dataclass(frozen=True)
class Converted:
    """What came out.

    Attributes:
        layout: the dimensions of the result.
        layers: for each layer its errors, as in `conversion.json`.
        files: the safetensors files.
        seconds: from the loaded weights to the written folder.
    """

    layout: Layout
    layers: list[dict[str, Any]]
    files: list[Path]
    seconds: float


def prepare(options: ConvertOptions) -> Prepared:
    """Check the source and the options, and read the text.

    Raises:
        ValueError: an unknown architecture, dimensions that do not fit, no tokenizer, too little
            text, an output that exists or does not fit on the disk.
    """
    check_accelerator(options.accelerator)
    source = find_source(options.source)
    check_output(source.path, Path(options.output), options.overwrite)
    if is_ours(source):
        # Refuses what cannot be loaded either, such as a mixture of experts.
        _ = GGUFFile(source.path).config if source.is_gguf else load_config(source.path)
        raise UsageError(
            f"source={source.path} has Multi-head Latent Attention already: evaluate, generate, "
            "export and model.init_from take it as it is"
        )
    if (source.path / INDEX).is_file():
        weight_files(source.path)  # refuses a folder that lacks one of its files
    config = read_config(source)
    layout = choose_layout(read_geometry(config, source.path), options)
    check_space(Path(options.output), _size_of_result(layout, config, options))
    tokenizer = _tokenizer(source, options)
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the vocabulary of {source.path} "
            f"{config.vocab_size}: give the tokenizer that the model was trained with"
        )
    rows_MT = None
    if not layout.is_exact:
        if options.calibration_tokens > config.max_position_embeddings:
            raise UsageError(
                f"calibration_tokens={options.calibration_tokens}: the model has "
                f"{config.max_position_embeddings:,} positions"
            )
        rows_MT = calibration_rows(tokenizer, options)
    check_report(options.parity_config(), config.max_position_embeddings, tokenizer)
    return Prepared(source, config, layout, tokenizer, rows_MT)


@torch.no_grad()
def convert(prepared: Prepared, options: ConvertOptions, on_layer: OnLayer) -> Converted:
    """Load the weights, convert them layer by layer and write the folder.

    Args:
        on_layer: told the layers done and in all; each counts twice where all are gone through
            first to choose the frequencies of a narrow rotary key.

    Raises:
        CheckpointError: weights that cannot be read, or a folder that cannot be written.
    """
    layout, source = prepared.layout, prepared.source
    model = load_transformers_model(source, None)
    start = time.perf_counter()
    dtype = DTYPES[options.dtype] if options.dtype else model.dtype
    on_gpu = torch.cuda.is_available() and options.accelerator != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    visits = layout.geometry.layers * (2 if layout.is_narrow else 1)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_layer(done, visits)

    stream = Stream(model, layout, prepared.rows_MT, device, count)
    layout, config = stream.layout, stream.config
    config.eos_token_id = _end_tokens(model)
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for index, (converted, errors) in enumerate(stream.layers()):
        prefix = f"model.layers.{index}.self_attn."
        tensors |= {prefix + name: tensor.to(dtype) for name, tensor in converted.items()}
        layers.append({"layer": index, **errors})
    tensors |= _unchanged(model, config, dtype)
    weights = _Tensors(tensors)
    check_sizes(weights, config, source.path)

    def describe(folder: Path) -> None:
        if options.tokenizer is None and not source.is_gguf:
            copy_tokenizer(source.path, folder)
        else:
            prepared.tokenizer.save_pretrained(folder)
        seconds = round(time.perf_counter() - start, 1)
        write_json(folder / CONVERSION, _record(prepared, layout, options, layers, device, seconds))

    files = write_export(
        Path(options.output),
        config,
        weights,
        describe,
        dtype=None,
        max_shard_size=options.max_shard_size,
        origin=source.path,
        later=(PARITY,),
        source=source,
        licence=options.licence,
    )
    return Converted(layout, layers, files, time.perf_counter() - start)


class _Tensors:
    """Weights that are in memory, as `ic.checkpoint.weights.Weights`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.sizes: Mapping[str, Tensor] = {
            name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self._tensors[name].contiguous()


def _end_tokens(model: Any) -> int | list[int] | None:
    """What ends a text, of its configuration and of its generation configuration, which lists more
    in Llama's and Qwen's folders: a healed model and its export have config.json alone.
    """
    said = model.config.eos_token_id
    own = said if isinstance(said, list) else [] if said is None else [said]
    ends = list(dict.fromkeys([*own, *model_end_tokens(model)]))
    return ends if len(ends) > 1 else ends[0] if ends else None


def _unchanged(model: Any, config: MLAConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor but those of attention, whose names are the same in all families."""
    kept = {
        name: tensor.to(dtype)
        for name, tensor in model.state_dict().items()
        if ".self_attn." not in name
    }
    if config.tie_word_embeddings:
        del kept["lm_head.weight"]
    return kept


def _tokenizer(source: Source, options: ConvertOptions) -> PreTrainedTokenizerBase:
    if options.tokenizer is not None:
        return build_tokenizer(options.tokenizer)
    return gguf_tokenizer(source.path) if source.is_gguf else load_tokenizer(source.path)


def _size_of_result(layout: Layout, config: Any, options: ConvertOptions) -> int:
    """Bytes of the weights that will be written."""
    with torch.device("meta"):
        model = MLAForCausalLM(layout.mla_config(config))
    dtype = DTYPES[options.dtype] if options.dtype else (config.dtype or torch.float32)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _record(
    prepared: Prepared,
    layout: Layout,
    options: ConvertOptions,
    layers: list[dict[str, Any]],
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    """What `conversion.json` holds: what it takes to repeat it, and what was measured. It is
    published with the folder, so it names files without where they lay.
    """
    source, geometry = prepared.source, layout.geometry
    rows = prepared.rows_MT
    described = describe_run(asdict(options), public=True)
    named = [*options.calibration, *options.calibration_chats]
    files = data_files(named, [Path.cwd()]) if named else None
    record = {
        "options": described.pop("config"),
        **described,
        "source": str(source.path),
        "family": FAMILIES[geometry.family],
        "licence": options.licence
        or (gguf_source if source.is_gguf else folder_source)(source.path)["licence"],
        "form": "exact" if layout.is_exact else "compressed",
        "original": {
            "heads": geometry.heads,
            "kv_heads": geometry.kv_heads,
            "head_dim": geometry.head_dim,
            "cache_numbers": geometry.cache_numbers,
        },
        "geometry": {
            "qk_nope_head_dim": layout.nope_dim,
            "qk_rope_head_dim": layout.rope_dim,
            **({} if layout.kept is None else {"rope_pairs": list(layout.kept)}),
            "v_head_dim": geometry.head_dim,
            "kv_lora_rank": layout.rank,
            "cache_numbers": layout.cache_numbers,
        },
        "calibration": None if rows is None else {"rows": rows.shape[0], "tokens": rows.shape[1]},
        "calibration_files": files,
        "converted_on": device.type,
        "seconds": seconds,
        "rows": layers,
    }
    command = record["command"]  # public, as a command is read and not as any other text
    return {**publishable(record), "command": command}
