"""What the dimensions of an MLA model may be. Imports no PyTorch: a configuration is checked with
it before anything else is loaded.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from ic.errors import check_choice

LENGTH_TEMPERATURES = ("none", "llama4", "ssmax")
# The keys that each type of rotation needs beside `rope_theta`.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class Dimensions(Protocol):
    """What `check_dimensions` reads: an `MLAConfig`, or the options that one is made from."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    length_temperature: str
    length_temperature_beta: float
    length_temperature_original: int
    absorbed_max_queries: int

    @property
    def rope_parameters(self) -> dict[str, Any] | None: ...
    @property
    def nope_layers(self) -> list[int] | None: ...


class Extensions(Protocol):
    """What `check_extensions` reads, of an `MLAConfig`."""

    q_lora_rank: int | None
    qk_rope_head_dim: int
    latent_norm: bool
    rope_repeats: int
    rope_pairs: list[int] | None
    rope_pairs_dim: int | None
    query_bias: bool
    qk_norm_dim: int | None


def check_dimensions(model: Dimensions) -> None:
    """Check the dimensions and choices that every MLA model has; whether the backends take them is
    asked when a model is built (`ic.model.operators`).

    Raises:
        ValueError: a dimension that does not fit, or an unknown choice.
    """
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "max_position_embeddings",
        "length_temperature_original",
    ):
        _check_type(name, value := getattr(model, name), int)
        least = 0 if name == "qk_nope_head_dim" else 1
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    _check_type("q_lora_rank", model.q_lora_rank or 1, int)
    if model.q_lora_rank is not None and model.q_lora_rank < 1:
        raise ValueError(f"q_lora_rank={model.q_lora_rank}: must be at least 1, or null for none")
    for name in ("rms_norm_eps", "length_temperature_beta"):
        _check_type(name, getattr(model, name), float)
    _check_type("absorbed_max_queries", model.absorbed_max_queries, int)
    if not 0 < model.rms_norm_eps <= 1:
        raise ValueError(f"rms_norm_eps={model.rms_norm_eps}: must be above 0 and at most 1")
    if not math.isfinite(model.length_temperature_beta):
        raise ValueError(
            f"length_temperature_beta={model.length_temperature_beta}: must be a finite number"
        )
    if model.absorbed_max_queries < 0:
        raise ValueError(f"absorbed_max_queries={model.absorbed_max_queries}: must be at least 0")
    if model.qk_rope_head_dim % 2:
        raise ValueError(
            f"qk_rope_head_dim={model.qk_rope_head_dim}: must be even, pairs are rotated"
        )
    check_choice("length_temperature", model.length_temperature, LENGTH_TEMPERATURES)
    bad = [i for i in model.nope_layers or [] if not 0 <= i < model.num_hidden_layers]
    if bad:
        raise ValueError(
            f"nope_layers={bad}: layer indices run from 0 to {model.num_hidden_layers - 1}"
        )
    _check_rope(model.rope_parameters or {})


def check_extensions(model: Extensions) -> None:
    """Check the switches that a model has which was converted from other attention.

    Raises:
        ValueError: of another type, or parts of the rotary key that do not divide it.
    """
    for name in ("latent_norm", "query_bias"):
        if not isinstance(value := getattr(model, name), bool):
            raise ValueError(f"{name}={value!r}: must be true or false")
    _check_type("rope_repeats", model.rope_repeats, int)
    width, repeats = model.qk_rope_head_dim, model.rope_repeats
    if repeats < 1 or width % (2 * repeats):
        raise ValueError(
            f"rope_repeats={repeats} and qk_rope_head_dim={width}: must be at least 1, and divide "
            "the rotary dimensions into parts of an even number"
        )
    _check_pairs(model)
    if model.qk_norm_dim is not None:
        _check_type("qk_norm_dim", model.qk_norm_dim, int)
        if model.qk_norm_dim < 2 or model.qk_norm_dim % 2 or width % model.qk_norm_dim:
            raise ValueError(
                f"qk_norm_dim={model.qk_norm_dim} and qk_rope_head_dim={width}: must be even, and "
                "divide the rotary dimensions; null for no norm"
            )
    if model.query_bias and model.q_lora_rank is not None:
        raise ValueError(
            f"query_bias=true and q_lora_rank={model.q_lora_rank}: only a full-rank query "
            "(q_lora_rank=null) has a bias"
        )


