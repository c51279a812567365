from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from refusion.cli import main as cli
from refusion.synthesis.jsonl import read_rows

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def synthesize(capsys: pytest.CaptureFixture[str], tiny_model_dir: Path) -> Run:
    """Run `refusion synthesize` on the tiny random model: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["synthesize", "--model", str(tiny_model_dir), *map(str, arguments)])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def rows(output: Path) -> list[dict[str, str]]:
    return [row for part in sorted(output.glob("part-*.jsonl")) for _, row in read_rows(part)]


def test_pairs_are_written_and_a_second_call_goes_on(synthesize: Run, tmp_path: Path) -> None:
    # Random bytes at a high temperature: an EOS comes now and then, and nothing repeats.
    options = ["--query-temperature", 3, "--answer-temperature", 3, "--top-p", 1, "--top-k", 300, "--max-length", 200]
    code, out, err = synthesize("--output", tmp_path / "a", "--num-pairs", 3, *options)
    assert code == 0, err
    assert out.startswith("3 pairs in ")
    assert "dropped" in err
    code, _, err = synthesize("--output", tmp_path / "a", "--num-pairs", 5, *options)
    assert code == 0, err
    assert synthesize("--output", tmp_path / "b", "--num-pairs", 5, "--batch-size", 40, *options)[0] == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert len(rows(tmp_path / "a")) == 5
    assert set(rows(tmp_path / "a")[0]) == {"query", "response"}


def test_given_queries_are_answered_without_the_excluded_ones(synthesize: Run, tmp_path: Path) -> None:
    queries, exclude = tmp_path / "queries.jsonl", tmp_path / "exclude.jsonl"
    queries.write_text("".join(json.dumps({"query": f"query {i}"}) + "\n" for i in range(12)))
    exclude.write_text('{"query": "Query 3"}\n')
    options = ["--answer-temperature", 3, "--top-p", 1, "--top-k", 300, "--max-length", 200]
    code, _, err = synthesize("--output", tmp_path / "out", "--queries", queries, "--exclude", exclude, *options)
    assert code == 0, err
    written = [row["query"] for row in rows(tmp_path / "out")]
    assert written == [query for query in (f"query {i}" for i in range(12)) if query in written]
    assert "query 3" not in written
    assert "1: held-out query" in err


@pytest.mark.parametrize(
    ("options", "exit_code", "reason"),
    [
        ([], 2, "--num-pairs is needed"),
        (["--num-pairs", 2, "--top-p", 0], 2, "--top-p is 0"),
        (["--num-pairs", 2, "--answer-temperature", -1], 2, "--answer-temperature"),
        (["--num-pairs", 2, "--dtype", "int8"], 2, "'int8' is not one of 'float32', 'bfloat16'"),
        (["--queries", "absent.jsonl"], 1, "cannot read absent.jsonl"),
        (["--num-pairs", 2, "--device", "gpu"], 1, "device is 'gpu'"),
        (["--num-pairs", 2, "--device", "cuda"], 1, "CUDA"),
        (["--num-pairs", 2, "--output", "/dev/null/pairs"], 1, "cannot write /dev/null/pairs"),
    ],
)
def test_bad_options_are_one_line(synthesize: Run, tmp_path: Path, options: list[object], exit_code: int, reason: str) -> None:
    import torch

    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, out, err = synthesize("--output", tmp_path / "out", *options)
    assert (code, out) == (exit_code, "")
    assert reason in err
    assert err.count("\n") == 1


def test_a_bad_line_is_named(synthesize: Run, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"query": "fine"}\n{"query": 3}\n')
    code, _, err = synthesize("--output", tmp_path / "out", "--queries", tmp_path / "q.jsonl")
    assert code == 1
    assert "q.jsonl:2" in err
