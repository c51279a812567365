"""Files of training rows: JSON, JSON lines (also gzipped) and Parquet, row by row with the place each row came from.

Reading holds no more than one row, or one group of a Parquet file; only a JSON array is read whole. What a row means is `encoder`'s.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refusion.errors import DataError
from refusion.training.recipe import Source

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
PARQUET_ROWS = 512


class PlacedRow(NamedTuple):
    """A row and where it stands: file, "line 3" or "row 3", and JSON text or the value itself."""

    file: str
    place: str
    content: Any

    def value(self) -> Any:
        """The row as plain values. Raises ValueError if its JSON is broken."""
        if not isinstance(self.content, bytes):
            return self.content
        try:
            return json.loads(self.content)
        except RecursionError:
            raise ValueError("the row is nested too deeply") from None


def read_source(source: Source) -> Iterator[PlacedRow]:
    """The rows of a source in the order of its sorted files, up to its limit. Raises DataError where a file is missing or damaged."""
    rows = (PlacedRow("toy", f"row {i}", row) for i, row in enumerate(toy_rows(source.toy), 1)) if source.toy else _glob_rows(source.path)
    for count, row in enumerate(rows):
        if source.limit and count >= source.limit:
            return
        yield row


def source_files(source: Source) -> list[str]:
    """The files of a source, sorted; none for toy rows."""
    if source.toy:
        return []
    paths = sorted(glob.glob(source.path))
    if not paths:
        raise DataError(f"no data file at {source.path}; see data.sources in the recipe")
    return paths


def read_file(path: str) -> Iterator[PlacedRow]:
    """The rows of one file."""
    if not path.endswith(SUFFIXES):
        raise DataError(f"cannot read {path}: a data file must be one of {', '.join(SUFFIXES)}")
    try:
        if path.endswith(".parquet"):
            yield from _parquet_rows(path)
        else:
            with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
                yield from _array_rows(path, file.read()) if _is_array(path, file) else _line_rows(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def read_queries(path: str) -> Iterator[str]:
    """The queries (or last user turns) of a file whose rows must not be trained on."""
    if not Path(path).exists():
        raise DataError(f"no file at {path}; see data.exclude in the recipe")
    for row in read_file(path):
        try:
            value = row.value()
            query = value.get("query", value.get("question"))
            if query is None:
                query = [m["content"] for m in value["messages"] if m["role"] == "user"][-1]
            yield query.strip()
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise DataError(f'{row.file}, {row.place}: an excluded row needs "query", "question" or "messages"') from None


def toy_rows(count: int, seed: int = 0) -> Iterator[dict[str, list[int]]]:
    """String tasks over ids: prompt [BOS, letters, task], answer [letters copied, reversed or sorted, EOS]; ids as in `toy_config`."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        letters = generator.integers(8, 64, int(generator.integers(6, 25)))
        task = int(generator.integers(3))
        answer = (letters, letters[::-1], np.sort(letters))[task]
        yield {"prompt_ids": [3, *letters.tolist(), 4 + task], "answer_ids": [*answer.tolist(), 1]}


def _glob_rows(pattern: str) -> Iterator[PlacedRow]:
    for path in source_files(Source(path=pattern)):
        yield from read_file(path)


def _line_rows(path: str, file: Any) -> Iterator[PlacedRow]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield PlacedRow(path, f"line {number}", line)


def _is_array(path: str, file: Any) -> bool:
    """Whether a .json file holds one array; many files of that name hold JSON lines."""
    if path.endswith((".jsonl", ".jsonl.gz")):
        return False
    beginning = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return beginning.startswith(b"[")


def _array_rows(path: str, text: bytes) -> Iterator[PlacedRow]:
    try:
        rows = PlacedRow(path, "", text).value()
    except ValueError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    for number, row in enumerate(rows, 1):
        yield PlacedRow(path, f"row {number}", row)


def _parquet_rows(path: str) -> Iterator[PlacedRow]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"cannot read {path}: Parquet files need pyarrow; `pip install pyarrow`, or write the rows as .jsonl") from None
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield PlacedRow(path, f"row {number}", row)
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
