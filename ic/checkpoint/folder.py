"""Checkpoints as folders: Hugging Face's files, and beside them the trainer's state.

    step=100/
        config.json         with `trained_length`, the longest context so far
        model.safetensors
        tokenizer files     all that `evaluate`, `generate` and `transformers` need
        trainer.pt          optimizer, schedule, loops, callbacks, data position
        checksums.sha256    of all of these (ic.checkpoint.checksums)
        adapter/            LoRA in PEFT's format, if it trains; the weights above are then the
                            base model's, and `load_model` merges the two

A folder is written under a temporary name, flushed to disk and renamed: it is there whole or not
at all.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ic.checkpoint.architecture import check_names, check_same_architecture, check_tensors
from ic.checkpoint.checksums import check_intact, write_checksums
from ic.checkpoint.commit import commit_folder, partial_path, sync_folder
from ic.checkpoint.compressed_tensors import (
    load_quantised_model,
    quantisation_of,
    read_quantisation,
)
from ic.checkpoint.errors import CheckpointError, damaged_error, not_finite_error, save_error
from ic.checkpoint.finite import first_not_finite
from ic.checkpoint.hugging_face import CONFIG, WEIGHTS, weight_files
from ic.checkpoint.storage import MODEL, OPTIMIZER, ShardReader, is_sharded, read_tensors
from ic.errors import lacks_memory
from ic.files.retry_io import operating_system_error, retrying
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.adapter import (
    add_adapter,
    join_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    split_adapter,
)
from ic.model.backends import ON_TORCH, Backends
from ic.model.options import AdapterOptions

TRAINER_STATE = "trainer.pt"
ADAPTER = "adapter"
MODULE_PREFIX = "model."  # of the weights in the LightningModule


class FolderCheckpointIO(CheckpointIO):
    """Reads and writes the folders above for Lightning.

    Args:
        config: of the model that trains; a checkpoint of another architecture is refused.
        tokenizer: saved beside the weights.
        adapter: configuration of the LoRA layers that train, if any.
    """

    def __init__(
        self,
        config: MLAConfig,
        tokenizer: PreTrainedTokenizerBase,
        adapter: AdapterOptions | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.adapter = adapter

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the folder `path`, replacing nothing until all of it is on disk.

        Raises:
            CheckpointError: the disk is full or not writable; what was there before is untouched.
        """
        target = Path(path)
        partial = partial_path(target)
        self.note_trained_length(checkpoint)

        def write() -> None:
            partial.mkdir(parents=True, exist_ok=True)
            base, adapter = split_adapter(self.weights(checkpoint["state_dict"]))
            save_file(base, partial / WEIGHTS, {"format": "pt"})
            self.save_description(partial, adapter)
            rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
            torch.save(rest, partial / TRAINER_STATE)
            write_checksums(partial)
            sync_folder(partial)

        try:
            retrying(write)
            retrying(lambda: commit_folder(partial, target))
        except (OSError, RuntimeError, SafetensorError) as error:
            # safetensors and torch.save wrap the operating system's error each in its own way
            shutil.rmtree(partial, ignore_errors=True)
            raise save_error(target, operating_system_error(error) or error) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """State for Lightning to restore, weights included; sharded checkpoints are put together.

        Raises:
            CheckpointError: missing, damaged, of another architecture, or with weights that are
                NaN or infinite.
        """
        folder = Path(path)
        check_intact(folder)
        self.check_config(folder)
        state = read_trainer_state(folder)
        if is_sharded(folder):
            reader = ShardReader(folder)
            weights = read_tensors(reader, MODEL)
            if "optimizer_groups" in state:
                groups = state.pop("optimizer_groups")
                state["optimizer_states"] = [_optimizer_state(reader, groups)]
        else:
            weights = read_weights(folder)
        check_tensors(self.config, weights, folder)
        if self.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        weights = join_adapter(weights, self.read_adapter(folder))
        if (name := first_not_finite(weights)) is not None:
            raise not_finite_error(folder, name)
        state["state_dict"] = _under_prefix(weights)
        return state

    def note_trained_length(self, checkpoint: dict[str, Any]) -> None:
        """Keep in the configuration the longest context that a run has come to."""
        lengths = (self.config.trained_length, context_length(checkpoint))
        self.config.trained_length = max((n for n in lengths if n is not None), default=None)

    def check_config(self, folder: Path) -> None:
        """Refuse a checkpoint of another architecture; take over the length it was trained at.

        Raises:
            CheckpointError: another architecture.
        """
        found = load_config(folder)
        check_same_architecture(self.config, found, folder)
        self.config.trained_length = found.trained_length

    def read_adapter(self, folder: Path) -> dict[str, Tensor]:
        """The adapter's tensors in a checkpoint, under the model's names; none without an adapter.

        Raises:
            CheckpointError: the checkpoint has an adapter and the run has none, or the other way
                round, or of other settings.
        """
        saved = (folder / ADAPTER).is_dir()
        if saved != (self.adapter is not None):
            raise CheckpointError(
                f"{folder} was saved {'with' if saved else 'without'} a LoRA adapter; resume it "
                f"{'with' if saved else 'without'} model/adapter=lora, or begin a new run from its "
                "weights with model.init_from"
            )
        if self.adapter is None:
            return {}
        check_intact(folder / ADAPTER)
        tensors, config = load_adapter(folder / ADAPTER)
        if config != self.adapter:
            raise CheckpointError(
                f"{folder} holds an adapter of other settings: {config} (configured {self.adapter})"
            )
        return tensors

    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def save_description(self, folder: Path, adapter: dict[str, Tensor]) -> None:
        """Write what makes a folder of base weights self-describing: config.json, the tokenizer and
        the adapter's tensors, if the run has one, flushed to disk.
        """
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.adapter is not None:
            save_adapter(adapter, self.adapter, folder / ADAPTER)
            write_checksums(folder / ADAPTER)
            sync_folder(folder / ADAPTER)

    def weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's part of a LightningModule's tensors: Hugging Face's names, tied ones once."""
        weights = {
            name.removeprefix(MODULE_PREFIX): tensor.detach().contiguous()
            for name, tensor in state_dict.items()
            if name.startswith(MODULE_PREFIX)
        }
        if self.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return weights


