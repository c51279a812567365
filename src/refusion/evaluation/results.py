"""Result files: one schema for every figure that the project quotes.

A file says what was measured (figures, settings), on what (machine, versions) and from which code (commit, command line), so that a
table can be written from it without asking anybody. `benchmarks/tables.py` does that.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from refusion import __version__
from refusion.atomic import atomic_file
from refusion.errors import DataError
from refusion.evaluation.statistics import Interval

SCHEMA = 1
FIELDS = ("schema", "name", "date", "machine", "versions", "commit", "command", "settings", "figures", "runs", "notes")

Figure = float | int | Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One setting of a sweep: its label, what was set and what came out."""

    label: str
    settings: Mapping[str, Any]
    figures: Mapping[str, Figure]
    series: Mapping[str, Sequence[float] | Mapping[str, float]] = field(default_factory=dict)
    """Curves, such as a loss by step, and lists; left out of the file where there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a benchmark hands over; the rest of the file is found out here."""

    name: str
    settings: Mapping[str, Any]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    runs: Sequence[Run] = ()
    notes: str = ""
    device: str = "cpu"


def write_result(path: Path, result: Result) -> dict[str, Any]:
    """Write the file, whole or not at all; returns its content."""
    content = content_of(result)
    with atomic_file(path) as draft:
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return content


def content_of(result: Result) -> dict[str, Any]:
    """What a result file says: the result, when, on what and from which code it came."""
    return {
        "schema": SCHEMA,
        "name": result.name,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine(result.device),
        "versions": versions(),
        "commit": commit(),
        "command": command_line(),
        "settings": to_plain(result.settings),
        "figures": {name: to_plain(figure) for name, figure in result.figures.items()},
        "runs": [{name: value for name, value in to_plain(asdict(run)).items() if value or name != "series"} for run in result.runs],
        "notes": result.notes,
    }


def read_result(path: Path) -> dict[str, Any]:
    """The content of a result file. Raises DataError if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the result file {path}: {error}") from error
    missing = [name for name in FIELDS if not isinstance(content, dict) or name not in content]
    if missing or content["schema"] != SCHEMA:
        raise DataError(f"{path} is no result file of schema {SCHEMA}" + (f": {', '.join(missing)} missing" if missing else ""))
    return content


def machine(device: str) -> dict[str, Any]:
    """Device, processor and memory as the system names them."""
    import torch

    found: dict[str, Any] = {"device": device, "cpu": cpu_name(), "cores": num_cores(), "threads": torch.get_num_threads()}
    if device.startswith("cuda"):
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def num_cores() -> int:
    """Cores this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "refusion": __version__}
    for name in ("torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The commit of the code, `+dirty` if tracked files differ; $REFUSION_COMMIT says it where there is no git."""
    given = os.environ.get("REFUSION_COMMIT")
    if given:
        return given
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+dirty" if changed.strip() else "")


PLACES = ("WORK", "OUT", "DATA", "SUITE")
"""Environment variables of the scripts in benchmarks/ that say where things are on a machine."""


def command_line() -> str:
    """As it was given; the scratch folders of a machine by the variables that name them."""
    places = {path: f"${name}" for name in PLACES if (path := os.environ.get(name, "").rstrip("/"))}
    script = Path(sys.argv[0]).name
    words = ["refusion"] if script in ("__main__.py", "refusion") else ["python", script]
    for word in sys.argv[1:]:
        held = [path for path in places if word == path or word.startswith(f"{path}/")]
        longest = max(held, key=len, default="")
        words.append(places[longest] + word.removeprefix(longest) if longest else word)
    return " ".join(words)


def to_plain(value: Any) -> Any:
    """JSON types only: dataclasses as objects, paths by their last part, NaN as null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value
