"""Where imports may point: each folder of `ic` stands on a floor and imports from lower ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. Neighbours on a floor do not import each other (docs/adr/0004-floors.md).
FLOORS = (
    ("files", "errors", "startup", "terminal"),
    ("kernels", "display", "tracking"),
    ("model",),
    ("machine", "checkpoint"),
    ("parallel",),
    ("datamodules",),
    ("inference", "training"),
    ("evaluation",),
    ("callbacks", "conversion", "serving", "quantization"),
    ("config",),
    ("run",),
    ("studies", "planning", "doctor"),
    ("verbs",),
    ("cli", "__init__"),
    ("__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(root: Path) -> dict[str, Path]:
    """Every module below `root/ic` by its dotted name; the links lead to the top-level folders."""
    linked = {path.name: path.resolve() for path in (root / "ic").iterdir() if path.is_symlink()}
    found = {}
    for name, folder in {"": root / "ic", **linked}.items():
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder).with_suffix("").parts
            if name or inside[0] not in linked:
                parts = [part for part in ("ic", name, *inside) if part]
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of `ic` that a file names in any import: at the top, lazy or for type checkers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ic")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            if node.module and node.module.split(".")[0] == "ic":
                for alias in node.names:
                    below = f"{node.module}.{alias.name}"
                    yield below if below in known else node.module


def named(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules that a file names in strings, to import them by name: a registry does, so that no
    circle begins there, but upward it may not name one either.
    """
    strings = (node for node in ast.walk(ast.parse(path.read_text())) if type(node) is ast.Constant)
    for node in strings:
        if isinstance(node.value, str) and "." in node.value and node.value in known:
            yield node.value


def faults(root: Path) -> list[str]:
    """What stands wrong: rooms without a floor, arrows that do not point down, circles of files."""
    known = modules(root)
    arrows = {name: set(imports(path, known)) for name, path in known.items()}
    found = []
    for name, targets in sorted(arrows.items()):
        room = [*name.split("."), "__init__"][1]
        if room not in FLOOR_OF:
            found.append(f"{name}: ic/{room} has no floor")
            continue
        for target in sorted({*targets, *named(known[name], known)}):
            other = [*target.split("."), "__init__"][1]
            if other != room and FLOOR_OF.get(other, len(FLOORS)) >= FLOOR_OF[room]:
                found.append(f"{name} imports {target}, which is not below it")
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        found.append(f"a circle: {' <- '.join(error.args[1])}")
    return found


def test_imports_point_down() -> None:
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ({"model/a.py": "def f():\n    from ic.verbs import b\n"}, "ic.model.a imports ic.verbs"),
        (
            {"model/a.py": "import_module('ic.run.b')\n", "run/b.py": ""},
            "ic.model.a imports ic.run.b",
        ),
        ({"model/a.py": "import ic.cli\n"}, "ic.model.a imports ic.cli"),
        (
            {"model/a.py": "if TYPE_CHECKING:\n    from ic.parallel.b import c\n"},
            "ic.model.a imports ic.parallel.b",
        ),
        (
            {"kernels/a.py": "from ic.display.b import c\n"},
            "ic.kernels.a imports ic.display.b, which is not below it",
        ),
        ({"cellar/a.py": ""}, "ic/cellar has no floor"),
        (
            {"model/a.py": "import ic.model.b\n", "model/b.py": "import ic.model.a\n"},
            "a circle: ic.model",
        ),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, planted: dict[str, str], complaint: str) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "ic").mkdir()
    (tmp_path / "ic/kernels").symlink_to("../kernels")
    for name, text in planted.items():
        path = tmp_path / "ic" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert any(complaint in fault for fault in faults(tmp_path))
