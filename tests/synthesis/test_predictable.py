from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from refusion.evaluation.sandbox import run_many
from refusion.synthesis.predictable import HELD_OUT_SEED, check, code_block, make, make_training_rows


def test_rows_are_fixed_by_the_seed() -> None:
    assert make(5, 70) == make(5, 70)
    assert make(5, 70) != make(6, 70)
    assert make(5, 140)[:70] == make(5, 70)
    first = make(HELD_OUT_SEED, 1)[0]
    assert first["query"] == "Add 11574 and 18851 digit by digit, from the right."  # what the fixed yardstick begins with


def test_the_held_out_rows_are_those_of_their_seed(shared_dir: Path) -> None:
    rows = [json.loads(line) for line in (shared_dir / "tasks" / "heldout.jsonl").read_text().splitlines()]
    assert make(HELD_OUT_SEED, 2100) == rows


def test_every_gold_answer_is_right_and_a_changed_one_is_wrong() -> None:
    rows = make(3, 210)
    assert Counter(row["family"] for row in rows) == dict.fromkeys((row["family"] for row in rows[:7]), 30)
    for row in rows:
        assert check(row, "  " + row["response"] + "\n")
        if row["check"]["type"] != "python":
            assert not check(row, row["response"].replace("a", "b").replace("1", "7") + "0")


def test_gold_functions_pass_their_tests() -> None:
    rows = [row for row in make(4, 280) if row["family"] == "function"][:12]
    results = run_many([(code_block(row["response"]) or "", row["check"]["tests"]) for row in rows])  # type: ignore[typeddict-item]
    assert all(result.passed for result in results)


def test_answers_without_a_code_block_are_none() -> None:
    row = make(1, 7)[6]
    assert row["check"]["type"] == "python"
    assert check(row, "def f(): pass") is None


def test_training_rows_leave_out_held_out_and_repeated_queries() -> None:
    rows = make(1, 700)
    held_out = [row["query"] for row in rows[::10]]
    kept = [row["query"] for row in make_training_rows(1, 700, held_out)]
    assert set(kept) == {row["query"] for row in rows} - set(held_out)
    assert len(kept) == len(set(kept))
    with pytest.raises(AssertionError, match="held-out"):
        make_training_rows(HELD_OUT_SEED, 7, [])


def test_the_command_writes_rows_without_the_excluded_ones(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text(json.dumps(make(2, 1)[0]) + "\n")
    command = [sys.executable, "-m", "refusion.synthesis.predictable", "--seed", "2", "--count", "14", "--exclude", tmp_path / "held.jsonl"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in out.splitlines()] == make(2, 14)[1:]
