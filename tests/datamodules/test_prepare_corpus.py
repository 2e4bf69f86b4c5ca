"""A corpus out of folders: what is stripped, joined, left out, held out and refused."""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from ic.datamodules.corpus.boilerplate import Boilerplate
from ic.datamodules.corpus.books import read_book
from ic.datamodules.corpus.histogram import draw_lengths, histogram
from ic.datamodules.corpus.near_duplicates import NearDuplicates, shingles, signature, similarity
from ic.datamodules.corpus.options import PrepareCorpusOptions
from ic.datamodules.corpus.prepare import compressed_share, held_out_authors, prepare_corpus
from ic.datamodules.corpus.rfcs import join_pages, read_rfc
from ic.datamodules.corpus.source_trees import (
    LEAST_BYTES,
    SkippedFiles,
    is_generated,
    read_tree,
    source_directories,
)
from ic.datamodules.text_files import TextFiles
from ic.files.json_lines import read_rows

Run = Callable[..., int]
NOTICE = "This notice stands at the end of every volume of the series, and says nothing new. " * 3


def prose(seed: int, sentences: int = 120) -> str:
    """Sentences of made-up words, four paragraphs of them."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("aeioubdlmnrst"), 2 + i % 6)) for i in range(400)]
    made = [" ".join(rng.choice(words, 9)).capitalize() + "." for _ in range(sentences)]
    return "\n\n".join(" ".join(made[start::4]) for start in range(4)) + "\n"


GUTENBERG = """\
The Project Gutenberg eBook of Emma, by Jane Austen

Title: Emma
       A Novel

Author: Jane Austen

*** START OF {the} PROJECT GUTENBERG EBOOK EMMA ***

Produced by An Anonymous Volunteer
and David Widger

EMMA

Emma Woodhouse, handsome, clever, and rich.

{end}

Section 1. General Terms of Use
"""


@pytest.mark.parametrize(
    ("the", "end"),
    [
        ("THE", "*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***"),
        ("THIS", "End of the Project Gutenberg EBook of Emma, by Jane Austen"),
        ("THIS", "End of Project Gutenberg's Emma, by Jane Austen\n\n*** END OF THIS PROJECT"),
    ],
)
def test_gutenbergs_header_and_footer_are_off(tmp_path: Path, the: str, end: str) -> None:
    file = tmp_path / "158-0.txt"
    file.write_bytes(GUTENBERG.format(the=the, end=end).replace("\n", "\r\n").encode())
    book = read_book(file, tmp_path)
    assert book.text == "EMMA\n\nEmma Woodhouse, handsome, clever, and rich.\n"
    assert (book.title, book.author) == ("Emma A Novel", "Jane Austen")
    assert book.licence == "Public domain in the USA (Project Gutenberg)"


def test_older_books_are_latin_1_and_end_their_small_print_otherwise(tmp_path: Path) -> None:
    header = "Title: Emma\nCharacter set encoding: ISO-8859-1\n"
    mark = "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n"
    (tmp_path / "old.txt").write_bytes(f"{header}{mark}Ein Café.\n".encode("latin-1"))
    assert read_book(tmp_path / "old.txt", tmp_path).text == "Ein Café.\n"


@pytest.mark.parametrize(
    ("text", "title", "author", "body"),
    [
        (
            '---\ntitle: "Emma"\nauthor: J. Austen\nlicense: CC0-1.0\n---\nOne.\n',
            "Emma",
            "J. Austen",
            "One.\n",
        ),
        (
            "# Title: Emma\n\n## Author: J. Austen\n\n## Year: 1815\n\n-------\nOne.\n",
            "Emma",
            "J. Austen",
            "One.\n",
        ),
        ("# Emma\n\nOne.\n", "Emma", "Austen", "# Emma\n\nOne.\n"),
        ("One.\n", "158", "Austen", "One.\n"),
    ],
)
def test_markdown_says_who_wrote_it(
    tmp_path: Path, text: str, title: str, author: str, body: str
) -> None:
    (tmp_path / "Austen").mkdir()
    (tmp_path / "Austen/158.md").write_text(text)
    book = read_book(tmp_path / "Austen/158.md", tmp_path)
    assert (book.title, book.author, book.text) == (title, author, body)
    assert book.licence == ("CC0-1.0" if text.startswith("---") else None)


RFC = """



