"""Configuration of the MLA language model, in DeepSeek-V2/V3's and Hugging Face's names."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ic.errors import check_choice
from ic.model.backends import Backends
from ic.model.dimensions import check_dimensions, check_extensions
from ic.model.indexer_options import INDEXER_CHOICES, INDEXER_KEYS, check_indexer
from ic.model.options import CACHE_DTYPES
from ic.model.registry import PARTS, backend_names

# A number in DeepSeek's configurations, which check their types and print what they refuse. A model
# of dense layers has no use for it.
_GUARD = "n_shared_experts"
# What only our classes read, and `extensions` names where it is on.
EXTENSION_KEYS = (
    "length_temperature",
    "length_temperature_beta",
    "length_temperature_original",
    "nope_layers",
    "latent_norm",
    "rope_repeats",
    "rope_pairs",
    "rope_pairs_dim",
    "query_bias",
    "qk_norm_dim",
    *INDEXER_KEYS,
)


class MLAConfig(PreTrainedConfig):
    """Configuration of `MLAForCausalLM`.

    A folder saved with this configuration also loads in `transformers`' `DeepseekV3ForCausalLM`
    (and `DeepseekV2ForCausalLM` with `rope_interleave=True`) as long as `extensions` is empty:
    every layer is dense, `first_k_dense_replace` says so. With an extension, which they would not
    compute, a value in `config.json` makes them refuse it.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: sizes.
        q_lora_rank: rank of the query's down-projection; None for a full-rank query.
        kv_lora_rank: rank of the latent that the cache holds (numbers a token and layer).
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: dimensions a head; the first may be 0.
        max_position_embeddings: largest position plus one that the model accepts.
        rope_parameters: `{"rope_type": "default", "rope_theta": 1e4}`, or with the keys of
            transformers' rope types `yarn` (`factor, original_max_position_embeddings, beta_fast,
            beta_slow, mscale, mscale_all_dim, truncate`), `linear` (`factor`) and `llama3`
            (`factor, low_freq_factor, high_freq_factor, original_max_position_embeddings`).
        rope_interleave: pairs are (2i, 2i+1) as DeepSeek lays them out, else (i, i + P/2).
        attention_backend: `torch` (everywhere), `triton` (our kernels; needs a CUDA GPU) or another
            of `ic.model.registry`. Padded batches, and decoding of more tokens at once than the
            backend takes (four on `triton`), run on `torch` either way.
        norm_backend, rope_backend: the same choice for RMSNorm (with the residual addition before
            it) and for the rotation. With both on `triton`, decoding over a `LatentCache` does
            norm, rotation and append in one kernel.
        absorbed_max_queries: with a cache, up to this many new tokens run in absorbed form.
        length_temperature: scale on the query by the number of visible keys n:
            `none`; `llama4`: 1 + beta * log(1 + floor((n - 1) / original)); `ssmax`: a learned
            per-head s * log(n) (Scalable-Softmax, arXiv 2501.19399).
        nope_layers: indices of layers that do not rotate query and key.
        latent_norm: the latent has an RMSNorm (`kv_a_layernorm`).
        rope_repeats: copies of the frequencies that the rotary dimensions hold: pair i turns as
            pair i mod (P / 2 / rope_repeats) of so many dimensions fewer would.
        rope_pairs: for each of the P / 2 rotary pairs the one, of a rotation of `rope_pairs_dim`
            dimensions, that it turns as; a pair may be named several times. None for a rotation of
            all of P, pair after pair.
        rope_pairs_dim: dimensions whose pairs `rope_pairs` counts; None without it.
        query_bias: `q_proj` has a bias.
        qk_norm_dim: RMSNorm of query and rotary key in blocks of so many dimensions
            (`ic.model.qk_norm`); None for none.
        trained_length: longest context in tokens that the weights were trained at, once they were.
        cache_dtype: what the caches that the model makes hold: `auto` for its own dtype, `fp8` or
            `int8` for codes with a scale per token (`ic.model.quantised_latents`).
        indexer: `off`, without one; `dense`, attention does not ask it; `sparse`, attention is over
            the tokens that it chooses (`ic.model.indexer`).
        index_n_heads, index_head_dim: index heads, and dimensions of each and of the index key.
        index_rope_head_dim: dimensions of an index head that are rotated; None for
            qk_rope_head_dim.
        index_topk: tokens that a query attends to at most.
        index_group_size: layers that share the indexer in the first of them.
        index_cache_dtype: as `cache_dtype`, of the caches of index keys.

    Raises:
        ValueError: a dimension that does not fit, or an unknown choice. Whether the backends take
            the dimensions is asked when a model is built.
    """

    model_type = "infinite_context"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    auto_map: ClassVar[dict[str, str]] = {}  # TRL asks every model that it loads for it

    vocab_size: int = 320
    hidden_size: int = 2048
    intermediate_size: int = 5440
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int = 192
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 2**21
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 258
    bos_token_id: int | None = 256
    eos_token_id: int | list[int] | None = 257
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_interleave: bool = True
    attention_bias: bool = False
    attention_dropout: float = 0.0
    first_k_dense_replace: int | None = None

    # InfiniteContext's extensions
    attention_backend: str = "torch"
    norm_backend: str = "torch"
    rope_backend: str = "torch"
    absorbed_max_queries: int = 16
    length_temperature: str = "none"
    length_temperature_beta: float = 0.1
    length_temperature_original: int = 8192
    nope_layers: list[int] | None = None
    latent_norm: bool = True
    rope_repeats: int = 1
    rope_pairs: list[int] | None = None
    rope_pairs_dim: int | None = None
    query_bias: bool = False
    qk_norm_dim: int | None = None
    trained_length: int | None = None
    cache_dtype: str = "auto"
    indexer: str = "off"
    index_n_heads: int = 4
    index_head_dim: int = 64
    index_rope_head_dim: int | None = None
    index_topk: int = 2048
    index_group_size: int = 1
    index_cache_dtype: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(kwargs.get(_GUARD), str):
            del kwargs[_GUARD]
        for derived in ("qk_head_dim", "head_dim"):  # saved beside the sizes that they follow from
            kwargs.pop(derived, None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        # transformers' rope code reads the rotated dimension under this name
        self.head_dim = self.qk_rope_head_dim
        if self.nope_layers is None:
            self.nope_layers = []
        if self.first_k_dense_replace is None:
            self.first_k_dense_replace = self.num_hidden_layers
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration of ours or of DeepSeek's, of which a key that is left out has DeepSeek's
        default: their files need not say that there is no token for padding, say.
        """
        kind = config_dict.get("model_type")
        if kind in ("deepseek_v2", "deepseek_v3"):
            ours = {field.name for field in fields(cls)} - {"num_key_value_heads"}
            defaults = {f.name: f.default for f in fields(CONFIG_MAPPING[kind]) if f.name in ours}
            config_dict = {**defaults, **config_dict}
        return super().from_dict(config_dict, **kwargs)

    @property
    def extensions(self) -> list[str]:
        """What the layers compute that DeepSeek's classes do not, as `key=value`."""
        used = []
        if self.length_temperature != "none":
            used.append(f"length_temperature={self.length_temperature}")
        if self.nope_layers:
            used.append(f"nope_layers={self.nope_layers}")
        if not self.latent_norm:
            used.append("latent_norm=False")
        if self.rope_repeats > 1:
            used.append(f"rope_repeats={self.rope_repeats}")
        if self.rope_pairs is not None:
            used.append(f"rope_pairs={self.rope_pairs} of {self.rope_pairs_dim} dimensions")
        if self.query_bias:
            used.append("query_bias=True")
        if self.qk_norm_dim is not None:
            used.append(f"qk_norm_dim={self.qk_norm_dim}")
        if self.indexer != "off":
            used.append(f"indexer={self.indexer}")
        return used

    @property
    def latent_dim(self) -> int:
        """Numbers that the cache holds a token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(d_qk), times YaRN's mscale squared as in DeepSeek-V3's `Attention.__init__`."""
        scale = self.qk_head_dim**-0.5
        rope = self.rope_parameters or {}
        if rope.get("rope_type", "default") == "yarn" and rope.get("mscale_all_dim"):
            scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
        return scale

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds: all but the backends, which are the machine's matter, and a
        cache that is the model's dtype.
        """
        saved = super().to_diff_dict()
        for part in PARTS:
            saved.pop(f"{part}_backend", None)
        if self.cache_dtype == "auto":
            saved.pop("cache_dtype", None)
        if self.extensions:
            saved[_GUARD] = (
                f"none: {' and '.join(self.extensions)} of InfiniteContext is not DeepSeek's; load "
                "this folder after `import ic.model`, by an Auto class or MLAForCausalLM"
            )
        return saved

    def set_backends(self, backends: Backends) -> None:
        """Choose the implementations of a loaded configuration, checked as at construction."""
        self.attention_backend = backends.attention
        self.norm_backend = backends.norm
        self.rope_backend = backends.rope
        self._check()

    def set_cache_dtype(self, name: str) -> None:
        """Choose what a model's caches hold; `auto` leaves what the configuration says.

        Raises:
            ValueError: no cache of this name.
        """
        if name != "auto":
            self.cache_dtype = name
        self._check()

    def set_indexer(self, mode: str) -> None:
        """Choose whether attention asks the model's indexer: `sparse` or `dense`; `auto` leaves
        what the configuration says.

        Raises:
            ValueError: a model without an indexer, or no mode of this name.
        """
        check_choice("indexer", mode, INDEXER_CHOICES)
        if mode == "auto":
            return
        if self.indexer == "off":
            raise ValueError(
                f"indexer={mode}: the model has no indexer; leave it out, or train one with "
                "model.indexer.mode=dense and objective.indexer=alone (docs/sparse_attention.md)"
            )
        self.indexer = mode

    def _check(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size}: must be at least 1")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads}: MLA expands one key and value a "
                f"query head; leave it out or set {self.num_attention_heads}"
            )
        if (self.first_k_dense_replace or 0) < self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={self.first_k_dense_replace} of {self.num_hidden_layers} "
                "layers: mixture-of-experts layers are not supported, every layer must be dense"
            )
        if self.attention_dropout:
            raise ValueError(f"attention_dropout={self.attention_dropout}: only 0 is supported")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r}: only 'silu' is supported")
        for part in PARTS:
            name = f"{part}_backend"
            check_choice(name, getattr(self, name), backend_names())
        check_choice("cache_dtype", self.cache_dtype, CACHE_DTYPES)
        check_dimensions(self)
        check_extensions(self)
        check_indexer(self)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention factor, 0.1 * mscale * ln(factor) + 1 (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
