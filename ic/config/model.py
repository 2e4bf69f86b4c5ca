"""The model's configuration, and the model it makes.

`ModelConfig` gives the sizes itself, `PretrainedModelConfig` (`ic.config.pretrained_model`) takes
them from a folder. What both are asked stands in `BaseModelConfig`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ic.errors import check_choice
from ic.files.saved_config import MAY_CHANGE
from ic.model.backends import Backends
from ic.model.dimensions import check_dimensions
from ic.model.indexer_options import INDEXER_WEIGHTS, IndexerOptions
from ic.model.options import FP8_RECIPES, AdapterOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ic.model.config import MLAConfig
    from ic.model.modeling_mla import MLAForCausalLM

# A curriculum from 256 tokens to a million doubles twelve times.
MAX_COMPILED_LENGTHS = 32


@dataclass
class BaseModelConfig(ABC):
    """The model: its sizes and kernels in `MLAConfig`'s names, and how it begins.

    Attributes:
        attention, norm, rope: `torch` or `triton`, each on its own.
        gradient_checkpointing: recompute each layer in the backward pass.
        compile: each layer by torch.compile, where it runs without a cache (training, validation).
        init_from: where to take the weights from, instead of random ones: a folder in any form that
            `ic.checkpoint.source` knows.
        adapter: train LoRA layers alone (`model/adapter=lora`); null trains every weight.
        indexer: sparse attention over the latent.
        fp8: multiply in FP8 in the linear layers of the decoder while training, by torchao:
            `tensorwise` (a scale for each tensor), `rowwise` (one for each row) or
            `rowwise_with_gw_hp` (the same, and weight gradients in full precision). Weights stay as
            they are, and so does evaluation. Needs the extra `fp8`, and a GPU of compute capability
            8.9 or later; a CPU emulates it.
        fp8_keep_layers: indices of decoder layers that `fp8` leaves as they are, negative ones from
            the end.
        fp8_keep: names of linear layers that `fp8` leaves as they are in every decoder layer, such
            as `kv_a_proj_with_mqa`.
    """

    attention: str = field(default="torch", metadata=MAY_CHANGE)
    norm: str = field(default="torch", metadata=MAY_CHANGE)
    rope: str = field(default="torch", metadata=MAY_CHANGE)
    gradient_checkpointing: bool = False
    compile: bool = field(default=False, metadata=MAY_CHANGE)
    init_from: str | None = None
    adapter: AdapterOptions | None = None
    indexer: IndexerOptions = field(default_factory=IndexerOptions)
    fp8: str | None = field(default=None, metadata=MAY_CHANGE)
    fp8_keep_layers: list[int] = field(default_factory=lambda: [0, -1], metadata=MAY_CHANGE)
    fp8_keep: list[str] = field(default_factory=list, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        Backends(self.attention, self.norm, self.rope)
        if self.fp8 is not None:
            check_choice("model.fp8", self.fp8, FP8_RECIPES)
            if self.adapter is not None:
                raise ValueError(
                    f"model.fp8={self.fp8} does not go with model/adapter, whose matrices are too "
                    "narrow to gain from it; set one of the two to null"
                )

    @property
    @abstractmethod
    def positions(self) -> int:
        """Positions that the model accepts."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """The model's dimensions and choices, in `MLAConfig`'s names."""

    @property
    def index_mode(self) -> str:
        """The indexer's mode: what is given, else the folder's."""
        return self.indexer.mode or self.sizes.get("indexer", "off")

    @abstractmethod
    def mla_config(self, vocab_size: int, **token_ids: Any) -> MLAConfig:
        """The Hugging Face configuration of this model.

        Args:
            vocab_size: rows of embedding and head, if the model has no weights yet.
            token_ids: of the tokenizer: `pad_token_id`, `bos_token_id`, `eos_token_id`.
        """

    def build(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int | None = None,
        *,
        take_over: bool = True,
    ) -> MLAForCausalLM:
        """A fresh model, or the weights of `init_from` in this configuration.

        Args:
            vocab_size: rows of embedding and head; by default the tokenizer's.
            take_over: load the weights of `init_from`; False where a checkpoint is restored over
                them, so that `init_from` may be gone by then.

        Raises:
            ValueError: weights of another architecture, or a tokenizer of more tokens.
        """
        from ic.datamodules.tokenizers import vocabulary_size
        from ic.model.adapter import add_adapter
        from ic.model.modeling_mla import MLAForCausalLM

        wanted = self.mla_config(
            vocab_size or vocabulary_size(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        if len(tokenizer) > wanted.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and the model an embedding of "
                f"{wanted.vocab_size}: give the tokenizer that it was trained with, such as "
                "tokenizer=${model.init_from}"
            )
        take_over = take_over and self.init_from is not None
        weights = _take_over(wanted, str(self.init_from)) if take_over else None
        model = MLAForCausalLM(wanted)
        if weights is not None:
            _load(model, weights, str(self.init_from))
        elif self.init_from is None:
            _note_fresh_indexer(wanted)
        if self.adapter is not None:
            add_adapter(model, self.adapter)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compile:
            _compile_layers(model)
        return model.train()


@dataclass
class ModelConfig(BaseModelConfig):
    """A model whose sizes are given here.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: width inside the feed-forward part of a layer.
        num_hidden_layers: layers.
        num_attention_heads: heads of each layer.
        q_lora_rank: rank of the query's down-projection; null for a full-rank query.
        kv_lora_rank: rank of the latent that the cache holds, numbers per token and layer.
        qk_nope_head_dim: dimensions per head of query and key that are not rotated.
        qk_rope_head_dim: dimensions per head of the query, and of the one key of all heads, that
            are rotated.
        v_head_dim: dimensions per head of the value.
        max_position_embeddings: positions that the model accepts.
        rms_norm_eps: added to the mean square before its root.
        tie_word_embeddings: the head's weights are the embedding's.
        rope_parameters: `rope_type` (`default`, `linear`, `yarn` or `llama3`), `rope_theta` and
            what else the type needs, as in Hugging Face's.
        rope_interleave: pairs are (2i, 2i+1) as DeepSeek lays them out, else (i, i + P/2).
        length_temperature: scale on the query by the number of visible keys: `none`, `llama4` or
            `ssmax`, which is learned.
        length_temperature_beta: strength of `llama4`.
        length_temperature_original: visible keys, in tokens, from which on `llama4` scales.
        nope_layers: indices of layers that do not rotate query and key.
        absorbed_max_queries: with a cache, up to this many new tokens run in absorbed form.
    """

    hidden_size: int = 2048
    intermediate_size: int = 5440
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    q_lora_rank: int | None = None
    kv_lora_rank: int = 192
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    max_position_embeddings: int = 2**21
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 1e6}
    )
    rope_interleave: bool = True
    length_temperature: str = "ssmax"
    length_temperature_beta: float = 0.1
    length_temperature_original: int = 8192
    nope_layers: list[int] = field(default_factory=list)
    absorbed_max_queries: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dimensions(self)

    @property
    def positions(self) -> int:
        return self.max_position_embeddings

    @property
    def sizes(self) -> dict[str, Any]:
        common = BaseModelConfig.__dataclass_fields__
        return {n: getattr(self, n) for n in self.__dataclass_fields__ if n not in common}

    def mla_config(self, vocab_size: int, **token_ids: Any) -> MLAConfig:
        from ic.model.config import MLAConfig

        return MLAConfig(
            vocab_size=vocab_size,
            attention_backend=self.attention,
            norm_backend=self.norm,
            rope_backend=self.rope,
            **self.sizes,
            **self.indexer.keys,
            **token_ids,
        )


def _take_over(wanted: MLAConfig, given: str) -> dict[str, Any]:
    """Weights of a source, whose trained length goes into `wanted`. Positions, rotation and backend
    may change from stage to stage; the weights do not depend on them.

    Raises:
        ValueError: no checkpoint folder, or one of another architecture.
    """
    from ic.checkpoint.architecture import check_same_architecture
    from ic.checkpoint.folder import load_config, load_model, trained_length
    from ic.checkpoint.source import find_source

    source = find_source(given)
    if source.is_gguf:
        raise ValueError(
            f"model.init_from={given} is a GGUF file: write its weights into a folder with "
            "python -m ic export, and start from that"
        )
    folder = source.path
    check_same_architecture(wanted, load_config(folder), folder)
    wanted.trained_length = trained_length(folder)
    return load_model(folder).float().state_dict()


def _load(model: MLAForCausalLM, weights: dict[str, Any], given: str) -> None:
    """Weights of a source; an indexer that only one of the two has begins anew, or is left out."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    has = any(INDEXER_WEIGHTS in name for name in weights)
    if has and model.config.indexer == "off":
        rank_zero_info(f"model.indexer.mode=off leaves out the indexer of {given}")
        weights = {n: tensor for n, tensor in weights.items() if INDEXER_WEIGHTS not in n}
    elif not has and model.config.indexer != "off":
        own = model.state_dict()
        weights = weights | {n: tensor for n, tensor in own.items() if INDEXER_WEIGHTS in n}
        _note_fresh_indexer(model.config)
    model.load_state_dict(weights)


def _note_fresh_indexer(config: MLAConfig) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn

    if config.indexer == "sparse":
        rank_zero_warn(
            "model.indexer.mode=sparse with an indexer that was never trained: it chooses "
            f"{config.index_topk:,} tokens at random; first train it with "
            "model.indexer.mode=dense objective.indexer=alone (docs/sparse_attention.md)"
        )


def _compile_layers(model: MLAForCausalLM) -> None:
    """One graph a context length: with symbolic lengths each layer falls into several graphs."""
    import torch

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_COMPILED_LENGTHS)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
