"""Codes of e4m3 or int8 to fp16, exactly, in registers (Gluon)."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def widen(codes, E4M3: gl.constexpr):
    """Words of four codes to words of two fp16, exactly: twice as many columns."""
    if E4M3:
        low, high = gl.inline_asm_elementwise(
            """{
            .reg .b16 first, second;
            mov.b32 {first, second}, $2;
            cvt.rn.f16x2.e4m3x2 $0, first;
            cvt.rn.f16x2.e4m3x2 $1, second;
            }""",
            "=r,=r,r",
            [codes],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        # 0x6400 is 1024 in fp16, whose last bit is then worth 1; 0x6480 is 1024 + 128.
        low, high = gl.inline_asm_elementwise(
            """{
            .reg .b32 shifted, offset;
            xor.b32 shifted, $2, 0x80808080;
            mov.b32 offset, 0x64806480;
            prmt.b32 $0, shifted, 0x64646464, 0x4140;
            prmt.b32 $1, shifted, 0x64646464, 0x4342;
            sub.rn.f16x2 $0, $0, offset;
            sub.rn.f16x2 $1, $1, offset;
            }""",
            "=&r,=&r,r",
            [codes],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    return gl.join(low, high).reshape([64, 2 * codes.shape[1]])
