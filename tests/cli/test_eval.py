from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import RunCli

from refusion.cli import options
from refusion.engine.settings import EngineSettings
from refusion.llm import LLM

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def roomy_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("roomy") / "tiny"
    shutil.copytree(tiny_model_dir, path)
    config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def arguments(roomy_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One question of GSM8K, 16 new tokens."""
    from refusion.evaluation import benchmarks

    real = benchmarks.task_configs

    def short(benchmark: Any) -> list[dict[str, Any]]:
        return [config | {"generation_kwargs": config["generation_kwargs"] | {"max_gen_toks": 16}} for config in real(benchmark)]

    monkeypatch.setattr(benchmarks, "task_configs", short)
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    row = {"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text(json.dumps(row) + "\n")
    return ["eval", "--model", str(roomy_model_dir), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out.json")]


def test_a_result_is_written_and_shown(run_cli: RunCli, arguments: list[str], tmp_path: Path) -> None:
    found = run_cli(*arguments, "--tasks", "gsm8k,gpqa")
    assert found.code == 0, found.err
    assert "GSM8K" in found.out
    assert "tokens/forward" in found.out
    assert "left out: no rows of gpqa" in found.err
    assert json.loads((tmp_path / "out.json").read_text())["runs"][0]["label"] == "gsm8k"
    assert len((tmp_path / "out.samples" / "gsm8k.jsonl").read_text().splitlines()) == 1
    again = run_cli(*arguments, "--tasks", "gsm8k", "--json", "--resume")
    assert again.json["runs"][0]["figures"]["num_samples"] == 1
    twice = run_cli(*arguments, "--tasks", "gsm8k")
    assert twice.code == 1
    assert "add --resume" in twice.err


def test_so_many_questions_as_asked_for_are_decoded_together(
    run_cli: RunCli, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seats: list[int | None] = []
    load = options.load

    def watched(model: str, device: str, dtype: Any, engine: EngineSettings | None = None) -> LLM:
        llm = load(model, device, dtype, engine)
        seats.append(llm.engine_settings.max_num_seqs)
        return llm

    monkeypatch.setattr(options, "load", watched)
    found = run_cli(*arguments, "--tasks", "gsm8k", "--batch-size", "6", "--json")
    assert found.code == 0, found.err
    assert (seats, found.json["settings"]["batch_size"]) == ([6], 6)


def test_gpqa_runs_end_to_end_with_made_up_rows(
    run_cli: RunCli, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refusion.evaluation import suite

    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["made_up_gpqa.py", str(tmp_path / "made-up"), "--questions", "7"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(folder / "made_up_gpqa.py"), run_name="__main__")
    command = [*arguments, "--data", str(tmp_path / "made-up"), "--tasks", "gpqa"]
    monkeypatch.setattr("refusion.evaluation.harness.chunk_size", lambda lm: 3)
    real, groups = suite._answer, iter(range(10))

    def interrupted(*given: Any) -> Any:
        if next(groups) == 1:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(suite, "_answer", interrupted)
    assert run_cli(*command).code == 130
    log = tmp_path / "out.samples" / "gpqa_made_up.jsonl"
    assert len(log.read_text().splitlines()) == 3
    found = run_cli(*command, "--resume")
    assert found.code == 0, found.err
    assert next(groups) == 4  # groups of three, three again, and one: the first is not asked twice
    assert "GPQA (made-up rows)" in found.out
    content = json.loads((tmp_path / "out.json").read_text())
    (one,) = content["runs"]
    assert (one["label"], one["settings"]["title"]) == ("gpqa_made_up", "GPQA (made-up rows)")
    assert (one["figures"]["num_samples"], one["figures"]["num_scorer_errors"]) == (7, 0)
    slots = one["settings"]["slots"]
    assert (slots["slot_size"], slots["serial_blocks"], slots["acceptance"]) == (8, 32, "paper")
    assert content["figures"] == {"mean_score": None, "mean_score_standard_error": None, "num_benchmarks": 0}
    assert "no score of it" in content["notes"]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == list(range(7))
    assert {row["target"] for row in rows} <= {"(A)", "(B)", "(C)", "(D)"}
    assert all("enclosed in parentheses ((A), (B), (C), or (D))" in row["prompt"] for row in rows)
    assert all(row["num_tokens"] > 0 and row["num_forwards"] > 0 for row in rows)


def test_where_gpqas_rows_come_from_and_belong_is_one_line(run_cli: RunCli, arguments: list[str]) -> None:
    found = run_cli(*arguments, "--tasks", "gpqa")
    assert (found.code, found.err.count("\n")) == (1, 1), found.err
    for words in ("no rows of gpqa", "ask for access", "github.com/idavidrein/gpqa", "gpqa_main.csv", "into DIR/gpqa/ and give --data DIR"):
        assert words in found.err


def test_a_diffusion_decoder_is_evaluated_with_its_own_settings(run_cli: RunCli, arguments: list[str], tmp_path: Path) -> None:
    found = run_cli(*arguments, "--tasks", "gsm8k", "--decoder", "block_diffusion", "--block-size", "8", "--threshold", "0.5")
    assert found.code == 0, found.err
    content = json.loads((tmp_path / "out.json").read_text())
    settings = {"block_size": 8, "steps": None, "threshold": 0.5, "fuse_commit": True}
    assert content["settings"]["diffusion"] == content["runs"][0]["settings"]["diffusion"] == settings
    assert "slots" not in content["runs"][0]["settings"]
    other = run_cli(*arguments, "--tasks", "gsm8k", "--decoder", "block_diffusion", "--block-size", "4", "--resume")
    assert other.code == 1  # answers of other settings are not mixed


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--tasks", "gsm9k"], 2, "--tasks has 'gsm9k'; did you mean gsm8k?"),
        (["--suite", "papers"], 2, "--suite is 'papers'; did you mean paper?"),
        (["--limit", "0"], 2, "--limit is 0"),
        (["--slot-size", "8"], 2, "--setting is 'paper', which brings its own slot settings"),
        (["--tasks", "mbpp"], 1, "no rows of mbpp"),
        (["--data", "nowhere", "--tasks", "mbpp"], 1, "there is no data folder nowhere"),
        (["--decoder", "magic"], 2, "magic"),
    ],
)
def test_bad_input_is_one_line(run_cli: RunCli, arguments: list[str], extra: list[str], code: int, message: str) -> None:
    found = run_cli(*arguments, *extra)
    assert found.code == code
    assert message in found.err
    assert "Traceback" not in found.err


def test_wrong_columns_are_one_line(run_cli: RunCli, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text('{"query": "x", "answer": "#### 1"}\n')
    found = run_cli(*arguments, "--tasks", "gsm8k")
    assert (found.code, found.err.count("\n")) == (1, 1), found.err
    assert "row 1 of gsm8k has no column 'question' but query, answer" in found.err


@pytest.mark.parametrize("decoder", ["masked_diffusion", "block_diffusion", "refusion"])
def test_a_checkpoint_without_mask_token_is_one_line(
    run_cli: RunCli, arguments: list[str], edited_model: Callable[..., Path], decoder: str
) -> None:
    path = edited_model(mask_token_id=None, max_position_embeddings=2048)
    found = run_cli(*arguments, "--model", path, "--tasks", "gsm8k", "--decoder", decoder)
    assert (found.code, found.err.count("\n")) == (1, 1), found.err
    assert "no mask token" in found.err


def test_an_interrupted_run_says_how_to_go_on(run_cli: RunCli, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from refusion.evaluation import suite

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "_answer", interrupted)
    found = run_cli(*arguments, "--tasks", "gsm8k")
    assert found.code == 130
    assert "--resume" in found.err
    assert "before the first answer" in found.err  # there is no log to name yet
