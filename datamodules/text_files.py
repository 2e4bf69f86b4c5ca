"""Documents out of local text, JSON Lines and parquet files, streamed by `datasets`.

JSON Lines goes through the library's line reader and `json.loads`, not its JSON reader. That one
infers a schema from the first 10 MB, so that a file fails whose other keys change later; it turns
numbers into strings where a column of strings is asked for; and it counts a broken row within a
chunk, not within the file.
"""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ic.datamodules.options import SUFFIXES
from ic.files.retry_io import retrying

# `datasets` calls a whole file a "document".
_SAMPLE_BY = {"file": "document", "paragraph": "paragraph", "line": "line"}
_ROWS_PER_READ = 256
_JSON_TYPES = {
    "NoneType": "null",
    "bool": "a boolean",
    "int": "a number",
    "float": "a number",
    "str": "a string",
    "list": "an array",
    "dict": "an object",
}


def resolve_files(patterns: list[str], setting: str) -> list[str]:
    """Absolute paths of the files that paths or globs name, sorted within a glob, each once.

    Args:
        patterns: paths, or globs (`*`, `?`, `[]`, `**`); a path that exists is taken literally.
        setting: name of the setting, for the messages.

    Raises:
        ValueError: nothing matches, a directory, an empty file, a name `datasets` cannot read.
    """
    files: dict[str, None] = {}
    for pattern in patterns:
        if Path(pattern).is_dir():
            raise ValueError(
                f"{setting}: {pattern!r} is a directory; name its files, for example "
                f"{str(Path(pattern) / '**' / '*.jsonl')!r}"
            )
        exists = Path(pattern).is_file()
        matches = [pattern] if exists else sorted(glob.glob(pattern, recursive=True))
        matches = [match for match in matches if Path(match).is_file()]
        if not matches:
            what = "no file matches" if glob.has_magic(pattern) else "there is no file"
            raise ValueError(
                f"{setting}: {what} {pattern!r} (looked in {Path.cwd()}); "
                "give paths or globs of local files"
            )
        files.update(dict.fromkeys(str(Path(match).absolute()) for match in matches))
    for file in files:
        if Path(file).stat().st_size == 0:
            raise ValueError(f"{setting}: {file} is empty; remove it or give it content")
        if "::" in file:
            raise ValueError(f"{setting}: {file} has '::' in its name, which `datasets` reserves")
    return list(files)


def detect_format(files: list[str], file_format: str, setting: str) -> str:
    """The one format of all files: as given, or by suffix (a final `.gz` is left aside) if `auto`.

    Raises:
        ValueError: an unknown suffix, or files of more than one format.
    """
    if file_format != "auto":
        return file_format
    found: dict[str, str] = {}
    for file in files:
        suffix = Path(file.removesuffix(".gz")).suffix.lower()
        matching = [name for name, suffixes in SUFFIXES.items() if suffix in suffixes]
        if not matching:
            known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
            raise ValueError(
                f"{setting}: cannot tell the format of {file} from its suffix (known: {known}); "
                f"set data.format to one of {', '.join(SUFFIXES)}"
            )
        found.setdefault(matching[0], file)
    if len(found) > 1:
        raise ValueError(
            f"{setting}: files of several formats ("
            + ", ".join(f"{name}: {file}" for name, file in found.items())
            + "); give files of one format"
        )
    return next(iter(found))


