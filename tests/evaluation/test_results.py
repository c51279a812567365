from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from refusion.errors import DataError
from refusion.evaluation.results import FIELDS, Result, Run, command_line, read_result, write_result
from refusion.evaluation.statistics import Interval


def test_a_result_file_says_where_its_figures_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSION_COMMIT", "abc123")
    runs = [Run(label="k=8", settings={"slot_size": 8}, figures={"tpf": 2.0})]
    figures = {"agreement": Interval(0.9, 0.88, 0.92), "nll": float("nan")}
    write_result(tmp_path / "chat.json", Result(name="chat", settings={"data": Path("a/heldout.jsonl.gz")}, figures=figures, runs=runs))
    content = read_result(tmp_path / "chat.json")
    assert tuple(content) == FIELDS
    assert content["commit"] == "abc123"
    assert content["figures"] == {"agreement": {"value": 0.9, "low": 0.88, "high": 0.92}, "nll": None}
    assert content["runs"][0]["figures"] == {"tpf": 2.0}
    assert content["settings"] == {"data": "heldout.jsonl.gz"}
    assert content["machine"]["cores"] >= 1
    assert content["versions"]["torch"]
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for text, reason in (("{", "cannot read"), ("[]", "missing"), (json.dumps(dict.fromkeys(FIELDS, 0)), "schema")):
        path.write_text(text)
        with pytest.raises(DataError, match=reason):
            read_result(path)


def test_a_command_names_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORK", "/scratch/a/")
    monkeypatch.setenv("OUT", "/scratch/a/out")
    words = [
        "/somewhere/tasks.py",
        "--model",
        "/scratch/a/runs/x",
        "--output",
        "/scratch/a/out/t.json",
        "--data",
        "/scratch/abc",
        "/scratch/a",
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert command_line() == "python tasks.py --model $WORK/runs/x --output $OUT/t.json --data /scratch/abc $WORK"
    monkeypatch.setattr(sys, "argv", ["/site/refusion/__main__.py", "bench", "--json"])
    assert command_line() == "refusion bench --json"
