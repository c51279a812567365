"""The recipe ablations on a tiny model on a CPU: trained, measured, not repeated, continued and put into a table."""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refusion.evaluation.results import read_result
from refusion.synthesis.jsonl import write_rows
from refusion.training.recipe import changed_settings, load_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Script = Callable[..., tuple[int, str]]


@pytest.fixture
def script(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Script]:
    """Runs the script in this process; its trainings have their own. Returns exit code and standard error."""
    rows = [{"query": f"what is {i}", "response": f"a number, {i} of them, and then some more of it"} for i in range(40)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "heldout.jsonl", [{"query": f"who is {i}", "response": "nobody at all"} for i in range(6)])
    settings = [f"base={tiny_model_dir}", "mask_token=", "model.attention=sdpa", "model.residual=float32", "compile=false"]
    settings += ["pack_length=256", "rows_per_step=2", "chunk_size=64", "num_workers=0", "log_steps=1"]
    sets = [word for setting in settings for word in ("--set", setting)]
    options = ["--train", tmp_path / "train.jsonl", "--data", tmp_path / "heldout.jsonl", "--rows", "4:6", "--validation-rows", 4]
    options += ["--max-tokens", 6, "--jobs", 2, "--apart", 0, "--work", tmp_path / "work", "--output", tmp_path / "out.json"]
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))

    def script(*more: object, name: str = "recipe_ablations") -> tuple[int, str]:
        monkeypatch.setattr(
            sys, "argv", [f"{name}.py", *map(str, [*options, *sets] if name == "recipe_ablations" else []), *map(str, more)]
        )
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        return int(stop.value.code or 0), capsys.readouterr().err

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield script
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_an_arm_is_trained_measured_and_not_repeated(script: Script, tmp_path: Path) -> None:
    arms = ["--arms", "the paper's rows, cosine*"]
    code, err = script(*arms, "--steps", 2)
    assert code == 0, err
    content = read_result(tmp_path / "out.json")
    untrained, cosine = content["runs"]
    assert (untrained["label"], cosine["label"]) == ("before training", "the paper's rows, cosine noise")
    assert untrained["figures"]["agreement_one_by_one"]["value"] == 1.0  # it is its own judge
    assert {"tokens_per_forward", "agreement", "base_nll", "validation_ar", "validation_mdm"} <= cosine["figures"].keys()
    assert cosine["figures"]["validation_ar"] != untrained["figures"]["validation_ar"]
    assert cosine["settings"]["changes"] == ["objective.serial_share=0", "objective.noise=cosine"]
    assert cosine["settings"]["against"] == "the paper's rows alone"
    assert cosine["series"]["seconds_of_training"].keys() == {"start", "data", "first step", "other steps", "end"}
    settings = content["settings"]
    assert (settings["is_complete"], settings["missing"], settings["base_recipe"]["run"]["max_steps"]) == (True, [], 2)
    assert "step 2/2" in (tmp_path / "work" / "the-paper-s-rows-cosine-noise.log").read_text()

    code, err = script(*arms, "--steps", 2)
    assert (code, err.count("measured before")) == (0, 2)
    assert read_result(tmp_path / "out.json")["runs"] == content["runs"]

    code, err = script(*arms, "--steps", 3)
    assert code == 1
    assert "was trained with another run.max_steps; choose another --work" in err

    page = tmp_path / "page.md"
    page.write_text("<!-- table:recipes out -->\n<!-- /table -->\n")
    code, err = script("--results", tmp_path, page, name="tables")
    assert code == 0, err
    assert "| the paper's rows, cosine noise | 2 |" in page.read_text()


def test_out_of_time_it_says_what_is_missing_and_a_failed_arm_leaves_the_others(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ("--steps", 10_000)  # more than any machine takes in that time
    code, err = script("--arms", "base", "--seconds", 20, *steps)  # enough to measure what needs no training
    assert code == 0, err
    assert "out of time for base; the same command goes on from here" in err
    settings = read_result(tmp_path / "out.json")["settings"]
    assert (settings["is_complete"], settings["missing"]) == (False, ["base"])

    monkeypatch.setattr(sys, "executable", "/bin/false")  # every training fails at once
    code, err = script("--arms", "base", "slots of 4", *steps)
    assert code == 1
    assert "base failed: ended with 1: without a word" in err
    content = read_result(tmp_path / "out.json")
    assert (content["settings"]["failed"], len(content["runs"])) == (["base", "slots of 4"], 1)


def test_every_arm_is_a_recipe_that_differs_from_the_one_it_is_put_against() -> None:
    arms: list[Any] = runpy.run_path(str(BENCHMARKS / "recipe_arms.py"))["arms"]()
    recipe = BENCHMARKS.parent / "recipes" / "comparison" / "refusion.toml"
    tables = {arm.label: load_recipe(recipe, arm.changes).to_table() for arm in arms}
    assert len({arm.name for arm in arms}) == len(tables) == len(arms)
    for arm in arms:
        changed = set(changed_settings(tables["base"], tables[arm.label]))
        assert changed <= {change.partition("=")[0] for change in arm.changes}
        assert arm.against in tables
        assert tables[arm.against] != tables[arm.label] or arm.length != 1 or arm.label == "base"


def test_an_arm_that_is_none_is_named(script: Script) -> None:
    code, err = script("--arms", "slot of 4")
    assert (code, err.count("\n")) == (1, 1)
    assert "no arm is named 'slot of 4'; known are base, " in err
