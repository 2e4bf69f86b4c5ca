"""Compile one kernel ahead of time, without a GPU, and say what the compiler used."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {"bf16": "bf16", "fp16": "fp16", "fp8": "fp8e4nv", "i8": "i8"}


def compile_kernel(
    fn: Any,
    capability: int,
    pointers: dict[str, str],
    constants: dict[str, Any],
    source_type: Any = ASTSource,
    *,
    aligned_strides: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Compile one kernel: pointers, and strides unless said otherwise, divisible by 16, other
    numbers int32.
    """
    signature, attributes, values = {}, {}, {}
    for index, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(index,)] = constants[name]
            continue
        is_float = name in ("scale_log2", "eps", "beta", "original")
        signature[name] = pointers.get(name, "fp32" if is_float else "i32")
        if name.endswith("_ptr") or (aligned_strides and name.startswith("stride_")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = source_type(fn=fn, signature=signature, constexprs=values, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "shared_bytes": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
    } | resource_usage(kernel.asm["cubin"])


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and spilled stack bytes."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}
