"""The controlled comparison on tiny models: what is measured, that it can be interrupted, and what the figures are made of."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from refusion import LLM
from refusion.evaluation.results import read_result
from refusion.synthesis.jsonl import write_rows
from refusion.synthesis.predictable import HELD_OUT_SEED, make

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Compare = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two problems of each kind, three chats."""
    path = tmp_path / "data"
    write_rows(path / "tasks_heldout.jsonl.gz", [row for row in make(HELD_OUT_SEED, 7) if row["family"] in ("addition", "shopping")])
    write_rows(path / "gsm8k_test.jsonl.gz", [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in (1, 2)])
    write_rows(path / "rg_heldout.jsonl.gz", [{"family": "gcd", "query": f"gcd {i}?", "answer": "1"} for i in (1, 2)])
    write_rows(path / "heldout.jsonl.gz", [{"query": f"question {i}", "response": "an answer"} for i in range(3)])
    return path


@pytest.fixture
def compare(
    tmp_path: Path, data: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Compare:
    """Run the script on three runs of two objectives: exit code, standard error, content of the result file."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("autoregressive-0", "refusion-0", "refusion-1"):
        shutil.copytree(tiny_model_dir, tmp_path / "runs" / name / "final")
    (tmp_path / "runs" / "lora-0" / "final").mkdir(parents=True)  # of another experiment
    places = ["--runs", tmp_path / "runs", "--data", data, "--state", tmp_path / "state", "--output", tmp_path / "out.json"]
    sizes = ["--max-tokens", 8, "--speed-prompts", 2, "--speed-seconds", 0.1, "--batch-sizes", 1, 2, "--batch-size", 2, "--chat-rows", 3]
    common = [*places, *sizes, "--base", tiny_model_dir, "--dtype", "float32", "--slots", '{"slot_size": 4, "token_threshold": 0.1}']

    def compare(*options: object) -> tuple[int, str, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["comparison.py", *map(str, (*common, *options))])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(BENCHMARKS / "comparison.py"), run_name="__main__")
        err = capsys.readouterr().err
        return int(stop.value.code or 0), err, read_result(tmp_path / "out.json") if (tmp_path / "out.json").exists() else {}

    return compare


@pytest.fixture
def without_second_seed(tmp_path: Path, compare: Compare) -> None:
    shutil.rmtree(tmp_path / "runs" / "refusion-1")


def test_all_is_measured_once_and_set_against_each_other(compare: Compare, tmp_path: Path) -> None:
    code, err, content = compare()
    assert code == 0, err
    runs = {run["label"]: run for run in content["runs"]}
    assert content["settings"]["unfinished"] == []
    assert {"autoregressive seed 0", "refusion seed 0", "refusion seed 1", "autoregressive", "refusion"} <= runs.keys()
    assert "refusion - autoregressive" in runs
    assert "refusion over autoregressive" in runs
    assert "tokens_per_second_chat_1" in runs["refusion_paper"]["figures"]
    ours = runs["refusion"]
    counts = {"predictable": 2, "gsm8k": 2, "gcd": 2}
    assert ours["settings"] == {"contender": "refusion", "seeds": [0, 1], "tasks": list(counts), "num_problems": counts}
    assert {"mean_accuracy", "accuracy_gcd", "chat_agreement", "chat_nll", "tokens_per_forward"} <= ours["figures"].keys()
    assert {"tokens_per_second_chat_1", "tokens_per_second_tasks_2"} <= ours["figures"].keys()
    assert {"prepared_lengths_chat_1", "prepared_lengths_last_chat_1", "prepared_lengths_tasks_2"} <= ours["figures"].keys()
    assert "prepared_lengths_chat_1" not in runs["autoregressive"]["figures"]
    assert runs["autoregressive"]["figures"]["chat_agreement"]["value"] == 1.0  # the base is the same model
    assert runs["autoregressive"]["figures"]["tokens_per_forward"]["value"] == 1.0
    assert "accuracy_predictable_addition" in runs["refusion seed 1"]["figures"]
    ratio = runs["refusion over autoregressive"]["figures"]["speed_chat_1"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert set(content["settings"]["weights"]) == {"autoregressive-0", "refusion-0", "refusion-1"}
    lines = (tmp_path / "state" / "autoregressive.jsonl").read_text().splitlines()
    again = compare()
    assert again[0] == 0
    assert (tmp_path / "state" / "autoregressive.jsonl").read_text().splitlines() == lines  # nothing is asked twice
    assert again[2]["runs"] == content["runs"]


def test_every_shape_of_slots_is_made_ready_before_they_are_timed(
    compare: Compare, without_second_seed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[tuple[str, ...], int]] = []
    warm_up = LLM.warm_up

    def counted(self: LLM, decoders: Sequence[str] = (), **options: Any) -> int:
        called.append((tuple(decoders), options["batch_size"]))
        return warm_up(self, decoders, **options)

    monkeypatch.setattr(LLM, "warm_up", counted)
    code, err, _ = compare("--tasks", "gsm8k", "--contenders", "refusion", "autoregressive")
    assert code == 0, err
    kinds = 2  # chat and tasks
    assert [call for call in called if call[0]] == [(("refusion",), size) for size in (1, 2) for _ in range(2 * kinds)]


def test_out_of_time_it_says_what_there_is_and_goes_on_later(compare: Compare, without_second_seed: None, tmp_path: Path) -> None:
    code, err, content = compare("--seconds", 0)
    assert (code, content["runs"]) == (0, [])
    assert "out of time" in err
    assert "autoregressive/0@" in content["settings"]["unfinished"][0]
    code, err, content = compare("--tasks", "gsm8k", "--batch-sizes")
    assert code == 0, err
    assert content["settings"]["unfinished"] == []
    assert not any(name.startswith("tokens_per_second") for run in content["runs"] for name in run["figures"])


def test_ctrl_c_writes_what_there_is(compare: Compare, without_second_seed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks  # type: ignore[import-not-found]  # a script of the benchmarks folder

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "judge", interrupted)
    code, _err, content = compare()
    assert (code, content["runs"]) == (130, [])


def test_answers_of_a_retrained_model_are_not_mixed_in(compare: Compare, without_second_seed: None, tmp_path: Path) -> None:
    only = ("--tasks", "gsm8k", "--contenders", "autoregressive", "--batch-sizes", 1)
    compare(*only)
    before = len((tmp_path / "state" / "autoregressive.jsonl").read_text().splitlines())
    final = tmp_path / "runs" / "autoregressive-0" / "final"
    config = json.loads((final / "config.json").read_text())
    _retrain(final)
    assert json.loads((final / "config.json").read_text()) == config
    _code, _err, content = compare(*only)
    assert len((tmp_path / "state" / "autoregressive.jsonl").read_text().splitlines()) == 2 * before
    assert [run["settings"].get("seeds") for run in content["runs"] if run["label"] == "autoregressive"] == [[0]]


def test_who_was_asked_fewer_problems_is_set_against_the_others_on_those(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import comparison  # type: ignore[import-not-found]  # a script of the benchmarks folder
    import comparison_figures  # type: ignore[import-not-found]

    contenders = [
        comparison.Contender(name="autoregressive", objective="autoregressive", is_main=False),
        comparison.Contender(name="block_diffusion", objective="block_diffusion"),
        comparison.Contender(name="masked_diffusion", objective="masked_diffusion", num_problems=2),
    ]
    models = [comparison.Model(c.objective, 0, tmp_path / c.objective / "final", c.objective) for c in contenders]
    (tmp_path / "block_diffusion").mkdir()
    (tmp_path / "block_diffusion" / "report.json").write_text('{"steps": 400, "validation_mdm": 1.5, "output": "x"}')
    task = comparison.Task("gcd", [{"family": "gcd"}] * 4, 8)
    cost = {"num_tokens": 10, "num_forwards": 5, "is_cut": False}
    rows = []
    for model, rights in zip(models[1:], ([1.0, 0.0, 1.0, 1.0], [0.0, 0.0]), strict=True):
        key = comparison_figures.key_of(model.recipe, 0, model.sha256, "gcd")
        rows += [{"task": key, "doc_id": i, "scores": {"right": right}, **cost} for i, right in enumerate(rights)]
    for model, walls in zip(models, ([1.0, 1.0, 4.0], [], [2.0, 3.0]), strict=True):
        key = comparison_figures.key_of(model.recipe, 0, model.sha256, "speed_chat_1")
        rows += [{"task": key, "doc_id": i, "scores": {"wall": wall}, **cost} for i, wall in enumerate(walls)]
    for model, num_first_runs in zip(models[1:], (3, 0), strict=True):
        key = comparison_figures.key_of(model.recipe, 0, model.sha256, "speed_chat_32")
        rows.append({"task": key, "doc_id": 0, "scores": {"wall": 1.0}, "num_first_runs": num_first_runs, **cost})
    rows[-1] |= {"prepared": [4, 10, 2]}  # 10 lengths in 4 forwards, 2 in the last one
    result = comparison_figures.result(rows, models, contenders, [task], {})
    runs = {run.label: run for run in result.runs}
    assert result.settings["unfinished"] == []
    assert runs["block_diffusion"].figures["accuracy_gcd"].value == 0.75
    assert runs["masked_diffusion"].settings["num_problems"] == {"gcd": 2}
    difference = runs["block_diffusion - masked_diffusion"]
    assert (difference.settings["num_problems"], difference.figures["accuracy_gcd"].value) == ({"gcd": 2}, 0.5)
    assert runs["training of block_diffusion-0"].figures == {"steps": 400, "validation_mdm": 1.5}
    ratio = runs["masked_diffusion over autoregressive"].figures["speed_chat_1"]
    assert ratio.value == (20 / 5) / (20 / 2)  # the first two prompts
    first_runs = {name: {key: value for key, value in run.figures.items() if key.startswith("first_runs")} for name, run in runs.items()}
    assert first_runs["block_diffusion"] == {"first_runs_chat_32": 3}
    assert (first_runs["masked_diffusion"], first_runs["autoregressive"]) == ({"first_runs_chat_32": 0}, {})
    prepared = [runs["masked_diffusion"].figures[f"prepared_lengths_{name}"] for name in ("chat_32", "last_chat_32")]
    assert prepared == [2.5, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--runs", "/nowhere"), "holds no RECIPE-SEED/final"),
        (("--contenders", "magic"), "unknown contender 'magic'"),
        (("--tasks", "magic"), "unknown task 'magic'"),
        (("--data", "/nowhere"), "cannot read /nowhere"),
        (("--slots", '{"slot_size": 0}'), "slot_size is 0"),
    ],
)
def test_bad_input_is_one_line(compare: Compare, without_second_seed: None, options: tuple[str, ...], message: str) -> None:
    code, err, _content = compare(*options)
    assert (code, err.count("\n")) == (1, 1), err
    assert message in err


def _retrain(final: Path) -> None:
    """Other weights, the same everything else."""
    from safetensors.torch import load_file, save_file

    weights = load_file(final / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 0.01
    save_file(weights, final / "model.safetensors", metadata={"format": "pt"})
