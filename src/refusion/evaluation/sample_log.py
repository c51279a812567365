"""The answers of an evaluation, one JSON object a line, written as they come, so that a run that was interrupted can go on.

Beside the lines stands what they were made with: a run with other settings does not continue them. Several processes may write to one log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from refusion.atomic import atomic_file, make_directory
from refusion.errors import DataError
from refusion.evaluation.results import to_plain

_SETTINGS = "settings.json"
_LOCK = ".lock"


class SampleLog:
    """A directory with NAME.jsonl per benchmark; rows are told apart by `task` and `doc_id`."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Raises DataError if there are rows already that must not, or cannot, be continued."""
        self.directory = directory
        self._lock = FileLock(directory / _LOCK)  # somebody who mends a file while another appends to it would lose what is appended
        written = directory / _SETTINGS
        plain = to_plain(settings)
        if written.exists():
            if not resume:
                raise DataError(f"{directory} holds answers already; add --resume to go on with them, or choose another --output")
            _check_same(_read_json(written), plain, directory)
        make_directory(directory)
        with atomic_file(written) as draft:
            draft.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.jsonl"

    def rows(self, name: str) -> list[dict[str, Any]]:
        """What was written before, each sample once; a line that a crash left half written is dropped from the file too."""
        with self._lock:
            return self._rows(self.path(name))

    def _rows(self, path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        # No `splitlines`: answers may hold U+2028 and its like, which JSON leaves as they are.
        lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        for line in lines:
            row = _parsed(line)
            if row is not None:
                rows.setdefault((row["task"], row["doc_id"]), row)
        if len(rows) < len(lines):
            with atomic_file(path) as draft:
                draft.write_text("".join(_line(row) for row in rows.values()), encoding="utf-8")
        return list(rows.values())

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows behind those that are there; behind the half line of a process that crashed they begin a new one."""
        with self._lock, self.path(name).open("ab+") as file:
            begins = "\n" if _ends_in_half_a_line(file) else ""
            file.write((begins + "".join(_line(row) for row in rows)).encode())


def _ends_in_half_a_line(file: BinaryIO) -> bool:
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return False
    file.seek(end - 1)
    return file.read(1) != b"\n"


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(to_plain(row), ensure_ascii=False, default=str) + "\n"


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"task", "doc_id", "scores"} <= row.keys() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; remove {path.parent} or choose another --output") from error


def _check_same(before: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    other = [name for name in now if before.get(name) != now[name]]
    if other:
        name = other[0]
        raise DataError(
            f"{directory} was made with {name}={before.get(name)}, not {now[name]}; choose another --output or the same settings"
        )
