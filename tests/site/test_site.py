"""The built site (`make site`): its links lead somewhere, it loads nothing from elsewhere, and a page
reads there as it does on GitHub.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.site
ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "site"
PAGES = sorted(SITE.rglob("*.html"))
# What GitHub's Markdown and the site's must agree in.
COUNTED = ("li", "ul", "ol", "pre", "table", "tr", "td", "th", "img", "h2", "h3", "em", "strong")


class Elements(HTMLParser):
    """The elements of a page, below `inside` if that is given."""

    def __init__(self, text: str, inside: str | None = None) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.inside, self.depth = inside, 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.inside is None or self.depth:
            self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag == self.inside:
            self.depth += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == self.inside:
            self.depth -= 1

    def count(self) -> Counter[str]:
        return Counter(tag for tag, _ in self.found if tag in COUNTED)


@cache
def elements(page: Path) -> list[tuple[str, dict[str, str]]]:
    return Elements(page.read_text(encoding="utf-8")).found


@cache
def anchors(page: Path) -> set[str]:
    return {given[key] for _, given in elements(page) for key in ("id", "name") if key in given}


def test_it_is_there() -> None:
    names = {page.relative_to(SITE).as_posix() for page in PAGES}
    assert {"index.html", "tutorial.html", "changelog.html", "reference/model.html"} <= names
    assert {f"notebooks/{path.stem}.html" for path in (ROOT / "notebooks").glob("*.ipynb")} <= names
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(SITE).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for _, given in elements(page):
        for address in (given.get("href"), given.get("src")):
            if not address or address.startswith(("data:", "mailto:", "http:", "https:")):
                continue
            path, _, anchor = unquote(address).partition("#")
            # The page of what is not found is shown at any address: its links begin at the root.
            start = SITE if path.startswith("/") else page.parent
            target = (start / path.lstrip("/")).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (
                anchor and target.suffix == ".html" and anchor not in anchors(target)
            ):
                broken.append(address)
    assert not broken


def test_nothing_is_loaded_from_elsewhere() -> None:
    """A reader without a network, or with a careful one, sees all of it."""
    for page in PAGES:
        for tag, given in elements(page):
            loaded = given.get("src", "")
            if tag == "link" and given.get("rel") != "canonical":
                loaded = given.get("href", "")
            assert not loaded.startswith(("http:", "https:", "//")), (page.name, tag, loaded)
    for style in SITE.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert "url(http" not in text.replace("'", "").replace('"', ""), style.name
        assert "@import" not in text, style.name


@pytest.mark.parametrize(
    "source", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.stem
)
def test_a_page_reads_as_on_github(source: Path) -> None:
    """Lists without an empty line before them, nested code, tables: two readers, one result."""
    markdown_it = pytest.importorskip("markdown_it")
    reader = markdown_it.MarkdownIt("commonmark").enable("table")
    expected = Elements(reader.render(source.read_text(encoding="utf-8"))).count()
    built = SITE / source.relative_to(ROOT / "docs").with_suffix(".html")
    text = built.read_text(encoding="utf-8")
    article = text[text.index("<article") : text.index("</article>")]
    assert Elements(article).count() == expected


def test_the_reference_says_what_docstrings_say() -> None:
    page = SITE / "reference/model.html"
    assert "ic.model.attention.MLAAttention" in anchors(page)
    assert "ic.callbacks.loss_curve.LossCurve" in anchors(SITE / "reference/callbacks.html")
    text = page.read_text(encoding="utf-8")
    assert "Multi-head Latent Attention" in text
