"""Ablations on a tiny model: every arm of every group, resumed, refused for another checkpoint, drawn."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refusion.evaluation.results import Result, Run, read_result, write_result
from refusion.evaluation.statistics import Interval
from refusion.synthesis.jsonl import write_rows

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Script = Callable[..., tuple[int, str, str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def script(name: str, *options: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return script


@pytest.fixture
def options(tmp_path: Path, tiny_model_dir: Path) -> list[object]:
    chat = tmp_path / "chat.jsonl"
    write_rows(chat, [{"query": "hello"}, {"query": "again"}])
    sizes = ["--limit", 2, "--max-tokens", 8, "--chat-rows", 2, "--speed-prompts", 2, "--dtype", "float32", "--batch-size", 2]
    models = ["--model", tiny_model_dir, "--base", tiny_model_dir, "--chat-data", chat]
    return [*models, *sizes, "--output", tmp_path / "out.json"]


def test_every_arm_is_measured_and_none_twice(script: Script, options: list[object], tmp_path: Path) -> None:
    code, _out, err = script("ablations", *options, "--seconds", 0)
    assert (code, "out of time" in err) == (0, True)
    code, out, err = script("ablations", *options)
    assert code == 0, err
    runs: dict[str, Any] = {run["label"]: run for run in read_result(tmp_path / "out.json")["runs"]}
    assert len(runs) == len(out.splitlines()) == 50
    assert {run["settings"]["group"] for run in runs.values()} == {"slots", "thresholds", "rules", "fusion", "infill", "kv", "score"}
    wide = runs["slots: 16 in 128"]
    assert (wide["settings"]["slots"]["slot_size"], wide["settings"]["slots"]["block_size"]) == (16, 128)
    sliding = runs["slots: 16 sliding"]["settings"]["slots"]
    assert (sliding["sliding"], sliding["slot_size"], sliding["block_size"], sliding["infill_length"]) == (True, 16, None, 4)
    assert {"slots: 32 in 128"} <= runs.keys()
    assert {"accuracy", "tokens_per_forward", "tokens_per_second", "over_autoregressive", "chat_agreement"} <= wide["figures"].keys()
    assert {"prepared_lengths", "prepared_lengths_last"} <= wide["figures"].keys()
    assert runs["fusion: two-pass"]["figures"]["prepared_lengths"] == 0
    assert "tokens_per_second" not in runs["kv: computed anew, slot 0.9"]["figures"]  # the plain decoder
    fused, two_pass = (runs[f"fusion: {name}"]["figures"] for name in ("fused rounds and infill", "two-pass"))
    assert fused["mean_tokens"] == two_pass["mean_tokens"]  # the same tokens
    assert fused["tokens_per_forward"]["value"] > two_pass["tokens_per_forward"]["value"]
    plain, first = runs["kv: as the infill left them, slot 0.9"]["figures"], runs["score: first token, slot 0.9"]["figures"]
    assert plain == first  # two ways to say the same
    code, out, err = script("ablations", *options)
    assert (code, out) == (0, ""), err


def test_arms_of_another_setting_are_not_mixed_in(script: Script, options: list[object]) -> None:
    only = ("--groups", "fusion")
    assert script("ablations", *options, *only)[0] == 0
    code, _out, err = script("ablations", *options, *only, "--slot-size", 4)
    assert (code, err.count("\n")) == (1, 1)
    assert "measured with other settings" in err
    code, _out, err = script("ablations", *options, "--groups", "magic")
    assert (code, "unknown group 'magic'" in err) == (1, True)
    code, _out, err = script("ablations", *options, "--arms", "magic*")
    assert (code, err.count("\n"), "no arm is named 'magic*'" in err) == (1, 1, True)


def test_arms_can_be_chosen_and_ordered(script: Script, options: list[object], tmp_path: Path) -> None:
    arms = ("rules: paper acceptance, *", "slots: common", "rules: *")
    code, _out, err = script("ablations", *options, "--arms", *arms, "--chat-rows", 0, "--speed-prompts", 0)
    assert code == 0, err
    labels = [run["settings"]["label"] for run in read_result(tmp_path / "out.json")["runs"]]
    assert labels == [
        "paper acceptance, paper correction",
        "paper acceptance, autoregressive correction",
        "common",
        "argmax acceptance, paper correction",
        "argmax acceptance, autoregressive correction",
    ]


def test_alternatives_of_the_checkpoint_are_left_out_where_the_correction_knows_none(
    script: Script, options: list[object], tmp_path: Path, tiny_model_dir: Path
) -> None:
    path = tmp_path / "recommends"
    shutil.copytree(tiny_model_dir, path)
    config = json.loads((path / "config.json").read_text()) | {"refusion": {"slots": {"cpu": {"slot_size": 4, "alternatives": 2}}}}
    (path / "config.json").write_text(json.dumps(config))
    code, _out, err = script("ablations", *options, "--model", path, "--groups", "rules", "--speed-prompts", 0)
    assert code == 0, err
    runs = read_result(tmp_path / "out.json")["runs"]
    tried = {run["settings"]["label"]: run["settings"]["slots"]["alternatives"] for run in runs}
    assert tried["argmax acceptance, autoregressive correction"] == 2
    assert tried["argmax acceptance, paper correction"] == 0


def test_plots_are_drawn_from_all_result_files_and_are_the_same_twice(script: Script, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = {"accuracy": Interval(0.5, 0.4, 0.6), "over_autoregressive": 2.0}
    runs = [Run(label=f"slots: {i}", settings={"group": "slots", "label": f"arm {i}"}, figures=figures) for i in (4, 8)]
    runs.append(Run(label="kv: x", settings={"group": "kv", "label": "x"}, figures={"accuracy": Interval(0.5, 0.4, 0.6)}))
    inputs = [tmp_path / "ablations.json", tmp_path / "more.json"]
    write_result(inputs[0], Result(name="ablations", settings={}, runs=runs))
    more = [runs[0], Run(label="slots: 16", settings={"group": "slots", "label": "arm 16"}, figures=figures)]
    write_result(inputs[1], Result(name="ablations", settings={}, runs=more))
    drawn = []
    for _ in range(2):
        code, _out, err = script("ablation_plots", "--input", *inputs, "--output", tmp_path)
        assert code == 0, err
        assert [path.name for path in tmp_path.glob("*.svg")] == ["ablations-slots.svg"]
        drawn.append((tmp_path / "ablations-slots.svg").read_text())
    assert drawn[0] == drawn[1]
    assert "tokens/s at batch 1" in drawn[0]
    assert [drawn[0].count(f">arm {i}<") for i in (4, 8, 16)] == [1, 1, 1], "the legend names every arm once"
    write_result(tmp_path / "empty.json", Result(name="ablations", settings={}, runs=runs[2:]))
    code, _out, err = script("ablation_plots", "--input", tmp_path / "empty.json", "--output", tmp_path)
    assert (code, "no arm with a speed" in err) == (1, True)
