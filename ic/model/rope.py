"""Decoupled rotary position embedding.

Legend: B batch, T tokens, H heads, P qk_rope_head_dim.

Angles are computed in float64 and cast after cos and sin: at position 2^20 a float32 angle is off
by up to 0.03 rad, because float32 resolves only 2^-4 there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ic.model.config import MLAConfig, yarn_mscale


def inverse_frequencies(config: MLAConfig, device: torch.device | None = None) -> Tensor:
    """Rotation per position of each pair, float64 (P/2,).

    The types of `rope_parameters` give the numbers of `ROPE_INIT_FUNCTIONS` in
    `transformers.modeling_rope_utils`, for one of the `rope_repeats` parts of the dimensions, or
    for the `rope_pairs_dim` dimensions of which `rope_pairs` names pairs.
    """
    rope = config.rope_parameters or {}
    dim = config.rope_pairs_dim or config.qk_rope_head_dim // config.rope_repeats
    theta = float(rope["rope_theta"])
    pair = torch.arange(dim // 2, dtype=torch.float64, device=device)
    inv_freq = theta ** (-2 * pair / dim)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        inv_freq = inv_freq / rope["factor"]
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    elif kind == "yarn":
        inv_freq = _yarn(inv_freq, pair, dim, theta, rope)
    if config.rope_pairs is not None:
        # Not by a list of indices, which would be copied to the device for each pass.
        return torch.stack([inv_freq[pair] for pair in config.rope_pairs])
    return inv_freq if config.rope_repeats == 1 else inv_freq.repeat(config.rope_repeats)


def _yarn(inv_freq: Tensor, pair: Tensor, dim: int, theta: float, rope: dict[str, Any]) -> Tensor:
    """YaRN (arXiv 2309.00071; DeepSeek-V3's `precompute_freqs_cis`): pairs that turn more than
    `beta_fast` times in the original context keep their frequency, those below `beta_slow` are
    divided by `factor`, and a linear ramp joins them.
    """
    original = rope["original_max_position_embeddings"]

    def pair_at(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_at(rope.get("beta_fast") or 32), pair_at(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (pair - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return inv_freq / rope["factor"] * (1 - keep) + inv_freq * keep


def _llama3(inv_freq: Tensor, rope: dict[str, Any]) -> Tensor:
    """Llama 3.1 (`apply_scaling` in meta-llama/llama-models): pairs that turn more than
    `high_freq_factor` times in the original context keep their frequency, those below
    `low_freq_factor` are divided by `factor`, and between them it goes with the number of turns.
    """
    turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq / rope["factor"] * (1 - keep) + inv_freq * keep


def cos_sin_scale(config: MLAConfig) -> float:
    """YaRN's factor on cos and sin: mscale / mscale_all_dim, both through `yarn_mscale`."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(rope["factor"], mscale) / yarn_mscale(rope["factor"], all_dim)
    return yarn_mscale(rope["factor"], 1.0)


class DecoupledRotaryEmbedding(nn.Module):
    """cos and sin of the rotary part that MLA keeps apart from the latent."""

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = cos_sin_scale(config)

    @torch.no_grad()
    def forward(self, position_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, T) int64 -> cos, sin (B, T, P/2) float32."""
        # Not a buffer: `module.to(dtype)` would cast it, and P/2 numbers cost nothing to make. On
        # the device itself, because a CUDA graph takes no copy from the host.
        inv_freq = inverse_frequencies(self.config, position_ids_BT.device)
        angle = position_ids_BT[..., None].double() * inv_freq
        return (angle.cos() * self.scale).float(), (angle.sin() * self.scale).float()


def apply_rope(x_BTHP: Tensor, cos_BTF: Tensor, sin_BTF: Tensor, *, interleave: bool) -> Tensor:
    """Rotate the last dimension of (B, T, H, P) by cos, sin (B, T, P/2); computed in float32.

    With `interleave` the pairs are (2i, 2i+1) and stay where they are (DeepSeek's
    `view_as_complex`); otherwise (i, i + P/2), Hugging Face's `rotate_half`.
    """
    x = x_BTHP.float()
    cos, sin = cos_BTF.unsqueeze(2), sin_BTF.unsqueeze(2)
    if interleave:
        # Not strided slices: their gradients would each fill a tensor of zeros.
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x.chunk(2, dim=-1)
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return out.to(x_BTHP.dtype)
