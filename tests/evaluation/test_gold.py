from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_rows import write_rows

from refusion.evaluation.gold import main


def test_published_solutions_pass_the_sandbox(shared_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every 20th row; `python -m refusion.evaluation.gold DATA` runs them all."""
    assert main([str(shared_dir / "data"), "--every", "20"]) == 0
    assert capsys.readouterr().out == "humaneval: 9/9 pass\nmbpp: 25/25 pass\n"


def test_a_wrong_solution_is_named(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"task_id": 7, "text": "x", "code": "x = 1", "test_list": ["assert x == 2"], "test_setup_code": ""}
    write_rows(data_dir / "mbpp" / "test.jsonl", [row])
    assert main([str(data_dir)]) == 1
    assert "mbpp: 0/1 pass; failing: 7" in capsys.readouterr().out
