"""Files as people have them: compressed, in shards of which some are empty, with odd types."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ic.datamodules.options import PreferenceDataOptions, SFTDataOptions, TextDataOptions
from ic.datamodules.preference import PreferenceDataModule
from ic.datamodules.sft import SFTDataModule
from ic.datamodules.text import TextDataModule
from ic.datamodules.text_files import TextFiles, detect_format, read_text
from ic.datamodules.tokenizers import vocabulary_size
from ic.model.byte_tokenizer import VOCAB_SIZE, ByteTokenizer

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    # Two frames, as parallel compressors and `cat` make them.
    "zst": lambda data: b"".join(
        pyarrow.compress(part, codec="zstd", asbytes=True) for part in (data[:99], data[99:])
    ),
}
NEEDS_ZSTANDARD = pytest.mark.skipif(
    find_spec("zstandard") is None, reason="reading .zst needs the package zstandard"
)
SUFFIXES = ["gz", "bz2", "xz", pytest.param("zst", marks=NEEDS_ZSTANDARD)]
ROWS = {
    "text": [{"text": f"document {i} of ten"} for i in range(10)],
    "sft": [{"prompt": f"{i}?", "completion": "yes"} for i in range(10)],
    "preference": [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(10)],
}


def sft_of(file: Path) -> SFTDataModule:
    options = SFTDataOptions(train_files=[str(file)], context_length=64, tokens_per_batch=64)
    return SFTDataModule(options, ByteTokenizer())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_compressed_files_are_read_everywhere(tmp_path: Path, suffix: str) -> None:
    files = {}
    for kind, rows in ROWS.items():
        files[kind] = tmp_path / f"{kind}.jsonl.{suffix}"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        files[kind].write_bytes(COMPRESS[suffix](lines.encode()))
    text = str(files["text"])
    assert detect_format([text], "auto", "data.train_files") == "jsonl"
    documents = list(TextFiles([text], "jsonl", "text", "file").documents(0))
    assert documents == [(i, row["text"]) for i, row in enumerate(ROWS["text"])]
    assert read_text(text).splitlines() == [json.dumps(row) for row in ROWS["text"]]
    assert len(sft_of(files["sft"]).examples("train_files")) == 10
    options = PreferenceDataOptions(
        train_files=[str(files["preference"])], context_length=64, tokens_per_batch=128
    )
    assert len(PreferenceDataModule(options, ByteTokenizer()).examples("train_files")) == 10


@pytest.mark.parametrize("unit", ["paragraph", "line"])
def test_rows_of_a_long_text_do_not_depend_on_how_it_is_read(
    tmp_path: Path, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "one\n\n\ntwo\ntwo\n\n\n\nthree\n\n" * 40
    (tmp_path / "a.txt").write_text(text)
    expected = text.split("\n\n") if unit == "paragraph" else text.split("\n")
    for pieces in (1, 2, 5, 2**20):
        monkeypatch.setattr("ic.datamodules.text_files._PIECE_CHARACTERS", pieces)
        files = TextFiles([str(tmp_path / "a.txt")], "text", "text", unit)
        rows = list(files.documents(0))
        assert [row for _, row in rows] == [row for row in expected if row]
        assert list(files.documents(0, start_row=rows[7][0])) == rows[7:]


def write(path: Path, column: Any, **options: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, **options)
    return str(path)


TEXTS = [f"row {i} of a shard that is long enough" for i in range(20)]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_parquet_strings_of_every_kind(tmp_path: Path, kind: pyarrow.DataType) -> None:
    file = write(tmp_path / "a.parquet", pyarrow.array(TEXTS).cast(kind), row_group_size=7)
    files = TextFiles([file], "parquet", "text", "file")
    assert list(files.documents(0)) == list(enumerate(TEXTS))
    for start in (0, 6, 7, 16, 19):
        assert list(files.documents(0, start)) == list(enumerate(TEXTS))[start:]
    assert list(files.documents(0, 3, 1, 4)) == [(row, TEXTS[row]) for row in (5, 9, 13, 17)]


def test_empty_parquet_shards_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", pyarrow.array([], pyarrow.null()))
    write(tmp_path / "1.parquet", pyarrow.array(TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({}), tmp_path / "2.parquet")
    write(tmp_path / "3.parquet", pyarrow.array(TEXTS).dictionary_encode())
    options = TextDataOptions(
        train_files=[str(tmp_path / "*.parquet")], context_length=1500, tokens_per_batch=1500
    )
    data = TextDataModule(options, ByteTokenizer())
    data.setup("fit")  # one sequence takes all of the documents
    batch = next(iter(data.train_dataloader()))
    assert int((batch["input_ids"] == ByteTokenizer().eos_token_id).sum()) >= 40


@pytest.mark.parametrize("role", ["tool", "narrator"])
def test_a_role_that_the_template_does_not_know_names_the_row(tmp_path: Path, role: str) -> None:
    chats = [
        {"messages": [{"role": r, "content": "x"} for r in roles]}
        for roles in (["user", "assistant"], ["user", role, "assistant"])
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    with pytest.raises(ValueError, match=rf"chats\.jsonl:2: .*roles are user, {role}, assistant"):
        sft_of(tmp_path / "chats.jsonl").examples("train_files")


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "\ud83d"},
            ]
        },
        {"prompt": "\ud83d", "completion": "a"},
        {"prompt": "q", "completion": "\ud83d"},
    ],
)
def test_half_a_surrogate_pair_names_the_row(tmp_path: Path, row: dict[str, Any]) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' + json.dumps(row))
    with pytest.raises(ValueError, match=r"chats\.jsonl:2: .* holds half a surrogate pair"):
        sft_of(file).examples("train_files")


@pytest.mark.parametrize(("added", "rows"), [(0, VOCAB_SIZE), (57, VOCAB_SIZE), (58, 384)])
def test_the_embedding_has_rows_for_added_tokens(added: int, rows: int) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens([f"<tool {i}>" for i in range(added)])
    assert vocabulary_size(tokenizer) == rows
    assert max(tokenizer("a" + "".join(f"<tool {i}>" for i in range(added)))["input_ids"]) < rows


def test_a_resume_within_parquet_reads_no_earlier_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"document {i}" for i in range(30)]
    file = write(tmp_path / "a.parquet", texts, row_group_size=7)
    iter_batches, read = pyarrow.parquet.ParquetFile.iter_batches, []

    def traced(self: Any, *args: Any, row_groups: list[int], **options: Any) -> Any:
        read.append(list(row_groups))
        return iter_batches(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", traced)
    files = TextFiles([file], "parquet", "text", "file")
    for start, groups in ((0, 5), (6, 5), (7, 4), (13, 4), (14, 3), (29, 1), (30, 0)):
        assert list(files.documents(0, start_row=start)) == list(enumerate(texts))[start:]
        assert read.pop() == list(range(5 - groups, 5))