def load_config(folder: Path, *, quantised: bool = False) -> MLAConfig:
    """The model configuration of a checkpoint folder.

    Args:
        quantised: whether the folder may hold quantised weights, of which `quantization_config`
            tells in the result (`ic.checkpoint.compressed_tensors`).

    Raises:
        CheckpointError: no such folder, or its config.json is not ours or DeepSeek's.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint folder {folder}: give a folder that holds {CONFIG} and {WEIGHTS}"
        )
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it holds no {CONFIG}")
    check_intact(folder, only=[CONFIG])  # a damaged one may name another type
    try:
        raw, _ = MLAConfig.get_config_dict(folder)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder / CONFIG} holds no table of keys: the file is damaged")
    kind = raw.get("model_type")
    if kind not in (MLAConfig.model_type, "deepseek_v2", "deepseek_v3"):
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r}; infinite_context, and deepseek_v2 and "
            "deepseek_v3 with dense layers, can be loaded, and by `evaluate` and `generate` every "
            "causal language model that the installed transformers knows"
        )
    raw.pop("auto_map", None)  # code that comes with a model: ours loads it
    found = raw.get("quantization_config")
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{folder / CONFIG}: quantization_config={found!r} is no table")
    if found and read_quantisation(found, folder) and not quantised:
        raise CheckpointError(
            f"{folder} holds {read_quantisation(found, folder).name} weights: evaluate, "
            "generate and parity take them as they are; give the folder that they were made from"
        )
    try:
        config = MLAConfig.from_dict(raw)
        if config.dtype is not None and not isinstance(config.dtype, torch.dtype):
            raise TypeError(f"dtype={config.dtype!r} is no name of a dtype such as bfloat16")
        return config
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be loaded: {error}") from error


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """Everything of a run's state but its tensors.

    Raises:
        CheckpointError: missing or damaged.
    """
    return _read(
        folder / TRAINER_STATE, lambda file: torch.load(file, weights_only=True, map_location="cpu")
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's single safetensors file, on the CPU."""
    return _read(folder / WEIGHTS, load_file)


