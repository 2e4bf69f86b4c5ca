"""MLA decode against its PyTorch reference: in Triton's interpreter on a CPU, natively on a GPU."""

from __future__ import annotations

import itertools
import math
import mmap
from typing import Any

import pytest
import torch

from ic.kernels.mla_decode_launch import DecodeConfig, Device, decode_config, split_count
from ic.kernels.mla_decode_plan import DecodePlan
from ic.kernels.reference import mla_decode_reference, quantize_per_token
from ic.kernels.triton_mla_flash_decode import mla_decode
from ic.kernels.widths import one_tile

CUDA = torch.cuda.is_available()
# The interpreter computes bfloat16 wrongly (Triton 3.9.0), so that type is tested on GPUs only.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 5e-3}
# e4m3 and int8 caches, against the reference on the dequantised and on the original cache.
TOLERANCE_WIDENED = 1.5e-3 if not CUDA else 5e-3
TOLERANCE_QUANTIZED = {torch.float8_e4m3fn: 5e-2, torch.int8: 2e-2}
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
SCALE = 1 / math.sqrt(192)
# Of a multiprocessor, by compute capability.
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}


def make_case(
    device: torch.device,
    lengths: list[int],
    *,
    dtype: torch.dtype = torch.float16,
    num_query: int = 1,
    heads: int = 5,
    latent: int = 64,
    rope: int = 16,
    page_size: int | None = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs; every slot of the cache that belongs to no token is NaN."""
    generator = torch.Generator().manual_seed(seed)
    B, width = len(lengths), latent + rope
    step = page_size or 1
    capacity = -(-max(*lengths, 1) // step) * step
    rows = torch.randn(B, capacity, width, generator=generator)
    rows[torch.arange(capacity)[None] >= torch.tensor(lengths)[:, None]] = float("nan")
    table = None
    if page_size is None:
        cache = rows
    else:
        pages_each = capacity // page_size
        pages = torch.randperm(B * pages_each + 2, generator=generator)
        table = pages[: B * pages_each].view(B, pages_each).int()
        cache = torch.full((len(pages), page_size, width), float("nan"))
        cache[table.flatten().long()] = rows.view(-1, page_size, width)
        # Entries past a sequence's last page point outside the cache: they must never be followed.
        unused = torch.arange(pages_each)[None] * page_size >= torch.tensor(lengths)[:, None]
        table = table.masked_fill(unused, 2**30).to(device)
    query = torch.randn(B, num_query, heads, width, generator=generator).to(device, dtype)
    return {
        "q_latent_BQHR": query[..., :latent],
        "q_rope_BQHP": query[..., latent:],
        "cache": cache.to(device, dtype),
        "seq_lens_B": torch.tensor(lengths, dtype=torch.int32, device=device),
        "block_table": table,
        "softmax_scale": SCALE,
    }


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    assert not out.isnan().any()
    return float((out.float() - reference).norm() / reference.norm())


def assert_matches(
    result: tuple[torch.Tensor, torch.Tensor], case: dict[str, Any], limit: float
) -> None:
    out, lse = result
    reference, reference_lse = mla_decode_reference(**case)
    assert out.shape == reference.shape
    assert out.dtype == case["q_latent_BQHR"].dtype
    assert relative_error(out, reference) < limit
    seen = reference_lse > float("-inf")
    assert torch.equal(lse > float("-inf"), seen)
    assert (out[~seen] == 0).all()
    torch.testing.assert_close(lse[seen], reference_lse[seen], rtol=0, atol=20 * limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [None, 16, 48, 64])
@pytest.mark.parametrize(("latent", "rope"), [(192, 64), (64, 16), (48, 16), (64, 0)])
def test_matches_reference(
    device: torch.device, dtype: torch.dtype, page_size: int | None, latent: int, rope: int
) -> None:
    case = make_case(
        device, [0, 1, 63, 111], dtype=dtype, page_size=page_size, latent=latent, rope=rope
    )
    assert_matches(mla_decode(**case), case, TOLERANCE[dtype])


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(("latent", "rope"), [(8, 16), (24, 8), (48, 32), (80, 16), (96, 64)])
def test_any_multiples_of_eight(
    device: torch.device, page_size: int | None, latent: int, rope: int
) -> None:
    """A tile wider than a row takes nothing of the next one, which may be nobody's (NaN)."""
    for dtype, num_query in ((DTYPES[0], 1), (DTYPES[1], 2)):
        case = make_case(
            device, [0, 3, 77], dtype=dtype, num_query=num_query, page_size=page_size,
            latent=latent, rope=rope,
        )  # fmt: skip
        assert_matches(mla_decode(**case), case, TOLERANCE[dtype])
        assert_matches(mla_decode(**case, num_splits=3), case, TOLERANCE[dtype])


@pytest.mark.parametrize(("latent", "rope"), [(256, 64), (512, 64)])
def test_large_latents(device: torch.device, latent: int, rope: int) -> None:
    case = make_case(device, [65, 17], heads=17, latent=latent, rope=rope, page_size=64)
    assert_matches(mla_decode(**case), case, TOLERANCE[torch.float16])


@pytest.mark.parametrize("num_query", [2, 3, 4])
@pytest.mark.parametrize("page_size", [None, 32])
def test_several_query_tokens_are_causal(
    device: torch.device, num_query: int, page_size: int | None
) -> None:
    lengths = [0, 1, num_query, 64, 65, 130]
    case = make_case(device, lengths, num_query=num_query, heads=3, page_size=page_size)
    assert_matches(mla_decode(**case), case, TOLERANCE[torch.float16])


@pytest.mark.parametrize("num_splits", [1, 2, 7, 40])
def test_splits_at_odd_lengths(device: torch.device, num_splits: int) -> None:
    case = make_case(device, [1000, 16, 0], heads=2, page_size=16)
    result = mla_decode(**case, num_splits=num_splits)
    assert_matches(result, case, TOLERANCE[torch.float16])


@pytest.mark.parametrize("heads", [1, 16, 20, 33, 130])
def test_any_number_of_heads(device: torch.device, heads: int) -> None:
    case = make_case(device, [70], heads=heads, page_size=64)
    assert_matches(mla_decode(**case), case, TOLERANCE[torch.float16])


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("latent", "rope", "page_size", "num_query"),
    [(192, 64, 64, 1), (64, 16, 16, 2), (64, 16, None, 1), (48, 32, 16, 1), (8, 16, None, 2)],
)
def test_quantized_cache(
    device: torch.device,
    kind: torch.dtype,
    latent: int,
    rope: int,
    page_size: int | None,
    num_query: int,
) -> None:
    case = make_case(
        device,
        [0, 1, 111],
        heads=3,
        latent=latent,
        rope=rope,
        page_size=page_size,
        num_query=num_query,
    )
    # Tokens of very different size: per-token scales over five decades, with queries as large.
    sizes = torch.logspace(-6, -1, case["cache"].shape[1], device=device)[:, None]
    cache = (case["cache"].float() * sizes).nan_to_num(0)
    case["cache"], case["cache_scale"] = quantize_per_token(cache, kind)
    case["q_latent_BQHR"] = case["q_latent_BQHR"] * 100
    assert_matches(mla_decode(**case), case, TOLERANCE_WIDENED)
    case = make_case(device, [500], heads=3, latent=latent, rope=rope, page_size=page_size)
    reference, _ = mla_decode_reference(**case)
    case["cache"], case["cache_scale"] = quantize_per_token(case["cache"].nan_to_num(0), kind)
    assert relative_error(mla_decode(**case)[0], reference) < TOLERANCE_QUANTIZED[kind]


