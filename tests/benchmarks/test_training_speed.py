"""The training benchmarks run without a GPU, and packing changes no loss."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from refusion.evaluation.results import read_result

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _run(monkeypatch: pytest.MonkeyPatch, *args: object, script: str = "training_speed.py") -> int:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    return int(stop.value.code or 0)


def test_a_dry_run_measures_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _run(monkeypatch, "--dry-run", "--parity-steps", 4, "--output", tmp_path / "speed.json") == 0
    runs = read_result(tmp_path / "speed.json")["runs"]
    small, large, parity = (run["figures"] for run in runs)
    for figures in (small, large):
        assert figures["tokens_per_second"] > 0
        assert 0.8 < figures["packed_share"] <= 1
        assert figures["seconds_per_step_planned"] > 0
        assert figures["memory_gb_planned"] > 0
    assert parity["loss_off_worst_ten_steps"] < 1e-4, "float32: only the order of sums differs"
    curves = runs[2]["series"]
    assert len(curves["step"]) == len(curves["loss_packed"]) == len(curves["loss_padded"]) > 1
    assert "series" not in runs[0]


def test_without_a_gpu_it_says_what_is_possible(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _run(monkeypatch, "--parts", "small") == 1
    assert "use --dry-run" in capsys.readouterr().err


def test_two_processes_are_compared_with_one_and_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a CPU by plain data parallelism; what the script does around the runs is the same on two GPUs."""
    assert _run(monkeypatch, "--dry-run", "--steps", 4, "--output", tmp_path / "two.json", script="two_gpus.py") == 0
    content = read_result(tmp_path / "two.json")
    assert [run["label"] for run in content["runs"]] == ["one", "two", "resumed"]
    assert {len(run["series"]["loss"]) for run in content["runs"]} == {4}
    assert content["figures"]["two_against_one_loss_off_worst"] < 1e-5
    assert content["figures"]["two_against_one_weights_off"] < 1e-3
    assert content["figures"]["resumed_against_unbroken_weights_off"] < 1e-3