def load_model(folder: Path, backends: Backends = ON_TORCH) -> MLAForCausalLM:
    """The model of a checkpoint folder, in evaluation mode on the CPU; an adapter is merged.

    Raises:
        CheckpointError: missing, truncated, or tensors that do not fit the configuration.
    """
    check_intact(folder, but=[TRAINER_STATE])
    config = load_config(folder, quantised=True)
    config.set_backends(backends)
    if (saved := quantisation_of(config, folder)) is not None:
        return load_quantised_model(folder, config, saved).eval()
    model = _base_model(folder, config)
    if (folder / ADAPTER).is_dir():
        check_intact(folder / ADAPTER)
        tensors, adapter_config = load_adapter(folder / ADAPTER)
        add_adapter(model, adapter_config)
        incompatible = model.load_state_dict(tensors, strict=False)
        if incompatible.unexpected_keys:
            raise CheckpointError(
                f"{folder / ADAPTER} does not fit the model: {incompatible.unexpected_keys[0]}"
            )
        merge_adapter(model)
        model.requires_grad_(True)
    return model.eval()


def _base_model(folder: Path, config: MLAConfig) -> MLAForCausalLM:
    if is_sharded(folder):
        return _load_sharded_model(folder, config)
    weight_files(folder)
    try:
        loaded: Any = MLAForCausalLM.from_pretrained(
            folder, config=config, output_loading_info=True, dtype="auto"
        )
        model, info = loaded
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if lacks_memory(error):
            raise
        raise CheckpointError(f"the weights in {folder} cannot be read: {error}") from error
    check_names(folder, info["missing_keys"], info["unexpected_keys"])
    loaded_model: MLAForCausalLM = model
    return loaded_model


def _under_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {MODULE_PREFIX + name: tensor for name, tensor in weights.items()}


def _load_sharded_model(folder: Path, config: MLAConfig) -> MLAForCausalLM:
    reader = ShardReader(folder)
    weights = read_tensors(reader, MODEL)
    model: Any = MLAForCausalLM(config)  # transformers wraps `to` past its types
    model = model.to(next(iter(weights.values())).dtype)
    check_tensors(config, weights, folder)
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {folder} do not fit: {error}") from error
    loaded: MLAForCausalLM = model
    return loaded


def _optimizer_state(reader: ShardReader, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's `state_dict`, by parameter index as unsharded optimizers want it."""
    state: dict[int, dict[str, Tensor]] = {}
    names = [name.removeprefix(MODULE_PREFIX) for group in groups for name in group["params"]]
    index = {name: i for i, name in enumerate(names)}
    for key, tensor in read_tensors(reader, OPTIMIZER).items():
        name, _, entry = key.rpartition(".")
        state.setdefault(index[name], {})[entry] = tensor
    return {
        "state": state,
        "param_groups": [
            {**g, "params": [index[n.removeprefix(MODULE_PREFIX)] for n in g["params"]]}
            for g in groups
        ],
    }


def _read(file: Path, load: Any) -> Any:
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent} is not a complete checkpoint: it holds no {file.name}"
        )
    try:
        return load(file)
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        if lacks_memory(error):
            raise  # the file is as it was
        raise damaged_error(file, error) from error


def trained_length(folder: Path) -> int | None:
    """Longest context in tokens that a checkpoint was trained at, if it tells.

    `config.json` says it; before it did, the trainer's state alone knew.
    """
    config = load_config(folder, quantised=True)
    if config.trained_length is not None or not (folder / TRAINER_STATE).is_file():
        return config.trained_length
    # Mapped, so that an optimizer's state is not read for it.
    state = _read(
        folder / TRAINER_STATE,
        lambda file: torch.load(file, weights_only=True, map_location="cpu", mmap=True),
    )
    return context_length(state)


def context_length(state: dict[str, Any]) -> int | None:
    """The context length in tokens at which a run trained when it saved this state, if it tells."""
    found: int | None = state.get("context_length")
    for key, value in state.items():  # before it had a key of its own, some datamodules kept it
        if found is None and key.endswith("DataModule") and isinstance(value, dict):
            found = value.get("context_length")
    return found
