"""What the vLLM plugin does without vLLM: versions, and attention of new tokens in pieces."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ic.kernels.reference import attention_reference
from ic.serving.vllm_plugin import register, versions
from ic.serving.vllm_plugin.prefill import PrefillAttention, gather_rows

# A server that begins a process of a name, and is killed.
SERVER = """
import multiprocessing, os, signal, sys, threading
from ic.serving.vllm_plugin.orphans import end_with_server

def begun():
    for _ in range(2):
        end_with_server()
    print(os.getpid(), threading.active_count(), flush=True)
    signal.pause()

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=begun, name=sys.argv[1]).start()
"""
H, N, P, V, R = 2, 16, 16, 16, 32
SCALE = (N + P) ** -0.5


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.32.1", "0.33.0+cu130"])
def test_known_versions_are_taken(version: str) -> None:
    assert versions.refusal(version) is None


@pytest.mark.parametrize("version", [None, "0.25.1", "0.34.0", "1.0.0", "dev"])
def test_others_are_refused_in_one_line(
    version: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    why_not = versions.refusal(version)
    assert why_not is not None
    assert "0.26.0 (PyTorch 2.11)" in why_not
    assert "\n" not in why_not
    monkeypatch.setattr(register, "installed", lambda: version)
    with caplog.at_level(logging.WARNING, logger="vllm"):
        register.register()  # imports no vLLM, which is not here
    assert [record.message for record in caplog.records] == [
        f"{why_not}. Our models are not registered."
    ]


def test_lengths_are_read_on_the_host_of_prefills_alone() -> None:
    common = SimpleNamespace(
        query_start_loc_cpu=torch.tensor([0, 1, 2, 7, 10]),
        seq_lens_cpu_upper_bound=torch.tensor([30, 40, 5, 19]),
    )
    mixed = SimpleNamespace(num_decodes=2, num_prefills=2)
    assert versions.prefill_lengths(mixed, common) == [(5, 0), (3, 16)]
    decode = SimpleNamespace(num_decodes=4, num_prefills=0)
    assert versions.prefill_lengths(decode, SimpleNamespace(seq_lens_cpu_upper_bound=None)) == []


@pytest.fixture
def prefill() -> Callable[[int], PrefillAttention]:
    """A layer with random weights, that makes keys and values of so many cached tokens at once."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(R, H * (N + V), generator=generator) * R**-0.5

    def expand(latent_SR: Tensor, k_rope_SP: Tensor) -> tuple[Tensor, Tensor]:
        kv = (latent_SR @ weight).unflatten(-1, (H, -1))
        k_nope, v = kv.split([N, V], -1)
        return torch.cat((k_nope, k_rope_SP[:, None].expand(-1, H, -1)), -1), v

    return lambda piece_tokens: PrefillAttention(SCALE, expand, piece_tokens, (N + P, V))


def whole(prefill: PrefillAttention, q: Tensor, rows: Tensor) -> Tensor:
    k, v = prefill.expand(*rows.split([R, P], -1))
    return attention_reference(q[None], k[None], v[None], scale=SCALE)[0][0]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("lengths", [(9,), (1, 33, 20)])
def test_fresh_requests_attend_apart(
    prefill: Callable[[int], PrefillAttention],
    lengths: tuple[int, ...],
    kernels: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ic.kernels.arguments.INTERPRETED", kernels)
    rows, q = torch.randn(sum(lengths), R + P), torch.randn(sum(lengths), H, N + P)
    out = prefill(64).fresh(q, *rows.split([R, P], -1), lengths)
    for one, q_one, rows_one in zip(*(x.split(lengths) for x in (out, q, rows)), strict=True):
        torch.testing.assert_close(one, whole(prefill(64), q_one, rows_one), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(("context", "piece"), [(70, 100), (70, 32), (64, 32), (5, 1)])
def test_cached_tokens_are_seen_in_pieces(
    prefill: Callable[[int], PrefillAttention],
    context: int,
    piece: int,
    kernels: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ic.kernels.arguments.INTERPRETED", kernels)
    rows, q = torch.randn(context + 11, R + P), torch.randn(11, H, N + P)
    pages, page_tokens = torch.tensor([4, 0, 2, 3, 5], dtype=torch.int32), 16
    cache = torch.full((6, page_tokens, R + P), torch.nan)
    for place in range(context):
        cache[pages[place // page_tokens], place % page_tokens] = rows[place]
    asked = []

    def rows_of(first: int, last: int) -> Tensor:
        asked.append(last - first)
        return gather_rows(cache, pages, first, last, 1.0)

    new = rows[context:].split([R, P], -1)
    out = prefill(piece).continued(q, *new, rows_of, context)
    torch.testing.assert_close(out, whole(prefill(piece), q, rows), rtol=0, atol=1e-5)
    assert sum(asked) == context
    assert max(asked) <= (piece if kernels else context)


def test_an_e4m3_cache_is_read_with_its_scale() -> None:
    codes = torch.randn(3, 16, 8).to(torch.float8_e4m3fn)
    rows = gather_rows(codes, torch.tensor([2, 0]), 3, 20, 0.5)
    expected = torch.cat((codes[2], codes[0])).float()[3:20] * 0.5
    assert rows.equal(expected)


@pytest.mark.parametrize(
    ("name", "watches"), [("EngineCore", True), ("EngineCore_DP1", True), ("Worker", False)]
)
def test_an_engine_ends_when_its_server_was_killed(
    tmp_path: Path, name: str, watches: bool
) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    with subprocess.Popen([sys.executable, script, name], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        begun, threads = map(int, server.stdout.readline().split())
        ended = os.pidfd_open(begun)
        try:
            assert threads == 1 + watches  # once, though it is called twice
            server.kill()
            if watches:
                assert select.select([ended], [], [], 300)[0]
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(ended, signal.SIGKILL)
            os.close(ended)
