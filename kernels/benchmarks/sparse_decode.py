"""Benchmark cases of sparse decode: ranks of all keys, the choice, attention to what was chosen.

One query token per row. Dense attention over the same latents is a case beside them, and each step
has one of its own, so that it shows where the time goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from ic.kernels.benchmark_registry import BenchmarkCase, Call, Inputs, register
from ic.kernels.reference import mla_decode_reference, quantize_per_token
from ic.kernels.triton_index_ranks import index_ranks
from ic.kernels.triton_mla_flash_decode import mla_decode

HEADS, LATENT, ROPE = 16, 192, 64
INDEX_HEADS, INDEX_DIM, TOP_K = 4, 64, 2048
_PLACE = 2**32 - 1


def make_inputs(
    device: torch.device, seed: int, *, batch: int, context: int, key_type: str
) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    keys, scale = normal(batch, context, INDEX_DIM), None
    if key_type == "fp8":
        keys, scale = quantize_per_token(keys, torch.float8_e4m3fn)
    last = torch.full((batch, 1), context - 1, dtype=torch.int32, device=device)
    return {
        "q_latent": normal(batch, 1, HEADS, LATENT),
        "q_rope": normal(batch, 1, HEADS, ROPE),
        "cache": normal(batch, context, LATENT + ROPE),
        "index_q": normal(batch, 1, INDEX_HEADS, INDEX_DIM),
        "index_w": normal(batch, 1, INDEX_HEADS, dtype=torch.float32),
        "keys": keys,
        "key_scale": scale,
        "first": torch.zeros_like(last),
        "last": last,
        "scale": (LATENT + ROPE) ** -0.5,
    }


def ranks_of(inputs: Inputs) -> torch.Tensor:
    names = ("index_q", "index_w", "keys", "first", "last")
    return index_ranks(*(inputs[name] for name in names), key_scale=inputs["key_scale"])


def table_of(ranks: torch.Tensor) -> torch.Tensor:
    """The places of the chosen tokens among those of all rows."""
    place = ranks[:, 0].topk(TOP_K, dim=-1).values & _PLACE
    first = torch.arange(len(ranks), device=ranks.device)[:, None] * ranks.shape[-1]
    return (place + first).int()


def attend(inputs: Inputs, table: torch.Tensor) -> torch.Tensor:
    lengths = torch.full_like(inputs["last"][:, 0], TOP_K)
    out, _ = mla_decode(
        inputs["q_latent"],
        inputs["q_rope"],
        inputs["cache"].view(-1, 1, LATENT + ROPE),
        lengths,
        softmax_scale=inputs["scale"],
        block_table=table,
        check_indices=False,
    )
    return out


def ours(inputs: Inputs) -> Call:
    return lambda: attend(inputs, table_of(ranks_of(inputs)))


def dense(inputs: Inputs) -> Call:
    """Attention to all tokens."""
    lengths = inputs["last"][:, 0] + 1
    return lambda: mla_decode(
        inputs["q_latent"],
        inputs["q_rope"],
        inputs["cache"],
        lengths,
        softmax_scale=inputs["scale"],
        check_indices=False,
    )


def scores(inputs: Inputs) -> torch.Tensor:
    """Index scores (B, S) in fp32."""
    keys = inputs["keys"].float()
    if inputs["key_scale"] is not None:
        keys = keys * inputs["key_scale"][..., None]
    total = torch.zeros(keys.shape[:2], device=keys.device)
    for head in range(INDEX_HEADS):
        products = torch.einsum("bi,bsi->bs", inputs["index_q"][:, 0, head].float(), keys)
        total += inputs["index_w"][:, 0, head, None] * products.relu()
    return total


def reference(inputs: Inputs) -> torch.Tensor:
    total = scores(inputs)
    first = torch.arange(len(total), device=total.device)[:, None] * total.shape[1]
    table = (total.topk(TOP_K, dim=-1).indices + first).int()
    out, _ = mla_decode_reference(
        inputs["q_latent"],
        inputs["q_rope"],
        inputs["cache"].view(-1, 1, LATENT + ROPE),
        torch.full_like(inputs["last"][:, 0], TOP_K),
        softmax_scale=inputs["scale"],
        block_table=table,
    )
    return out


def ranked_scores(inputs: Inputs) -> Call:
    """The scores within the ranks on the first call, which is compared; then only ranks."""
    checked: list[bool] = []

    def call() -> torch.Tensor:
        ranks = ranks_of(inputs)
        if checked:
            return ranks
        checked.append(True)
        ordered = (ranks[:, 0] >> 32).int()
        return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)

    return call


def chosen(inputs: Inputs) -> Call:
    """The sorted places on the first call, which is compared; then only the choice."""
    ranks, checked = ranks_of(inputs), list[bool]()

    def call() -> torch.Tensor:
        table = table_of(ranks)
        if checked:
            return table
        checked.append(True)
        return table.sort(-1).values.float()

    return call


def chosen_reference(inputs: Inputs) -> torch.Tensor:
    total = scores(inputs)
    first = torch.arange(len(total), device=total.device)[:, None] * total.shape[1]
    return (total.topk(TOP_K, dim=-1).indices + first).sort(-1).values.float()


def sparse_case(what: str, batch: int, context: int, key_type: str) -> BenchmarkCase:
    config: dict[str, Any] = {"batch": batch, "context": context, "key_type": key_type}
    key_bytes = context * (2 * INDEX_DIM if key_type == "bf16" else INDEX_DIM + 4)
    steps = {
        "ranks": (ranked_scores, scores, key_bytes + 8 * context),
        "choice": (chosen, chosen_reference, 8 * context + 4 * TOP_K),
        "whole": (ours, reference, key_bytes + 16 * context + 2 * TOP_K * (LATENT + ROPE)),
    }
    prepare, compare, row_bytes = steps[what]
    flops = 2 * INDEX_HEADS * INDEX_DIM * context
    return BenchmarkCase(
        kernel="sparse_decode",
        name=f"({batch}, {context >> 10}k) {key_type} keys, {what}",
        config=config,
        make_inputs=partial(make_inputs, **config),
        ours=prepare,
        reference=compare,
        bytes_moved=batch * row_bytes,
        flops=batch * flops,
        tolerance=5e-2,
    )


def dense_case(batch: int, context: int) -> BenchmarkCase:
    """What sparse decode is to beat."""
    config: dict[str, Any] = {"batch": batch, "context": context, "key_type": "bf16"}

    def compare(inputs: Inputs) -> torch.Tensor:
        out, _ = mla_decode_reference(
            inputs["q_latent"],
            inputs["q_rope"],
            inputs["cache"],
            inputs["last"][:, 0] + 1,
            softmax_scale=inputs["scale"],
        )
        return out

    return BenchmarkCase(
        kernel="sparse_decode",
        name=f"({batch}, {context >> 10}k) dense",
        config=config,
        make_inputs=partial(make_inputs, **config),
        ours=dense,
        reference=compare,
        bytes_moved=2 * batch * context * (LATENT + ROPE),
        flops=2 * batch * HEADS * (2 * LATENT + ROPE) * context,
        tolerance=5e-2,
    )


@register("sparse_decode")
def cases() -> Iterable[BenchmarkCase]:
    for batch, context in ((1, 2**20), (1, 2**17), (16, 2**15)):
        yield dense_case(batch, context)
        for key_type in ("bf16", "fp8"):
            for what in ("ranks", "choice", "whole"):
                yield sparse_case(what, batch, context, key_type)
