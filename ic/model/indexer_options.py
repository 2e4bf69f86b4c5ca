"""What an indexer may be. Imports no PyTorch: a configuration is checked with it before anything
else is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ic.errors import check_choice
from ic.model.options import CACHE_DTYPES

INDEXER_MODES = ("off", "dense", "sparse")
# What a model that is there may be asked for.
INDEXER_CHOICES = ("auto", "dense", "sparse")
# The configuration's keys, as config.json has them: DeepSeek-V3.2's where it has the same.
INDEXER_KEYS = (
    "indexer",
    "index_n_heads",
    "index_head_dim",
    "index_rope_head_dim",
    "index_topk",
    "index_group_size",
    "index_cache_dtype",
)
# Those that the weights of an indexer depend on.
INDEXER_SHAPE = ("index_n_heads", "index_head_dim", "index_group_size")
# In the names of an indexer's weights, and of no others.
INDEXER_WEIGHTS = ".indexer."


@dataclass
class IndexerOptions:
    """Sparse attention over the latent: an indexer chooses the tokens that each query attends to
    (docs/sparse_attention.md). null is what the folder `init_from` of a pretrained model says, or
    the default.

    Attributes:
        mode: `off`, without an indexer; `dense`, with one that attention does not ask; `sparse`.
            The default is `off`.
        num_heads: index heads; the default is 4.
        head_dim: dimensions of an index head and of the one index key of a token; 64.
        rope_head_dim: of these, how many are rotated; the default is the model's
            qk_rope_head_dim, which the number has to divide.
        top_k: tokens that a query attends to at most; 2048.
        group_size: layers that share an indexer, which stands in the first of them; 1.
        cache_dtype: what the cache of index keys holds: `auto`, the model's dtype, `fp8` or `int8`
            with a scale per token.
    """

    mode: str | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    rope_head_dim: int | None = None
    top_k: int | None = None
    group_size: int | None = None
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.mode is not None:
            check_choice("model.indexer.mode", self.mode, INDEXER_MODES)
        if self.cache_dtype is not None:
            check_choice("model.indexer.cache_dtype", self.cache_dtype, CACHE_DTYPES)
        for name in ("num_heads", "head_dim", "rope_head_dim", "top_k", "group_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"model.indexer.{name}={value}: must be at least 1, or null for the default"
                )

    @property
    def keys(self) -> dict[str, Any]:
        """Those that are given, in `MLAConfig`'s names."""
        values = (
            self.mode,
            self.num_heads,
            self.head_dim,
            self.rope_head_dim,
            self.top_k,
            self.group_size,
            self.cache_dtype,
        )
        named = zip(INDEXER_KEYS, values, strict=True)
        return {name: value for name, value in named if value is not None}


class IndexerSizes(Protocol):
    """What `check_indexer` reads, of an `MLAConfig`."""

    num_hidden_layers: int
    qk_rope_head_dim: int
    rope_repeats: int
    indexer: str
    index_n_heads: int
    index_head_dim: int
    index_rope_head_dim: int | None
    index_topk: int
    index_group_size: int
    index_cache_dtype: str


def check_indexer(model: IndexerSizes) -> None:
    """Check the choices and, of a model with an indexer, its dimensions.

    Raises:
        ValueError: an unknown choice, or a dimension that does not fit.
    """
    check_choice("indexer", model.indexer, INDEXER_MODES)
    check_choice("index_cache_dtype", model.index_cache_dtype, CACHE_DTYPES)
    if model.indexer == "off":
        return
    for name in ("index_n_heads", "index_head_dim", "index_topk", "index_group_size"):
        value = getattr(model, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
    if model.num_hidden_layers % model.index_group_size:
        raise ValueError(
            f"index_group_size={model.index_group_size} of {model.num_hidden_layers} layers: must "
            "divide them, because the layers of a group share the indexer of its first"
        )
    width = index_rope_dim(model)
    if isinstance(width, bool) or not isinstance(width, int) or width < 2 or width % 2:
        raise ValueError(f"index_rope_head_dim={width!r}: must be even and at least 2")
    if width > model.index_head_dim:
        raise ValueError(
            f"index_head_dim={model.index_head_dim} and {width} rotated dimensions: they are part "
            "of the head; raise index_head_dim or lower index_rope_head_dim"
        )
    if (model.qk_rope_head_dim // model.rope_repeats) % width:
        raise ValueError(
            f"index_rope_head_dim={width} and qk_rope_head_dim={model.qk_rope_head_dim} in "
            f"{model.rope_repeats} parts: must divide a part, whose frequencies it takes"
        )


def index_rope_dim(model: IndexerSizes) -> int:
    """Dimensions of an index head that are rotated."""
    given = model.index_rope_head_dim
    return model.qk_rope_head_dim // model.rope_repeats if given is None else given


def num_indexers(model: IndexerSizes) -> int:
    """Indexers of a model: one for each group of layers, or none."""
    return 0 if model.indexer == "off" else model.num_hidden_layers // model.index_group_size
