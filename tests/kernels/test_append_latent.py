"""The fused normalise, rotate and append kernel against its PyTorch reference."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch

from ic.kernels.reference import append_latent_reference
from ic.kernels.triton_append_latent import append_latent

CUDA = torch.cuda.is_available()
TOLERANCE = {torch.float32: 2e-7, torch.float16: 1e-5, torch.bfloat16: 1e-4}
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]


def make_case(
    device: torch.device,
    slots: list[int],
    *,
    dtype: torch.dtype = torch.float16,
    latent: int = 192,
    rope: int = 64,
    num_pages: int = 9,
    page_size: int = 16,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(slots))
    T = len(slots)
    projected = torch.randn(T, latent + rope, generator=generator) * 3
    angle = torch.rand(T, rope // 2, generator=generator) * 100
    projected = projected.to(device, dtype)
    return {
        "latent_TR": projected[:, :latent],
        "rope_key_TP": projected[:, latent:],
        "weight_R": (torch.rand(latent, generator=generator) + 0.5).to(device, dtype),
        "cos_TF": angle.cos().to(device),
        "sin_TF": angle.sin().to(device),
        "cache": torch.full((num_pages, page_size, latent + rope), float("nan")).to(device, dtype),
        "slot_mapping_T": torch.tensor(slots, dtype=torch.int64, device=device),
    }


def run_both(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache after the kernel and after the reference, dequantised, as fp32."""
    results = []
    for function in (append_latent, append_latent_reference):
        copy = case | {"cache": case["cache"].clone()}
        if "cache_scale" in case:
            copy["cache_scale"] = case["cache_scale"].clone()
        function(**copy)
        result = copy["cache"].float()
        if "cache_scale" in case:
            result = result * copy["cache_scale"][..., None]
        results.append(result)
    return results[0], results[1]


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    assert torch.equal(out.isnan(), reference.isnan()), "a slot was written or left by mistake"
    return float((out - reference).nan_to_num(0).norm() / reference.nan_to_num(0).norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("latent", "rope"), [(192, 64), (512, 64), (48, 16), (80, 48), (8, 24)])
def test_matches_reference(
    device: torch.device, dtype: torch.dtype, interleaved: bool, latent: int, rope: int
) -> None:
    slots = [0, 15, 16, 143, 77, -1, 31, 32]
    case = make_case(device, slots, dtype=dtype, latent=latent, rope=rope)
    assert relative_error(*run_both(case | {"interleaved": interleaved})) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_tokens", [1, 63, 111])
