"""What mkdocs needs to know of this repository: pages that lie outside docs/, and the reference.

Pages of docs/ link to other files as one reads them in a checkout: `../CONTRIBUTING.md`, a source
file, a folder, a notebook. On the site each such file is a page of its own, below `repository/`,
and the link leads there. So no page has to be written twice, and none links to a host.

The reference of the code is a page for each folder of `ic`, made from its docstrings without
importing anything.
"""

from __future__ import annotations

import base64
import os
import posixpath
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
# An inline link or picture; code between backquotes is no link.
_LINK = re.compile(r"(`+[^`]*`+)|(\]\()([^)#\s]*)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"^( *```.*?^ *```\s*?$)", re.S | re.M)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".sbatch": "bash"}
# Pages that stand in the navigation although they lie elsewhere.
_OWN_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "ROADMAP.md": "roadmap.md",
    "PROGRESS.md": "progress.md",
}
_NOTEBOOKS = "notebooks"
_REFERENCE = "reference"
_RUNBOOKS = "runbooks"  # a page for each alert
# Where mkdocs.yml has mkdocstrings look.
_PACKAGE = ROOT / "build" / "reference"


def on_startup(**_: Any) -> None:
    """Lay out the package for the reader of docstrings, which follows neither links nor folders
    without an `__init__.py`.
    """
    shutil.rmtree(_PACKAGE, ignore_errors=True)
    shutil.copytree(
        ROOT / "ic", _PACKAGE / "ic", ignore=shutil.ignore_patterns("__pycache__", "conf")
    )
    for folder, _, _ in os.walk(_PACKAGE / "ic"):
        (Path(folder) / "__init__.py").touch()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/, the notebooks, and the reference."""
    asked = {f"{_NOTEBOOKS}/{path.name}" for path in (ROOT / _NOTEBOOKS).glob("*.ipynb")}
    asked |= {name for name in _OWN_PAGES if (ROOT / name).is_file()}
    sources = [(f.src_uri, f"docs/{f.src_uri}") for f in files.documentation_pages()]
    asked |= {target for _, path in sources for target in _outside(path)}
    done: set[str] = set()
    while waiting := sorted(asked - done):
        for path in waiting:
            done.add(path)
            if path.endswith(".md"):
                asked |= set(_outside(path))
            files.append(_page_of(path, config))
    reference = dict(_reference_pages())
    for name, text in reference.items():
        files.append(File.generated(config, f"{_REFERENCE}/{name}.md", content=text))
    notebooks = sorted(_site_uri(path) for path in done if path.endswith(".ipynb"))
    runbooks = sorted(f.src_uri for f in files if f.src_uri.startswith(f"{_RUNBOOKS}/"))
    config.nav += [  # type: ignore[operator]
        *([{"Runbooks": runbooks}] if runbooks else []),
        {"Notebooks": [f"{_NOTEBOOKS}/index.md", *notebooks]},
        {"Reference": [f"{_REFERENCE}/{name}.md" for name in reference]},
    ]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them."""
    source = _repository_path(page.file.src_uri)
    if source is None:
        return markdown
    here = posixpath.dirname(source)

    def moved(match: re.Match[str]) -> str:
        code, begin, target, anchor, end = match.groups()
        if code or not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        uri = _site_uri(posixpath.normpath(posixpath.join(here, target)))
        relative = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{begin}{relative}{anchor or ''}{end}"

    parts = _FENCE.split(markdown)
    return "".join(part if n % 2 else _LINK.sub(moved, part) for n, part in enumerate(parts))


def _outside(path: str) -> Iterator[str]:
    """Files and folders outside docs/ that a page links to, from the repository's root."""
    text = _FENCE.sub("", (ROOT / path).read_text(encoding="utf-8"))
    for code, _, target, _, _ in _LINK.findall(text):
        if code or not target or "://" in target or target.startswith("mailto:"):
            continue
        resolved = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if not resolved.startswith(("docs/", "..")) and (ROOT / resolved).exists():
            yield resolved


def _site_uri(path: str) -> str:
    """Where a file of the repository lies among the site's sources."""
    if path == "docs" or path.startswith("docs/"):
        return path.removeprefix("docs").removeprefix("/") or "index.md"
    if path in _OWN_PAGES:
        return _OWN_PAGES[path]
    if path.startswith(f"{_NOTEBOOKS}/"):
        return path.removesuffix(".ipynb") + ".md"
    if path == _NOTEBOOKS:
        return f"{_NOTEBOOKS}/index.md"
    # mkdocs leaves out what begins with a dot, such as .github/.
    seen = "/".join(part.lstrip(".") for part in path.split("/"))
    return f"repository/{seen.removesuffix('.md')}.md"


def _repository_path(uri: str) -> str | None:
    """Where a page of the site comes from; None for one that is made."""
    for path, own in _OWN_PAGES.items():
        if uri == own:
            return path
    if uri.startswith("repository/"):
        path = uri.removeprefix("repository/")
        return path if (ROOT / path).is_file() else None
    if uri.startswith(f"{_NOTEBOOKS}/"):
        path = uri.removesuffix(".md") + ".ipynb"
        return path if (ROOT / path).is_file() else None
    if uri.startswith(f"{_REFERENCE}/"):
        return None
    return f"docs/{uri}"


def _page_of(path: str, config: MkDocsConfig) -> File:
    uri, source = _site_uri(path), ROOT / path
    if path.endswith(".md"):
        return File.generated(config, uri, content=source.read_text(encoding="utf-8"))
    if path.endswith(".ipynb"):
        return File.generated(config, uri, content=_notebook(source))
    if source.is_dir():
        listed = subprocess.run(
            ["git", "ls-files", path], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
        lines = "\n".join(f"- `{name}`" for name in listed)
        return File.generated(
            config, uri, content=f"# {path}\n\nFiles in this folder:\n\n{lines}\n"
        )
    language = _LANGUAGES.get(source.suffix, "text")
    text = source.read_text(encoding="utf-8")
    return File.generated(
        config, uri, content=f"# {path}\n\n````{language}\n{text.rstrip()}\n````\n"
    )


def _notebook(path: Path) -> str:
    """A notebook with what its cells printed and drew, which stands in the page itself."""
    text, resources = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4))
    pictures: dict[str, Any] = resources.get("outputs", {})
    for name, data in pictures.items():
        uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
        text = text.replace(f"({name})", f"({uri})")
    return text


def _reference_pages() -> Iterator[tuple[str, str]]:
    """A page for each folder of `ic`, with every module that has a docstring."""
    folders: dict[str, list[str]] = {}
    for directory, below, names in os.walk(_PACKAGE / "ic"):
        below.sort()
        parts = Path(directory).relative_to(_PACKAGE).parts
        if len(parts) > 1:
            modules = folders.setdefault(parts[1], [])
            modules += [
                ".".join((*parts, name.removesuffix(".py")))
                for name in sorted(names)
                if name.endswith(".py") and name != "__init__.py"
            ]
    for folder, modules in sorted(folders.items()):
        blocks = "\n\n".join(f"::: {module}" for module in modules)
        yield folder, f"# ic.{folder}\n\n{blocks}\n"
