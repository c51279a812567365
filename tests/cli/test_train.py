"""`refusion train`: the plan, and what is handed to training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import RunCli

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny.toml"


def test_a_plan_is_printed_without_reading_data_or_training(run_cli: RunCli, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = run_cli("train", TINY, "--plan", "--set", "data.sources=none.jsonl", "--output", output)
    assert result.code == 0, result.err
    for word in ("weights", "gradients", "optimizer", "activations", "tokens/s"):
        assert word in result.out
    assert not output.exists()


def test_a_plan_is_also_json(run_cli: RunCli) -> None:
    plan = json.loads(run_cli("train", TINY, "--plan", "--json").out)
    assert plan["parameters"] == 102_720
    assert plan["fits"]


def test_probes_are_wired(run_cli: RunCli, tmp_path: Path) -> None:
    settings = ("data.validation_rows=4", "probe_steps=1", "probe_rows=2", "max_steps=1", "tensorboard=false", "data.sources=[{toy=40}]")
    result = run_cli("train", TINY, "--output", tmp_path, *(word for setting in settings for word in ("--set", setting)))
    assert result.code == 0, result.err
    assert "probe_tpf" in result.err


def test_one_of_several_processes_talks(monkeypatch: pytest.MonkeyPatch) -> None:
    from refusion.cli import train

    assert train._is_first_process()
    monkeypatch.setenv("RANK", "1")
    assert not train._is_first_process()


def test_without_the_training_extra_one_line_says_what_to_install(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    result = run_cli("train", TINY)
    assert result.code == 1
    assert result.err == "refusion: error: this needs accelerate; install it with `pip install 'refusion[train]'`\n"
