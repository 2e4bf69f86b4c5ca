"""Write a source as Hugging Face safetensors, tensor by tensor, on the CPU.

Works on sharded and plain folders and on GGUF files, without a GPU, a process group or the run's
configuration. Host memory holds one file of the output at a time, so about `max_shard_size`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ic.checkpoint.commit import whole_folder
from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.export_folder import MANIFEST, check_output
from ic.checkpoint.folder import load_config, trained_length
from ic.checkpoint.gguf_file import GGUFFile
from ic.checkpoint.hugging_face import CONFIG, INDEX, TOKENIZER_PARTS
from ic.checkpoint.model_card import write_card
from ic.checkpoint.source import Source
from ic.checkpoint.weights import DTYPES, FolderWeights, Weights, check_sizes
from ic.files.atomic_write import write_json
from ic.files.retry_io import operating_system_error, retrying
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.config import EXTENSION_KEYS


def export_checkpoint(
    source: Source,
    output: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    licence: str | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write `config.json`, tokenizer, safetensors and a model card to the folder `output`; returns
    the weights.

    Args:
        tokenizer: saved with the weights; None copies the source's own files.
        dtype: float32, bfloat16 or float16; None keeps what the source holds, where quantised
            tensors of a GGUF file are float32.
        max_shard_size: of one safetensors file, as in `5GB`; a larger tensor gets its own file.
        overwrite: replace an existing `output` once the new one is complete, if it is an empty
            folder or an export and nothing else.
        licence: what the card says of the model's; None takes the source's.
        on_bytes: told the bytes written so far and in all.

    Raises:
        CheckpointError: unreadable source, existing output, full disk; `output` is untouched.
    """
    check_output(source.path, output, overwrite)
    config, weights, own_tokenizer = open_weights(source, tokenizer is None)
    tokenizer = tokenizer or own_tokenizer

    def describe(folder: Path) -> None:
        if tokenizer is None:
            copy_tokenizer(source.path, folder)
        else:
            tokenizer.save_pretrained(folder)

    return write_export(
        output,
        config,
        weights,
        describe,
        dtype=None if dtype is None else DTYPES[dtype],
        max_shard_size=max_shard_size,
        origin=source.path,
        source=source,
        licence=licence,
        on_bytes=on_bytes,
    )


def write_export(
    output: Path,
    config: MLAConfig,
    weights: Weights,
    describe: Callable[[Path], None],
    *,
    dtype: torch.dtype | None,
    max_shard_size: str,
    origin: Path,
    later: tuple[str, ...] = (),
    source: Source | None = None,
    licence: str | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write the folder `output` with its card, whole or not at all; returns the safetensors files.

    Args:
        describe: writes what else belongs into the folder it is given: the tokenizer, and of a
            conversion what the card tells of it.
        dtype: of the weights; None keeps theirs.
        origin: what the weights come from, for the messages.
        later: names that are written into the folder once it is whole, such as a report on it.
        source: whose history and figures the card tells; None leaves it to what `describe` wrote.
        licence: what the card says of the model's; None takes the source's.

    Raises:
        CheckpointError: a full disk, or one that cannot be written to; `output` is untouched.
    """
    sizes = {name: tensor.to(dtype or tensor.dtype) for name, tensor in weights.sizes.items()}
    try:
        split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    except ValueError as error:
        raise CheckpointError(
            f"max_shard_size={max_shard_size!r}: {error}; write for example 5GB or 500MB"
        ) from error
    total = split.metadata["total_size"]
    output = output.absolute()
    check_space(output, total)

    done = 0
    try:
        with whole_folder(output) as partial:
            for file, names in split.filename_to_tensors.items():
                _write_file(weights, names, dtype, partial / file)
                done += sum(sizes[name].nbytes for name in names)
                on_bytes(done, total)
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            config.dtype = dtype or next(iter(sizes.values())).dtype
            _write_config(config, partial)
            describe(partial)
            write_card(partial, name=output.name, source=source, licence=licence)
            _write_manifest(partial, later)
    except (OSError, SafetensorError) as error:
        cause = operating_system_error(error) or error
        raise CheckpointError(
            f"could not export to {output}: {cause}. {origin} is untouched; free some space "
            "or choose another output"
        ) from error
    return [output / file for file in split.filename_to_tensors]


def open_weights(
    source: Source, needs_tokenizer: bool
) -> tuple[MLAConfig, Weights, PreTrainedTokenizerBase | None]:
    """Configuration and weights of a source; of a GGUF file its tokenizer too, if it is needed.

    Raises:
        CheckpointError: a source that cannot be read, or weights that do not fit.
    """
    if source.is_gguf:
        file = GGUFFile(source.path)
        return file.config, file, file.tokenizer() if needs_tokenizer else None
    config = load_config(source.path)
    weights = FolderWeights(source.path)
    config.trained_length = trained_length(source.path)
    check_sizes(weights, config, source.path)
    return config, weights, None


def _write_file(weights: Weights, names: list[str], dtype: torch.dtype | None, file: Path) -> None:
    tensors = {name: weights.read(name) for name in names}
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    retrying(lambda: save_file(tensors, file, {"format": "pt"}))


def _write_config(config: MLAConfig, folder: Path) -> None:
    """`config.json`, as DeepSeek-V3's where that computes the same: every program that knows
    DeepSeek-V3 then takes the folder.
    """
    config.architectures = [MLAForCausalLM.__name__]
    config.save_pretrained(folder)
    if config.extensions:
        return
    values = json.loads((folder / CONFIG).read_text())
    for key in EXTENSION_KEYS:
        values.pop(key, None)
    values |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    write_json(folder / CONFIG, values)


def _write_manifest(folder: Path, later: tuple[str, ...]) -> None:
    names = sorted({*(path.name for path in folder.iterdir()), *later})
    write_json(folder / MANIFEST, {"files": names})


def check_space(output: Path, needed_bytes: int) -> None:
    """Raises CheckpointError unless the disk of `output` has so many bytes free."""
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise CheckpointError(
            f"output={output}: the export takes {needed_bytes / 1e9:.1f} GB, but {existing} has "
            f"{free / 1e9:.1f} GB free; free some space or choose another output"
        )


def copy_tokenizer(checkpoint: Path, output: Path) -> None:
    """The files of a tokenizer, by their names, without the code that another may name."""
    for name in TOKENIZER_PARTS:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, output / name)
    settings = output / "tokenizer_config.json"
    if settings.exists() and "auto_map" in (values := json.loads(settings.read_text())):
        del values["auto_map"]
        write_json(settings, values)
    if (output / "tokenizer.json").exists() and not (output / "tokenizer_config.json").exists():
        # Without its class `AutoTokenizer` goes by the type of the model, which is now another.
        PreTrainedTokenizerFast.from_pretrained(checkpoint).save_pretrained(output)
