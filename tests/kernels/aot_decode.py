"""Compile the decode kernels ahead of time, without a GPU, and print what the compiler used.

Run by test_aot_compile_decode.py in a process of its own, because the interpreter mode of the other
tests replaces `triton.jit`:  python tests/kernels/aot_decode.py CAPABILITY ...
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ic.kernels import triton_append_latent as append
from ic.kernels import triton_matvec as matvec
from ic.kernels import triton_mla_combine as combine
from ic.kernels import triton_mla_splits as splits
from ic.kernels import triton_new_tokens as new_tokens
from ic.kernels import triton_silu_mul as silu_mul
from ic.kernels.mla_decode_launch import (
    FEW_ROWS,
    Device,
    combine_blocks,
    decode_config,
    e4m3_codes_config,
)
from ic.kernels.widths import one_tile
from tests.kernels.aot_compile import TYPES, compile_kernel
from tests.kernels.aot_index import compile_index_choice, compile_index_scores
from tests.kernels.aot_many_heads import compile_many_heads, compile_many_heads_codes, compile_pairs

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
# (latent, rope, rows, cache type): the published figures' shapes, then others that must compile.
PUBLISHED = [
    (192, 64, 16, "bf16"),
    (192, 64, 16, "fp8"),
    (512, 64, 16, "bf16"),
    (512, 64, 16, "fp8"),
    (512, 64, 64, "bf16"),
    (96, 32, 16, "fp8"),
]
# Published where Hopper's own kernels take them.
HOPPER_MANY_HEADS = [
    (512, 64, 64, "fp8"),
    (512, 64, 64, "i8"),
    (448, 64, 64, "bf16"),
    (192, 64, 64, "bf16"),
    (192, 64, 128, "bf16"),
    (128, 64, 128, "bf16"),
    (256, 64, 64, "bf16"),
    (192, 64, 32, "bf16"),
    (512, 64, 32, "bf16"),
]
OTHERS = [
    (192, 64, 64, "fp8"),
    (192, 64, 16, "i8"),
    (256, 64, 16, "bf16"),
    (64, 16, 16, "fp16"),
    # Rows narrower than their tile.
    (8, 16, 16, "bf16"),
    (48, 32, 16, "bf16"),
    (48, 32, 64, "bf16"),
    (48, 32, 16, "fp8"),
]


def compile_decode(
    capability: int,
    latent: int,
    rope: int,
    rows: int,
    kind: str,
    page_size: int | None = 64,
    num_query: int = 1,
) -> dict[str, Any]:
    quantized = kind in ("fp8", "i8")
    device = Device(capability, 132, SHARED_LIMIT[capability])
    config = decode_config(rows, latent, rope, 1 if quantized else 2, device)
    query = "fp16" if kind == "fp16" else "bf16"
    bits = config.e4m3_bits and kind == "fp8"
    pointers = {
        "q_latent_ptr": f"*{query}",
        "q_rope_ptr": f"*{query}",
        "cache_ptr": "*u8" if bits else f"*{TYPES[kind]}",
        "scale_ptr": "*fp32",
        "block_table_ptr": "*i32",
        "seq_lens_ptr": "*i32",
        "out_ptr": "*fp32",
        "lse_ptr": "*fp32",
    }
    constants = {
        "NUM_QUERY": num_query,
        "R": latent,
        "P": rope,
        "TILE": one_tile(latent, rope) or latent,
        "COMBINED": config.combined,
        "PAGED": page_size is not None,
        "PAGE_SIZE": page_size or 16,
        "SWAP": config.swap,
        "QUANTIZED": quantized,
        "E4M3_BITS": bits,
        "SHIFT": 14.0 if quantized else 0.0,
        "PRECISION": "ieee",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
        "SPLIT": True,
        "PDL": config.pdl,
        "DENSE_TOKENS": True,
        "stride_scale_token": 1,
    }
    if not quantized:
        constants["scale_ptr"] = None
    if page_size is None:
        constants["block_table_ptr"] = None
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.max_registers:
        options["maxnreg"] = config.max_registers
    return compile_kernel(splits._decode_kernel, capability, pointers, constants, **options)


def compile_e4m3_codes(capability: int, latent: int, rope: int) -> dict[str, Any]:
    """The Gluon kernel of few heads over e4m3, which only Hopper runs."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from ic.kernels.gluon_mla_decode_e4m3 import PRECISE, _decode_e4m3_kernel

    config = e4m3_codes_config(latent, rope)
    tile = latent + rope if config.combined else latent
    descriptors = {}
    for name, width in (("desc_tile", tile), ("desc_rope", tile if config.combined else rope)):
        layout = gl.NVMMASharedLayout.get_default_for([64, width], gl.float8e4nv)
        descriptors[name] = f"tensordesc<fp8e4nv{[64, width]},{layout!r}>"
    pointers = {
        "q_latent_ptr": "*bf16",
        "q_rope_ptr": "*bf16",
        "scale_ptr": "*fp32",
        "block_table_ptr": "*i32",
        "seq_lens_ptr": "*i32",
        "out_ptr": "*fp32",
        "lse_ptr": "*fp32",
    }
    constants = {
        "NUM_QUERY": 1,
        "R": latent,
        "P": rope,
        "TILE": tile,
        "COMBINED": config.combined,
        "PAGED": True,
        "PAGE_SIZE": 64,
        "STAGES": config.num_stages,
        "SPLIT": True,
        "PRECISE": min(PRECISE, tile),
        "PDL": config.pdl,
    }
    return compile_kernel(
        _decode_e4m3_kernel,
        capability,
        pointers | descriptors,
        constants,
        GluonASTSource,
        num_warps=config.num_warps,
    )


