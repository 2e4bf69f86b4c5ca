"""Index scores, and decode through a table of tokens, against the formulas in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ic.kernels.benchmarks import sparse_decode
from ic.kernels.reference import mla_decode_reference, quantize_per_token
from ic.kernels.triton_index_scores import index_scores
from ic.kernels.triton_mla_flash_decode import mla_decode
from ic.model import MLAForCausalLM
from ic.model.selection import index_scores as formula
from tests.inference.engine.serving import ask, draw_prompt, engine_of, finish, generated
from tests.kernels.test_model_backend import DIMS, SWITCHES, Kernels


def draw(
    device: torch.device, batch: int, queries: int, heads: int, dim: int, keys: int
) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(keys)
    shapes = (batch, queries, heads, dim), (batch, queries, heads), (batch, keys, dim)
    return tuple(torch.randn(shape, generator=g).to(device) for shape in shapes)


def compare(found: torch.Tensor, scores: torch.Tensor, visible: torch.Tensor, atol: float) -> None:
    """The scores, and what is hidden."""
    assert (found == -torch.inf).equal(~visible)
    torch.testing.assert_close(found[visible], scores[visible], atol=atol, rtol=1e-5)


@pytest.mark.parametrize(
    ("batch", "queries", "heads", "dim", "keys"),
    [
        (1, 1, 4, 64, 1),
        (2, 1, 4, 64, 300),
        (1, 5, 3, 16, 129),
        (2, 33, 8, 32, 63),
        (1, 3, 64, 128, 40),
    ],
)
def test_scores(
    device: torch.device, batch: int, queries: int, heads: int, dim: int, keys: int
) -> None:
    q, w, k = draw(device, batch, queries, heads, dim, keys)
    last = torch.randint(0, keys, (batch, queries), device=device, dtype=torch.int32)
    first = (last - torch.randint(0, keys, last.shape, device=device)).clamp(min=0).int()
    place = torch.arange(keys, device=device)
    visible = (place >= first[..., None]) & (place <= last[..., None])
    compare(index_scores(q, w, k, first, last), formula(q, w, k), visible, 1e-4)


def test_scores_are_the_same_whatever_queries_stand_beside(device: torch.device) -> None:
    """So a choice does not depend on the pieces that a prompt is read in, ties included.

    The interpreter multiplies by NumPy, whose order of additions depends on the CPU and on how many
    rows a product has. Quarters are added exactly in any order.
    """
    q, w, k = draw(device, 1, 9, 2, 16, 200)
    if device.type == "cpu":
        q, w, k = ((x * 4).round() / 4 for x in (q, w, k))
    k[:, ::3] = 0
    last = torch.arange(191, 200, dtype=torch.int32, device=device)[None]
    whole = index_scores(q, w, k, torch.zeros_like(last), last)
    assert (whole[..., :190:3] == 0).all()
    for part in (slice(0, 1), slice(1, 6), slice(6, 9)):
        given = q[:, part], w[:, part], k, torch.zeros_like(last[:, part]), last[:, part]
        assert index_scores(*given).equal(whole[:, part])


def test_keys_that_no_query_sees_are_not_read(device: torch.device) -> None:
    """Of a table for many tokens that holds a few, pages beyond them may be any."""
    q, w, k = draw(device, 2, 3, 4, 16, 512)
    last = torch.tensor([[140, 141, 142], [300, 301, 302]], dtype=torch.int32, device=device)
    first = last - 120
    visible = torch.arange(512, device=device) <= last[..., None]
    visible &= torch.arange(512, device=device) >= first[..., None]
    expected = formula(q, w, k)
    k[0, :20], k[0, 143:], k[1, :180], k[1, 303:] = (torch.nan,) * 4
    compare(index_scores(q, w, k, first, last), expected, visible, 1e-4)


@pytest.mark.parametrize("codes", [None, torch.float8_e4m3fn, torch.int8], ids=["", "fp8", "int8"])
@pytest.mark.parametrize("page_size", [None, 16, 48])
def test_quantised_keys_in_pages(
    device: torch.device, codes: torch.dtype | None, page_size: int | None
) -> None:
    """Keys in a longer buffer, or in pages in any order, whose unwritten places are no numbers."""
    q, w, k = draw(device, 2, 2, 4, 32, 96)
    held, scale = (k, None) if codes is None else quantize_per_token(k, codes)
    plain = k if scale is None else held.float() * scale[..., None]
    table = None
    if page_size is None:
        buffer = torch.zeros(2, 160, 32, dtype=held.dtype, device=device)
        buffer[:, :96] = held
        held = buffer[:, :96]
        if scale is not None:
            scales = torch.full((2, 160), torch.nan, device=device)
            scales[:, :96] = scale
            scale = scales[:, :96]
    else:
        per_row = 96 // page_size
        order = torch.randperm(2 * per_row, generator=torch.Generator().manual_seed(1)).to(device)
        table = order.view(2, per_row).int()
        pages = torch.empty(2 * per_row, page_size, 32, dtype=held.dtype, device=device)
        pages[order] = held.reshape(-1, page_size, 32)
        held = pages
        if scale is not None:
            paged = torch.empty(2 * per_row, page_size, device=device)
            paged[order] = scale.reshape(-1, page_size)
            scale = paged
    last = torch.tensor([[70, 71], [94, 95]], dtype=torch.int32, device=device)
    visible = torch.arange(96, device=device) <= last[..., None]
    found = index_scores(
        q, w, held, torch.zeros_like(last), last, key_scale=scale, block_table=table
    )
    # Quantised keys meet the query in fp16.
    compare(found, formula(q, w, plain), visible, 1e-4 if codes is None else 2e-2)


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    q, w, k = draw(device, 2, 1, 4, 32, 48)
    last = torch.full((2, 1), 47, dtype=torch.int32, device=device)
    table = torch.zeros(2, 3, dtype=torch.int32, device=device)
    codes, scale = quantize_per_token(k, torch.int8)
    good: dict[str, Any] = {"q_BTJI": q, "w_BTJ": w, "keys": k, "first_BT": last, "last_BT": last}
    bad: dict[str, dict[str, Any]] = {
        "q has 4 heads of 24": {"q_BTJI": q[..., :24], "keys": k[..., :24]},
        "w is torch.float64": {"w_BTJ": w.double()},
        "keys has shape": {"keys": k[..., :16]},
        "last is torch.int64": {"last_BT": last.long()},
        "keys is torch.float16, but q": {"keys": k.half()},
        "keys is torch.float32; with key_scale": {"key_scale": scale},
        "key_scale is torch.float64": {"keys": codes, "key_scale": scale.double()},
        "keys holds 1 rows": {"keys": k[:1]},
        "keys has pages of 15": {"keys": k[:, :15], "block_table": table},
        "block_table is torch.int64": {"block_table": table.long()},
    }
    index_scores(**good)
    for message, changes in bad.items():
        with pytest.raises(ValueError, match=message):
            index_scores(**good | changes)


def test_the_operator_is_what_pytorch_expects(device: torch.device) -> None:
    q, w, k = draw(device, 1, 2, 4, 32, 48)
    last = torch.full((1, 2), 40, dtype=torch.int32, device=device)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=device)
    given = (q, w, k.view(3, 16, 32), last * 0, last, None, table)
    torch.library.opcheck(torch.ops.ic.index_scores.default, given)


@pytest.mark.parametrize("codes", [None, torch.float8_e4m3fn, torch.int8], ids=["", "fp8", "int8"])
@pytest.mark.parametrize("rank", [48, 64])
def test_decode_reads_a_table_of_tokens(
    device: torch.device, codes: torch.dtype | None, rank: int
) -> None:
    """Pages of one token: each row attends to its own tokens, in any order."""
    g = torch.Generator().manual_seed(0)
    latent, rope = torch.randn(3, 1, 5, rank, generator=g), torch.randn(3, 1, 5, 16, generator=g)
    cache = torch.randn(200, 1, rank + 16, generator=g)
    table = torch.stack([torch.randperm(200, generator=g)[:37] for _ in range(3)]).int()
    lengths = torch.tensor([37, 1, 20], dtype=torch.int32)
    latent, rope, cache, table, lengths = (
        x.to(device) for x in (latent, rope, cache, table, lengths)
    )
    scale = None
    if codes is not None:
        cache, scale = quantize_per_token(cache, codes)
    given: dict[str, Any] = {"softmax_scale": 0.1, "block_table": table, "cache_scale": scale}
    out, lse = mla_decode(latent, rope, cache, lengths, **given)
    expected, expected_lse = mla_decode_reference(latent, rope, cache, lengths, **given)
    atol = 1e-4 if codes is None else 1e-2
    torch.testing.assert_close(out, expected, atol=atol, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=atol, rtol=0)


SPARSE = {"indexer": "sparse", "index_topk": 12, "index_head_dim": 16, "index_n_heads": 4}


@torch.no_grad()
@pytest.mark.parametrize("codes", ["auto", "fp8"])
def test_the_model_on_kernels(
    make_model: Callable[..., MLAForCausalLM], device: torch.device, codes: str
) -> None:
    """Prefill in pieces and decoding; packed texts; each with both kernels."""
    layers = 2 if codes == "auto" else 1
    caches = {"cache_dtype": codes, "index_cache_dtype": codes, "num_hidden_layers": layers}
    plain = make_model(**DIMS | SPARSE | caches).to(device)
    ours = make_model(**DIMS | SPARSE | caches | SWITCHES["all"]).to(device)
    tokens = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(3)).to(device)
    found: list[list[torch.Tensor]] = []
    with Kernels() as kernels:
        for model in (plain, ours):
            cache = model.model.new_cache()
            parts = tokens.split([30, 1, 4, 5], dim=1)
            given = {"past_key_values": cache, "use_cache": True}
            found.append([model(part, **given).logits for part in parts])
    for name in ("index_scores", "index_choice", "mla_decode"):
        assert kernels.names.count(name) == layers * 4
    for one, other in zip(*found, strict=True):
        if codes == "auto":
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
        else:  # a key that is rounded the other way may be another choice for some tokens
            assert ((one - other).abs().amax(-1) < 5e-2).float().mean() > 0.8
    documents = torch.tensor([[0] * 15 + [1] * 25, [0] * 40], device=device)
    one, other = (m(tokens, document_ids=documents, use_cache=False).logits for m in (plain, ours))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "all"])
def test_the_engine_is_sparse_over_pages(
    make_model: Callable[..., MLAForCausalLM], device: torch.device, backend: str
) -> None:
    from tests.inference.engine.serving import SIZES

    sizes = SIZES | DIMS | SPARSE
    switches = SWITCHES["all"] if backend == "all" else {}
    model = make_model(**sizes | switches).to(device)
    plain = make_model(**sizes)
    dense = make_model(**sizes | {"indexer": "dense"})
    engine = engine_of(model, prefill_chunk_tokens=16)
    requests = [ask(f"{n}", draw_prompt(n), 4) for n in (5, 40, 17)]
    for request in requests:
        engine.add(request)
    answers = finish(engine)
    for request in requests:
        assert answers[request.id].token_ids == generated(plain, request)
    assert any(generated(plain, r) != generated(dense, r) for r in requests)


@pytest.mark.parametrize("key_type", ["bf16", "fp8"])
def test_the_benchmarks_steps_are_their_references(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, key_type: str
) -> None:
    monkeypatch.setattr(sparse_decode, "TOP_K", 32)
    inputs = benchmark_inputs(device, key_type)
    inputs["index_w"][1] = -inputs["index_w"][1].abs()  # no score above zero, which many have
    for ours, reference in (
        (sparse_decode.ours, sparse_decode.reference),
        (sparse_decode.scored, sparse_decode.scores),
        (sparse_decode.chosen, sparse_decode.chosen_reference),
        (sparse_decode.chosen_by_pytorch, sparse_decode.chosen_reference),
    ):
        found, expected = ours(inputs)().float(), reference(inputs).float()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_choice_by_other_ties_is_not_the_benchmarks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference that takes the earlier of equal scores would attend to other tokens."""
    monkeypatch.setattr(sparse_decode, "TOP_K", 32)
    inputs = benchmark_inputs(device, "bf16")
    inputs["index_w"] = -inputs["index_w"].abs()
    right = sparse_decode.chosen_reference(inputs)
    total = sparse_decode.scores(inputs)
    assert (total == 0).sum(-1).min() > 0
    earlier = total.sort(dim=-1, descending=True, stable=True).indices[:, :32].sort(-1).values
    assert not right.equal(earlier + torch.arange(2, device=device)[:, None] * total.shape[1])


def benchmark_inputs(device: torch.device, key_type: str) -> dict[str, Any]:
    inputs = sparse_decode.make_inputs(device, 0, batch=2, context=960, key_type=key_type)
    wide = ["q_latent", "q_rope", "cache", "index_q", *(["keys"] if key_type == "bf16" else [])]
    return inputs | {name: inputs[name].float() for name in wide}  # bf16 needs a GPU
