"""The training benchmarks run without a GPU, and packing changes no loss."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
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
    """On a CPU by plain data parallelism, and by ZeRO where DeepSpeed is; what the script does around the runs is the same on two GPUs."""
    assert _run(monkeypatch, "--dry-run", "--steps", 4, "--output", tmp_path / "two.json", script="two_gpus.py") == 0
    content = read_result(tmp_path / "two.json")
    zero = ["zero2", "zero3"] if find_spec("deepspeed") else []
    assert [run["label"] for run in content["runs"]] == ["one", "two", "resumed", *zero]
    assert ("ZeRO was left out" in content["notes"]) == (not zero)
    assert {len(run["series"]["loss"]) for run in content["runs"]} == {4}
    assert content["figures"]["two_against_one_loss_off_worst"] < 1e-5
    assert content["figures"]["two_against_one_weights_off"] < 1e-3
    assert all(content["figures"][f"{name}_against_one_loss_off_worst"] < 1e-5 for name in zero)
    assert content["figures"]["resumed_against_unbroken_weights_off"] < 1e-3


def test_the_comparison_trains_goes_on_and_leaves_alone_what_is_finished(tmp_path: Path) -> None:
    """The toy model on ready ids; one objective, for each run is a process of its own."""
    data = tmp_path / "work" / "data"
    data.mkdir(parents=True)
    for name in ("predictable", "rg_sums", "selfwritten_train-00"):
        rows = [{"prompt_ids": [10 + i % 40, 4], "answer_ids": [20, 30, 1]} for i in range(40)]
        (data / f"{name}.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (data / "rg_heldout.jsonl.gz").write_bytes(gzip.compress(b'{"query": "never trained on"}\n'))
    small = [
        "base=toy",
        "mask_token=",
        "model.attention=sdpa",
        "model.residual=float32",
        "compile=false",
        "pack_length=128",
        "rows_per_step=4",
    ]
    small += ["num_workers=0", "save_steps=2", "data.validation_rows=8", "chunk_size=64", "tensorboard=false"]
    options = [word for setting in small for word in ("--set", setting)]
    command = ["bash", BENCHMARKS / "train_comparison.sh", "3", "4", "--only", "block_diffusion", *options]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "WORK": str(tmp_path / "work"), "PATH": path, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    recipe = json.loads((tmp_path / "work" / "runs" / "comparison" / "block_diffusion-3" / "recipe.json").read_text())
    assert recipe["data"]["exclude"] == [str(data / "rg_heldout.jsonl.gz")]
    report = json.loads((tmp_path / "work" / "out" / "comparison-block_diffusion-3.json").read_text())
    assert (report["steps"], report["examples"]) == (4, 112)
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "block_diffusion-3 is finished\n")
    assert subprocess.run(command[:2], env=environment, capture_output=True).returncode == 2
