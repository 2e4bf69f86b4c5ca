"""Bad input ends with a ValueError that says what was given and what to change."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from ic.datamodules.options import TextDataOptions
from ic.datamodules.text import TextDataModule
from ic.datamodules.text_files import resolve_files
from ic.model.byte_tokenizer import ByteTokenizer
from tests.datamodules.test_file_formats import COMPRESS, SUFFIXES

GOOD = json.dumps({"text": "a good row of some length"})


def fit_setup(tokenizer: PreTrainedTokenizerBase, files: list[str], **settings: Any) -> None:
    settings = {"context_length": 16, "tokens_per_batch": 16, **settings}
    TextDataModule(TextDataOptions(train_files=files, **settings), tokenizer).setup("fit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "never closed"', r"not valid JSON \(Expecting ',' delimiter, column 24\)"),
        ("plain words", r"not valid JSON \(Expecting value, column 1\): 'plain words'"),
        ('["a"]', "is an array; a line must be one JSON object"),
        ('{"txt": "a", "id": 3}', r'no "text"; the keys are txt, id; .*data\.text_column'),
        ("{}", 'no "text"; the keys are none'),
        ('{"text": 5}', '"text" is a number, not a string'),
        ('{"text": null}', '"text" is null, not a string'),
        ('{"text": "b", "meta": ' + "[" * 100_000, "arrays or objects nested too deeply"),
        (r'{"text": "half \ud83d"}', '"text" holds half a surrogate pair at character 5'),
    ],
)
def test_a_malformed_row_names_file_and_line(
    tokenizer: ByteTokenizer, tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([GOOD, "", line, GOOD]))  # the blank line counts, but is no row
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: {message}"):
        fit_setup(tokenizer, [str(file)])


def test_a_malformed_row_far_into_the_second_file_is_named_by_a_worker(
    tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([GOOD] * 700))
    (tmp_path / "b.jsonl").write_text("\n".join([GOOD] * 600 + ["{"] + [GOOD] * 9))
    config = TextDataOptions(
        train_files=[str(tmp_path / "*.jsonl")],
        context_length=16,
        tokens_per_batch=1600,
        shuffle_buffer=0,
        num_workers=1,
    )
    datamodule = TextDataModule(config, tokenizer)
    datamodule.setup("fit")  # looks at the first sequence only
    # The message alone, without the worker's traceback.
    with pytest.raises(ValueError, match=r"^\S+b\.jsonl:601: not valid JSON .*$"):
        list(islice(datamodule.train_dataloader(), 100))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_that_is_not_utf_8(tokenizer: ByteTokenizer, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"latin{suffix}"
    file.write_bytes(f"{GOOD}\n{GOOD}\n".encode() + b'{"text": "na\xefve"}\n')
    with pytest.raises(ValueError, match=rf"latin\{suffix}:3: not valid UTF-8"):
        fit_setup(tokenizer, [str(file)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "train_files: there is no file '.*absent.jsonl'"),
        ("absent-*.jsonl", r"train_files: no file matches '.*absent-\*\.jsonl'"),
        ("", r"is a directory; name its files, for example '.*\*\.jsonl'"),
        ("empty.jsonl", "empty.jsonl is empty"),
        ("blank.jsonl", "the data hold 0 documents"),
        ("odd.csv", r"cannot tell the format of .*odd\.csv .*\.jsonl.*set data\.format"),
        ("*b*.t*", "less than one sequence"),
        ("[ob]*", r"files of several formats \(text: .*b\.txt, jsonl: .*blank\.jsonl\)"),
    ],
)
def test_files_that_cannot_be_used(
    tokenizer: ByteTokenizer, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "b.txt").write_text("words")
    if name == "odd.csv":
        (tmp_path / "odd.csv").write_text("words")
    with pytest.raises(ValueError, match=message):
        fit_setup(tokenizer, [str(tmp_path / name)])


def test_no_files(tokenizer: ByteTokenizer) -> None:
    with pytest.raises(ValueError, match=r"data\.train_files is empty: give paths or globs"):
        fit_setup(tokenizer, [])
    for stage, split in (("validate", "val"), ("test", "test")):
        with pytest.raises(ValueError, match=rf"data\.{split}_files is empty"):
            TextDataModule(TextDataOptions(), tokenizer).setup(stage)


def test_data_smaller_than_one_sequence(tokenizer: ByteTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 14)
    (tmp_path / "b.txt").write_text("y" * 3)
    sizes = {"context_length": 19, "tokens_per_batch": 19}
    fit_setup(tokenizer, [str(tmp_path / "*")], **sizes)  # 14 + 3 and two eos just do
    sizes = {"context_length": 20, "tokens_per_batch": 20}
    with pytest.raises(ValueError, match=r"hold 2 documents with 19 tokens, .*context_length=20"):
        fit_setup(tokenizer, [str(tmp_path / "*")], **sizes)
    with pytest.raises(ValueError, match=r"share 2 of 2 of the data .* holds 1 documents with 4"):
        fit_setup(
            tokenizer, [str(tmp_path / "*")], num_streams=2, context_length=8, tokens_per_batch=8
        )


def test_parquet_without_the_column_or_with_other_content(
    tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    def write(**columns: list[Any]) -> list[str]:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        return [str(tmp_path / "a.parquet")]

    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; it has body, id"):
        fit_setup(tokenizer, write(body=["a"], id=[1]))
    with pytest.raises(ValueError, match=r"a\.parquet: column 'text' holds int64, not strings"):
        fit_setup(tokenizer, write(text=[1]))
    with pytest.raises(ValueError, match=r"a\.parquet: row 2: 'text' is null"):
        fit_setup(tokenizer, write(text=["a", None]))
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read as parquet"):
        fit_setup(tokenizer, [str(tmp_path / "a.parquet")])


def test_a_whole_number_of_any_length_beside_the_text(
    tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"id": {"9" * 5000}, "text": "{"a" * 40}"}}\n')
    fit_setup(tokenizer, [str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["cut", "plain"])
def test_damaged_compression(
    tokenizer: ByteTokenizer, tmp_path: Path, suffix: str, damage: str
) -> None:
    rows = "\n".join(json.dumps({"text": f"row {i}"}) for i in range(9000)).encode()
    whole = COMPRESS[suffix](rows)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else rows)
    sizes = {"context_length": 100_000, "tokens_per_batch": 100_000}  # all of it is read
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix}: cannot be read as jsonl"):
        fit_setup(tokenizer, [str(path)], **sizes)


def test_zstandard_without_its_package(
    tokenizer: ByteTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.txt\.zst: .*pip install zstandard"):
        fit_setup(tokenizer, [str(tmp_path / "a.txt.zst")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_files": "a.txt"}, r"data\.train_files='a\.txt': must be a list .* \[a\.txt\]"),
        ({"format": "csv"}, r"data\.format='csv': choose from auto, text, jsonl, parquet"),
        ({"document_unit": "page"}, r"data\.document_unit='page': choose from file, paragraph"),
        ({"text_column": ""}, r"data\.text_column is empty"),
        ({"context_length": 1}, r"data\.context_length=1: must be at least 2"),
        ({"shuffle_buffer": -1}, r"data\.shuffle_buffer=-1: must be at least 0"),
        ({"num_streams": 0}, r"data\.num_streams=0: must be at least 1"),
        ({"num_workers": -1}, r"data\.num_workers=-1: must be at least 0"),
        ({"seed": -1}, r"data\.seed=-1: must be at least 0"),
        ({"tokens_per_batch": 1000}, r"=1000: must be a multiple of .*=2048, such as 2048"),
        ({"tokens_per_batch": 5000}, r"=5000: must be a multiple of .*=2048, such as 4096"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextDataOptions(**settings)


def test_document_unit_is_not_ignored(tokenizer: ByteTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    with pytest.raises(ValueError, match=r"data\.document_unit=line is for text files"):
        fit_setup(tokenizer, [str(tmp_path / "a.jsonl")], document_unit="line")


def test_a_tokenizer_without_the_special_token() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"data\.append_eos=true, but the tokenizer has no eos"):
        TextDataModule(TextDataOptions(), tokenizer)
    TextDataModule(TextDataOptions(append_eos=False), tokenizer)


@pytest.mark.parametrize("tokens", [0, 1, 5, 32])
def test_a_context_length_that_does_not_divide(tokenizer: ByteTokenizer, tokens: int) -> None:
    datamodule = TextDataModule(TextDataOptions(context_length=16, tokens_per_batch=16), tokenizer)
    with pytest.raises(ValueError, match=rf"context length {tokens}: .* data\.context_length=16"):
        datamodule.set_context_length(tokens)


def test_a_sequence_of_two_tokens_is_the_shortest(tokenizer: ByteTokenizer) -> None:
    datamodule = TextDataModule(TextDataOptions(context_length=16, tokens_per_batch=16), tokenizer)
    datamodule.set_context_length(2)
    assert datamodule.context_length == 2


def test_two_stars_find_files_in_folders_of_folders(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c.jsonl"
    deep.parent.mkdir(parents=True)
    deep.write_text('{"text": "x"}\n')
    found = resolve_files([str(tmp_path / "**" / "*.jsonl")], "data.train_files")
    assert found == [str(deep)]
