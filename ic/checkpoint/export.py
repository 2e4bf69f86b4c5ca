"""Consolidate a checkpoint into Hugging Face safetensors, tensor by tensor, on the CPU.

Works on sharded and on plain folders, without a GPU, a process group or the run's configuration.
Host memory holds one file of the output at a time, so about `max_shard_size`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ic.checkpoint.commit import commit_folder, partial_path, sync_folder
from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.folder import ADAPTER, TRAINER_STATE, WEIGHTS, load_config
from ic.checkpoint.storage import MODEL, ShardReader, is_sharded, read_tensors, tensor_metadata
from ic.files.retry_io import operating_system_error, retrying
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.adapter import load_adapter, merged_tensor

INDEX = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WeightSource:
    """The weights of a checkpoint folder, one tensor at a time; an adapter is merged.

    Attributes:
        sizes: by Hugging Face's name, each tensor's size and type, as a tensor on `meta`.

    Raises:
        CheckpointError: unreadable, or tensors that `config` does not have, lacks or has otherwise.
    """

    def __init__(self, folder: Path, config: MLAConfig) -> None:
        self.folder = folder
        self._reader = ShardReader(folder) if is_sharded(folder) else None
        self._files: dict[str, Path] = {}
        has_adapter = (folder / ADAPTER).is_dir()
        self._adapter = load_adapter(folder / ADAPTER) if has_adapter else None
        if self._reader is not None:
            self.sizes = {
                name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                for name, entry in tensor_metadata(self._reader, MODEL).items()
            }
        else:
            self.sizes = dict(self._plain_sizes())
        self._check(config)

    def read(self, name: str) -> Tensor:
        tensor = self._read_base(name)
        return tensor if self._adapter is None else merged_tensor(name, tensor, *self._adapter)

    def _read_base(self, name: str) -> Tensor:
        if self._reader is not None:
            return read_tensors(self._reader, MODEL, [name])[name]
        file = self._files[name]
        try:
            with safe_open(file, framework="pt") as tensors:
                tensor: Tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is truncated or damaged: {error}") from error
        return tensor

    def _plain_sizes(self) -> Iterator[tuple[str, Tensor]]:
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.folder} is not a checkpoint: it holds no {WEIGHTS}")
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        self._files[name] = file
                        part = tensors.get_slice(name)
                        yield (
                            name,
                            torch.empty(part.get_shape(), dtype=part[:0].dtype, device="meta"),
                        )
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} is truncated or damaged: {error}") from error

    def _check(self, config: MLAConfig) -> None:
        with torch.device("meta"):
            wanted = MLAForCausalLM(config).state_dict()
        if config.tie_word_embeddings:
            wanted.pop("lm_head.weight")
        for name in sorted(wanted.keys() | self.sizes.keys()):
            expected = tuple(wanted[name].shape) if name in wanted else "no such tensor"
            found = tuple(self.sizes[name].shape) if name in self.sizes else "no such tensor"
            if expected != found:
                raise CheckpointError(
                    f"{self.folder} does not fit its config.json: {name} is {expected} by the "
                    f"configuration, and {found} in the checkpoint"
                )


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write `config.json`, tokenizer and safetensors to the folder `output`; returns the weights.

    Args:
        dtype: float32, bfloat16 or float16; None keeps what the checkpoint holds.
        max_shard_size: of one safetensors file, as in `5GB`; a larger tensor gets its own file.
        overwrite: replace an existing `output` once the new one is complete.
        on_bytes: told the bytes written so far and in all.

    Raises:
        CheckpointError: unreadable checkpoint, existing output, full disk; `output` is untouched.
    """
    config = load_config(checkpoint)
    if output.exists():
        if output.resolve() == checkpoint.resolve():
            raise CheckpointError(f"output={output} is the checkpoint: choose another folder")
        if not overwrite:
            raise CheckpointError(
                f"output={output} exists: choose another folder, or replace it with overwrite=true"
            )
    source = WeightSource(checkpoint, config)
    target_dtype = None if dtype is None else DTYPES[dtype]
    sizes = {name: tensor.to(target_dtype or tensor.dtype) for name, tensor in source.sizes.items()}
    try:
        split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    except ValueError as error:
        raise CheckpointError(
            f"max_shard_size={max_shard_size!r}: {error}; write for example 5GB or 500MB"
        ) from error
    total = split.metadata["total_size"]
    output = output.absolute()
    _check_space(output, total)

    partial = partial_path(output)
    shutil.rmtree(partial, ignore_errors=True)
    done = 0
    try:
        partial.mkdir(parents=True)
        for file, names in split.filename_to_tensors.items():
            _write_file(source, names, target_dtype, partial / file)
            done += sum(sizes[name].nbytes for name in names)
            on_bytes(done, total)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        config.dtype = target_dtype or next(iter(sizes.values())).dtype
        config.save_pretrained(partial)
        _copy_tokenizer(checkpoint, partial)
        sync_folder(partial)
        retrying(lambda: commit_folder(partial, output))
    except (OSError, SafetensorError) as error:
        cause = operating_system_error(error) or error
        raise CheckpointError(
            f"could not export to {output}: {cause}. {checkpoint} is untouched; free some space or "
            "choose another output"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [output / file for file in split.filename_to_tensors]


def _write_file(
    source: WeightSource, names: list[str], dtype: torch.dtype | None, file: Path
) -> None:
    tensors = {name: source.read(name) for name in names}
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    retrying(lambda: save_file(tensors, file, {"format": "pt"}))


def _check_space(output: Path, needed_bytes: int) -> None:
    existing = next(parent for parent in output.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise CheckpointError(
            f"output={output}: the export takes {needed_bytes / 1e9:.1f} GB, but {existing} has "
            f"{free / 1e9:.1f} GB free; free some space or choose another output"
        )


def _copy_tokenizer(checkpoint: Path, output: Path) -> None:
    """Everything beside weights, configuration and training state: small files of the tokenizer."""
    for file in checkpoint.iterdir():
        training = file.name == TRAINER_STATE or file.name.startswith((".", "__"))
        weights = file.suffix == ".safetensors" or file.name == INDEX
        if file.is_file() and not (training or weights or (output / file.name).exists()):
            shutil.copyfile(file, output / file.name)
