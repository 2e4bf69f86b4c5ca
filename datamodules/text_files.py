"""Documents out of local text, JSON Lines and parquet files, compressed or not, row by row."""

from __future__ import annotations

import glob
import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet

from ic.datamodules.compressed import READ_ERRORS, open_bytes, without_compression
from ic.datamodules.json_rows import as_object, check_text, json_type, parse_row
from ic.datamodules.options import COMPRESSIONS, SUFFIXES
from ic.files.retry_io import retrying

_ROWS_PER_READ = 256
_PIECE_CHARACTERS = 2**20
# The text that a row holds; None is a null of parquet.
Rows = list[str | None]


def resolve_files(patterns: list[str], setting: str) -> list[str]:
    """Absolute paths of the files that paths or globs name, sorted within a glob, each once.

    Args:
        patterns: paths, or globs (`*`, `?`, `[]`, `**`); a path that exists is taken literally.
        setting: name of the setting, for the messages.

    Raises:
        ValueError: nothing matches, a directory, an empty file.
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
    return list(files)


def expand_folders(paths: list[str], setting: str) -> list[str]:
    """Paths and globs as they are, and each folder as the files of text below it, sorted.

    Raises:
        ValueError: a folder without a file whose suffix tells a format.
    """
    known = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    found: list[str] = []
    for path in paths:
        if not Path(path).is_dir():
            found.append(path)
            continue
        files = [str(file) for file in sorted(Path(path).rglob("*")) if file.is_file()]
        texts = [file for file in files if without_compression(file).lower().endswith(known)]
        if not texts:
            raise ValueError(
                f"{setting}: no text in the folder {path!r}; it should hold files that end with "
                f"{', '.join(known)}, and {' '.join(COMPRESSIONS)} behind them"
            )
        found += texts
    return found


def detect_format(files: list[str], file_format: str, setting: str, group: str = "data") -> str:
    """The one format of all files: as given, or by suffix if `auto`, that of a compression aside.

    Args:
        group: where the options stand, for the messages; empty on the command line itself.

    Raises:
        ValueError: an unknown suffix, or files of more than one format.
    """
    if file_format != "auto":
        return file_format
    found: dict[str, str] = {}
    for file in files:
        suffix = Path(without_compression(file)).suffix.lower()
        matching = [name for name, suffixes in SUFFIXES.items() if suffix in suffixes]
        if not matching:
            known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
            known += f", and {' '.join(COMPRESSIONS)} behind them"
            raise ValueError(
                f"{setting}: cannot tell the format of {file} from its suffix (known: {known}); "
                f"set {_key(group, 'format')} to one of {', '.join(SUFFIXES)}"
            )
        found.setdefault(matching[0], file)
    if len(found) > 1:
        raise ValueError(
            f"{setting}: files of several formats ("
            + ", ".join(f"{name}: {file}" for name, file in found.items())
            + "); give files of one format"
        )
    return next(iter(found))


def read_text(path: str) -> str:
    """The whole text of a file, decompressed as its suffix says.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        # utf-8-sig: a byte order mark is no part of the text.
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as text:
            return text.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{_find_undecodable_line(path)}: not valid UTF-8 ({error.reason}); convert it"
        ) from error
    except READ_ERRORS as error:
        raise ValueError(f"{path}: cannot be read as text ({error})") from error


