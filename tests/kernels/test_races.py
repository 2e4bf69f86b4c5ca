"""No kernel's result depends on which of its threads is first.

Each is run again and again on a GPU and gives the same bits, over all widths, numbers of heads and
kinds of cache; and compute-sanitizer, where it is installed, finds no access outside memory
(memcheck) and no race (racecheck) that is not explained in docs/kernels.md.

racecheck may not see that an mbarrier orders two accesses, or a barrier of the whole block as warps
part. `handover.py` is ordered by mbarriers as the decode kernel is, starts as the decode kernels
do, and is exact. If racecheck reports it too, what it says of the decode kernel's `factor_smem` and
of the kernels' start is said of an order which is right; if it does not, a report of a decode
kernel is a race until it is explained.
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
@pytest.mark.parametrize("width", [(192, 128), (128, 128), (128, 64), (64, 64), (96, 64)], ids=str)
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
_ACCESS = re.compile(r"(race reported between|and) (?:Write|Read) access at", re.IGNORECASE)
_PLACE = re.compile(r" in (?:\S*/)?([\w.]+):(\d+)")


def races(report: str) -> set[tuple[Place, Place]]:
    """The places of both accesses of each race that racecheck reports. One error has a first access
    and, each on a line of its own, all that race with it.
    """
    found: set[tuple[Place, Place]] = set()
    first: Place | None = None
    for line in report.splitlines():
        access = _ACCESS.search(line)
        if access is None:
            continue
        match = _PLACE.search(line, access.end())
        assert match, f"a race without its place: {line}"
        place = (match[1], int(match[2]))
        if access[1].lower() != "and":
            first = place
        else:
            assert first, f"a second access without its first: {line}"
            found.add((first, place))
    return found


def test_reading_a_report() -> None:
    report = (
        "========= Error: Race reported between Write access at kernel+0x1b40 in "
        "/a/b/gluon_mla_decode.py:125\n"
        "=========     and Read access at kernel+0x3a60 in "
        "/a/b/gluon_mla_decode.py:154 [96 hazards]\n"
        "=========     and nothing else\n"
        "========= Warning: Race reported between Read access at pairs+0x140 in /a/b/pairs.py:236\n"
        "=========     and Write access at pairs+0xeec0 in /a/b/pairs.py:295 [8 hazards]\n"
        "=========     and Write access at pairs+0x7fb0 in /a/b/pairs.py:236 [8 hazards]\n"
        "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    )
    decode, pairs = "gluon_mla_decode.py", "pairs.py"
    assert races(report) == {
        ((decode, 125), (decode, 154)),
        ((pairs, 236), (pairs, 295)),
        ((pairs, 236), (pairs, 236)),
    }
    assert races("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == set()
    with pytest.raises(AssertionError, match="without its place"):
        races("========= Error: Race reported between Write access at kernel+0x1b40\n")
    with pytest.raises(AssertionError, match="without its first"):
        races("=========     and Read access at kernel+0x3a60 in /a/gluon_mla_decode.py:154\n")


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


DECODE = REPOSITORY / "kernels/gluon_mla_decode.py"
CODES = REPOSITORY / "kernels/gluon_mla_decode_codes.py"
PAIRS = REPOSITORY / "kernels/gluon_mla_decode_pairs.py"
HANDOVER = HERE / "handover.py"
# Lines whose accesses of the same bytes are ordered in a way that racecheck may not see
# (docs/kernels.md). First, what warpgroups hand over: factors, and scales of a token.
VECTORS = {
    "factors": {DECODE: ["factor_smem."], CODES: ["factor_smem."]},
    "scales": {CODES: ["scales.index"]},
    "logs": {CODES: ["logs.index"]},
    "inverses": {CODES: ["inverses.index"]},
}
# Then, what the compiler itself hands over as warps part: the arguments, and the part of each warp.
# A barrier of the whole block lies between any two accesses. They stand at the kernel's own line,
# but for the last write, which tells all warps to end: it is at the last statement of the body, and
# that of the pairs kernel, which parts in two branches, is an `if` (Triton 3.6; 3.9: its own line).
STARTS = {
    "start of many heads": {DECODE: ["def _decode_many_heads_kernel", "gl.warp_specialize("]},
    "start of codes": {CODES: ["def _decode_codes_kernel", "gl.warp_specialize("]},
    "start of pairs": {PAIRS: ["def _decode_pairs_kernel", "if GROUPS == 1:"]},
}
HANDOVERS = {
    "vectors": {HANDOVER: ["row_smem.store", "row_smem.load"]},
    "start": {HANDOVER: ["def handover_kernel", "gl.warp_specialize("]},
}


def lines_of(words: dict[Path, list[str]]) -> set[Place]:
    """Where the words stand, each of which must stand somewhere."""
    places = set()
    for file, alternatives in words.items():
        lines = file.read_text().splitlines()
        for word in alternatives:
            found = {(file.name, number) for number, line in enumerate(lines, 1) if word in line}
            assert found, f"{file.name} has no {word!r}, which explained a race"
            places |= found
    return places


def of_kind(
    kind: dict[str, dict[Path, list[str]]], found: set[tuple[Place, Place]]
) -> set[tuple[Place, Place]]:
    """Those of the races between two accesses that one entry explains."""
    entries = [lines_of(words) for words in kind.values()]
    return {pair for pair in found if any(set(pair) <= places for places in entries)}


def line_of(file: Path, word: str) -> Place:
    (place,) = lines_of({file: [word]})
    return place


def test_what_is_explained() -> None:
    """Accesses of the same bytes, and no others."""
    parts = line_of(PAIRS, "def _decode_pairs_kernel")
    ends = line_of(PAIRS, "if GROUPS == 1:")
    stored = line_of(DECODE, "factor_smem.store(alpha)")
    stored_codes = line_of(CODES, "factor_smem.store(alpha)")
    loads = lines_of({DECODE: ["factor_smem.load"]})
    logs = lines_of({CODES: ["logs.index"]})
    starts = {(parts, ends), (ends, parts), (parts, parts)}
    assert of_kind(STARTS, starts) == starts
    # `_values` of one file is also in the kernel of the other.
    between = {(store, load) for store in (stored, stored_codes) for load in loads}
    assert len(between) == 4
    assert of_kind(VECTORS, between) == between
    others = {
        (parts, stored),
        (stored, line_of(DECODE, "def _decode_many_heads_kernel")),
        (stored_codes, min(logs)),
        (parts, line_of(PAIRS, "mbarrier.arrive(zeroed)")),
    }
    assert not of_kind(VECTORS, others) | of_kind(STARTS, others)
    lines_of(HANDOVERS["vectors"] | HANDOVERS["start"])


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the kernels with mbarriers run on Hopper",
)
def test_racecheck() -> None:
    report = sanitize("racecheck", "memcheck_decode.py")
    found = races(report)
    vectors, starts = of_kind(VECTORS, found), of_kind(STARTS, found)
    assert not found - vectors - starts, "\n".join(filter(_ACCESS.search, report.splitlines()))
    if not found:
        return
    accepted = races(sanitize("racecheck", "handover.py"))
    for name, explained in (("vectors", vectors), ("start", starts)):
        if explained:
            assert of_kind({name: HANDOVERS[name]}, accepted), (
                f"racecheck accepts the {name} of handover.py and not those of the decode kernels"
            )
