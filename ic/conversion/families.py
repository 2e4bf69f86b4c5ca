"""Which models can be converted, and what of them the attention of the result has to carry.

Llama, Qwen2 (and 2.5), Qwen3 and Mistral name their layers and tensors alike. They differ in
biases, in norms of query and key, and in which of their layers look back through a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ic.errors import UsageError
from ic.model.config import yarn_mscale

# model_type in transformers -> as people call it
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
# Rotations that do not change with the length of a sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Geometry:
    """Attention of a model with G KV heads, each of which H / G query heads read.

    Attributes:
        family: its `model_type`.
        heads, kv_heads, head_dim, hidden_size, layers: sizes.
        query_bias: `q_proj` has a bias.
        key_value_bias: `k_proj` and `v_proj` have one.
        output_bias: `o_proj` has one.
        qk_norm: RMSNorm of each head's query and key before their rotation, as in Qwen3.
        rope_parameters: of the rotation, complete: no default depends on the family any more.
    """

    family: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    layers: int
    query_bias: bool
    key_value_bias: bool
    output_bias: bool
    qk_norm: bool
    rope_parameters: dict[str, Any]

    @property
    def cache_numbers(self) -> int:
        """Numbers that its cache holds per token and layer: the keys and values of all KV heads."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def keys_dim(self) -> int:
        """Dimensions of the keys of all KV heads together, G * d."""
        return self.kv_heads * self.head_dim

    @property
    def rotation_scale(self) -> float:
        """YaRN's factor on cos and sin, which a key that is not rotated has to be given."""
        return float(self.rope_parameters.get("attention_factor", 1.0))


def read_geometry(config: Any, path: Path) -> Geometry:
    """What a configuration of `transformers` says of attention.

    Args:
        config: of the model.
        path: where it comes from, for the messages.

    Raises:
        UsageError: a family that is not known, or an option of it that MLA does not compute.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise UsageError(
            f"source={path} holds a model of type {family!r}; {', '.join(FAMILIES.values())} can "
            "be converted"
        )
    if getattr(config, "quantization_config", None) and path.suffix != ".gguf":
        raise UsageError(
            f"source={path} holds quantised weights; give them in float32, bfloat16 or float16, or "
            "as a GGUF file"
        )
    if config.hidden_act != "silu":
        raise UsageError(
            f"source={path}: hidden_act={config.hidden_act!r}; the feed-forward part of the result "
            "has silu"
        )
    if getattr(config, "mlp_bias", False):
        raise UsageError(
            f"source={path}: mlp_bias=true; the feed-forward part of the result has no biases"
        )
    _check_windows(config, path)
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads:
        raise UsageError(
            f"source={path}: {heads} query heads do not divide among {kv_heads} KV heads"
        )
    has_bias = family == "qwen2" or bool(getattr(config, "attention_bias", False))
    return Geometry(
        family=family,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        query_bias=has_bias,
        key_value_bias=has_bias,
        output_bias=has_bias and family != "qwen2",
        qk_norm=family == "qwen3",
        rope_parameters=_rope(config, path),
    )


def _check_windows(config: Any, path: Path) -> None:
    """Refuse layers whose window ends before the model's last position."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    layers = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    if not layers:
        return
    which = "all layers" if len(layers) == len(kinds) else f"layers {_spans(layers)}"
    raise UsageError(
        f"source={path}: {which} attend to the last {window:,} of "
        f"{config.max_position_embeddings:,} tokens (sliding_window), and MLA to "
        f"all of them; a model without windows, or used to {window:,} tokens alone "
        f"(max_position_embeddings={window} in its config.json), can be converted"
    )


def _spans(numbers: list[int]) -> str:
    """`0-3, 8`: ascending numbers, runs of them as spans."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)


def _rope(config: Any, path: Path) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    kind = rope.setdefault("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UsageError(
            f"source={path}: a rotation of type {kind!r}, whose frequencies change with the length "
            f"of the sequence, cannot be carried; {', '.join(ROPE_TYPES)} can"
        )
    if (part := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise UsageError(
            f"source={path}: partial_rotary_factor={part}; only heads that are rotated whole can "
            "be converted"
        )
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        factor = rope.get("factor") or config.max_position_embeddings / original
        rope |= {"original_max_position_embeddings": original, "factor": factor}
        # Here mscale is a factor on cos and sin alone; in DeepSeek's models it also scales softmax.
        mscale, all_dim = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
        if rope.get("attention_factor") is None:
            rope["attention_factor"] = yarn_mscale(factor, mscale if mscale and all_dim else 1.0)
            if mscale and all_dim:
                rope["attention_factor"] /= yarn_mscale(factor, all_dim)
    return rope
