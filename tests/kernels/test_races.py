"""No kernel's result depends on which of its threads is first.

Each is run again and again on a GPU and gives the same bits, over all widths, numbers of heads and
kinds of cache; and compute-sanitizer, where it is installed, finds no access outside memory
(memcheck) and no race (racecheck) that is not explained in docs/kernels.md.

racecheck knows the barriers of whole blocks, and may not see that an mbarrier orders two accesses.
`handover.py` is ordered by mbarriers as the decode kernel is, and exact. If racecheck reports it
too, what it says of the decode kernel's `factor_smem` is said of this order, which is right; if it
does not, a report of the decode kernel is a race until it is explained.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ic.kernels.reference import quantize_per_token
from ic.kernels.triton_append_latent import append_latent
from ic.kernels.triton_index_choice import index_choice
from ic.kernels.triton_mla_attention import mla_attention
from ic.kernels.triton_mla_flash_decode import mla_decode
from tests.kernels import test_append_latent, test_mla_flash_decode

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
TIMES = 30 if torch.cuda.is_available() else 2
# bf16 is wrong in the interpreter.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
LATENTS = [128, 192, 256, 448, 512]
HEADS = [1, 16, 32, 64, 128]
CACHES = {"plain": None, "e4m3": torch.float8_e4m3fn, "int8": torch.int8}


def assert_same_bits(call: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    first = [tensor.clone() for tensor in call()]
    assert all(tensor.float().isfinite().any() for tensor in first)
    for _ in range(TIMES - 1):
        for tensor, again in zip(first, call(), strict=True):
            # NaN of a slot that no token has is equal, too.
            assert tensor.view(torch.uint8).equal(again.view(torch.uint8))


def assert_decode_repeats(
    device: torch.device, latent: int, heads: int, kind: str, **changes: Any
) -> None:
    lengths = [1, 63, 300] if torch.cuda.is_available() else [17, 70]
    case = test_mla_flash_decode.make_case(
        device, lengths, dtype=DTYPE, heads=heads, latent=latent, rope=64, **changes
    )
    dtype = CACHES[kind]
    if dtype is not None:
        case["cache"], case["cache_scale"] = quantize_per_token(case["cache"].nan_to_num(0), dtype)
    assert_same_bits(lambda: mla_decode(**case))
    assert_same_bits(lambda: mla_decode(**case, num_splits=3))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 16, 64])
@pytest.mark.parametrize("num_query", [1, 4])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("latent", LATENTS)
def test_decode_repeats_itself(
    device: torch.device, latent: int, heads: int, kind: str, num_query: int, page_size: int | None
) -> None:
    assert_decode_repeats(device, latent, heads, kind, num_query=num_query, page_size=page_size)


def append(device: torch.device, latent: int, dtype: torch.dtype | None) -> None:
    case = test_append_latent.make_case(
        device, [0, 15, 143, 7], dtype=DTYPE, latent=latent, rope=64
    )
    cache = case["cache"] if dtype is None else case["cache"].nan_to_num(0).to(dtype)
    scale = None if dtype is None else torch.zeros(cache.shape[:2], device=device)

    def call() -> tuple[torch.Tensor, ...]:
        pages, scales = cache.clone(), None if scale is None else scale.clone()
        append_latent(
            **dict(case, cache=pages), **({} if scales is None else {"cache_scale": scales})
        )
        return (pages,) if scales is None else (pages, scales)

    assert_same_bits(call)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("latent", LATENTS)
def test_append_repeats_itself(device: torch.device, latent: int, kind: str) -> None:
    append(device, latent, CACHES[kind])


def attention(device: torch.device, heads: int, width: tuple[int, int], tokens: int) -> None:
    """Prefill, and the gradients of training, whole and of packed documents."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, DTYPE).requires_grad_()

    q, k = draw(2, tokens, heads, width[0]), draw(2, tokens, heads, width[0])
    v, grad = draw(2, tokens, heads, width[1]), draw(2, tokens, heads, width[1]).detach()
    documents = (torch.arange(tokens, device=device) // 40).int().expand(2, -1).contiguous()
    for ids in (None, documents):

        def call(ids: torch.Tensor | None = ids) -> tuple[torch.Tensor, ...]:
            out = mla_attention(q, k, v, scale=width[0] ** -0.5, document_ids=ids)
            out = out[0] if isinstance(out, tuple) else out
            return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))

        assert_same_bits(call)


