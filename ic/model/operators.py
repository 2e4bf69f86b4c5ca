"""The model's seam: what a backend provides, what it supports, and who does what in one model.

A backend is an object of a class that inherits the parts it provides: attention, norm, rotation and
perhaps the append that fuses the last two. `choose_operators` takes one for each part by name, and
asks once, when a model is built, whether it provides the part and accepts the model's dimensions.

Legend: B batch, T new tokens, S visible tokens, H heads, N qk_nope, P qk_rope, K = N + P,
V v_head, R kv_lora_rank, C = R + P, F = P / 2, M tokens (flattened), D hidden, W vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from torch import Tensor

from ic.errors import check_choice
from ic.model.config import MLAConfig
from ic.model.registry import PARTS, backend_names, find_backend
from ic.model.sdpa import Segments
from ic.model.sparse_operators import SparseOperators


@dataclass(frozen=True)
class Capabilities:
    """What an attention backend supports beyond causal attention.

    Attributes:
        mask: keys hidden by a mask. Without, padded batches run on `torch`.
        documents: attention within documents. Without, document ids are refused.
        row_lengths: decode reads the number of keys of each row from `lengths_B`. Without, rows of
            unequal length come with a mask; without either they are refused.
        quantised_cache: decode over e4m3 or int8 latents with a scale a token.
        graph_capture: a decode step can be captured in a CUDA graph.
        max_decode_queries: most new tokens a row that decode takes, None for any number. More run
            on `torch`.
        block_table: decode reads the pages of each row where they lie. Without, they are gathered
            first.
    """

    mask: bool
    documents: bool
    row_lengths: bool
    quantised_cache: bool
    graph_capture: bool
    max_decode_queries: int | None
    block_table: bool = False

    def __post_init__(self) -> None:
        if self.max_decode_queries is not None and self.max_decode_queries < 1:
            raise ValueError(
                f"max_decode_queries={self.max_decode_queries}: decode takes at least one token; "
                "None is for any number"
            )


class AttentionOperators(ABC):
    """Both forms of attention."""

    capabilities: Capabilities

    def check_attention(self, config: MLAConfig) -> None:  # noqa: B027  # most take any
        """Raises ValueError for dimensions that this backend does not take."""

    def document_segments(self, document_ids_BT: Tensor) -> Segments | None:
        """What the form (row, start, end) costs a backend that reads the ids themselves: None."""
        return None

    @abstractmethod
    def expanded(
        self,
        q_BTHK: Tensor,
        k_BSHK: Tensor,
        v_BSHV: Tensor,
        *,
        scale: float,
        mask_BTS: Tensor | None = None,
        segments: Segments | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """softmax(scale q k^T) v -> (B, T, H, V), differentiable.

        The queries are the last T of the S positions, and see those up to their own.

        Args:
            mask_BTS: True where a key is visible, in place of that; only with `capabilities.mask`.
            segments, document_ids_BT: documents that attend within themselves, in the form that
                `document_segments` chose and as ids; only with `capabilities.documents`.
        """

    @abstractmethod
    def absorbed(
        self,
        q_latent_BTHR: Tensor,
        q_rope_BTHP: Tensor,
        cache_BSC: Tensor,
        *,
        scale: float,
        mask_BTS: Tensor | None = None,
        lengths_B: Tensor | None = None,
        cache_scale_BS: Tensor | None = None,
        block_table_BN: Tensor | None = None,
    ) -> Tensor:
        """Attention of new tokens over latents, which are key and value at once -> (B, T, H, R).

        Args:
            cache_BSC: latents and rotated keys, side by side.
            mask_BTS: as in `expanded`.
            lengths_B: int32, keys of each row, the new tokens last among them. None: all S.
            cache_scale_BS: float32, factors on the tokens of a quantised cache; only with
                `capabilities.quantised_cache`.
            block_table_BN: int32, the pages of each row; only with `capabilities.block_table`.
                `cache_BSC` is then (pages, tokens of a page, C), and the scales likewise.
        """


class NormOperators(ABC):
    """x / rms(x) * weight over the last dimension; statistics in float32, result in x's dtype."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The norm of x, differentiable."""

    @abstractmethod
    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum."""


class RotaryOperators(ABC):
    """Decoupled rotary position embedding."""

    def check_rotation(self, config: MLAConfig) -> None:  # noqa: B027  # most take any
        """Raises ValueError for dimensions that this backend does not take."""

    @abstractmethod
    def rotate(
        self, q_BTHP: Tensor, k_BT1P: Tensor, cos_BTF: Tensor, sin_BTF: Tensor, *, interleave: bool
    ) -> tuple[Tensor, Tensor]:
        """Rotate the rope parts of queries and shared key, which may be slices of a projection's
        output; differentiable. cos and sin are (B or 1, T, F) float32.
        """


@dataclass(frozen=True)
class NewTokens:
    """Tokens that are to be appended to a cache, neither normalised nor rotated.

    Attributes:
        latent_MR, k_rope_MP: as projected.
        cos_MF, sin_MF: float32, the rotation of each.
        slots_M: int64, page * tokens of a page + place in it.
    """

    latent_MR: Tensor
    k_rope_MP: Tensor
    cos_MF: Tensor
    sin_MF: Tensor
    slots_M: Tensor


class AppendOperators(ABC):
    """Norm, rotation and append to the cache at once; taken where the same backend does the first
    two, and the latent has a norm.
    """

    @abstractmethod
    def accepts_append(self, config: MLAConfig) -> bool:
        """Whether it takes the model's dimensions; else the three run one after the other."""

    @abstractmethod
    def append(
        self,
        new: NewTokens,
        weight_R: Tensor,
        pages: Tensor,
        *,
        eps: float,
        interleave: bool,
        cache_scale: Tensor | None = None,
        queries: NewQueries | None = None,
    ) -> None:
        """Normalise the latents, rotate the shared keys and write both into the cache, in place.

        Args:
            weight_R, eps: of the norm.
            queries: of the same tokens, scaled and rotated by the way.
            pages: (pages, a multiple of 16 tokens, C).
            cache_scale: (pages, tokens) float32, written for a quantised cache.
        """


