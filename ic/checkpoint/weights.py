"""The weights of a source, one tensor at a time, under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ic.checkpoint.checksums import check_intact
from ic.checkpoint.errors import CheckpointError, damaged_error
from ic.checkpoint.folder import ADAPTER, TRAINER_STATE
from ic.checkpoint.hugging_face import weight_files
from ic.checkpoint.storage import MODEL, ShardReader, is_sharded, read_tensors, tensor_metadata
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.adapter import load_adapter, merged_tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Weights(Protocol):
    """Attributes:
    sizes: each tensor's size and type by its name, as a tensor on `meta`.
    """

    sizes: Mapping[str, Tensor]

    def read(self, name: str) -> Tensor:
        """The tensor of a name, on the CPU."""


class FolderWeights:
    """The weights of a checkpoint folder; an adapter is merged.

    Raises:
        CheckpointError: unreadable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_intact(folder, but=[TRAINER_STATE])
        check_intact(folder / ADAPTER)
        self._reader = ShardReader(folder) if is_sharded(folder) else None
        self._files: dict[str, Path] = {}
        has_adapter = (folder / ADAPTER).is_dir()
        self._adapter = load_adapter(folder / ADAPTER) if has_adapter else None
        self.sizes: Mapping[str, Tensor]
        if self._reader is not None:
            self.sizes = {
                name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                for name, entry in tensor_metadata(self._reader, MODEL).items()
            }
        else:
            self.sizes = dict(self._plain_sizes())

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
            raise damaged_error(file, error) from error
        return tensor

    def _plain_sizes(self) -> Iterator[tuple[str, Tensor]]:
        for file in weight_files(self.folder):
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
                raise damaged_error(file, error) from error


def check_sizes(weights: Weights, config: MLAConfig, source: Path) -> None:
    """Compare the tensors of a source with those of its configuration.

    Raises:
        CheckpointError: tensors that the configuration does not have, lacks or has otherwise.
    """
    with torch.device("meta"):
        wanted = MLAForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    for name in sorted(wanted.keys() | weights.sizes.keys()):
        expected = tuple(wanted[name].shape) if name in wanted else "no such tensor"
        found = tuple(weights.sizes[name].shape) if name in weights.sizes else "no such tensor"
        if expected != found:
            raise CheckpointError(
                f"{source} does not fit its configuration: {name} is {expected} by the "
                f"configuration, and {found} in the weights"
            )
