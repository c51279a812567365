from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import RunCli

from refusion.evaluation.results import read_result
from refusion.llm import DECODERS

SHORT = ("--dtype", "float32", "--seconds", "0.2", "--max-tokens", "8", "--slot-size", "4")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("hello\n\nand again\n")
    return path


def test_every_decoder_is_measured_at_every_batch_size(run_cli: RunCli, tiny_model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    sizes = ("--batch-size", 1, "--batch-size", 3)
    named = [word for name in DECODERS for word in ("--decoder", name)]
    found = run_cli("bench", "--model", tiny_model_dir, *SHORT, *sizes, *named, "--prompts", prompts, "--json", "--output", output)
    assert found.code == 0, found.err
    assert found.err == ""  # no progress without a terminal
    assert found.json == read_result(output)
    runs = {run["label"]: run["figures"] for run in found.json["runs"]}
    assert {*runs} == {"forward", "prefill"} | {f"{name} at {size}" for name in (*DECODERS, "compared") for size in (1, 3)}
    assert runs["forward"]["forward_ms_1"] > 0
    assert runs["prefill"]["prefill_tokens_per_second_128"]["value"] > 0
    assert "prefill_tokens_per_second_512" not in runs["prefill"]  # longer than the context of the tiny model
    assert runs["autoregressive at 1"]["tokens_per_forward"]["value"] == 1.0
    assert runs["refusion at 3"]["num_requests"] >= 3
    assert runs["refusion at 1"]["first_token_ms_p50"] > 0
    assert 0 <= runs["refusion at 1"]["prepared_lengths"] <= 4
    assert runs["compared at 3"]["refusion_over_autoregressive"] > 0
    assert found.json["settings"]["slots"]["slot_size"] == 4


def test_the_table_has_a_line_and_a_bar_for_every_decoder(run_cli: RunCli, tiny_model_dir: Path, prompts: Path) -> None:
    decoders = ("--decoder", "refusion", "--decoder", "autoregressive")
    found = run_cli("bench", "--model", tiny_model_dir, *SHORT, *decoders, "--prompts", prompts)
    assert found.code == 0, found.err
    assert "prefill, tokens/s: " in found.out
    assert "auto at 1" not in found.out
    assert max(line.count("█") for line in found.out.splitlines()) == 40
    assert sum("tokens/s" in line and "█" in line for line in found.out.splitlines()) == 2


def test_a_checkpoint_without_mask_token_is_measured_one_by_one(run_cli: RunCli, edited_model: Callable[..., Path], prompts: Path) -> None:
    path = edited_model(mask_token_id=None)
    found = run_cli("bench", "--model", path, *SHORT, "--prompts", prompts, "--json")
    assert found.code == 0, found.err
    assert found.json["settings"]["decoders"] == ["autoregressive"]
    named = run_cli("bench", "--model", path, *SHORT, "--decoder", "refusion")
    assert named.code == 1
    assert "no mask token" in named.err


@pytest.mark.parametrize(
    ("objective", "decoders"),
    [
        (None, ["refusion", "autoregressive", "auto"]),
        ("refusion", ["refusion", "autoregressive", "auto"]),
        ("masked_diffusion", ["autoregressive", "masked_diffusion"]),
        ("block_diffusion", ["autoregressive", "block_diffusion"]),
    ],
)
def test_decoders_that_the_checkpoint_was_not_trained_for_are_measured_only_by_name(
    run_cli: RunCli, edited_model: Callable[..., Path], prompts: Path, objective: str | None, decoders: list[str]
) -> None:
    path = edited_model(refusion=objective and {"training": {"objective": {"name": objective}}})
    found = run_cli("bench", "--model", path, *SHORT, "--batch-size", 1, "--prompts", prompts, "--json")
    assert found.code == 0, found.err
    assert found.json["settings"]["decoders"] == decoders
    named = run_cli("bench", "--model", path, *SHORT, "--batch-size", 1, "--decoder", "masked_diffusion", "--prompts", prompts, "--json")
    assert named.json["settings"]["decoders"] == ["masked_diffusion"], named.err


def test_json_lines_and_built_in_prompts(run_cli: RunCli, tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"query": "hello"}) + "\n")
    found = run_cli("bench", "--model", tiny_model_dir, *SHORT, "--decoder", "autoregressive", "--prompts", rows, "--json", "--raw")
    assert found.json["settings"]["num_prompts"] == 1
    built_in = run_cli("bench", "--model", tiny_model_dir, *SHORT, "--decoder", "autoregressive", "--json")
    assert built_in.json["settings"]["num_prompts"] >= 8


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--seconds", "0"), 2, "--seconds is 0"),
        (("--batch-size", "0"), 2, "--batch-size is 0"),
        (("--decoder", "magic"), 2, "--decoder is 'magic'"),
        (("--plot", "bench.jpeg"), 2, "--plot is 'bench.jpeg'"),
        (("--prompts", "absent.txt"), 1, "cannot read absent.txt"),
        (("--prompts", "empty.txt"), 1, "empty.txt holds no prompt"),
        (("--device", "tpu"), 1, "tpu"),
        (("--max-tokens", "100000"), 1, "max_tokens is 100000"),
    ],
)
def test_bad_input_is_one_line(
    run_cli: RunCli, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    found = run_cli("bench", "--model", tiny_model_dir, *flags)
    assert (found.code, found.err.count("\n")) == (code, 1), found.err
    assert message in found.err


def test_a_plot_without_matplotlib_says_how_to_get_it(run_cli: RunCli, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = run_cli("bench", "--model", tiny_model_dir, "--plot", "bench.svg")
    assert (found.code, found.err.count("\n")) == (1, 1), found.err
    assert "pip install 'refusion[plot]'" in found.err


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_plot_is_drawn(run_cli: RunCli, tiny_model_dir: Path, prompts: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"bench.{suffix}"
    found = run_cli("bench", "--model", tiny_model_dir, *SHORT, "--batch-size", 1, "--batch-size", 2, "--prompts", prompts, "--plot", path)
    assert found.code == 0, found.err
    assert path.stat().st_size > 1000
    assert "█" not in found.out
    assert suffix != "svg" or "autoregressive" in path.read_text()


def test_ctrl_c_ends_it_with_one_line(run_cli: RunCli, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refusion.evaluation import speed

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "prefill_speeds", interrupted)
    found = run_cli("bench", "--model", tiny_model_dir, *SHORT)
    assert (found.code, found.err) == (130, "stopped\n")
