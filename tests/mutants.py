"""Plants small faults in the source and counts those that the tests notice.

`make mutants` runs it. The faults are Cosmic Ray's (comparisons, arithmetic, constants, loops,
conditions, caught exceptions). A sample is drawn by a seed, since all of them would take a day.
Each worker has a copy of the tree in which one fault at a time stands, and stops at the first test
that fails. At the end every test that noticed a fault runs once without any: where it fails too, it
noticed nothing. The result goes to a JSON file, with the lines of every fault that lived.
"""

import argparse
import datetime
import difflib
import functools
import importlib
import json
import os
import platform
import random
import re
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


def test_files(module: Path, folders: list[str]) -> list[str]:
    """The folders' test files that name the module, the file of its own name first.

    Then those that name a module which imports it; all where there are none.
    """
    files = sorted(f for folder in folders for f in (ROOT / folder).rglob("test_*.py"))
    own = [f for f in files if f.stem == f"test_{module.stem}"]
    importers = [m for m in modules() if names(m, module) and m != ROOT / module]
    named = [f for f in files if names(f, module)]
    named += [f for f in files if any(names(f, each.relative_to(ROOT)) for each in importers)]
    chosen = list(dict.fromkeys(own + named)) or files
    return [str(f.relative_to(ROOT)) for f in chosen]


@functools.cache
def modules() -> list[Path]:
    return sorted(m for folder in ("ic", *AREAS) for m in (ROOT / folder).rglob("*.py"))


def names(file: Path, module: Path) -> bool:
    """Whether a file's text holds the module's dotted name."""
    dotted = ".".join(module.with_suffix("").parts).removeprefix("ic.")
    return re.search(rf"\bic\.{re.escape(dotted)}\b(?!\.)", text_of(file)) is not None


@functools.cache
def text_of(file: Path) -> str:
    return file.read_text()


def take_copy(queue: "Queue[str]") -> None:
    """Gives this worker a copy of the tree of its own, and keeps compiled faults off the disk."""
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.chdir(queue.get())


class Failures:
    """A pytest plugin: keeps the names of the tests that fail."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self.file.open("a") as file:
                file.write(f"{report.nodeid}\n")


def failures(tests: list[str], timeout_s: float, *options: str) -> tuple[bool, list[str]]:
    """Runs tests in a fork of this process, which has the libraries loaded.

    Returns:
        Whether they came to an end within the time, and those that failed; `collection` if they
        could not begin.
    """
    own = Path.cwd().with_suffix(".tests")  # other runs of pytest clear the common folder
    kept = Path.cwd().with_suffix(".failed")
    kept.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        arguments = ["-n", "0", "-q", "-p", "no:cacheprovider", "-m", NOT_MARKED, *options]
        arguments += [f"--basetemp={own}", *tests]
        os._exit(int(pytest.main(arguments, plugins=[Failures(kept)])))
    end = os.pidfd_open(child)
    ended, _, _ = select.select([end], [], [], timeout_s)
    os.close(end)
    if not ended:
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return True, []
    return bool(ended), kept.read_text().splitlines() if kept.exists() else ["collection"]


def judge(item: WorkItem, tests: list[str], timeout_s: float) -> dict[str, object]:
    """Plants one fault in this worker's copy and runs the tests: what it was, and whether it lived."""
    began = time.perf_counter()
    fault = item.mutations[0]
    operator = get_operator(fault.operator_name)(**fault.operator_args)
    with use_mutation(fault.module_path, operator, fault.occurrence) as (before, after):
        in_time, failed = failures(tests, timeout_s, "-x")
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return {
        "module": str(fault.module_path),
        "line": fault.start_pos[0],
        "operator": fault.operator_name.removeprefix("core/"),
        "lived": in_time and not failed,
        "undecided": not in_time,
        "noticed_by": failed[0] if in_time and failed else "",
        "seconds": round(time.perf_counter() - began, 1),
        "change": changed,
    }


def commit() -> str:
    if named := os.environ.get("IC_COMMIT"):
        return named
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()


def summary(
    options: argparse.Namespace, records: list[dict[str, Any]], possible: dict[str, int]
) -> dict[str, Any]:
    """What the results file holds, also of a campaign that is cut short.

    A fault whose tests took too long, or failed without it too, is undecided: it counts neither as
    planted nor as seen.
    """
    judged = [r for r in records if not r["undecided"]]
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
        "lived": [r for r in records if r["lived"]],
        "undecided": [f"{r['module']}:{r['line']}" for r in records if r["undecided"]],
        "noticed_by": sorted({r["noticed_by"] for r in judged} - {""}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=60, help="faults per area")
    parser.add_argument("--seed", type=int, default=0, help="draws the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time")
    parser.add_argument("--areas", nargs="+", choices=sorted(AREAS), default=sorted(AREAS))
    parser.add_argument("--timeout-s", type=float, default=600, help="for the tests of one fault")
    parser.add_argument(
        "--stop-after-s", type=float, default=float("inf"), help="starts no more then"
    )
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
                tests = test_files(item.mutations[0].module_path, AREAS[area])
                waiting.append((area, pool.submit(judge, item, tests, options.timeout_s)))
            for area, future in waiting:
                left = options.stop_after_s - (time.perf_counter() - began)
                if left <= 0:
                    future.cancel()
                if not future.cancelled():
                    records.append({"area": area, **future.result()})
                    print(f"{len(records)}/{len(chosen)}", *records[-1].values(), flush=True)
                    found = summary(options, records, possible)
                    options.output.write_text(json.dumps(found, indent=1) + "\n")
            noticed_by = sorted({r["noticed_by"] for r in records} - {"", "collection"})
            again = pool.submit(failures, noticed_by, options.timeout_s * len(noticed_by))
            failing = set(again.result()[1]) if noticed_by else set()
    print(f"fail without a fault: {sorted(failing) or 'none'}")
    for record in records:
        record["undecided"] |= record["noticed_by"] in failing
    found = summary(options, records, possible)
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["rows"]:
        print(f"{row['area']}: {row['seen']} of {row['planted']} seen")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
