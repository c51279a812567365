"""Figures of the comparison from raw answers, on an archive of two problems a task."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from refusion.errors import DataError

SHAS = {0: "a" * 64, 1: "b" * 64}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import comparison_again  # type: ignore[import-not-found]  # a script of the benchmarks folder

    monkeypatch.setattr(comparison_again, "SIZES", {"gcd": 2})
    monkeypatch.setattr(comparison_again, "NUM_HELD_OUT", 2)
    return comparison_again


@pytest.fixture
def state(module: ModuleType, tmp_path: Path) -> Path:
    """An archive like results/raw/comparison-h200.tgz, unpacked: seed 0 answers one problem of two right, seed 1 both."""
    rows = [row(seed, task, i, float(seed or i)) for seed in SHAS for task in ("predictable", "gcd") for i in range(2)]
    write(tmp_path / "raw" / "answers" / "refusion.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    write(tmp_path / "raw" / "reports" / "comparison-refusion-0.json", json.dumps({"steps": 1000}))
    with tarfile.open(tmp_path / "raw.tgz", "w:gz") as archive:
        for name in ("answers", "reports"):
            archive.add(tmp_path / "raw" / name, name)
    module.unpack(tmp_path / "raw.tgz", tmp_path / "state")
    return tmp_path / "state"


def row(seed: int, task: str, number: int, right: float) -> dict[str, Any]:
    cost = {"num_tokens": 8, "num_forwards": 4, "is_cut": False}
    return {"task": f"refusion/{seed}@{SHAS[seed][:12]}/{task}", "doc_id": number, "scores": {"right": right}, **cost}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def content() -> dict[str, Any]:
    settings = {"chat_rows": 0, "weights": {"refusion-0": SHAS[0]}, "base": "tiny"}
    return {"commit": "49ecdd3", "settings": settings, "runs": [], "notes": ""}


def test_all_seeds_of_the_raw_answers_are_counted(module: ModuleType, state: Path) -> None:
    found = module.again(content(), state)
    runs = {run["label"]: run for run in found["runs"]}
    assert runs["refusion"]["settings"]["seeds"] == [0, 1]
    assert runs["refusion"]["figures"]["mean_accuracy"]["value"] == 0.75
    assert runs["training of refusion-0"]["figures"] == {"steps": 1000}
    assert found["settings"]["weights"] == {"refusion-0": SHAS[0], "refusion-1": SHAS[1][:12]}
    assert (found["commit"], found["settings"]["base"]) == ("49ecdd3", "tiny")
    assert "seeds 0, 1" in found["notes"]
    assert module.again(found, state)["notes"] == found["notes"]


def test_seeds_can_be_chosen(module: ModuleType, state: Path) -> None:
    runs = {run["label"]: run for run in module.again(content(), state, [0])["runs"]}
    assert runs["refusion"]["figures"]["mean_accuracy"]["value"] == 0.5
    assert "refusion seed 1" not in runs


def test_what_is_no_archive_is_named(module: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "raw.tgz").write_text("no archive")
    with pytest.raises(DataError, match=r"cannot unpack .*raw\.tgz"):
        module.unpack(tmp_path / "raw.tgz", tmp_path / "state")


def test_a_stranger_among_the_answers_is_named(module: ModuleType, state: Path) -> None:
    write(state / "answers" / "other.jsonl", json.dumps(row(0, "gcd", 0, 1.0) | {"task": "nobody/0@abcdefabcdef/gcd"}))
    with pytest.raises(DataError, match="nobody/0@abcdefabcdef/gcd is no key"):
        module.again(content(), state)
