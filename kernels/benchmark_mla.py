"""Check, time and report the kernels (the verb `benchmark`).

For each registered case (see `benchmark_registry`): compare with the reference on fresh inputs,
refuse to time what is wrong, time ours and every peer that imports over rotating buffers larger
than L2, and relate the times to the copy bandwidth and the matrix rate measured in the same run.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ic.files.atomic_write import write_json
from ic.files.results import describe_run
from ic.kernels.benchmark_registry import BenchmarkCase, Prepare, cases_of, load_kernels
from ic.kernels.benchmark_report import plot, print_table
from ic.kernels.benchmark_timing import measure_ceilings, rotations, time_best


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| in fp32; NaN or infinity anywhere gives infinity.

    Raises:
        ValueError: the shapes are such that each row would be compared with all others.
    """
    difference = out.float() - reference.float()
    if difference.numel() != reference.numel():
        raise ValueError(f"shape {tuple(out.shape)}; the reference has {tuple(reference.shape)}")
    error = float(difference.norm() / reference.float().norm())
    return error if error == error else float("inf")


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


def benchmark(
    kernels: Sequence[str], *, match: str, output: Path | None, peers: bool, command: str
) -> int:
    """Check and time the cases -> 1 if one of our kernels was wrong, else 0.

    Args:
        kernels: names of kernels; empty for all.
        match: only cases whose name contains this.
        output: JSON file; a plot goes beside it.
        peers: time other implementations too, where their package imports.
        command: what was called, for the results file.

    Raises:
        ValueError: an unknown kernel, no such case, or no CUDA GPU here.
    """
    cases = selected_cases(kernels, match)
    if not torch.cuda.is_available():
        raise ValueError("benchmark measures a GPU, and PyTorch sees none here")
    torch.manual_seed(0)
    ceilings = measure_ceilings(torch.device("cuda"))
    rows: list[dict[str, Any]] = []
    run = describe_run({"ceilings": ceilings}, command, public=True)
    for case in cases:
        rows += run_case(case, ceilings, peers=peers)
        add_baselines(rows, cases)
        if output:  # after every case, so that an interrupted run keeps what it measured
            write_json(output, run | {"rows": rows})
        gc.collect()
        torch.cuda.empty_cache()
    print_table(run, rows)
    if output:
        plot(output.with_suffix(".png"), run, rows)
    return int(any(row["by"] == "ours" and "reason" in row for row in rows))


def selected_cases(kernels: Sequence[str], match: str) -> list[BenchmarkCase]:
    """Cases of these kernels, of all without any, whose names contain `match`.

    Raises:
        ValueError: an unknown kernel, or no such case.
    """
    known = load_kernels()
    cases = [case for kernel in kernels or known for case in cases_of(kernel)]
    found = [case for case in cases if match in case.name]
    if not found:
        raise ValueError(f"match={match!r}: no case of {', '.join(kernels or known)} contains it")
    return found