@pytest.mark.parametrize(("latent", "rope"), [(192, 64), (512, 64), (96, 32)])
@pytest.mark.parametrize(("page_size", "num_query", "heads"), [(64, 1, 16), (None, 3, 5)])
def test_e4m3_cache_of_few_heads(
    device: torch.device, latent: int, rope: int, page_size: int | None, num_query: int, heads: int
) -> None:
    """On Hopper this is `gluon_mla_decode_e4m3`."""
    case = make_case(
        device,
        [0, 1, 63, 64, 65, 150],
        heads=heads,
        latent=latent,
        rope=rope,
        page_size=page_size,
        num_query=num_query,
    )
    quantize_case(case, torch.float8_e4m3fn)
    for num_splits in (1, 4):
        result = mla_decode(**case, num_splits=num_splits)
        assert_matches(result, case, TOLERANCE_WIDENED)


def quantize_case(case: dict[str, Any], kind: torch.dtype) -> None:
    """Quantise the cache; codes and scales of no token are NaN, or what that is in int8."""
    unused = case["cache"].isnan().any(-1)
    # Tokens of very different size.
    sizes = torch.logspace(-2, 1, case["cache"].shape[1], device=unused.device)[:, None]
    cache = case["cache"].float().nan_to_num(0) * sizes
    case["cache"], case["cache_scale"] = quantize_per_token(cache, kind)
    case["cache"].view(torch.uint8)[unused] = 0x7F
    case["cache_scale"][unused] = float("nan")


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("latent", "rope"), [(48, 16), (64, 16), (40, 16)])
@pytest.mark.parametrize("num_query", [1, 3])
def test_both_operand_orders(
    device: torch.device, swap: bool, latent: int, rope: int, num_query: int
) -> None:
    dtype = torch.float16 if CUDA else torch.float32
    case = make_case(
        device, [3, 150], dtype=dtype, latent=latent, rope=rope, page_size=32, num_query=num_query
    )
    config = DecodeConfig(16, 64, 4, 2, 1, swap=swap, combined=bool(one_tile(latent, rope)))
    q_latent, q_rope, cache = case["q_latent_BQHR"], case["q_rope_BQHP"], case["cache"]
    plan = DecodePlan(q_latent, q_rope, cache, case["block_table"], None, config)
    lengths, table = case["seq_lens_B"], case["block_table"]
    result = plan.run(q_latent, q_rope, cache, lengths, table, None, SCALE, 2)
    assert_matches(result, case, TOLERANCE[dtype])