class TextFiles:
    """The documents of a list of files, by file and row, without reading more than is asked for.

    Args:
        files: absolute paths, as `resolve_files` returns them.
        file_format: `text`, `jsonl` or `parquet`.
        text_column: key (jsonl) or column (parquet) that holds the document.
        document_unit: what of a text file is one document: `file`, `paragraph` (blank lines
            separate) or `line`.
    """

    def __init__(
        self, files: list[str], file_format: str, text_column: str, document_unit: str
    ) -> None:
        self.files = files
        self.file_format = file_format
        self.text_column = text_column
        self.document_unit = document_unit
        self._dataset: Any = None

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the files itself.
        return {**self.__dict__, "_dataset": None}

    def documents(
        self, file_index: int, start_row: int = 0, shard: int = 0, num_shards: int = 1
    ) -> Iterator[tuple[int, str]]:
        """Pairs of row and text of one file, for the rows that belong to a shard.

        Row r of file f belongs to shard (f + r) % num_shards, whatever order the files are read
        in. The rows before `start_row` are read and passed over, not parsed.

        Raises:
            ValueError: the file cannot be read, or a row holds no document; names file and line
                (row, in parquet).
        """
        path = self.files[file_index]
        only_one_row = self.file_format == "text" and self.document_unit == "file"
        if only_one_row and (start_row > 0 or file_index % num_shards != shard):
            return
        try:
            row = start_row
            for table in _Tables(self, file_index, start_row):
                column = table.column(self._column)
                first = (shard - file_index - row) % num_shards
                for offset in range(first, len(table), num_shards):
                    text = self._parse(path, row + offset, column[offset].as_py())
                    # An empty document has nothing to learn from, and no token to pack.
                    if text:
                        yield row + offset, text
                row += len(table)
        except UnicodeDecodeError as error:
            line = _find_undecodable_line(path)
            raise ValueError(
                f"{path}:{line}: not valid UTF-8 ({error.reason}); convert the file to UTF-8"
            ) from error
        except (pyarrow.ArrowException, OSError, EOFError) as error:
            raise ValueError(
                f"{path}: cannot be read as {self.file_format} ({error}); "
                "check the file, or set data.format"
            ) from error

    @property
    def _column(self) -> str:
        return self.text_column if self.file_format == "parquet" else "text"

    def _open(self, file_index: int, start_row: int) -> Iterator[pyarrow.Table]:
        if self.file_format == "parquet":
            self._check_parquet_schema(self.files[file_index])
        if self._dataset is None:
            self._dataset = self._load()
        # One file is one shard of the data set. `iter(batch_size=...)` rather than plain iteration:
        # the latter would split the files among DataLoader workers, which is done here.
        one_file = self._dataset.shard(num_shards=len(self.files), index=file_index)
        if start_row:
            one_file = one_file.skip(start_row)
        return one_file.with_format("arrow").iter(batch_size=_ROWS_PER_READ)

    def _load(self) -> Any:
        from datasets import load_dataset  # two seconds to import; other verbs do without

        # `datasets` takes every name for a glob; escaped, it is the file of that name.
        data_files = [glob.escape(file) for file in self.files]
        name: str = "parquet"
        options: dict[str, Any] = {"columns": [self.text_column]}
        if self.file_format != "parquet":
            by = self.document_unit if self.file_format == "text" else "line"
            # utf-8-sig: a byte order mark is no part of the first document.
            name, options = "text", {"sample_by": _SAMPLE_BY[by], "encoding": "utf-8-sig"}
        dataset = load_dataset(
            name, data_files=data_files, split="train", streaming=True, **options
        )
        assert dataset.num_shards == len(self.files), "one file is one shard"
        return dataset

    def _check_parquet_schema(self, path: str) -> None:
        schema = pyarrow.parquet.read_schema(path)
        if self.text_column not in schema.names:
            raise ValueError(
                f"{path}: no column {self.text_column!r}; it has {', '.join(schema.names)}: "
                "set data.text_column to one of them"
            )
        dtype = schema.field(self.text_column).type
        if not (pyarrow.types.is_string(dtype) or pyarrow.types.is_large_string(dtype)):
            raise ValueError(
                f"{path}: column {self.text_column!r} holds {dtype}, not strings; "
                "set data.text_column to a column of strings"
            )

    def _parse(self, path: str, row: int, value: str | None) -> str:
        if self.file_format == "jsonl":
            # A blank line (often the last) is no row.
            return self._parse_json(f"{path}:{row + 1}", value) if value and value.strip() else ""
        if value is None:
            raise ValueError(
                f"{path}: row {row + 1}: {self.text_column!r} is null; remove the row or fill it"
            )
        return value

    def _parse_json(self, where: str, line: str) -> str:
        key = self.text_column
        wanted = f'a line must be one JSON object with a string under "{key}" (data.text_column)'
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            begin = line[:60] + ("..." if len(line) > 60 else "")
            raise ValueError(
                f"{where}: not valid JSON ({error.msg}, column {error.colno}): {begin!r}; {wanted}"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: is {_JSON_TYPES[type(record).__name__]}; {wanted}")
        if key not in record:
            raise ValueError(
                f'{where}: no "{key}"; the keys are {", ".join(record) or "none"}; {wanted}'
            )
        text = record[key]
        if not isinstance(text, str):
            json_type = _JSON_TYPES[type(text).__name__]
            raise ValueError(f'{where}: "{key}" is {json_type}, not a string; {wanted}')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can spell half of a surrogate pair; no tokenizer can encode it.
            raise ValueError(
                f'{where}: "{key}" holds half a surrogate pair at character {error.start}; '
                "write the character as UTF-8 or as both halves"
            ) from error
        return text


class _Tables:
    """The tables of a file from a row on; a read that fails for a moment is done again there."""

    def __init__(self, files: TextFiles, file_index: int, row: int) -> None:
        self._files, self._file_index, self._row = files, file_index, row
        self._open: Iterator[pyarrow.Table] | None = None

    def __iter__(self) -> Iterator[pyarrow.Table]:
        while (table := retrying(self._next)) is not None:
            yield table

    def _next(self) -> pyarrow.Table | None:
        try:
            if self._open is None:
                self._open = self._files._open(self._file_index, self._row)
            table = next(self._open, None)
        except OSError:
            self._open = None  # what is left of a broken iterator gives nothing more
            raise
        self._row += 0 if table is None else len(table)
        return table


def _find_undecodable_line(path: str) -> int:
    """Number of the first line, from 1, that is not UTF-8."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0
