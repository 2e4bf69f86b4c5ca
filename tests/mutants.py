"""Plants small faults in the source and counts those that the tests notice.

`make mutants` runs it. The faults are Cosmic Ray's (comparisons, arithmetic, constants, loops,
conditions, caught exceptions). A sample is drawn by a seed, since all of them would take a day.
The tests of an area's folders first run once without a fault, to know which of them execute which
line. Each worker has a copy of the tree in which one fault at a time stands, runs the tests that
execute its line, and stops at the first that fails. The result goes to a JSON file, with the lines
of every fault that lived.
"""

import argparse
import datetime
import difflib
import importlib
import json
import os
import platform
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Queue
from pathlib import Path
from typing import Any

import pytest
from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_item import WorkItem
from executed import Executed

ROOT = Path(__file__).resolve().parent.parent
# The area's modules, and the folders of tests that should notice a fault there.
AREAS = {
    "callbacks": ["tests/callbacks", "tests/run"],
    "ic/checkpoint": ["tests/checkpoint", "tests/run"],
    "ic/planning": ["tests/planning"],
    "datamodules": ["tests/datamodules"],
    "ic/evaluation": ["tests/evaluation"],
}
# `int | None` is arithmetic to the mutation tester, and a decorator's absence is often an error of
# syntax or of no consequence (`@override`).
NO_FAULT = ("core/ReplaceBinaryOperator_BitOr", "core/RemoveDecorator")
NOT_MARKED = "not slow and not slurm and not compile and not gpu and not multigpu"

# What the tests load and no fault touches: loaded once, before the workers are forked.
LIBRARIES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "hydra",
             "matplotlib.pyplot", "rich")  # fmt: skip


def every_fault(area: str, chance: random.Random) -> list[WorkItem]:
    """The faults that can be planted in an area's modules, one of a kind at each place.

    A `/` can become eleven other operators and a `<` five: one of them is drawn, so that a sample
    is spread over the places rather than over the alternatives. Paths are relative to the root.
    """
    modules = sorted(p.relative_to(ROOT) for p in (ROOT / area).rglob("*.py"))
    places: dict[tuple[object, ...], list[WorkItem]] = {}
    for item in _all_work_items(modules, {}):
        fault = item.mutations[0]
        if not fault.operator_name.startswith(NO_FAULT):
            kind = fault.operator_name.split("_")[0]
            places.setdefault((fault.module_path, fault.start_pos, kind), []).append(item)
    return [chance.choice(items) for items in places.values()]


def take_copy(queue: "Queue[str]") -> None:
    """Gives this worker a copy of the tree of its own, and keeps compiled faults off the disk."""
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.chdir(queue.get())


def tests_pass(arguments: list[str], timeout_s: float) -> bool | None:
    """Runs pytest in a fork of this process, which has the libraries loaded; None: it took too long."""
    child = os.fork()
    if child == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        os._exit(int(pytest.main(arguments)))
    end = os.pidfd_open(child)
    ended, _, _ = select.select([end], [], [], timeout_s)
    os.close(end)
    if not ended:
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status == 0 if ended else None


def judge(item: WorkItem, tests: list[str], timeout_s: float) -> dict[str, object]:
    """Plants one fault in this worker's copy and runs the tests: what it was, and whether it lived."""
    began = time.perf_counter()
    fault = item.mutations[0]
    operator = get_operator(fault.operator_name)(**fault.operator_args)
    with use_mutation(fault.module_path, operator, fault.occurrence) as (before, after):
        arguments = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
        arguments += [f"--basetemp={Path.cwd().with_suffix('.tmp')}", *tests]
        passed = tests_pass(arguments, timeout_s) if tests else True
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return {
        "module": str(fault.module_path),
        "line": fault.start_pos[0],
        "operator": fault.operator_name.removeprefix("core/"),
        "lived": passed is True,
        "timed_out": passed is None,
        "tests": len(tests),
        "seconds": round(time.perf_counter() - began, 1),
        "change": changed if passed else [],
    }


def commit() -> str:
    if named := os.environ.get("IC_COMMIT"):
        return named
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()


