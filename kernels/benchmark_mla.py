"""Check, time and report the kernels: `python -m ic benchmark [kernel ...] [--output FILE.json]`.

For each registered case (see `benchmark_registry`): compare with the reference on fresh inputs,
refuse to time what is wrong, time ours and every peer that imports over rotating buffers larger
than L2, and relate the times to the copy bandwidth and the matrix rate measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ic.atomic_write import write_json
from ic.kernels.benchmark_registry import BenchmarkCase, Prepare, cases_of, load_kernels
from ic.kernels.benchmark_report import plot, print_table
from ic.kernels.benchmark_timing import measure_ceilings, rotations, time_best
from ic.results import describe_run

PEERS_HELP = (
    "Peers are other implementations of the same case, timed in the same run where their package "
    "imports: flash_mla, fa3_fwd_interface (FlashAttention-3), flashinfer and, for training, "
    "flash_attn.cute (FlashAttention-4), liger_kernel, and PyTorch's own cuDNN attention, "
    "FlexAttention and torch.compile. Those that are not installed are named below the table."
)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| in fp32; NaN or infinity anywhere gives infinity."""
    difference = float((out.float() - reference.float()).norm() / reference.float().norm())
    return difference if difference == difference else float("inf")


def run_case(case: BenchmarkCase, ceilings: dict[str, float], peers: bool) -> list[dict[str, Any]]:
    device = torch.device("cuda")
    sets = [case.make_inputs(device, seed) for seed in range(rotations(case.bytes_moved, device))]
    reference = case.reference(sets[0])
    memory_us = case.bytes_moved / ceilings["copy_tb_per_s"] / 1e6
    matrix_us = case.flops / ceilings["matmul_bf16_tflop_per_s"] / 1e6
    common = {"kernel": case.kernel, "case": case.name, **case.config}
    rows: list[dict[str, Any]] = []
    implementations: dict[str, Prepare] = {"ours": case.ours, **(case.peers if peers else {})}
    for name, prepare in implementations.items():
        row = common | {"by": name}
        rows.append(row)
        try:
            calls = [prepare(inputs) for inputs in sets]
            error = relative_error(case.first_output(calls[0]()), reference)
        except ImportError as missing:
            row["reason"] = f"not installed: {missing}"
            continue
        except NotImplementedError as unsupported:
            row["reason"] = f"unsupported: {unsupported}"
            continue
        except Exception as crash:
            if name == "ours":
                raise
            row["reason"] = failure(crash)
            continue
        if error > case.tolerance:
            row["reason"] = f"refused: relative error {error:.2e} is above {case.tolerance:.0e}"
            continue
        row["relative_error"] = error
        try:
            row |= time_best(calls, graph=name not in case.launched_from_python)
        except Exception as crash:
            if name == "ours":
                raise
            row["reason"] = failure(crash)
            continue
        median = row["median_us"]
        row |= {
            "bytes_moved": case.bytes_moved,
            "flops": case.flops,
            "gb_per_s": case.bytes_moved / median / 1e3,
            "percent_of_copy": 100 * memory_us / median,
            "tflop_per_s": case.flops / median / 1e6,
            "percent_of_ceiling": 100 * max(memory_us, matrix_us) / median,
            "times_ours": median / rows[0]["median_us"] if "median_us" in rows[0] else None,
        }
        rows[-1] = row
        del calls
    return rows


def failure(crash: Exception) -> str:
    """Why a peer has no figure: the first line of what it raised. Its crash is not our run's."""
    lines = str(crash).strip().splitlines()
    return f"failed: {type(crash).__name__}: {lines[0][:160] if lines else ''}"


def add_baselines(rows: list[dict[str, Any]], cases: Sequence[BenchmarkCase]) -> None:
    ours = {row["case"]: row["median_us"] for row in rows if row["by"] == "ours" and "n" in row}
    for case in cases:
        for row in rows:
            if row["case"] == case.name and row["by"] == "ours" and case.baseline in ours:
                row["times_baseline_speed"] = ours[case.baseline] / row["median_us"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 1 if one of our kernels was wrong, 0 otherwise."""
    known = load_kernels()
    parser = argparse.ArgumentParser(
        prog="ic benchmark", description=__doc__.split("\n")[0], epilog=PEERS_HELP
    )
    parser.add_argument(
        "kernels", nargs="*", help=f"kernels to run, of {', '.join(known)}; default: all"
    )
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--output", type=Path, help="JSON file; a plot goes beside it")
    parser.add_argument("--no-peers", action="store_true", help="time only our kernels")
    parser.add_argument("--list", action="store_true", help="name the cases and leave")
    arguments = parser.parse_args(argv)
    cases = [case for kernel in arguments.kernels or known for case in cases_of(kernel)]
    cases = [case for case in cases if arguments.match in case.name]
    if arguments.list:
        print("\n".join(f"{case.kernel}: {case.name}" for case in cases))
        return 0
    if not torch.cuda.is_available():
        parser.error("no CUDA device: the benchmark measures a GPU (--list needs none)")
    torch.manual_seed(0)
    ceilings = measure_ceilings(torch.device("cuda"))
    rows: list[dict[str, Any]] = []
    run = describe_run({"ceilings": ceilings}, f"python -m ic benchmark {shlex.join(argv or [])}")
    for case in cases:
        rows += run_case(case, ceilings, peers=not arguments.no_peers)
        add_baselines(rows, cases)
        if arguments.output:  # after every case, so that an interrupted run keeps what it measured
            write_json(arguments.output, run | {"rows": rows})
        gc.collect()
        torch.cuda.empty_cache()
    print_table(run, rows)
    if arguments.output:
        plot(arguments.output.with_suffix(".png"), run, rows)
    return int(any(row["by"] == "ours" and "reason" in row for row in rows))


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