Network Working Group                                          J. Postel
Request for Comments: 999                                            ISI
                                                            October 1987

                        On Running Text over Pages

Status of this Memo

   A sentence that goes over a page

Postel                                                          [Page 1]
\f
RFC 999                        Running Text                 October 1987

   goes on here.  It ends.

Postel                                                          [Page 2]
\f
RFC 999                        Running Text                 October 1987

2. Next

   RFC 998 was published before, in October 1987
"""


def test_rfcs_lose_their_pages(tmp_path: Path) -> None:
    (tmp_path / "rfc999.txt.gz").write_bytes(gzip.compress(RFC.encode()))
    rfc = read_rfc(tmp_path / "rfc999.txt.gz")
    assert "   A sentence that goes over a page\n   goes on here.  It ends.\n\n2. Next" in rfc.text
    assert rfc.text.endswith("   RFC 998 was published before, in October 1987\n")
    for margin in ("[Page", "\f", "RFC 999"):
        assert margin not in rfc.text
    assert (rfc.title, rfc.author) == ("RFC 999: On Running Text over Pages", "J. Postel")
    assert join_pages("One.\n") == "One.\n"


def test_directories_of_sources_become_documents(tmp_path: Path) -> None:
    tree = tmp_path / "engine"
    long = "".join(f"int f{i}(int a) {{ return a + {i}; }}\n" for i in range(LEAST_BYTES // 20))
    for name, text in {
        "main.c": "// SPDX-License-Identifier: MIT\nint main(void) { return 0; }\n",
        "core/a.c": "// SPDX-License-Identifier: GPL-2.0\n" + long,
        "core/b.c": "int b;\n",
        "small/c.c": "int c;\n",
        "small/registers.h": "".join(f"#define REG_{i} 0x{i:04x}\n" for i in range(200)),
        "small/parser.c": "/* Automatically generated by bison. */\nint p;\n",
        "small/binary.c": "int\0c;\n",
        ".git/config.py": "x = 1\n",
        "node_modules/d.js": "var d;\n",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    skipped = SkippedFiles()
    read = read_tree(tree, skipped, source_directories(tree))
    core, rest = [document for documents in read for document in documents]
    assert core.text == (
        f"===== engine/core/a.c =====\n// SPDX-License-Identifier: GPL-2.0\n{long}\n"
        "===== engine/core/b.c =====\nint b;\n"
    )
    assert (core.title, core.author, core.licence) == ("engine/core", "engine", "GPL-2.0")
    assert [line for line in rest.text.split("\n") if line.startswith("=")] == [
        "===== engine/small/c.c =====",
        "===== engine/main.c =====",
    ]
    assert (rest.title, rest.licence) == ("engine", "MIT")
    assert skipped.counts == {"generated files": 2, "files that are no text": 1}
    assert not is_generated("def generate(x):\n    return x\n")


def test_minhash_estimates_jaccards_similarity() -> None:
    sentences = prose(0, 400).split(". ")
    for changed in (0, 10, 60, 200):
        other = prose(1, 400).split(". ")[:changed] + sentences[changed:]
        one, two = ". ".join(sentences), ". ".join(other)
        words = [text.lower().replace(".", "").split() for text in (one, two)]
        sets = [{tuple(own[i : i + 5]) for i in range(len(own) - 4)} for own in words]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        assert abs(similarity(signature(one), signature(two)) - exact) <= 3 * 0.045
        assert len(shingles(one)) == len(sets[0])


def test_near_duplicates_are_told_from_others() -> None:
    seen, text = NearDuplicates(0.7), prose(0, 400)
    assert seen.add(text)
    assert not seen.add(text.replace(".", " ;").upper())
    assert not seen.add(text.replace("\n\n", "\n\nAn editor's note.\n\n"))
    assert seen.add(prose(1, 400))
    assert [seen.add(text) for text in ("", "one two")] == [True, True]


def test_boilerplate_is_cut_where_it_stands() -> None:
    notice = Boilerplate(3)
    texts = [f"{prose(i)}\n\n{NOTICE}\n\nEnd {i}." for i in range(3)]
    for text in texts:
        notice.count(text + "\n\n" + NOTICE)  # twice in one document counts once
    assert notice.cut(texts[1]) == f"{prose(1).strip()}\n\nEnd 1."
    notice.documents = 4
    assert notice.cut(texts[1]) == texts[1]


def test_compression_tells_tables_and_random_text_from_prose() -> None:
    assert compressed_share("0, 0, 0, 1\n" * 500) < 0.05
    assert 0.25 < compressed_share(prose(0)) < 0.6
    random = np.random.default_rng(0).bytes(6000)
    assert compressed_share(base64.b64encode(random).decode()) > 0.7


def test_an_author_keeps_the_side_when_others_come() -> None:
    options = PrepareCorpusOptions(books=["."], held_out=0.2)
    few, many = ({f"Author {i}" for i in range(n)} for n in (40, 80))
    assert held_out_authors(options, few) == held_out_authors(options, many) & few
    assert 0 < len(held_out_authors(options, few)) < 20
    assert len(held_out_authors(options, {"a", "b"})) == 1
    assert held_out_authors(options, {"a"}) == set()


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    for number in range(8):
        path = folder / f"Author {number % 4}" / f"book{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{prose(number)}\n\n{NOTICE}\n")
    (folder / "copy.txt").write_text(prose(3) + "A word more.\n\n" + NOTICE)
    (folder / "table.txt").write_text("0, 0, 0, 1\n" * 500)
    (folder / "short.txt").write_text("Too short.\n")
    (folder / "image.txt").write_bytes(b"\x89PNG\0\0")
    return folder


@pytest.mark.parametrize("suffix", ["jsonl.xz", "jsonl.gz", "jsonl"])
def test_a_corpus_from_books(
    books: Path, tmp_path: Path, suffix: str, ic: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"out/corpus.{suffix}"
    assert ic("prepare_corpus", f"books=[{books}]", f"output={output}", "licence=CC0-1.0") == 0
    rows = {}
    for part in ("", "-heldout"):
        file = output.with_name(f"corpus{part}.{suffix}")
        files = TextFiles([str(file)], "jsonl", "text", "file")
        texts = [text for _, text in files.documents(0)]
        if suffix == "jsonl":
            rows[part] = read_rows(file)
            assert [row["text"] for row in rows[part]] == texts
        assert all(NOTICE.strip() not in text for text in texts)
        assert len(texts) == 2 if part else len(texts) == 6
    if rows:
        authors = [{row["author"] for row in rows[part]} for part in rows]
        assert len(authors[1]) == 1
        assert not authors[0] & authors[1]
        assert {row["licence"] for row in rows[""]} == {"CC0-1.0"}
        assert {(row["kind"], row["title"][:4]) for row in rows[""]} == {("book", "book")}
    counts = json.loads((tmp_path / "out/corpus-counts.json").read_text())
    assert counts["left_out"] == {
        "below least_bytes=2000": 1,
        "files that are no text": 1,
        "near-duplicates of another": 1,
        "repeat themselves (least_compressed=0.15)": 1,
    }
    assert [part["documents"] for part in counts["parts"]] == [2, 6]
    assert (tmp_path / "out/corpus-lengths.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "left out: 1 near-duplicates of another" in said
    assert "4,096" in said
    assert not list((tmp_path / "out").glob(".*"))


def test_lengths_are_drawn_in_units_that_people_read(figures: list[Figure], tmp_path: Path) -> None:
    lengths = {"book": [600, 3_000_000, 2_500_000], "rfc": [70_000]}
    draw_lengths(lengths, tmp_path / "a.png", title="t")
    left, right = figures[0].axes
    assert [label.get_text() for label in left.get_xticklabels()] == [
        "512 B", "2 KiB", "8 KiB", "32 KiB", "128 KiB", "512 KiB", "2 MiB"
    ]  # fmt: skip
    assert (left.get_ylabel(), right.get_ylabel()) == ("documents", "MB of text")
    names = [text.get_text() for text in left.get_legend().get_texts()]
    assert [name.rpartition(" ")[2] for name in names] == ["(3)", "(1)"]
    assert max(patch.get_height() for patch in left.patches) == 2
    assert max(patch.get_height() for patch in right.patches) == 5.5


def test_lengths_are_counted_by_doubling() -> None:
    assert histogram({"book": [1000, 1024, 5000], "rfc": [2047]}) == [
        (512, 1024, 1, 1000),
        (1024, 2048, 2, 3071),
        (2048, 4096, 0, 0),
        (4096, 8192, 1, 5000),
    ]


def test_two_processes_write_the_same_bytes(books: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from ic.datamodules.corpus.prepare import *; "
        "prepare_corpus(PrepareCorpusOptions(books=[sys.argv[1]], output=sys.argv[2]))"
    )
    for seed in "01":
        output = str(tmp_path / f"{seed}/corpus.jsonl.gz")
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-c", code, str(books), output], check=True, env=environment
        )
    for name in ("corpus.jsonl.gz", "corpus-heldout.jsonl.gz"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no text is named: give folders, for example books=[FOLDER]"),
        (["books=[nowhere]"], "books=nowhere: no such folder"),
        (["books=[empty]"], "books=empty: nothing in it can be read; it should hold books as .txt"),
        (["code=[empty]"], "code=empty: nothing in it can be read; it should hold source files"),
        (["rfcs=[books]"], "rfcs=books: nothing in it can be read; it should hold RFCs"),
        (["books=[books]", "output=c.txt"], "output=c.txt: name a file that ends in .jsonl"),
        (["books=[books]", "output=there.jsonl"], "there.jsonl exists; choose another name, or"),
        (["books=[books]", "least_bytes=1000000"], "no document is left (11 below least_bytes"),
        (
            ["books=[books]", "held_out_authors=[Nobody]"],
            "held_out_authors: no document is by Nobody",
        ),
        (["books=[books]", "held_out=2"], "held_out=2.0: must be between 0 and 0.9"),
        (["books=[books]", "most_compressed=0.1"], "least_compressed=0.15: must be below"),
        (["books=[books]", "boilerplate_documents=1"], "boilerplate_documents=1: must be 0, or"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    books: Path,
    tmp_path: Path,
    given: list[str],
    said: str,
    ic: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.jsonl").write_text("mine\n")
    before = sorted(tmp_path.rglob("*"))
    if not any(each.startswith("output=") for each in given):
        given = [*given, "output=new.jsonl"]
    assert ic("prepare_corpus", *given) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")[-1:]
    assert said in line
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.jsonl").read_text() == "mine\n"
    if "output=there.jsonl" in given:
        assert ic("prepare_corpus", *given, "overwrite=true") == 0
        assert len(read_rows(tmp_path / "there.jsonl")) == 6


def test_what_is_not_installed_is_said_before_the_work(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    options = PrepareCorpusOptions(books=[str(books)], output=str(tmp_path / "c.jsonl.zst"))
    with pytest.raises(
        ValueError, match=r"c\.jsonl\.zst: writing \.zst needs the package zstandard"
    ):
        prepare_corpus(options, lambda readings: pytest.fail("it began"))
