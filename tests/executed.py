"""Which tests execute a line: one run of the tests under coverage, for `tests/mutants.py`."""

import ast
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from coverage import CoverageData

ROOT = Path(__file__).resolve().parent.parent


class Recorder:
    """A pytest plugin: the seconds of every test, and those that failed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)


class Executed:
    """What the tests of some folders did when no fault was planted.

    Attributes:
        seconds: of each test, in the order in which pytest has them in each file.
        failed: the tests that fail on this machine and can therefore notice no fault.
        lines: for each module the tests that executed a line, as numbers into `seconds`. Lines that
            a subprocess or a forked rank executes are not among them.
    """

    def __init__(self, kept: dict[str, Any]) -> None:
        self.seconds: dict[str, float] = kept["seconds"]
        self.failed: list[str] = kept["failed"]
        self.lines: dict[str, dict[str, list[int]]] = kept["lines"]
        self._names = list(self.seconds)

    @classmethod
    def take(cls, areas: list[str], folders: list[str], jobs: int, marks: str) -> "Executed":
        """Run the folders' tests in a process of their own, under coverage of the areas."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "executed.json")
            command = [
                sys.executable,
                __file__,
                str(file),
                str(jobs),
                marks,
                *areas,
                "--",
                *folders,
            ]
            subprocess.run(command, cwd=ROOT, check=True)
            return cls(json.loads(file.read_text()))

    def save(self, file: Path) -> None:
        kept = {"seconds": self.seconds, "failed": self.failed, "lines": self.lines}
        file.write_text(json.dumps(kept))

    def tests_of(self, module: Path, line: int, at_most_s: float) -> list[str]:
        """The tests that execute a line, and those of the file that bears the module's name.

        A line that runs when the module is imported is everybody's: all tests that execute any line
        of the module's functions. The file of the module's name comes first, then those that name
        the module, then the others by their seconds, as long as all take no more than `at_most_s`;
        the tests of a file stay together, since they may share a fixture.
        """
        by_line = self.lines.get(str(module), {})
        inside = _lines_of_functions((ROOT / module).read_text())
        executed = sorted(int(number) for number in by_line)
        if line in inside:
            # Of a statement of several lines only some are recorded.
            nearest = max((n for n in executed if n <= line and n in inside), default=None)
            numbers = set(by_line[str(nearest)]) if nearest is not None else set()
        else:
            numbers = {test for n in executed if n in inside for test in by_line[str(n)]}
        own = f"test_{module.stem}.py"
        files: dict[str, list[str]] = defaultdict(list)
        for number, name in enumerate(self._names):
            file = name.partition("::")[0]
            if (number in numbers or Path(file).name == own) and name not in self.failed:
                files[file].append(name)

        dotted = ".".join(module.with_suffix("").parts).removeprefix("ic.")

        def order(file: str) -> tuple[bool, bool, float]:
            names_it = f"ic.{dotted} " in (ROOT / file).read_text()
            seconds = sum(self.seconds[name] for name in files[file])
            return Path(file).name != own, not names_it, seconds

        chosen: list[str] = []
        taken_s = 0.0
        for name in [name for file in sorted(files, key=order) for name in files[file]]:
            taken_s += self.seconds[name]
            if chosen and taken_s > at_most_s:
                break
            chosen.append(name)
        return chosen


def _lines_of_functions(source: str) -> set[int]:
    """The lines that do not run when a module is imported."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines.update(range(node.body[0].lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def _run(file: Path, jobs: int, marks: str, areas: list[str], folders: list[str]) -> None:
    data_file = file.with_suffix(".coverage")
    config = file.with_suffix(".ini")
    config.write_text(f"[run]\ndata_file = {data_file}\n")
    recorder = Recorder()
    pytest.main(
        ["-n", str(jobs), "--dist", "loadfile", "-q", "-p", "no:cacheprovider", "-m", marks]
        # Of its own: other runs of pytest clear what lies in the common one.
        + [f"--basetemp={file.with_suffix('.tmp')}"]
        + [f"--cov={area}" for area in areas]
        + ["--cov-context=test", "--cov-report=", f"--cov-config={config}", *folders],
        plugins=[recorder],
    )
    numbers = {name: number for number, name in enumerate(recorder.seconds)}
    of_file: dict[str, set[int]] = defaultdict(set)
    for name, number in numbers.items():
        of_file[name.partition("::")[0]].add(number)
    data = CoverageData(str(data_file))
    data.read()
    lines: dict[str, dict[str, list[int]]] = {}
    for module in data.measured_files():
        by_line = lines[str(Path(module).relative_to(ROOT))] = {}
        for line, contexts in data.contexts_by_lineno(module).items():
            found: set[int] = set()
            for context in contexts:
                name, _, phase = context.rpartition("|")
                if name in numbers:
                    # A fixture may be shared by all tests of its file.
                    found |= {numbers[name]} if phase == "run" else of_file[name.partition("::")[0]]
            by_line[str(line)] = sorted(found)
    kept = {"seconds": recorder.seconds, "failed": sorted(recorder.failed), "lines": lines}
    file.write_text(json.dumps(kept))


if __name__ == "__main__":
    separator = sys.argv.index("--")
    _run(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        sys.argv[3],
        sys.argv[4:separator],
        sys.argv[separator + 1 :],
    )
