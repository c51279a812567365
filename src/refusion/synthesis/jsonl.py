"""JSON lines, plain or gzipped: reading with file and line in every error, writing whole or not at all."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from refusion.atomic import atomic_file
from refusion.errors import DataError


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of the file with its place (`file:line`). Raises DataError naming the place."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line, f"{path}:{number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One object a line; gzipped without a time stamp if the name ends in .gz, so equal rows give equal bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with atomic_file(path) as draft:
        draft.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def read_queries(path: Path) -> list[str]:
    """The queries of a file: `query` of each row, or the first user turn of its `messages`. Raises DataError naming the place."""
    return [_query(row, place) for place, row in read_rows(path)]


def _open(path: Path) -> TextIO:
    return cast(TextIO, gzip.open(path, "rt", encoding="utf-8")) if path.suffix == ".gz" else path.open(encoding="utf-8")


def _parsed(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: not a JSON object")
    return row


def _query(row: dict[str, Any], place: str) -> str:
    query = row.get("query")
    if query is None and isinstance(row.get("messages"), list):
        query = next((m.get("content") for m in row["messages"] if isinstance(m, dict) and m.get("role") == "user"), None)
    if not isinstance(query, str):
        raise DataError(f"{place}: has neither `query` nor a user turn in `messages`")
    return query