def choice(device: torch.device, rows: int, keys: int, top_k: int) -> None:
    """With ties at the threshold, which many programs share."""
    scores = torch.randn(1, rows, keys, generator=torch.Generator().manual_seed(0)).to(device)
    last = torch.full((1, rows), keys - 1, dtype=torch.int32, device=device)
    for given in (scores, scores.relu(), scores.round(decimals=1)):

        def call(given: torch.Tensor = given) -> tuple[torch.Tensor, ...]:
            return index_choice(given, torch.zeros_like(last), last, top_k)

        assert_same_bits(call)


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 2048, 5000])
@pytest.mark.parametrize(("rows", "keys"), [(1, 2**20), (16, 2**15), (600, 7001)])
def test_choice_repeats_itself(device: torch.device, rows: int, keys: int, top_k: int) -> None:
    choice(device, rows, keys, top_k)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 111, 1000])
@pytest.mark.parametrize("width", [(192, 128), (128, 128), (64, 64), (96, 64)], ids=str)
@pytest.mark.parametrize("heads", [1, 16, 128])
def test_attention_repeats_itself(
    device: torch.device, heads: int, width: tuple[int, int], tokens: int
) -> None:
    attention(device, heads, width, tokens)


def test_the_same_in_the_interpreter(device: torch.device) -> None:
    """What the tests above do, once and small, where there is no GPU."""
    for kind in CACHES:
        assert_decode_repeats(device, 192, 3, kind, page_size=16)
        append(device, 192, CACHES[kind])
    attention(device, 2, (48, 32), 45)
    choice(device, 2, 5000, 100)


Place = tuple[str, int]
_PLACE = re.compile(r"(Write|Read) access at .* in (?:\S*/)?([\w.]+):(\d+)")


def races(report: str) -> set[tuple[Place, Place]]:
    """The places of both accesses of each race that racecheck reports."""
    places = [(found[2], int(found[3])) for found in _PLACE.finditer(report)]
    return set(zip(places[::2], places[1::2], strict=True))


def test_reading_a_report() -> None:
    report = (
        "========= Error: Race reported between Write access at kernel+0x1b40 in "
        "/a/b/gluon_mla_decode.py:125\n"
        "=========     and Read access at kernel+0x3a60 in /a/b/gluon_mla_decode.py:154 [96 hazards]\n"
        "=========     and nothing else\n"
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    )
    decode = "gluon_mla_decode.py"
    assert races(report) == {((decode, 125), (decode, 154))}
    assert races("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == set()


def sanitize(tool: str, script: str) -> str:
    if not Path(SANITIZER).is_file():
        pytest.skip("compute-sanitizer, which comes with the CUDA toolkit, is not installed")
    done = subprocess.run(
        [SANITIZER, "--tool", tool, "--print-limit", "1000", sys.executable, str(HERE / script)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("script", ["memcheck_decode.py", "handover.py"])
def test_memcheck(script: str) -> None:
    assert "ERROR SUMMARY: 0 errors" in sanitize("memcheck", script)


def explained_lines() -> set[Place]:
    """Where the decode kernels of many heads write and read the vectors that warpgroups hand over
    (factors, and scales of a token), and where those loops are called."""
    files = [REPOSITORY / f"kernels/{name}.py"
             for name in ("gluon_mla_decode", "gluon_mla_decode_codes")]  # fmt: skip
    words = ("factor_smem.store", "factor_smem.load", "scales.index", "logs.index",
             "inverses.index", "def _decode_many_heads_kernel", "def _decode_codes_kernel",
             "gl.warp_specialize")  # fmt: skip
    return {
        (file.name, number)
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if any(word in line for word in words)
    }


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the kernels with mbarriers run on Hopper",
)
def test_racecheck() -> None:
    found = races(sanitize("racecheck", "memcheck_decode.py"))
    unexplained = {pair for pair in found if not set(pair) <= explained_lines()}
    assert not unexplained
    if found:
        assert races(sanitize("racecheck", "handover.py")), (
            "racecheck accepts the order of handover.py and not that of the decode kernel"
        )