def test_strided_inputs(device: torch.device) -> None:
    """The latent cache of one layer out of several, and queries cut out of a wider tensor."""
    case = make_case(device, [40, 7], page_size=16)
    layers = torch.full((*case["cache"].shape[:2], 3, 80), float("nan"), dtype=torch.float16)
    layers = layers.to(device)
    layers[:, :, 1] = case["cache"]
    case["cache"] = layers[:, :, 1]
    wide = torch.randn(2, 1, 5, 2 * 64, device=device).half()
    case["q_latent_BQHR"] = wide[..., 64:]
    assert_matches(mla_decode(**case), case, TOLERANCE[torch.float16])


def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    """The sequence's page lies past element 2^31; nothing else of the cache is ever touched."""
    latent, rope, page_size = 192, 64, 64
    num_pages = 2**31 // (page_size * (latent + rope)) + 2
    if CUDA:
        cache = torch.empty(num_pages, page_size, latent + rope, dtype=torch.float16, device=device)
    else:
        memory = mmap.mmap(-1, num_pages * page_size * (latent + rope) * 2)
        cache = torch.frombuffer(memory, dtype=torch.float16).view(num_pages, page_size, -1)
    case = make_case(device, [37], latent=latent, rope=rope, page_size=page_size)
    cache[-1] = case["cache"][int(case["block_table"][0, 0])]
    case["cache"] = cache
    case["block_table"] = torch.tensor([[num_pages - 1]], dtype=torch.int32, device=device)
    assert cache[-1].storage_offset() > 2**31
    assert_matches(mla_decode(**case), case, TOLERANCE[torch.float16])


def test_bad_page_numbers_are_clamped_without_the_check(device: torch.device) -> None:
    case = make_case(device, [40], page_size=16)
    case["cache"] = case["cache"].nan_to_num(1)
    case["block_table"] = torch.tensor([[-5, 2**30, 1]], dtype=torch.int32, device=device)
    out, _ = mla_decode(**case, check_indices=False)
    last = case["cache"].shape[0] - 1
    case["block_table"] = torch.tensor([[0, last, 1]], dtype=torch.int32, device=device)
    assert_matches((out, _), case, TOLERANCE[torch.float16])


def test_empty_batch(device: torch.device) -> None:
    case = make_case(device, [4], page_size=16)
    case |= {name: case[name][:0] for name in ("q_latent_BQHR", "q_rope_BQHP", "seq_lens_B")}
    case["block_table"] = case["block_table"][:0]
    out, lse = mla_decode(**case)
    assert out.shape == (0, 1, 5, 64)
    assert lse.shape == (0, 1, 5)


@pytest.mark.parametrize("quantized", [False, True])
def test_opcheck(device: torch.device, quantized: bool) -> None:
    case = make_case(device, [5, 20], page_size=16)
    case["cache"] = case["cache"].nan_to_num(0)
    if quantized:
        case["cache"], case["cache_scale"] = quantize_per_token(case["cache"], torch.int8)
    arguments = (
        case["q_latent_BQHR"].contiguous(),
        case["q_rope_BQHP"].contiguous(),
        case["cache"],
        case["seq_lens_B"],
        case["block_table"],
        case.get("cache_scale"),
        SCALE,
        2,
    )
    torch.library.opcheck(torch.ops.ic.mla_decode.default, arguments)


