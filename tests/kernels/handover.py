"""One warpgroup hands rows to two others through shared memory, ordered by mbarriers alone.

The barriers are those of `ic.kernels.gluon_mla_decode` around `factor_smem`: a write, a barrier of
the writer's threads, one arrival at `filled`; a wait, a read, a barrier of the reader's threads, an
arrival at `taken`, for which the writer waits before it writes again. The result is exact, so a
kernel whose order were wrong would show. What `compute-sanitizer --tool racecheck` says of it is
what it says of this order.

    compute-sanitizer --tool racecheck python tests/kernels/handover.py
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

sync_threads = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
ROUNDS = 100


@gluon.jit
def _give(row_smem, filled, taken, num_rounds):
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, scores))
    for i in range(num_rounds):
        if i > 0:
            mbarrier.wait(taken, (i - 1) & 1)
        row_smem.store((row * (i + 1)).to(gl.float32))
        sync_threads()
        mbarrier.arrive(filled)


@gluon.jit
def _take(row_smem, filled, taken, num_rounds, out_ptr, SIDE: gl.constexpr):
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    layout: gl.constexpr = gl.SliceLayout(1, values)
    total = gl.full([64], 0.0, gl.float32, layout)
    for i in range(num_rounds):
        mbarrier.wait(filled, i & 1)
        total = total + row_smem.load(layout)
        sync_threads()
        mbarrier.arrive(taken)
    gl.store(out_ptr + SIDE * 64 + gl.arange(0, 64, layout=layout), total)


@gluon.jit
def handover_kernel(out_ptr, num_rounds):
    row_smem = gl.allocate_shared_memory(
        gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    filled = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(filled, count=1)
    mbarrier.init(taken, count=2)
    sync_threads()
    gl.warp_specialize(
        [
            (_give, (row_smem, filled, taken, num_rounds)),
            (_take, (row_smem, filled, taken, num_rounds, out_ptr, 0)),
            (_take, (row_smem, filled, taken, num_rounds, out_ptr, 1)),
        ],
        [4, 4],
        [64, 64],
    )


def main() -> None:
    out = torch.full((2, 64), float("nan"), device="cuda")
    kernel: Any = handover_kernel
    kernel[(1,)](out, ROUNDS, num_warps=4)
    expected = torch.arange(64, device="cuda") * (ROUNDS * (ROUNDS + 1) // 2)
    assert out.equal(expected.float().expand(2, -1)), out
    print("handover is exact")


if __name__ == "__main__":
    main()
