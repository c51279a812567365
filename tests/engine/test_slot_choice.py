"""Slot settings chosen by what forwards cost, with scripted cost tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from refusion import LLM, SamplingParams, SlotParams
from refusion import llm as llm_module
from refusion.engine.costs import CostTable
from refusion.engine.network import FlatNetwork
from refusion.engine.slot_choice import HOST_SECONDS, HOST_SECONDS_AUTOREGRESSIVE, Choice, Expected, choose, read_choices
from refusion.errors import CheckpointError

FLAT = CostTable((1, 64), (0.05, 0.05))  # rows are free: many tokens a forward win
STEEP = CostTable((1, 2), (0.01, 0.02))  # every row costs the same: few rows win
NARROW = {"slot_size": 2, "block_size": 2, "max_candidates": 0, "expected": [{"tokens_per_forward": 1.5, "rows": {"4": 1.0}}]}
WIDE = {"slot_size": 4, "block_size": 8, "max_candidates": 3, "expected": [{"tokens_per_forward": 3.0, "rows": {"8": 0.5, "24": 0.5}}]}


def sizes_of(choices: list[dict[str, Any]], costs: CostTable) -> int:
    return choose(read_choices(choices), costs)["slot_size"]


def test_free_rows_call_for_wide_blocks_and_dear_ones_for_narrow() -> None:
    for order in ([NARROW, WIDE], [WIDE, NARROW]):
        assert sizes_of(order, FLAT) == 4
        assert sizes_of(order, STEEP) == 2


def test_speed_is_tokens_over_the_mean_cost_of_the_forwards() -> None:
    expected = Expected(3.0, {"8": 0.5, "24": 0.5})
    assert expected.tokens_per_second(STEEP) == pytest.approx(3.0 / (0.16 + HOST_SECONDS))
    one_by_one = 0.01 + HOST_SECONDS_AUTOREGRESSIVE
    assert Choice({}, [expected]).speedups(STEEP) == pytest.approx([3.0 * one_by_one / (0.16 + HOST_SECONDS)])


def test_whoever_loses_on_some_text_comes_last() -> None:
    def with_kinds(*tokens: float) -> list[dict[str, Any]]:
        return [{"tokens_per_forward": each, "rows": {"4": 1.0}} for each in tokens]

    even, uneven = {**NARROW, "expected": with_kinds(1.5, 1.5)}, {**WIDE, "expected": with_kinds(0.9, 9.0)}
    assert sizes_of([uneven, even], FLAT) == 2
    assert sizes_of([even, {**uneven, "expected": with_kinds(1.2, 9.0)}], FLAT) == 4
    both_lose = [{**NARROW, "expected": with_kinds(0.5, 9.0)}, {**WIDE, "expected": with_kinds(0.8, 1.0)}]
    assert sizes_of(both_lose, FLAT) == 4  # whose worst is better


def test_the_first_choice_stays_unless_another_is_clearly_faster() -> None:
    slightly = {**WIDE, "expected": [{"tokens_per_forward": 1.5 * 1.04, "rows": {"4": 1.0}}]}
    assert sizes_of([NARROW, slightly], FLAT) == 2
    assert sizes_of([slightly, NARROW], FLAT) == 4
    clearly = {**WIDE, "expected": [{"tokens_per_forward": 1.5 * 1.06, "rows": {"4": 1.0}}]}
    assert sizes_of([NARROW, clearly], FLAT) == 4


@pytest.mark.parametrize(
    "broken",
    [
        {"slot_size": 4},
        {"slot_size": 4, "expected": []},
        {"slot_size": 4, "expected": [{"tokens_per_forward": 2.0, "rows": {}}]},
        {"slot_size": 4, "expected": [{"tokens_per_forward": 0.0, "rows": {"4": 1.0}}]},
        {"slot_size": 4, "expected": [{"tokens_per_forward": 2.0, "rows": {"many": 1.0}}]},
        {"slot_threshold": 0.5, "expected": [{"tokens_per_forward": 2.0, "rows": {"4": 1.0}}]},
    ],
    ids=str,
)
def test_malformed_choices_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="choices of the checkpoint's slots"):
        read_choices([broken])


@pytest.fixture
def choosing_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, with two sizes to choose from."""
    path = tmp_path / "choosing"
    shutil.copytree(tiny_model_dir, path)
    config = json.loads((path / "config.json").read_text())
    slots = {"slot_size": 2, "block_size": 2, "max_candidates": 0, "token_threshold": 0.25, "choices": [NARROW, WIDE]}
    (path / "config.json").write_text(json.dumps(config | {"refusion": {"slots": {"cpu": slots}}}))
    return path


@pytest.mark.parametrize(("costs", "size"), [(FLAT, 4), (STEEP, 2)])
def test_a_model_decodes_in_the_sizes_that_suit_the_machine(
    choosing_dir: Path, monkeypatch: pytest.MonkeyPatch, costs: CostTable, size: int
) -> None:
    asked: list[FlatNetwork] = []
    monkeypatch.setattr(llm_module, "measured_costs", lambda network: asked.append(network) or costs)
    llm = LLM.from_pretrained(choosing_dir, dtype="float32")
    settings = llm.resolve_slots(SlotParams())
    assert (settings.slot_size, settings.token_threshold) == (size, 0.25)
    assert settings == llm.resolve_slots(SlotParams(token_threshold=0.25)) == llm.new_request([7, 8], SamplingParams(max_tokens=8)).slots
    assert asked == [llm.engine.runner.network]  # once
    given = {name: value for name, value in (WIDE if size == 4 else NARROW).items() if name != "expected"}
    open_answer, given_answer = (llm.generate([[7, 8, 9]], SamplingParams(max_tokens=6), slots)[0] for slots in (None, SlotParams(**given)))
    assert open_answer.token_ids == given_answer.token_ids
    assert open_answer.stats.num_forwards == given_answer.stats.num_forwards


def test_what_a_user_gives_is_never_chosen_nor_measured(choosing_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "measured_costs", lambda network: pytest.fail("nothing is open"))
    llm = LLM.from_pretrained(choosing_dir, dtype="float32")
    assert llm.resolve_slots(SlotParams(slot_size=3)).slot_size == 3
    assert llm.resolve_slots(SlotParams(block_size=6)).slots_per_block(12) == 3  # of the slot size that is recommended
    assert llm.resolve_slots(SlotParams(max_candidates=1)).slot_size == 2
    assert llm.new_request([7, 8], SamplingParams(max_tokens=8), decoder="autoregressive").slots is None
