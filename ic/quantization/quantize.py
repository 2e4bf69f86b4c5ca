"""A source with Multi-head Latent Attention -> an export with quantised weights.

Everything that a user may have got wrong is refused before weights are read. They then go by tensor
by tensor, so that host memory holds one file of the output at a time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ic.checkpoint.card.history import QUANTISATION, data_files
from ic.checkpoint.export import copy_tokenizer, open_weights, write_export
from ic.checkpoint.export_folder import check_output
from ic.checkpoint.folder import load_config
from ic.checkpoint.source import Source, find_source
from ic.checkpoint.weights import Weights
from ic.datamodules.tokenizers import build_tokenizer
from ic.errors import UsageError
from ic.files.atomic_write import write_json
from ic.files.publishable import publishable, published_command
from ic.files.results import describe_run
from ic.inference.loading import load_source
from ic.inference.options import InferenceOptions
from ic.inference.transformers_model import is_ours
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.quantised_linear import WeightScheme
from ic.quantization.balance import BalancedWeights, RowFactors, check_balance, row_factors
from ic.quantization.gptq import input_moments
from ic.quantization.options import GPTQ, GROUP_SIZES, NONE, PARITY, QuantizeOptions
from ic.quantization.schemes import ABSORBED, HEAD, library_scheme, quantization_config
from ic.quantization.weights import QuantisedWeights

# Servers compute the layers of each of these in one product, which has one scheme.
_FUSED = (("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))


@dataclass(frozen=True)
class Prepared:
    """A quantisation of which everything is known but the weights.

    Attributes:
        source: the original.
        config: the original's, with what its caches are to hold.
        schemes: the layers that are quantised, by name.
        kept: names and patterns of those that stay, as `config.json` lists them.
        tokenizer: the one that is saved with it; None copies the source's files.
    """

    source: Source
    config: MLAConfig
    schemes: Mapping[str, WeightScheme]
    kept: list[str]
    tokenizer: PreTrainedTokenizerBase | None
    weights: Weights


@dataclass(frozen=True)
class Calibration:
    """What a text tells.

    Attributes:
        moments: of the inputs of the layers, for rounding by GPTQ; None rounds to nearest.
        factors: that bring the numbers of a cached row to like size; None leaves them.
    """

    moments: dict[str, Tensor] | None = None
    factors: dict[str, RowFactors] | None = None


@dataclass(frozen=True)
class Quantised:
    """What came out.

    Attributes:
        rows: of each layer its relative error and its bytes before and after.
        files: the safetensors files.
        bytes_before, bytes_after: of all weights.
        seconds: from the first weight read to the written folder.
    """

    rows: list[dict[str, Any]]
    files: list[Path]
    bytes_before: int
    bytes_after: int
    seconds: float


def prepare(options: QuantizeOptions) -> Prepared:
    """Check the source and the options; no weight is read.

    Raises:
        ValueError: compressed-tensors is missing; another architecture, weights that are quantised
            already or whose rows cannot be balanced, groups that do not divide, layers that there
            are not, an output that may not be taken.
    """
    source = find_source(options.source)
    check_output(source.path, Path(options.output), options.overwrite)
    if not is_ours(source):
        raise UsageError(
            f"source={source.path} has no Multi-head Latent Attention: `convert` gives it that "
            "first; for models as they are there is llm-compressor"
        )
    if not source.is_gguf:
        _check_unquantised(source)
    if options.scheme != NONE:
        library_scheme(WeightScheme(options.scheme, GROUP_SIZES[0] if _grouped(options) else None))
    config, weights, own_tokenizer = open_weights(source, options.tokenizer is None)
    schemes, kept = _schemes(options, linear_layers(config))
    if options.cache == "int8" and options.calibration:
        check_balance(config, weights)
    config.set_cache_dtype(options.cache)
    for scheme in list(schemes.values())[:1]:
        config.quantization_config = quantization_config(scheme, kept)
    tokenizer = own_tokenizer
    if options.tokenizer is not None:
        tokenizer = build_tokenizer(options.tokenizer)
    return Prepared(source, config, schemes, kept, tokenizer, weights)


def calibrate(
    prepared: Prepared,
    options: QuantizeOptions,
    rows_MT: Tensor,
    accelerator: str,
    on_row: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """What the inputs of the layers and the rows of the cache are like on a text.

    Args:
        rows_MT: token ids of the text, read once for each of the two that is asked.
        accelerator: where it is read, and the rounding computed: auto, cpu or gpu.
        on_row: told of each row that was read.

    Raises:
        CheckpointError: weights that cannot be loaded.
    """
    given = InferenceOptions(
        checkpoint=str(prepared.source.path), tokenizer=options.tokenizer, accelerator=accelerator
    )
    model = load_source(given).model
    factors = row_factors(model, rows_MT, on_row) if options.cache == "int8" else None
    moments = None
    if options.rounding == GPTQ:
        moments = input_moments(model, rows_MT, prepared.schemes, on_row)
    return Calibration(moments, factors)


@torch.no_grad()
def quantize(
    prepared: Prepared,
    options: QuantizeOptions,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
    *,
    calibration: Calibration | None = None,
) -> Quantised:
    """Read the weights, round and pack them, and write the folder whole or not at all.

    Args:
        on_bytes: told the bytes written so far and in all.
        calibration: what `calibrate` found.

    Raises:
        CheckpointError: weights that cannot be read, or a folder that cannot be written.
    """
    start, source = time.perf_counter(), prepared.source
    known, weights_before = calibration or Calibration(), prepared.weights
    if known.factors is not None:
        weights_before = BalancedWeights(weights_before, known.factors, prepared.config)
    weights = QuantisedWeights(weights_before, prepared.schemes, known.moments)
    before, after = (
        sum(tensor.nbytes for tensor in each.sizes.values()) for each in (prepared.weights, weights)
    )

    def describe(folder: Path) -> None:
        if prepared.tokenizer is None:
            copy_tokenizer(source.path, folder)
        else:
            prepared.tokenizer.save_pretrained(folder)
        about = {
            "scheme": next((asdict(scheme) for scheme in prepared.schemes.values()), None),
            "rounding": options.rounding,
            **({} if calibration is None else _calibration(options)),
            "cache": options.cache,
            "cache_is_balanced": known.factors is not None,
            "kept": prepared.kept,
            "bytes_before": before,
            "bytes_after": after,
            "seconds": round(time.perf_counter() - start, 1),
            "rows": list(weights.rows.values()),
        }
        write_json(folder / QUANTISATION, _record(prepared, options, about))

    files = write_export(
        Path(options.output),
        prepared.config,
        weights,
        describe,
        dtype=None,
        max_shard_size=options.max_shard_size,
        origin=source.path,
        later=(PARITY,),
        source=source,
        licence=options.licence,
        on_bytes=on_bytes,
    )
    rows = list(weights.rows.values())
    return Quantised(rows, files, before, after, time.perf_counter() - start)


def linear_layers(config: MLAConfig) -> dict[str, int]:
    """The names of all linear layers, with their numbers of inputs."""
    with torch.device("meta"):
        model = MLAForCausalLM(config)
    return {
        name: layer.in_features
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }


def _schemes(
    options: QuantizeOptions, layers: Mapping[str, int]
) -> tuple[dict[str, WeightScheme], list[str]]:
    """The layers that are quantised, each with the scheme, and the patterns of those that stay.

    Raises:
        UsageError: no layer is left, or groups that do not divide.
    """
    if options.scheme == NONE:
        return {}, []
    kept = [HEAD, f"re:.*{ABSORBED}$", *_patterns(options.keep, layers)]
    quantised = {name: inputs for name, inputs in layers.items() if not _is_kept(name, kept)}
    if not quantised:
        raise UsageError(f"keep={options.keep}: leaves no layer to quantise")
    _check_fused(options.keep, layers, quantised)
    group_size = _group_size(options, quantised) if _grouped(options) else None
    return dict.fromkeys(quantised, WeightScheme(options.scheme, group_size)), kept


def _grouped(options: QuantizeOptions) -> bool:
    return options.scheme == "int4"


def _check_unquantised(source: Source) -> None:
    config = load_config(source.path, quantised=True)
    if getattr(config, "quantization_config", None):
        raise UsageError(
            f"source={source.path} is quantised already, and rounding twice loses more: give the "
            "folder that it was made from"
        )


def _patterns(keep: Sequence[str], layers: Mapping[str, int]) -> list[str]:
    """`keep` as the file lists it: a bare name stands for every layer that ends with it.

    Raises:
        UsageError: one that no layer has.
    """
    found = []
    for given in keep:
        try:
            pattern = given if given.startswith("re:") else f"re:.*{re.escape(given)}$"
            named = any(_is_kept(name, [pattern]) for name in layers)
        except re.error as error:
            raise UsageError(f"keep={given}: no pattern: {error}") from error
        if not named:
            ends = sorted({name.rpartition(".")[2] for name in layers})
            raise UsageError(f"keep={given}: no layer is called so; there are {', '.join(ends)}")
        found.append(pattern)
    return found


def _is_kept(name: str, kept: Sequence[str]) -> bool:
    return any(
        re.match(each.removeprefix("re:"), name) if each.startswith("re:") else each == name
        for each in kept
    )


def _check_fused(
    keep: Sequence[str], layers: Mapping[str, int], quantised: Mapping[str, int]
) -> None:
    """Raises:
    UsageError: of layers that servers compute in one product some stay and others do not.
    """
    for name in layers:
        prefix, _, last = name.rpartition(".")
        for group in _FUSED:
            others = [f"{prefix}.{other}" for other in group if f"{prefix}.{other}" in layers]
            if last in group and len({other in quantised for other in others}) > 1:
                raise UsageError(
                    f"keep={list(keep)}: servers compute {' and '.join(group)} in one product: "
                    "keep both or neither"
                )


def _group_size(options: QuantizeOptions, layers: Mapping[str, int]) -> int:
    """The group size asked for, or the largest that divides the inputs of every layer.

    Raises:
        UsageError: it does not divide those of a layer.
    """
    asked = GROUP_SIZES if options.group_size is None else (options.group_size,)
    for size in asked:
        if all(inputs % size == 0 for inputs in layers.values()):
            return size
    name, inputs = next((n, i) for n, i in layers.items() if i % asked[-1])
    given = "scheme=int4" if options.group_size is None else f"group_size={options.group_size}"
    raise UsageError(
        f"{given}: {name} has {inputs} inputs, which groups of "
        f"{' or '.join(map(str, asked))} do not divide; choose another size of "
        f"{', '.join(map(str, GROUP_SIZES))}, keep the layer (keep=[{name.rpartition('.')[2]}]), "
        "or take scheme=int8"
    )


def _calibration(options: QuantizeOptions) -> dict[str, Any]:
    return {
        "calibration": {"rows": options.calibration_rows, "tokens": options.calibration_tokens},
        "calibration_files": data_files(options.calibration, [Path.cwd()]),
    }


def _record(
    prepared: Prepared, options: QuantizeOptions, about: Mapping[str, Any]
) -> dict[str, Any]:
    """What `quantization.json` holds. It is published with the folder, so it names files without
    where they lay.
    """
    described = describe_run(asdict(options))
    command = published_command(described.pop("command"))
    record = {
        "options": described.pop("config"),
        **described,
        "source": str(prepared.source.path),
        **about,
    }
    return {**publishable(record), "command": command}