def bad(case: dict[str, Any], name: str) -> dict[str, Any]:
    """The case with one argument spoilt."""
    q, cache, lens = case["q_latent_BQHR"], case["cache"], case["seq_lens_B"]
    table = case["block_table"]
    width = q.shape[-1] + case["q_rope_BQHP"].shape[-1]
    changes: dict[str, dict[str, Any]] = {
        "q_latent dtype": {"q_latent_BQHR": q.double()},
        "q_latent shape": {"q_latent_BQHR": q[0]},
        "q_latent tokens": {
            "q_latent_BQHR": q.repeat(1, 5, 1, 1),
            "q_rope_BQHP": case["q_rope_BQHP"].repeat(1, 5, 1, 1),
        },
        "q_latent stride": {"q_latent_BQHR": q.transpose(2, 3).contiguous().transpose(2, 3)},
        "q_latent and q_rope dimensions": {
            "q_rope_BQHP": case["q_rope_BQHP"][..., :9],
            "cache": cache[..., : width - 7],
        },
        "q_rope dtype": {"q_rope_BQHP": case["q_rope_BQHP"].float()},
        "cache dtype": {"cache": cache.float()},
        "cache shape": {"cache": cache[..., :-1]},
        "cache page size": {"cache": cache[:, :15]},
        "cache device": {"cache": cache.to("meta")},
        "cache_scale shape": {
            "cache": cache.nan_to_num(0).to(torch.int8),
            "cache_scale": torch.ones(1, device=q.device),
        },
        "seq_lens dtype": {"seq_lens_B": lens.long()},
        "seq_lens negative": {"seq_lens_B": lens - 100},
        "seq_lens overlong": {"seq_lens_B": lens + 100},
        "block_table dtype": {"block_table": table.long()},
        "block_table negative": {"block_table": table.clone().fill_(-1)},
        "block_table range": {"block_table": table.clone().fill_(cache.shape[0])},
        "num_splits": {"num_splits": 0},
    }
    return case | changes[name]


@pytest.mark.parametrize(
    "name",
    [
        "q_latent dtype",
        "q_latent shape",
        "q_latent tokens",
        "q_latent stride",
        "q_latent and q_rope dimensions",
        "q_rope dtype",
        "cache dtype",
        "cache shape",
        "cache page size",
        "cache device",
        "cache_scale shape",
        "seq_lens dtype",
        "seq_lens negative",
        "seq_lens overlong",
        "block_table dtype",
        "block_table negative",
        "block_table range",
        "num_splits",
    ],
)
def test_bad_input_is_named(device: torch.device, name: str) -> None:
    case = make_case(device, [30, 48], page_size=16)
    with pytest.raises(ValueError, match=name.split()[0]):
        mla_decode(**bad(case, name))


def test_split_counts() -> None:
    assert split_count(1, 2**20 // 64, 264) >= 256
    assert split_count(64, 64, 264) == 4
    assert split_count(128, 64, 132) == 1
    assert split_count(1, 1, 264) == 1


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_tiles_fit_the_chip(capability: int) -> None:
    """Programs that share a multiprocessor hold their tiles of keys at once: all stages but the one
    that is being multiplied."""
    device = Device(capability, 132, SHARED_BYTES[capability])
    for rows, width, itemsize in itertools.product(
        (1, 16, 17, 32, 33, 64, 128, 512),
        ((192, 64), (256, 64), (512, 64), (64, 16), (8, 16), (48, 32), (448, 40)),
        (1, 2, 4),
    ):
        config = decode_config(rows, *width, itemsize, device)
        shape = (rows, width, itemsize, config)
        for size in (config.block_m, config.block_n):  # `tl.dot` takes powers of two from 16 on
            assert size in (16, 32, 64, 128), shape
        assert config.block_m < 2 * max(rows, 16), f"most rows of a tile are empty: {shape}"
        tile = one_tile(*width) or sum(width)
        held = max(config.num_stages - 1, 1) * config.block_n * tile * itemsize
        assert held * config.programs_per_sm <= device.shared_bytes, shape
        assert config.combined == (width not in ((256, 64), (512, 64), (64, 16))), shape
        assert config.e4m3_bits == (capability < 89), shape
