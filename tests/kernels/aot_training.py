"""Compile the training kernels ahead of time, without a GPU, and print what the compiler used.

Run by test_aot_compile_training.py in a process of its own, because the interpreter mode of the
other tests replaces `triton.jit`:  python tests/kernels/aot_training.py CAPABILITY KERNEL
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ic.kernels import triton_mla_attention as forward
from ic.kernels import triton_mla_attention_backward as backward
from ic.kernels import triton_rmsnorm as rmsnorm
from ic.kernels import triton_rope as rope
from ic.kernels.widths import split_width

SHARED_LIMIT = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
FLOATS = ("scale", "scale_log2", "eps")


def inspect(cubin: bytes) -> dict[str, int]:
    """Registers, bytes of stack (what does not fit into registers goes there), and how many
    instructions read or write the stack inside a loop that multiplies matrices."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "-res-usage", "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text[:2000]
    return {
        "reg": int(found[1]),
        "stack": int(found[2]),
        "stack_in_loops": stack_accesses_in_loops(text),
    }


def stack_accesses_in_loops(sass: str) -> int:
    """LDL and STL between the target of a conditional backward branch and the branch, where that
    range holds matrix products and no smaller such range. (An unconditional one goes back to the
    partition loop, or from a wait that the compiler moved to the end.)"""
    code = [
        (int(m[1], 16), m[2])
        for m in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass, re.M)
    ]
    products = {at for at, text in code if "MMA." in text}
    loops = []
    for at, text in code:
        branch = re.match(r"@!?U?P\d\s+BRA (?:\S+, )?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            first = int(branch[1], 16)
            if any(first <= product <= at for product in products):
                loops.append((first, at))
    inner = [
        (a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c <= d <= b for c, d in loops)
    ]
    stack = [at for at, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(a <= at <= b for a, b in inner) for at in stack)


def compile_kernel(
    capability: int,
    fn: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    make: Any = ASTSource,
    **options: Any,
) -> dict[str, Any]:
    """Pointers, strides and sizes are divisible by 16, as in the published shapes."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list] = {}
    values: dict[tuple[int], Any] = {}
    for index, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            continue
        kind = "i64" if name.startswith("stride_") else "fp32" if name in FLOATS else "i32"
        signature[name] = pointers.get(name, kind)
        if signature[name][0] == "*" or name in ("T", "S", "H", "D") or kind == "i64":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = make(fn, signature, values, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": fn.__name__,
        "shared": kernel.metadata.shared,
        "limit": SHARED_LIMIT[capability],
        **inspect(kernel.asm["cubin"]),
    }


def attention(capability: int, d: int, v: int, documents: bool) -> list[dict[str, Any]]:
    dtype = torch.bfloat16
    d1, d2 = split_width(d)
    pointers = dict.fromkeys(("Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DVALUE"), "*bf16")
    pointers |= {"LSE": "*fp32", "DELTA": "*fp32", "DOCUMENT_START": "*i32", "DOCUMENT_END": "*i32"}
    common = {"D1": d1, "D2": d2, "DV": v, "HAS_DOCUMENTS": documents, "PRECISION": "ieee"}
    kv_tile, q_tile = backward.backward_tiles(capability, d + v, dtype)
    results = []
    forward_tile = forward.forward_tile(capability, d + v, dtype)
    plans: list[tuple[Any, tuple[int, int, int, int], dict[str, Any]]] = [
        (forward.mla_attention_forward_kernel, forward_tile, {"CAUSAL": True}),
        (backward.mla_attention_backward_kv_kernel, kv_tile, {}),
        (backward.mla_attention_backward_q_kernel, q_tile, {}),
    ]
    if not documents:  # a piece of cached keys
        plans.append((forward.mla_attention_forward_kernel, forward_tile, {"CAUSAL": False}))
    for fn, tile, more in plans:
        block_m, block_n, num_warps, num_stages = tile
        constants = common | {"BLOCK_M": block_m, "BLOCK_N": block_n} | more
        results.append(
            compile_kernel(
                capability, fn, pointers, constants, num_warps=num_warps, num_stages=num_stages
            )
            | {"shape": f"{d}/{v}"}
        )
    return results


def hopper(d: int, v: int, documents: bool) -> list[dict[str, Any]]:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from ic.kernels import triton_mla_attention_hopper as hopper_forward
    from ic.kernels import triton_mla_attention_hopper_backward as hopper_backward

    def descriptor(rows: int, columns: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], gl.bfloat16)
        return f"tensordesc<bf16[1,1,{rows},{columns}],{layout!r}>"

    widths = {"D1": v, "D2": d - v, "DV": v, "HAS_DOCUMENTS": documents}
    registers = {"CONSUMER_REGISTERS": 240, "PRODUCER_REGISTERS": 24}
    block_n, stages = hopper_forward._FORWARD_TILE
    query_block, key_block = hopper_backward._QUERY_BLOCK, hopper_backward._KEY_BLOCK
    plans = [
        (
            hopper_forward.hopper_forward_kernel,
            64,
            block_n,
            {"BLOCK_N": block_n, "STAGES": stages, "CAUSAL": causal} | widths,
        )
        for causal in ([True] if documents else [True, False])
    ] + [
        (
            hopper_backward.hopper_backward_kv_kernel,
            query_block,
            64,
            {"BLOCK_Q": query_block, "STAGES": hopper_backward._QUERY_STAGES} | widths | registers,
        ),
        (
            hopper_backward.hopper_backward_q_kernel,
            64,
            key_block,
            {
                "STATISTICS_BLOCK": query_block,
                "BLOCK_N": key_block,
                "STAGES": hopper_backward._KEY_STAGES,
            }
            | widths
            | registers,
        ),
    ]
    results = []
    for fn, query_rows, key_rows, constants in plans:
        pointers = {
            "LSE": "*fp32",
            "STATISTICS": "*fp32",
            "DOCUMENT_START": "*i32",
            "DOCUMENT_END": "*i32",
        }
        for name in ("q_desc", "k_desc"):
            rows = query_rows if name == "q_desc" else key_rows
            pointers |= {f"{name}1": descriptor(rows, v), f"{name}2": descriptor(rows, d - v)}
        pointers |= {"v_desc": descriptor(key_rows, v), "g_desc": descriptor(query_rows, v)}
        for name in ("out_desc", "dq_desc1", "dk_desc1", "dv_desc"):
            pointers[name] = descriptor(64, v)
        pointers |= {name: descriptor(64, d - v) for name in ("dq_desc2", "dk_desc2")}
        results.append(
            compile_kernel(
                90, fn, pointers, constants, make=GluonASTSource, num_warps=4, maxnreg=168
            )
            | {"shape": f"{d}/{v}", "documents": documents}
        )
    return results


def elementwise(capability: int) -> list[dict[str, Any]]:
    kind = "fp16" if capability < 80 else "bf16"
    tensors = (
        "X",
        "RESIDUAL",
        "WEIGHT",
        "Y",
        "H_OUT",
        "H",
        "DY",
        "DH_ABOVE",
        "DX",
        "DWEIGHT",
        "Q",
        "K",
        "Q_OUT",
        "K_OUT",
    )
    pointers = dict.fromkeys(tensors, f"*{kind}")
    pointers |= {"INVERSE": "*fp32", "DWEIGHT_PARTS": "*fp32", "COS": "*fp32", "SIN": "*fp32"}
    results = []
    for width in (2048, 7168):
        block = triton.next_power_of_2(width)
        rows, num_warps = rmsnorm.forward_tile(width)
        constants: dict[str, Any] = {"HAS_RESIDUAL": True, "BLOCK_D": block, "ROWS": rows}
        results.append(
            compile_kernel(
                capability,
                rmsnorm.rms_norm_forward_kernel,
                pointers,
                constants,
                num_warps=num_warps,
            )
        )
        rows, num_warps, _, stages = rmsnorm.backward_tile(capability, width)
        constants = {"HAS_ABOVE": True, "BLOCK_D": block, "ROWS": rows, "STAGES": stages}
        results.append(
            compile_kernel(
                capability,
                rmsnorm.rms_norm_backward_kernel,
                pointers,
                constants,
                num_warps=num_warps,
            )
        )
    constants = {"BLOCK_D": 32, "BLOCK_PARTS": 64}
    results.append(
        compile_kernel(
            capability, rmsnorm.rms_norm_weight_gradient_kernel, pointers, constants, num_warps=4
        )
    )
    del pointers["H"]  # the number of heads in the RoPE kernel
    for interleaved in (True, False):
        block_t, block_h, num_warps = rope.rope_tile(16, 64)
        constants = {
            "P": 64,
            "INTERLEAVED": interleaved,
            "INVERSE": True,
            "BLOCK_T": block_t,
            "BLOCK_H": block_h,
        }
        results.append(
            compile_kernel(capability, rope.rope_kernel, pointers, constants, num_warps=num_warps)
        )
    return results


def main() -> None:
    capability, kernel = int(sys.argv[1]), sys.argv[2]
    if kernel == "elementwise":
        results = elementwise(capability)
    elif kernel == "hopper":
        results = hopper(int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "True")
    else:
        results = attention(capability, int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "True")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
