"""Shards on disk: torch.distributed.checkpoint's files, committed by a rename, with checksums.

    .metadata               which tensor lies where (torch.distributed.checkpoint)
    __0_0.distcp            what rank 0 wrote, and so on
    __0_0.distcp.sha256     its checksum, in the form of `sha256sum`

The metadata is a pickle; it is read by an unpickler that knows its own classes and no others. The
shards hold tensors only and are read with `weights_only=True`. PyTorch does not check the CRCs of
its archives, hence the checksums.
"""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ic.checkpoint.checksums import sha256, write_checksums
from ic.checkpoint.commit import commit_folder, sync_folder
from ic.checkpoint.errors import CheckpointError, damaged_error
from ic.errors import lacks_memory
from ic.files.retry_io import operating_system_error, retrying

METADATA = ".metadata"
MODEL, OPTIMIZER = "model.", "optimizer."


class ShardWriter(dcp.FileSystemWriter):
    """Writes into `partial` and, once every rank has written, lets the coordinator rename it.

    Args:
        write_rest: adds to the folder what is not sharded; called on the coordinator.
    """

    def __init__(self, partial: Path, target: Path, write_rest: Callable[[Path], None]) -> None:
        super().__init__(partial)
        self.target = target
        self.write_rest = write_rest

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        def write() -> Future[list[WriteResult]]:
            written = super(ShardWriter, self).write_data(plan, planner)
            for name in {result.storage_data.relative_path for result in written.value()}:
                file = Path(self.path) / name
                _checksum_file(file).write_text(f"{sha256(file)}  {name}\n")
            return written

        return self._attempt(write)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        def write() -> None:
            self.write_rest(Path(self.path))
            super(ShardWriter, self).finish(metadata, results)
            write_checksums(Path(self.path))
            sync_folder(Path(self.path))

        self._attempt(write)
        self._attempt(lambda: commit_folder(Path(self.path), self.target))

    def _attempt(self, operation: Callable[[], Any]) -> Any:
        try:
            return retrying(operation)
        except (OSError, RuntimeError) as error:
            # The cause does not survive the way to the other ranks; its text does.
            raise CheckpointError(str(operating_system_error(error) or error)) from error


class ShardReader(dcp.FileSystemReader):
    """Reads what `ShardWriter` wrote, and names the file that it cannot read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self._metadata: Metadata | None = None
        self._intact: set[str] = set()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """
        Raises:
            CheckpointError: unreadable, or a shard that it lists is missing or too short.
        """
        if self._metadata is None:
            file = self.folder / METADATA
            try:
                self._metadata = retrying(lambda: _read_metadata(file))
            except (OSError, pickle.UnpicklingError, EOFError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{file} is missing or damaged: {error}") from error
            self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
            self._check_sizes(self._metadata)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in by_file.items():
            self._read_file(name, dataclasses.replace(plan, items=items), planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(self, name: str, plan: LoadPlan, planner: LoadPlanner) -> None:
        try:
            retrying(lambda: self._check_intact(name))
            retrying(lambda: super(ShardReader, self).read_data(plan, planner))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            if lacks_memory(error):
                raise  # the file is as it was
            raise damaged_error(self.folder / name, error) from error

    def _check_sizes(self, metadata: Metadata) -> None:
        ends: dict[str, int] = defaultdict(int)
        for info in metadata.storage_data.values():
            ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        for name, end in sorted(ends.items()):
            file = self.folder / name
            if not file.is_file():
                raise CheckpointError(
                    f"{self.folder} is not a complete checkpoint: the shard {file} is missing"
                )
            if (size := file.stat().st_size) < end:
                raise damaged_error(file, f"it holds {size:,} of {end:,} bytes")

    def _check_intact(self, name: str) -> None:
        if name in self._intact:
            return
        file = self.folder / name
        if sha256(file) != _checksum_file(file).read_text().split()[0]:
            raise damaged_error(file, f"it differs from {_checksum_file(file).name}")
        self._intact.add(name)


def is_sharded(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def tensor_metadata(reader: ShardReader, prefix: str) -> dict[str, TensorStorageMetadata]:
    """Sizes and types of the tensors whose key starts with `prefix`, by the rest of the key."""
    return {
        key.removeprefix(prefix): entry
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(
    reader: ShardReader, prefix: str, names: list[str] | None = None
) -> dict[str, Tensor]:
    """Whole tensors on the CPU, all below `prefix` or those named; needs no process group."""
    found = tensor_metadata(reader, prefix)
    tensors = {
        name: torch.empty(found[name].size, dtype=found[name].properties.dtype)
        for name in (found if names is None else names)
    }
    load_into({prefix + name: tensor for name, tensor in tensors.items()}, reader, None)
    return tensors


def load_into(state: dict[str, Any], reader: ShardReader, group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of `state`, DTensors of any mesh included, in place.

    Args:
        group: CPU process group of all ranks that load; None reads in this process alone.

    Raises:
        CheckpointError: on every rank of the group, if any of them cannot read.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise CheckpointError(first_failure(error, f"{reader.folder} cannot be read")) from error


def first_failure(error: CheckpointException, what: str) -> str:
    """One line of what torch.distributed.checkpoint collected from the ranks."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, CheckpointError):
        return str(cause)
    return f"{what}: {cause} (rank {rank})"


def _checksum_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _read_metadata(file: Path) -> Metadata:
    with file.open("rb") as stream:
        metadata = _MetadataUnpickler(stream).load()
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise pickle.UnpicklingError("it holds something else than a checkpoint's metadata")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Builds torch.distributed.checkpoint's metadata and nothing else."""

    _ALLOWED: ClassVar[dict[str, set[str]]] = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"Path", "PosixPath"},
        "pathlib._local": {"Path", "PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        found = None
        if module == "torch" or name in self._ALLOWED.get(module, ()):
            found = super().find_class(module, name)
        if module == "torch" and not (found is torch.Size or isinstance(found, torch.dtype)):
            found = None
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return found