def compile_handover(capability: int) -> dict[str, Any]:
    """The kernel that is held against racecheck's reports."""
    from handover import handover_kernel
    from triton.experimental.gluon._runtime import GluonASTSource

    return compile_kernel(
        handover_kernel, capability, {"out_ptr": "*fp32"}, {}, GluonASTSource, num_warps=4
    )


def compile_combine(capability: int, num_splits: int, latent: int) -> dict[str, Any]:
    block_s, block_r, num_warps = combine_blocks(num_splits, latent)
    pointers = {
        "partial_ptr": "*fp32",
        "partial_lse_ptr": "*fp32",
        "out_ptr": "*bf16",
        "lse_ptr": "*fp32",
    }
    constants = {"R": latent, "BLOCK_S": block_s, "BLOCK_R": block_r, "PDL": capability >= 90}
    return compile_kernel(
        combine._combine_kernel, capability, pointers, constants, num_warps=num_warps
    )


def compile_append(
    capability: int, latent: int, rope: int, kind: str, temperature: str | None = None
) -> dict[str, Any]:
    """The append alone, or with queries of this length temperature."""
    quantized = kind in ("fp8", "i8")
    bits = kind == "fp8" and capability < 89
    pointers = {
        "latent_ptr": "*bf16",
        "rope_key_ptr": "*bf16",
        "weight_ptr": "*bf16",
        "cos_ptr": "*fp32",
        "sin_ptr": "*fp32",
        "cache_ptr": "*u8" if bits else f"*{TYPES[kind]}",
        "scale_ptr": "*fp32",
        "slots_ptr": "*i64",
    }
    constants = append.kernel_constants(
        latent, rope, interleaved=True, quantized=quantized, bits=bits
    )
    if not quantized:
        constants["scale_ptr"] = None
    if temperature is None:
        return compile_kernel(append._append_kernel, capability, pointers, constants, num_warps=1)
    pointers |= {"q_ptr": "*bf16", "temperature_ptr": "*bf16", "visible_ptr": "*i64"}
    constants |= {"TEMPERATURE": temperature, "N": 128, "BLOCK_N": 128, "HEADS": new_tokens.BLOCK_H}
    return compile_kernel(
        new_tokens._new_tokens_kernel, capability, pointers, constants, num_warps=1
    )


def compile_silu_mul(capability: int) -> dict[str, Any]:
    constants = {"BLOCK_F": silu_mul.BLOCK}
    pointers = {"X": "*bf16", "Y": "*bf16"}
    return compile_kernel(silu_mul.silu_mul_kernel, capability, pointers, constants, num_warps=4)


