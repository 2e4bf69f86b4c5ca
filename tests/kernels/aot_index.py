"""Compile the indexer's kernels ahead of time, for aot_decode.py."""

from __future__ import annotations

from typing import Any

from ic.kernels import triton_index_choice as index_choice
from ic.kernels import triton_index_scores as index_scores
from tests.kernels.aot_compile import TYPES, compile_kernel


def compile_index_scores(capability: int, num_query: int, kind: str) -> dict[str, Any]:
    """Four index heads of 64 over pages."""
    block_t, joined, num_warps = index_scores.index_tile(num_query, 4)
    bits = kind == "fp8" and capability < 89
    constants = {
        "J": 4, "JOINED": joined, "DIM": 64, "QUANTIZED": kind != "bf16", "E4M3_BITS": bits,
        "PAGED": True, "PAGE_SIZE": 64, "BLOCK_T": block_t, "BLOCK_S": index_scores.BLOCK_S,
    }  # fmt: skip
    pointers = {
        "q_ptr": "*bf16", "w_ptr": "*fp32", "key_ptr": "*u8" if bits else f"*{TYPES[kind]}",
        "scale_ptr": "*fp32", "table_ptr": "*i32", "first_ptr": "*i32", "last_ptr": "*i32",
        "score_ptr": "*fp32",
    }  # fmt: skip
    return compile_kernel(
        index_scores.index_scores_kernel, capability, pointers, constants, num_warps=num_warps
    )


def compile_index_choice(capability: int, step: str) -> dict[str, Any]:
    numbers = "first_ptr", "last_ptr", "count_ptr", "state_ptr", "chunk_ptr"
    pointers = dict.fromkeys(numbers, "*i32")
    pointers |= {"score_ptr": "*fp32", "index_ptr": "*i64", "chosen_ptr": "*i64"}
    constants: dict[str, Any] = {"BLOCK": index_choice.BLOCK}
    if step == "chosen":
        kernel = index_choice._count_chosen_kernel
    elif step == "write":
        kernel = index_choice._write_chosen_kernel
        constants["MAX_CHUNKS"] = index_choice.MAX_CHUNKS
    else:
        kernel = index_choice._count_digits_kernel
        constants["DIGITS"] = int(step)
    return compile_kernel(
        kernel, capability, pointers, constants, aligned_strides=False,
        num_warps=index_choice.WARPS,
    )  # fmt: skip
