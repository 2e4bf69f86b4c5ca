"""A model whose sizes a folder tells: a converted model, an export, or a run's checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ic.checkpoint.hugging_face import CONFIG
from ic.checkpoint.source import find_source
from ic.config.model import BaseModelConfig, ModelConfig

if TYPE_CHECKING:
    from ic.model.config import MLAConfig

# What `MLAForCausalLM` loads, as `ic.checkpoint.folder.load_config` has it.
_OURS = ("infinite_context", "deepseek_v2", "deepseek_v3")
# How a folder was written and trained, which is no part of the model.
_OF_THE_FILE = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    "trained_length",
)


@dataclass
class PretrainedModelConfig(BaseModelConfig):
    """A model with the weights and sizes of the folder `init_from`.

    Attributes:
        max_position_embeddings: positions that the model accepts; null is the folder's.
        rope_parameters: entries in place of the folder's, such as `rope_theta`; null leaves one as
            it is. Another `rope_type` begins anew with the folder's `rope_theta`.
        shape: what the folder's config.json says; read from it when the run begins, and kept in the
            run's config.yaml, so that the run goes on without the folder.
    """

    max_position_embeddings: int | None = None
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_theta": None})
    shape: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from is None:
            raise ValueError(
                "model=pretrained takes the sizes and weights of a folder: give it as "
                "model.init_from=FOLDER"
            )
        if not self.shape:
            self.shape = read_shape(self.init_from)
        if self.max_position_embeddings is not None and self.max_position_embeddings < 1:
            raise ValueError(
                f"model.max_position_embeddings={self.max_position_embeddings}: must be at least "
                "1, or null for the folder's"
            )
        theta = self.rope_parameters.get("rope_theta")
        if theta is not None and (not isinstance(theta, int | float) or not theta > 1):
            raise ValueError(
                f"model.rope_parameters.rope_theta={theta!r}: must be a number above 1, or null "
                "for the folder's"
            )

    @property
    def positions(self) -> int:
        return int(self.sizes["max_position_embeddings"])

    @property
    def sizes(self) -> dict[str, Any]:
        positions = self.max_position_embeddings
        given = {} if positions is None else {"max_position_embeddings": positions}
        return {**ModelConfig().sizes, **self.shape, **given}

    def mla_config(self, vocab_size: int, **token_ids: Any) -> MLAConfig:
        """The folder's configuration, its vocabulary and token ids included.

        Raises:
            ValueError: the folder's configuration, or what is put in its place, cannot be.
        """
        from ic.model.config import MLAConfig

        read: Any = MLAConfig.from_dict(dict(self.shape))
        changed = {k: v for k, v in self.rope_parameters.items() if v is not None}
        own = dict(read.rope_parameters or {})
        if changed.get("rope_type", own.get("rope_type")) != own.get("rope_type"):
            own = {"rope_theta": own["rope_theta"]}
        values = {**read.to_dict(), "rope_parameters": {**own, **changed}}
        if self.max_position_embeddings is not None:
            values["max_position_embeddings"] = self.max_position_embeddings
        for name, token in token_ids.items():
            if values.get(name) is None:
                values[name] = token
        backends = (self.attention, self.norm, self.rope)
        names = ("attention_backend", "norm_backend", "rope_backend")
        values |= dict(zip(names, backends, strict=True)) | self.indexer.keys
        config: MLAConfig = MLAConfig.from_dict(values)
        return config


def read_shape(folder: str) -> dict[str, Any]:
    """The model's configuration in a folder, by name alone: no library for models is loaded.

    Raises:
        ValueError: no folder of a model of ours; says what it holds.
    """
    source = find_source(folder)
    if source.is_gguf:
        raise ValueError(
            f"model.init_from={folder} is a GGUF file: write a folder of it with python -m ic "
            "convert, or python -m ic export if it is of our architecture"
        )
    file = source.path / CONFIG
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"model.init_from={folder}: {file} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"model.init_from={folder}: {file} holds no table of keys")
    kind = raw.get("model_type")
    if kind not in _OURS:
        raise ValueError(
            f"model.init_from={folder} holds a model of type {kind!r}, and {', '.join(_OURS)} can "
            f"be trained; make one of it with python -m ic convert source={folder}"
        )
    if raw.get("quantization_config"):
        raise ValueError(
            f"model.init_from={folder} holds quantised weights, which cannot be trained; give them "
            "in float32, bfloat16 or float16"
        )
    # The default of DeepSeek's classes is not what a model was made for.
    positions = raw.get("max_position_embeddings")
    if isinstance(positions, bool) or not isinstance(positions, int) or positions < 1:
        raise ValueError(
            f"{file}: max_position_embeddings={positions!r}: must be a number of at least 1"
        )
    return {name: value for name, value in raw.items() if name not in _OF_THE_FILE}
