"""Benchmark cases of sparse decode: scores of all keys, the choice, attention to what was chosen.

One query token per row. Dense attention over the same latents is a case beside them, and each step
has one of its own, so that it shows where the time goes.

Of equal scores the later keys are taken, by us and by the references. The inputs have such scores:
a row whose weights are all negative scores zero at best, and so do a sixteenth of its keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from ic.kernels.benchmark_registry import BenchmarkCase, Call, Inputs, register
from ic.kernels.reference import mla_decode_reference, quantize_per_token
from ic.kernels.triton_index_choice import index_choice
from ic.kernels.triton_index_scores import index_scores
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


def scores_of(inputs: Inputs) -> torch.Tensor:
    names = ("index_q", "index_w", "keys", "first", "last")
    return index_scores(*(inputs[name] for name in names), key_scale=inputs["key_scale"])


def in_all_rows(place: torch.Tensor, context: int) -> torch.Tensor:
    """Places (B, K) within their rows as those among the tokens of all rows."""
    return (place + torch.arange(len(place), device=place.device)[:, None] * context).int()


def table_of(inputs: Inputs, scores: torch.Tensor) -> torch.Tensor:
    """The places of the chosen tokens among those of all rows, in ascending order."""
    place, _ = index_choice(scores, inputs["first"], inputs["last"], TOP_K)
    return in_all_rows(place[:, 0], scores.shape[-1])


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
    return lambda: attend(inputs, table_of(inputs, scores_of(inputs)))


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


def chosen_reference(inputs: Inputs) -> torch.Tensor:
    """The places of the highest scores, in ascending order."""
    total = scores(inputs)
    context = total.shape[1]
    # A stable sort of the keys in reverse has of equal ones the later first.
    order = total.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :TOP_K]
    return in_all_rows((context - 1 - order).sort(-1).values, context).float()


def reference(inputs: Inputs) -> torch.Tensor:
    out, _ = mla_decode_reference(
        inputs["q_latent"],
        inputs["q_rope"],
        inputs["cache"].view(-1, 1, LATENT + ROPE),
        torch.full_like(inputs["last"][:, 0], TOP_K),
        softmax_scale=inputs["scale"],
        block_table=chosen_reference(inputs).int(),
    )
    return out


def scored(inputs: Inputs) -> Call:
    return lambda: scores_of(inputs)[:, 0]


def chosen(inputs: Inputs) -> Call:
    total = scores_of(inputs)
    return lambda: table_of(inputs, total)


def chosen_by_pytorch(inputs: Inputs) -> Call:
    """`torch.topk` over scores and places together, whose ties are then as ours.

    Sorted on the first call, which is compared; then only the choice.
    """
    total = scores_of(inputs)[:, 0]
    bits = (total + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    ranks = ordered | torch.arange(total.shape[1], device=total.device)
    checked: list[bool] = []

    def call() -> torch.Tensor:
        table = in_all_rows(ranks.topk(TOP_K, dim=-1).values & _PLACE, ranks.shape[1])
        if checked:
            return table
        checked.append(True)
        return table.sort(-1).values

    return call


def sparse_case(what: str, batch: int, context: int, key_type: str) -> BenchmarkCase:
    config: dict[str, Any] = {"batch": batch, "context": context, "key_type": key_type}
    key_bytes = context * (2 * INDEX_DIM if key_type == "bf16" else INDEX_DIM + 4)
    steps = {
        "scores": (scored, scores, key_bytes + 4 * context),
        "choice": (chosen, chosen_reference, 4 * context + 4 * TOP_K),
        "whole": (ours, reference, key_bytes + 8 * context + 2 * TOP_K * (LATENT + ROPE)),
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
        peers={"PyTorch": chosen_by_pytorch} if what == "choice" else {},
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
            for what in ("scores", "choice", "whole"):
                yield sparse_case(what, batch, context, key_type)
