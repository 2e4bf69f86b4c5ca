"""Queries scaled and rotated beside the append equal the model's own steps one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ic.kernels.triton_append_latent import append_latent
from ic.kernels.triton_new_tokens import append_with_queries, append_with_queries_op
from ic.model import MLAConfig
from ic.model.length_temperature import LengthTemperature
from ic.model.rope import apply_rope

M, H, R, P = 5, 6, 48, 16


def made(device: torch.device, dtype: torch.dtype, nope: int) -> dict[str, Any]:
    """Slices of one projection's output, as in the model."""
    generator = torch.Generator().manual_seed(nope)
    width = nope + P

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    both = randn(M, H * width + R + P).to(dtype)
    angle = 9 * randn(M, P // 2)
    return {
        "query_MHK": both[:, : H * width].unflatten(-1, (H, width)),
        "latent_MR": both[:, H * width : H * width + R],
        "rope_key_MP": both[:, H * width + R :],
        "weight_R": randn(R).to(dtype),
        "cos_MF": angle.cos(),
        "sin_MF": angle.sin(),
        "cache": torch.zeros(2, 16, R + P, dtype=dtype, device=device),
        "slot_mapping_M": torch.tensor([3, 31, -1, 0, 8], device=device),
    }


@pytest.mark.parametrize("temperature", ["none", "ssmax", "llama4"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("nope", [24, 0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 6e-4)], ids=str
)
def test_equals_the_steps(
    device: torch.device, dtype: torch.dtype, tolerance: float, nope: int, interleaved: bool,
    temperature: str,
) -> None:  # fmt: skip
    given = made(device, dtype, nope)
    visible = torch.tensor([1, 7, 20000, 8193, 300], device=device)
    config = MLAConfig(num_attention_heads=H, length_temperature=temperature)
    options: dict[str, Any] = {}
    query = given["query_MHK"].clone()
    if temperature != "none":
        module = LengthTemperature(config).to(device)
        options = {"visible_M": visible, "beta": module.beta, "original": module.original}
        if temperature == "ssmax":
            torch.nn.init.uniform_(module.scale, 0.1, 0.2)
            options["temperature_scale_H"] = module.scale.detach()
        with torch.no_grad():
            query = query.mul_(module(visible[None])[0])
    rope = apply_rope(
        query[None, ..., nope:], given["cos_MF"][None], given["sin_MF"][None],
        interleave=interleaved,
    )[0]  # fmt: skip
    expected = torch.cat((query[..., :nope], rope), dim=-1).double()
    cache = given["cache"].clone()
    named = {RENAMED.get(k, k): v for k, v in given.items() if RENAMED.get(k, k)}
    append_latent(**named | {"cache": cache}, interleaved=interleaved)
    append_with_queries(**given, **options, temperature=temperature, interleaved=interleaved)
    assert given["cache"].equal(cache)
    got = given["query_MHK"].double()
    assert float((got - expected).norm()) <= tolerance * float(expected.norm())


RENAMED = {
    "query_MHK": "", "latent_MR": "latent_TR", "rope_key_MP": "rope_key_TP", "cos_MF": "cos_TF",
    "sin_MF": "sin_TF", "slot_mapping_M": "slot_mapping_T",
}  # fmt: skip


def test_a_quantised_cache(device: torch.device) -> None:
    given = made(device, torch.float32, 8)
    caches, scales = [], []
    for call, names in ((append_latent, RENAMED), (append_with_queries, {})):
        cache = given["cache"].to(torch.int8)
        scale = torch.zeros(2, 16, device=device)
        named = {names.get(k, k): v for k, v in given.items() if names.get(k, k)}
        call(**named | {"cache": cache, "cache_scale": scale})
        caches.append(cache)
        scales.append(scale)
    assert caches[0].any()
    assert caches[1].equal(caches[0])
    assert scales[1].equal(scales[0])


def test_opcheck(device: torch.device) -> None:
    given = made(device, torch.float32, 8)
    given["query_MHK"] = given["query_MHK"].contiguous()
    query, *others = given.values()
    visible = torch.ones(M, dtype=torch.int64, device=device)
    arguments = (query, "llama4", None, visible, 0.1, 8.0, *others, None, 1e-6, True)
    torch.library.opcheck(append_with_queries_op, arguments)


def test_bad_input_names_the_argument(device: torch.device) -> None:
    given = made(device, torch.float32, 8)
    visible = torch.ones(M, dtype=torch.int64, device=device)
    for message, changes in (
        ("^query: shape", {"query_MHK": given["query_MHK"][:3]}),
        ("^query: 8 numbers", {"query_MHK": given["query_MHK"][..., :8]}),
        ("^query: dtype", {"query_MHK": given["query_MHK"].half()}),
        ("^temperature: 'warm'", {"temperature": "warm"}),
        ("^visible: None", {"temperature": "llama4"}),
        ("^visible: dtype", {"temperature": "llama4", "visible_M": visible.float()}),
        ("^temperature_scale: None", {"temperature": "ssmax", "visible_M": visible}),
        ("^slot_mapping", {"slot_mapping_M": given["slot_mapping_M"].int()}),
    ):
        with pytest.raises(ValueError, match=message):
            append_with_queries(**given | changes)
