"""Which tests execute a line: one run of the tests under coverage, for `tests/mutants.py`."""

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from coverage import Coverage

ROOT = Path(__file__).resolve().parent.parent


class Watch:
    """A pytest plugin: what each test executes of some folders, its seconds, and whether it fails.

    Every worker writes what it saw. Nothing else goes to the disk meanwhile: some tests make it
    seem full.
    """

    def __init__(self, folder: Path, areas: list[str]) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        include = [str(ROOT / area / "*") for area in areas]
        self.coverage = Coverage(data_file=None, config_file=False, include=include)
        self.coverage.start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.coverage.switch_context(f"{item.nodeid}|setup")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        self.coverage.switch_context(f"{item.nodeid}|run")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        self.coverage.switch_context(f"{item.nodeid}|teardown")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {
            str(Path(module).relative_to(ROOT)): data.contexts_by_lineno(module)
            for module in data.measured_files()
        }
        kept = {"seconds": self.seconds, "failed": sorted(self.failed), "contexts": lines}
        (self.folder / f"{os.getpid()}.json").write_text(json.dumps(kept))


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.option.numprocesses:
        folder, *areas = os.environ["IC_EXECUTED"].split(":")
        config.pluginmanager.register(Watch(Path(folder), areas))


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
            folder = Path(scratch, "workers")
            folder.mkdir()
            environment = {
                **os.environ,
                "IC_EXECUTED": ":".join([str(folder), *areas]),
                "PYTHONPATH": str(Path(__file__).parent),
            }
            command = [sys.executable, "-m", "pytest", "-p", "executed", "-n", str(jobs)]
            command += ["--dist", "loadfile", "-q", "-p", "no:cacheprovider", "-m", marks]
            # Of its own: other runs of pytest clear what lies in the common one.
            command += [f"--basetemp={scratch}/tests", *folders]
            subprocess.run(command, cwd=ROOT, env=environment)
            return cls.merged([json.loads(file.read_text()) for file in folder.iterdir()])

    @classmethod
    def merged(cls, workers: list[dict[str, Any]]) -> "Executed":
        """Of what several workers saw, each of files of its own."""
        seconds = {name: each for worker in workers for name, each in worker["seconds"].items()}
        numbers = {name: number for number, name in enumerate(seconds)}
        of_file: dict[str, set[int]] = defaultdict(set)
        for name, number in numbers.items():
            of_file[name.partition("::")[0]].add(number)
        found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for worker in workers:
            for module, by_line in worker["contexts"].items():
                for line, contexts in by_line.items():
                    for context in contexts:
                        name, _, phase = context.rpartition("|")
                        if name in numbers:
                            # A fixture may be shared by all tests of its file.
                            all_of = of_file[name.partition("::")[0]]
                            found[module][line] |= {numbers[name]} if phase == "run" else all_of
        lines = {
            module: {line: sorted(tests) for line, tests in by_line.items()}
            for module, by_line in found.items()
        }
        failed = sorted({name for worker in workers for name in worker["failed"]})
        return cls({"seconds": seconds, "failed": failed, "lines": lines})

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