@dataclass(frozen=True)
class NewQueries:
    """Queries of the tokens that are appended, to be scaled by a length temperature and rotated.

    Attributes:
        q_MHK: written in place; the rope part of each head is its last.
        temperature: the configuration's `length_temperature`.
        scale_H: of `ssmax`.
        visible_M: int64, keys that each sees, or None without a temperature.
        beta, original: of `llama4`.
    """

    q_MHK: Tensor
    temperature: str
    scale_H: Tensor | None
    visible_M: Tensor | None
    beta: float
    original: int


class FeedForwardOperators(ABC):
    @abstractmethod
    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, differentiable."""


class LossOperators(ABC):
    @abstractmethod
    def summed_linear_cross_entropy(
        self, hidden_MD: Tensor, weight_WD: Tensor, labels_M: Tensor
    ) -> Tensor:
        """Cross-entropy of `hidden @ weight.T`, summed over the labels that are not -100; a float32
        scalar, differentiable.
        """


class FusedOperators(ABC):
    """A norm, the product behind it, SwiGLU and the products after them, for layers whose weights
    of one input lie in one matrix; without gradients.

    Each with a norm adds `x_BTD` to `residual_BTD`, if there is one, normalises the sum as
    `NormOperators.add_rms_norm` does, and returns the sum beside the result.
    """

    @abstractmethod
    def norm_linear(
        self,
        x_BTD: Tensor,
        residual_BTD: Tensor | None,
        norm_weight_D: Tensor,
        eps: float,
        weight_XD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """norm(sum) weight^T (B, T, X), and the sum."""

    @abstractmethod
    def norm_swiglu(
        self,
        x_BTD: Tensor,
        residual_BTD: Tensor | None,
        norm_weight_D: Tensor,
        eps: float,
        weight_2FD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """silu(gate) * up (B, T, F), where gate and up are norm(sum) times the first and the second
        half of the weight; and the sum.
        """

    @abstractmethod
    def linear(self, x_BTD: Tensor, weight_XD: Tensor) -> Tensor:
        """x weight^T (B, T, X)."""


_PROVIDERS: dict[str, type] = {
    "attention": AttentionOperators,
    "norm": NormOperators,
    "rope": RotaryOperators,
}


@dataclass(frozen=True)
class Operators:
    """Who does what in one model.

    Attributes:
        attention, norm, rope: as configured.
        append: norm, rotation and append at once, or None for one after the other.
        masked: attention with a mask: `attention` if it takes one, else PyTorch's.
        many_queries: decode of more tokens than `attention` takes at once: PyTorch's.
        feed_forward, loss: PyTorch's, or Liger's on a GPU where it is installed.
        fused: inference with weights side by side, by who does the norm, else PyTorch.
        sparse: an indexer's scores and attention to what it chose, by `attention`, else PyTorch.
    """

    attention: AttentionOperators
    norm: NormOperators
    rope: RotaryOperators
    append: AppendOperators | None
    masked: AttentionOperators
    many_queries: AttentionOperators
    feed_forward: FeedForwardOperators
    loss: LossOperators
    fused: FusedOperators
    sparse: SparseOperators

    def with_torch_as(self, other: Any) -> Operators:
        """The same with `other`, which provides all parts, wherever PyTorch's operators stand."""
        torch_operators = load_operators("torch")
        return Operators(
            **{
                field.name: other if value is torch_operators else value
                for field in fields(self)
                for value in (getattr(self, field.name),)
            }
        )