def summary(
    options: argparse.Namespace,
    records: list[dict[str, Any]],
    possible: dict[str, int],
    failed: list[str],
) -> dict[str, Any]:
    """What the results file holds, also of a campaign that is cut short.

    A fault whose tests took too long is undecided: it counts neither as planted nor as seen.
    """
    judged = [r for r in records if not r["timed_out"]]
    rows = []
    for area in options.areas:
        of_area = [r for r in judged if r["area"] == area]
        seen = sum(not r["lived"] for r in of_area)
        rows.append(
            {"area": area, "possible": possible[area], "planted": len(of_area), "seen": seen}
        )
    return {
        "command": "python tests/mutants.py " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{options.jobs} of {os.cpu_count()} CPU cores, {platform.machine()}",
        "python": platform.python_version(),
        "seed": options.seed,
        "planted": len(judged),
        "seen": sum(not r["lived"] for r in judged),
        "rows": rows,
        "left_out": failed,
        "lived": [r for r in records if r["lived"]],
        "undecided": [f"{r['module']}:{r['line']}" for r in records if r["timed_out"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=60, help="faults per area")
    parser.add_argument("--seed", type=int, default=0, help="draws the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time")
    parser.add_argument("--areas", nargs="+", choices=sorted(AREAS), default=sorted(AREAS))
    parser.add_argument(
        "--tests-at-most-s", type=float, default=300, help="of tests for one fault, as first timed"
    )
    parser.add_argument(
        "--stop-after-s", type=float, default=float("inf"), help="starts no more then"
    )
    parser.add_argument("--executed", type=Path, help="keeps which tests execute which line")
    parser.add_argument("--output", type=Path, default=Path("mutants.json"))
    options = parser.parse_args()

    os.chdir(ROOT)
    chosen: list[tuple[str, WorkItem]] = []
    possible = {}
    for area in options.areas:
        faults = every_fault(area, random.Random(options.seed))
        possible[area] = len(faults)
        drawn = random.Random(options.seed).sample(faults, min(options.faults, len(faults)))
        chosen += [(area, fault) for fault in drawn]
    random.Random(options.seed).shuffle(chosen)

    began, records = time.perf_counter(), []
    if options.executed is not None and options.executed.exists():
        executed = Executed(json.loads(options.executed.read_text()))
    else:
        folders = sorted({folder for area in options.areas for folder in AREAS[area]})
        executed = Executed.take(options.areas, folders, options.jobs, NOT_MARKED)
        if options.executed is not None:
            executed.save(options.executed)
    print(f"left out, since they fail without a fault: {executed.failed or 'none'}", flush=True)
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory() as scratch:
        queue: Queue[str] = Queue()
        for number in range(options.jobs):
            copy = Path(scratch, str(number))
            shutil.copytree(
                ROOT,
                copy,
                symlinks=True,
                ignore=shutil.ignore_patterns(
                    ".git", ".venv", "runs", "*.png", "__pycache__", ".pack", ".whl"
                ),
            )
            queue.put(str(copy))
        with ProcessPoolExecutor(options.jobs, initializer=take_copy, initargs=(queue,)) as pool:
            waiting = []
            for area, item in chosen:
                fault = item.mutations[0]
                tests = executed.tests_of(
                    fault.module_path, fault.start_pos[0], options.tests_at_most_s
                )
                # Ten times what they took: a busy machine is no reason to call a fault seen.
                timeout_s = 60 + 10 * sum(executed.seconds[name] for name in tests)
                waiting.append((area, pool.submit(judge, item, tests, timeout_s)))
            for area, future in waiting:
                left = options.stop_after_s - (time.perf_counter() - began)
                if left <= 0:
                    future.cancel()
                if not future.cancelled():
                    records.append({"area": area, **future.result()})
                    print(f"{len(records)}/{len(chosen)}", *records[-1].values(), flush=True)
                    found = summary(options, records, possible, executed.failed)
                    options.output.write_text(json.dumps(found, indent=1) + "\n")

    for row in summary(options, records, possible, executed.failed)["rows"]:
        print(f"{row['area']}: {row['seen']} of {row['planted']} seen")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
