"""Compile Hopper's decode kernels of many heads ahead of time, for aot_decode.py."""

from __future__ import annotations

from typing import Any

from ic.kernels.mla_decode_launch import pairs_config
from tests.kernels.aot_compile import compile_kernel


def compile_many_heads(capability: int, latent: int) -> dict[str, Any]:
    """The Gluon kernel, which only Hopper runs."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from ic.kernels.gluon_mla_decode import _decode_many_heads_kernel

    descriptors = {}
    for name, shape in (("desc_half", [64, 256]), ("desc_rope", [64, 64])):
        layout = gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)
        descriptors[name] = f"tensordesc<bf16{shape},{layout!r}>"
    pointers = {
        "q_latent_ptr": "*bf16",
        "q_rope_ptr": "*bf16",
        "block_table_ptr": "*i32",
        "seq_lens_ptr": "*i32",
        "out_ptr": "*bf16",
        "lse_ptr": "*fp32",
    }
    constants = {
        "NUM_QUERY": 1, "PAGED": True, "PAGE_SIZE": 64, "SHIFT": 0.0, "SPLIT": False, "R": latent,
    }  # fmt: skip
    return compile_kernel(
        _decode_many_heads_kernel,
        capability,
        pointers | descriptors,
        constants,
        GluonASTSource,
        num_warps=4,
    )


def compile_pairs(
    capability: int, latent: int, rows: int, num_query: int = 1, split: bool = False
) -> dict[str, Any]:
    """The Gluon kernel of many heads and narrow latents."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from ic.kernels.gluon_mla_decode_pairs import REGISTERS, _decode_pairs_kernel, column_parts

    config = pairs_config(rows, latent)
    groups = config.block_m // 64
    first, second = column_parts(latent)
    average, consumer, producer = REGISTERS[groups]
    descriptors = {}
    for name, width in (("desc_first", first), ("desc_narrow", 64)):
        layout = gl.NVMMASharedLayout.get_default_for([64, width], gl.bfloat16)
        descriptors[name] = f"tensordesc<bf16{[64, width]},{layout!r}>"
    pointers = {
        "q_latent_ptr": "*bf16",
        "q_rope_ptr": "*bf16",
        "block_table_ptr": "*i32",
        "seq_lens_ptr": "*i32",
        "out_ptr": "*fp32" if split else "*bf16",
        "lse_ptr": "*fp32",
    }
    constants = {
        "NUM_QUERY": num_query, "PAGED": True, "PAGE_SIZE": 64, "SHIFT": 0.0, "SPLIT": split,
        "GROUPS": groups, "STAGES": config.num_stages, "FIRST": first, "SECOND": second,
        "CONSUMER_REGISTERS": consumer, "PRODUCER_REGISTERS": producer,
    }  # fmt: skip
    return compile_kernel(
        _decode_pairs_kernel,
        capability,
        pointers | descriptors,
        constants,
        GluonASTSource,
        num_warps=4,
        maxnreg=average,
    )


def compile_many_heads_codes(
    capability: int,
    kind: str,
    *,
    query: str = "bf16",
    page_size: int | None = 64,
    num_query: int = 1,
    split: bool = False,
) -> dict[str, Any]:
    """The kernel that widens codes in a warpgroup of its own, likewise."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from ic.kernels import gluon_mla_decode_codes as codes

    pointers = {
        "q_latent_ptr": f"*{query}",
        "q_rope_ptr": f"*{query}",
        "cache_ptr": "*i32",
        "scale_ptr": "*fp32",
        "block_table_ptr": "*i32",
        "seq_lens_ptr": "*i32",
        "out_ptr": "*fp32" if split else f"*{query}",
        "lse_ptr": "*fp32",
    }
    constants = codes.kernel_constants(kind == "fp8", num_query, page_size, is_split=split)
    return compile_kernel(
        codes._decode_codes_kernel, capability, pointers, constants, GluonASTSource, num_warps=4
    )