def choose_operators(config: MLAConfig) -> Operators:
    """The operators that a configuration names.

    Raises:
        ValueError: a backend that cannot be imported, lacks the part that it was chosen for, or
            does not take the model's dimensions.
    """
    attention: AttentionOperators = _provider(config, "attention")
    norm: NormOperators = _provider(config, "norm")
    rope: RotaryOperators = _provider(config, "rope")
    attention.check_attention(config)
    rope.check_rotation(config)
    is_fused = norm is rope and isinstance(norm, AppendOperators) and config.latent_norm
    fused: Any = norm if is_fused else None
    torch_operators = load_operators("torch")
    return Operators(
        attention,
        norm,
        rope,
        append=fused if fused is not None and fused.accepts_append(config) else None,
        masked=attention if attention.capabilities.mask else torch_operators,
        many_queries=torch_operators,
        feed_forward=torch_operators,
        loss=torch_operators,
        fused=norm if isinstance(norm, FusedOperators) else torch_operators,
        sparse=attention if isinstance(attention, SparseOperators) else torch_operators,
    )


def load_operators(name: str) -> Any:
    """A backend's `OPERATORS`.

    Raises:
        ValueError: no backend of this name, or a module that cannot be imported or holds none.
    """
    check_choice("backend", name, backend_names())
    module = find_backend(name).module
    try:
        return import_module(module).OPERATORS
    except ImportError as error:
        raise ValueError(f"backend {name!r}: {module} cannot be imported: {error}") from error
    except AttributeError as error:
        raise ValueError(f"backend {name!r}: {module} has no OPERATORS: {error}") from error


def _provider(config: MLAConfig, part: str) -> Any:
    name = getattr(config, f"{part}_backend")
    operators = load_operators(name)
    if not isinstance(operators, _PROVIDERS[part]):
        provided = [p for p in PARTS if isinstance(operators, _PROVIDERS[p])]
        raise ValueError(
            f"{part}_backend={name!r}: this backend provides {' and '.join(provided) or 'nothing'},"
            f" not {part}; use {part}=torch"
        )
    return operators