class TextFiles:
    """The documents of a list of files, by file and row, without reading more than is asked for.

    Args:
        files: absolute paths, as `resolve_files` returns them.
        file_format: `text`, `jsonl` or `parquet`.
        text_column: key (jsonl) or column (parquet) that holds the document.
        document_unit: what of a text file is one document: `file`, `paragraph` (blank lines
            separate) or `line`.
        group: where these options stand, for the messages; empty on the command line itself.
    """

    def __init__(
        self,
        files: list[str],
        file_format: str,
        text_column: str,
        document_unit: str,
        group: str = "data",
    ) -> None:
        self.files = files
        self.group = group
        self.file_format = file_format
        self.text_column = text_column
        self.document_unit = document_unit

    def __len__(self) -> int:
        return len(self.files)

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
            for rows in _Reads(self, file_index, start_row):
                first = (shard - file_index - row) % num_shards
                for offset in range(first, len(rows), num_shards):
                    text = self._parse(path, row + offset, rows[offset])
                    # An empty document has nothing to learn from, and no token to pack.
                    if text:
                        yield row + offset, text
                row += len(rows)
        except UnicodeDecodeError as error:
            where = f"{path}:{_find_undecodable_line(path)}"
            if self.file_format == "parquet":
                where = f"{path}: one of {_ROWS_PER_READ} rows from row {row + 1} on"
            raise ValueError(
                f"{where}: not valid UTF-8 ({error.reason}); convert the file to UTF-8"
            ) from error
        except (pyarrow.ArrowException, *READ_ERRORS) as error:
            raise ValueError(
                f"{path}: cannot be read as {self.file_format} ({error}); "
                f"check the file, or set {_key(self.group, 'format')}"
            ) from error

    def _open(self, file_index: int, start_row: int) -> Iterator[Rows]:
        """The rows from `start_row` on, a few hundred at once."""
        path = self.files[file_index]
        if self.file_format == "parquet":
            yield from self._parquet_rows(path, start_row)
            return
        # utf-8-sig: a byte order mark is no part of the first document.
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as text:
            rows = islice(self._text_rows(text), start_row, None)
            while some := list(islice(rows, _ROWS_PER_READ)):
                yield some

    def _text_rows(self, text: io.TextIOWrapper) -> Iterator[str | None]:
        if self.file_format == "jsonl" or self.document_unit == "line":
            for line in text:
                yield line.removesuffix("\n")
        elif self.document_unit == "paragraph":
            rest = ""
            while piece := text.read(_PIECE_CHARACTERS):
                *paragraphs, rest = (rest + piece).split("\n\n")
                yield from filter(None, paragraphs)
            if rest:
                yield rest
        else:
            yield text.read()

    def _parquet_rows(self, path: str, start_row: int) -> Iterator[Rows]:
        with pyarrow.parquet.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                return  # a shard without rows may have no columns either
            self._check_parquet_schema(path, file.schema_arrow)
            groups, skip = list(range(file.num_row_groups)), start_row
            while groups and skip >= file.metadata.row_group(groups[0]).num_rows:
                skip -= file.metadata.row_group(groups.pop(0)).num_rows
            for batch in file.iter_batches(
                batch_size=_ROWS_PER_READ, row_groups=groups, columns=[self.text_column]
            ):
                if skip < len(batch):
                    yield batch.slice(skip).column(0).to_pylist()
                skip = max(0, skip - len(batch))

    def _check_parquet_schema(self, path: str, schema: pyarrow.Schema) -> None:
        if self.text_column not in schema.names:
            raise ValueError(
                f"{path}: no column {self.text_column!r}; it has {', '.join(schema.names)}: "
                f"set {_key(self.group, 'text_column')} to one of them"
            )
        kind = schema.field(self.text_column).type
        # Categories, as pandas and polars save them, are numbered strings.
        values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        is_text = (
            pyarrow.types.is_string,
            pyarrow.types.is_large_string,
            pyarrow.types.is_string_view,
        )
        if not any(check(values) for check in is_text):
            raise ValueError(
                f"{path}: column {self.text_column!r} holds {kind}, not strings; "
                f"set {_key(self.group, 'text_column')} to a column of strings"
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
        where_to_set = _key(self.group, "text_column")
        wanted = f'a line must be one JSON object with a string under "{key}" ({where_to_set})'
        value = parse_row(line, where, wanted)
        if isinstance(value, str):  # a line may be the document itself
            check_text(value, where, "the string")
            return value
        record = as_object(value, where, wanted)
        if key not in record:
            raise ValueError(
                f'{where}: no "{key}"; the keys are {", ".join(record) or "none"}; {wanted}'
            )
        text = record[key]
        if not isinstance(text, str):
            raise ValueError(f'{where}: "{key}" is {json_type(text)}, not a string; {wanted}')
        check_text(text, where, key)
        return text


class _Reads:
    """The rows of a file from a row on; a read that fails for a moment is done again there."""

    def __init__(self, files: TextFiles, file_index: int, row: int) -> None:
        self._files, self._file_index, self._row = files, file_index, row
        self._open: Iterator[Rows] | None = None

    def __iter__(self) -> Iterator[Rows]:
        while (rows := retrying(self._next)) is not None:
            yield rows

    def _next(self) -> Rows | None:
        try:
            if self._open is None:
                self._open = self._files._open(self._file_index, self._row)
            rows = next(self._open, None)
        except OSError:
            self._open = None  # what is left of a broken iterator gives nothing more
            raise
        self._row += 0 if rows is None else len(rows)
        return rows


def _key(group: str, name: str) -> str:
    return f"{group}.{name}" if group else name


def _find_undecodable_line(path: str) -> int:
    """Number of the first line, from 1, that is not UTF-8."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0