def _check_pairs(model: Extensions) -> None:
    pairs, dim = model.rope_pairs, model.rope_pairs_dim
    if (pairs is None) != (dim is None):
        raise ValueError(
            f"rope_pairs={pairs} and rope_pairs_dim={dim}: give both, or null for both"
        )
    if pairs is None or dim is None:
        return
    _check_type("rope_pairs_dim", dim, int)
    if dim < 2 or dim % 2:
        raise ValueError(f"rope_pairs_dim={dim}: must be even and at least 2, pairs are rotated")
    if not isinstance(pairs, list):
        raise ValueError(f"rope_pairs={pairs!r}: must be a list of whole numbers")
    for pair in pairs:
        _check_type("rope_pairs", pair, int)
        if not 0 <= pair < dim // 2:
            raise ValueError(
                f"rope_pairs={pairs}: rope_pairs_dim={dim} has pairs 0 to {dim // 2 - 1}"
            )
    if 2 * len(pairs) != model.qk_rope_head_dim:
        raise ValueError(
            f"rope_pairs={pairs}: {len(pairs)} pairs, and qk_rope_head_dim="
            f"{model.qk_rope_head_dim} dimensions are {model.qk_rope_head_dim // 2}"
        )
    if model.rope_repeats != 1:
        raise ValueError(
            f"rope_repeats={model.rope_repeats} and rope_pairs: a pair that is repeated is named "
            "several times in rope_pairs; set rope_repeats=1"
        )
    if model.qk_norm_dim is not None:
        raise ValueError(
            f"qk_norm_dim={model.qk_norm_dim} and rope_pairs: a norm of query and key goes before "
            "the rotation of whole heads; leave one of them out"
        )


def _check_type(name: str, value: object, kind: type) -> None:
    """A file may hold anything."""
    fits = isinstance(value, int) or (kind is float and isinstance(value, float))
    if isinstance(value, bool) or not fits:
        raise ValueError(f"{name}={value!r}: must be a {'whole ' * (kind is int)}number")


def _check_rope(rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    check_choice("rope_parameters.rope_type", kind, tuple(ROPE_KEYS))
    if not rope.get("rope_theta", 0) > 1:
        raise ValueError(
            f"rope_parameters.rope_theta={rope.get('rope_theta')}: must be a number above 1"
        )
    missing = set(ROPE_KEYS[kind]) - rope.keys()
    if missing:
        raise ValueError(f"rope_parameters: rope_type={kind} needs {sorted(missing)}")
    for name in ROPE_KEYS[kind]:
        _check_type(f"rope_parameters.{name}", rope[name], float)
        if not rope[name] > 0:
            raise ValueError(f"rope_parameters.{name}={rope[name]}: must be above 0")
    if kind == "llama3" and not rope["high_freq_factor"] > rope["low_freq_factor"]:
        raise ValueError(
            f"rope_parameters.high_freq_factor={rope['high_freq_factor']}: must be above "
            f"low_freq_factor={rope['low_freq_factor']}"
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"rope_parameters.partial_rotary_factor={rope['partial_rotary_factor']}: all of "
            "qk_rope_head_dim is rotated; leave it out"
        )
    if kind != "yarn" and rope.get("mscale_all_dim"):
        raise ValueError(
            f"rope_parameters.mscale_all_dim={rope['mscale_all_dim']}: only YaRN has it "
            f"(rope_type={kind}); leave it out"
        )
