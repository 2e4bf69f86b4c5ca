"""Small launches of every decode path, for compute-sanitizer's memcheck and racecheck on a GPU
(tests/kernels/test_races.py).
"""

from __future__ import annotations

import itertools

import test_append_latent as append_tests
import test_mla_flash_decode as decode_tests
import torch

from ic.kernels.reference import quantize_per_token
from ic.kernels.triton_append_latent import append_latent
from ic.kernels.triton_index_choice import index_choice
from ic.kernels.triton_mla_flash_decode import mla_decode


def main() -> None:
    device = torch.device("cuda")
    for latent, heads in itertools.product((128, 192, 256, 448, 512), (16, 32, 64, 128)):
        for page_size in (None, 16, 64):
            case = decode_tests.make_case(
                device,
                [0, 1, 63, 200],
                dtype=torch.bfloat16,
                heads=heads,
                latent=latent,
                rope=64,
                page_size=page_size,
            )
            mla_decode(**case)
            # Tables and lengths that lie must not lead outside the cache either.
            lies = dict(case, seq_lens_B=torch.full_like(case["seq_lens_B"], 2**30))
            if page_size:
                lies["block_table"] = torch.full_like(case["block_table"], -(2**30))
            mla_decode(**lies, check_indices=False)
            for kind in (torch.float8_e4m3fn, torch.int8):
                rows, scale = quantize_per_token(case["cache"].nan_to_num(0), kind)
                mla_decode(**dict(case, cache=rows, cache_scale=scale))
                mla_decode(**dict(lies, cache=rows, cache_scale=scale), check_indices=False)
    case = append_tests.make_case(device, [0, 15, 143, -1, 2**40], dtype=torch.bfloat16)
    append_latent(**case, check_indices=False)
    scores = torch.randn(2, 3, 5001, device=device)
    last = torch.tensor([[0, 77, 5000], [-1, 2**31 - 1, 2049]], dtype=torch.int32, device=device)
    for top_k in (1, 2048, 5001):
        index_choice(scores.round(), torch.zeros_like(last), last, top_k)
    torch.cuda.synchronize()
    print("memcheck launches done")


if __name__ == "__main__":
    main()