def test_odd_token_counts(device: torch.device, num_tokens: int) -> None:
    slots = torch.randperm(1008, generator=torch.Generator().manual_seed(0))[:num_tokens].tolist()
    case = make_case(device, slots, latent=64, rope=16, num_pages=21, page_size=48)
    assert relative_error(*run_both(case)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_quantized_cache(device: torch.device, kind: torch.dtype, interleaved: bool) -> None:
    slots = [0, 15, 16, 143, 77, -1, 31, 32]
    case = make_case(device, slots) | {"interleaved": interleaved}
    original, _ = run_both(case)
    case["cache"] = torch.zeros(9, 16, 256, device=device).to(kind)
    case["cache_scale"] = torch.full((9, 16), float("nan"), device=device)
    out, reference = run_both(case)
    # A value on the boundary of two codes may fall either way: a step in a few places, no more.
    assert relative_error(out, reference) < 4e-3
    limit = 3.5e-2 if kind == torch.float8_e4m3fn else 1.5e-2
    written = ~out.isnan()
    assert float((out - original)[written].norm() / original[written].norm()) < limit


def test_every_e4m3_code(device: torch.device) -> None:
    """A row that holds each positive e4m3 value and each midpoint is rounded as PyTorch rounds."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.zeros(3)])
    case = make_case(device, [5], dtype=torch.float32, latent=256, rope=16)
    case["latent_TR"] = (values / values.square().mean().sqrt())[None].to(device)
    case["weight_R"] = torch.full((256,), float(values.square().mean().sqrt()), device=device)
    case["rope_key_TP"] = torch.zeros(1, 16, device=device)
    case["cache"] = torch.zeros(9, 16, 272, device=device).to(torch.float8_e4m3fn)
    case["cache_scale"] = torch.ones(9, 16, device=device)
    out, reference = run_both(case)
    torch.testing.assert_close(out[0, 5], reference[0, 5], rtol=0.13, atol=2**-9 * 1.01)
    assert float((out[0, 5] == reference[0, 5]).float().mean()) > 0.7


def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    num_pages = 2**31 // (64 * 256) + 2
    if CUDA:
        cache = torch.empty(num_pages, 64, 256, dtype=torch.float16, device=device)
    else:
        memory = mmap.mmap(-1, num_pages * 64 * 256 * 2)
        cache = torch.frombuffer(memory, dtype=torch.float16).view(num_pages, 64, 256)
    case = make_case(device, [num_pages * 64 - 3])
    small = case["cache"].clone()
    append_latent(**(case | {"cache": cache}))
    append_latent_reference(
        **(case | {"cache": small, "slot_mapping_T": torch.tensor([13], device=device)})
    )
    assert cache[-1].storage_offset() > 2**31
    assert relative_error(cache[-1, 61][None].float(), small[0, 13][None].float()) < 1e-5


def test_slots_outside_are_skipped_without_the_check(device: torch.device) -> None:
    case = make_case(device, [3, 9 * 16, -2, 2**40])
    append_latent(**case, check_indices=False)
    written = ~case["cache"].isnan().flatten(0, 1).any(-1)
    assert written.nonzero().flatten().tolist() == [3]


def test_no_tokens(device: torch.device) -> None:
    case = make_case(device, [1])
    case |= {name: case[name][:0] for name in case if name.endswith(("TR", "TP", "TF", "_T"))}
    append_latent(**case)
    assert case["cache"].isnan().all()


def test_opcheck(device: torch.device) -> None:
    case = make_case(device, [1, 2])
    arguments = (
        case["latent_TR"].contiguous(),
        case["rope_key_TP"].contiguous(),
        case["weight_R"],
        case["cos_TF"],
        case["sin_TF"],
        case["cache"].nan_to_num(0),
        case["slot_mapping_T"],
        None,
        1e-6,
        True,
    )
    torch.library.opcheck(torch.ops.ic.append_latent.default, arguments)


BAD = {
    "latent shape": lambda c: {"latent_TR": c["latent_TR"][0]},
    "latent dtype": lambda c: {"latent_TR": c["latent_TR"].double()},
    "latent stride": lambda c: {"latent_TR": c["latent_TR"].T.contiguous().T},
    "rope_key shape": lambda c: {"rope_key_TP": c["rope_key_TP"][:1]},
    "latent and rope_key dimensions": lambda c: {"rope_key_TP": c["rope_key_TP"][:, :9]},
    "weight shape": lambda c: {"weight_R": c["weight_R"][:-1]},
    "cos shape": lambda c: {"cos_TF": c["cos_TF"][:, 1:]},
    "sin dtype": lambda c: {"sin_TF": c["sin_TF"].long()},
    "cache shape": lambda c: {"cache": c["cache"][:, :15]},
    "cache dtype": lambda c: {"cache": c["cache"].to(torch.int32)},
    "cache_scale dtype": lambda c: {
        "cache": c["cache"].nan_to_num(0).to(torch.int8),
        "cache_scale": torch.ones(9, 16).half(),
    },
    "slot_mapping dtype": lambda c: {"slot_mapping_T": c["slot_mapping_T"].int()},
    "slot_mapping negative": lambda c: {"slot_mapping_T": c["slot_mapping_T"] - 7},
    "slot_mapping range": lambda c: {"slot_mapping_T": c["slot_mapping_T"] + 144},
    "weight device": lambda c: {"weight_R": c["weight_R"].to("meta")},
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_named(device: torch.device, name: str) -> None:
    case = make_case(device, [3, 4])
    with pytest.raises(ValueError, match=name.split()[0]):
        append_latent(**(case | BAD[name](case)))