def compile_matvec(capability: int, *, width: int, swiglu: bool) -> dict[str, Any]:
    """With a norm and a sum before SwiGLU, as behind attention; alone otherwise."""
    block_x, block_d, num_warps = matvec.matvec_tile(width, swiglu=swiglu)
    constants = {
        "HAS_RESIDUAL": swiglu, "HAS_NORM": swiglu, "SWIGLU": swiglu, "BLOCK_X": block_x,
        "BLOCK_D": block_d, "PIECES": -(-width // block_d), "PDL": capability >= 90,
    }  # fmt: skip
    pointers = dict.fromkeys(("X", "RESIDUAL", "NORM", "W", "Y", "H"), "*bf16")
    return compile_kernel(
        matvec.matvec_kernel, capability, pointers, constants, num_warps=num_warps
    )


def compile_chosen(capability: int, latent: int, rope: int, rows: int, kind: str) -> dict[str, Any]:
    """The kernel that takes pages of 64."""
    if capability == 90 and rope == 64 and rows > FEW_ROWS:
        if kind == "bf16" and latent in (448, 512):
            return compile_many_heads(capability, latent)
        if kind == "bf16":
            return compile_pairs(capability, latent, rows)
        if latent == 512:
            return compile_many_heads_codes(capability, kind)
    if (capability, rows, kind) == (90, FEW_ROWS, "fp8") and (latent, rope) != (48, 32):
        return compile_e4m3_codes(capability, latent, rope)
    return compile_decode(capability, latent, rope, rows, kind)


def compile_all(capability: int) -> list[dict[str, Any]]:
    rows = []
    for published, shapes in (
        (True, PUBLISHED), (capability == 90, HOPPER_MANY_HEADS), (False, OTHERS)
    ):  # fmt: skip
        for shape in shapes:
            name = "decode {}+{} rows {} {}".format(*shape)
            rows.append({"name": name, "published": published} | compile_chosen(capability, *shape))
    others = {
        "combine 264 splits": lambda: compile_combine(capability, 264, 512),
        "append fp8": lambda: compile_append(capability, 512, 64, "fp8"),
        "combine 4 splits": lambda: compile_combine(capability, 4, 192),
        "append bf16": lambda: compile_append(capability, 192, 64, "bf16"),
        "new tokens bf16": lambda: compile_append(capability, 192, 64, "bf16", "ssmax"),
        "new tokens fp8": lambda: compile_append(capability, 192, 64, "fp8", "llama4"),
        "silu mul": lambda: compile_silu_mul(capability),
        "matvec": lambda: compile_matvec(capability, width=5440, swiglu=False),
        "matvec swiglu": lambda: compile_matvec(capability, width=2048, swiglu=True),
        "index scores": lambda: compile_index_scores(capability, 1, "bf16"),
        "index scores fp8 keys": lambda: compile_index_scores(capability, 1, "fp8"),
        "index scores of a prompt": lambda: compile_index_scores(capability, 4096, "fp8"),
        "index scores int8 keys": lambda: compile_index_scores(capability, 1, "i8"),
        "index choice, first digit": lambda: compile_index_choice(capability, "0"),
        "index choice, second digit": lambda: compile_index_choice(capability, "1"),
        "index choice, last digit": lambda: compile_index_choice(capability, "3"),
        "index choice, chunks": lambda: compile_index_choice(capability, "chosen"),
        "index choice, places": lambda: compile_index_choice(capability, "write"),
        "page 1": lambda: compile_decode(capability, 192, 64, 16, "bf16", page_size=1),
        "page 1, 512": lambda: compile_decode(capability, 512, 64, 16, "bf16", page_size=1),
        "fp8, page 1": lambda: compile_decode(capability, 192, 64, 16, "fp8", page_size=1),
        "page 16": lambda: compile_decode(capability, 192, 64, 16, "bf16", page_size=16),
        "contiguous": lambda: compile_decode(capability, 192, 64, 16, "bf16", page_size=None),
        "fp8, page 16": lambda: compile_decode(capability, 192, 64, 16, "fp8", page_size=16),
        "fp8 512, page 16": lambda: compile_decode(capability, 512, 64, 16, "fp8", page_size=16),
        "4 query tokens": lambda: compile_decode(capability, 192, 64, 64, "bf16", num_query=4),
    }
    for name, build in others.items():
        # e4m3 in small pages has no published figure; its kernel widens and may spill on sm_90.
        rows.append({"name": name, "published": not name.startswith("fp8")} | build())
    if capability == 90:
        hopper = {
            "handover": lambda: compile_handover(capability),
            "rows 32, page 16": lambda: compile_decode(
                capability, 192, 64, 32, "bf16", page_size=16
            ),
            "rows 64, page 16": lambda: compile_decode(
                capability, 192, 64, 64, "bf16", page_size=16
            ),
            "512 rows 32, page 16": lambda: compile_decode(
                capability, 512, 64, 32, "bf16", page_size=16
            ),
            "512 rows 64, page 16": lambda: compile_decode(
                capability, 512, 64, 64, "bf16", page_size=16
            ),
            "pairs 192+64 2 query tokens": lambda: compile_pairs(capability, 192, 128, 2, True),
            "pairs 256+64 rows 128": lambda: compile_pairs(capability, 256, 128, split=True),
        }
        for name, build in hopper.items():
            rows.append({"name": name, "published": True} | build())
        for options in ({"split": True}, {"page_size": None, "num_query": 4}, {"query": "fp16"}):
            for kind in ("fp8", "i8"):
                row = compile_many_heads_codes(capability, kind, **options)
                rows.append({"name": f"many heads {kind} {options}", "published": True} | row)
    limit = SHARED_LIMIT[capability]
    return [row | {"capability": capability, "shared_limit_bytes": limit} for row in rows]


if __name__ == "__main__":
    print(json.dumps([row for argument in sys.argv[1:] for row in compile_all(int(argument))]))
