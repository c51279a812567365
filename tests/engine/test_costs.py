"""Cost tables: measured once, kept, and measured anew where what was kept cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refusion.decoding.params import SlotSettings
from refusion.engine import costs
from refusion.engine.candidates import Candidates
from refusion.engine.costs import CostTable, measure, measured_costs, typical_costs
from refusion.engine.network import FlatNetwork

TABLE = CostTable((1, 4), (0.5, 2.0))


def test_a_table_is_measured_once_and_again_where_it_cannot_be_read(
    network: FlatNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[FlatNetwork] = []
    monkeypatch.setenv("REFUSION_HOME", str(tmp_path))
    monkeypatch.setattr(costs, "measure", lambda network, widths: measured.append(network) or TABLE)
    assert measured_costs(network) == measured_costs(network) == TABLE
    assert len(measured) == 1
    (file,) = (tmp_path / "costs").iterdir()
    for spoilt in ("", "{", "[]", '{"widths": [1], "seconds": [1.0]}', '{"widths": [1, 2], "seconds": [1, 2]}', "5"):
        file.write_text(spoilt)  # the last but one is of a version that did not know unrest
        assert measured_costs(network) == TABLE
    assert len(measured) == 7


def test_what_a_busy_machine_said_is_not_kept(
    network: FlatNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("REFUSION_HOME", str(tmp_path))
    tables = [CostTable((1, 4), (2.0, 2.0), unrest=3.0), TABLE]
    monkeypatch.setattr(costs, "measure", lambda network, widths: tables.pop(0))
    monkeypatch.setattr(costs, "_of_this_process", {})
    assert measured_costs(network) == measured_costs(network) != TABLE  # once a process
    assert not (tmp_path / "costs").exists()
    assert len(caplog.records) == 1
    costs._of_this_process.clear()  # the next one
    assert measured_costs(network) == measured_costs(network) == TABLE


@pytest.mark.parametrize(
    ("dtype", "has_amx", "expected"), [("bfloat16", True, "WITH_AMX"), ("bfloat16", False, "WITHOUT_AMX"), ("float32", True, "WITHOUT_AMX")]
)
def test_a_row_is_cheap_only_where_the_processor_multiplies_tiles(
    network: FlatNetwork, monkeypatch: pytest.MonkeyPatch, dtype: str, has_amx: bool, expected: str
) -> None:
    monkeypatch.setattr(network, "dtype", getattr(torch, dtype))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert typical_costs(network).seconds == getattr(costs, expected)


def test_sliding_slots_prepare_fewer_lengths_where_rows_are_dear() -> None:
    slots = SlotSettings(slot_size=16, sliding=True, acceptance="exact", correction="autoregressive", alternatives=1, infill_length=3)
    chosen = []
    for seconds in (costs.WITH_AMX, costs.WITHOUT_AMX):
        table = CostTable(costs.TYPICAL_WIDTHS, seconds)
        candidates = Candidates(lambda table=table: table, 4096, spares_rows=True, tokens_per_forward=2.3)
        chosen.append(candidates.choose(candidates.experience(slots, 1), 1).candidates)
    assert chosen == [4, 0]


def test_unrest_is_how_far_repeats_are_apart(network: FlatNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU all widths take turns; the first rounds only warm up."""
    rounds = [[9.0, 9.0, 9.0]] * costs.WARM_UP + [[1.0, 2.0, 3.0], [1.1, 6.0, 3.0], [1.2, 8.0, 30.0]]
    taken = iter([seconds for each in rounds for seconds in each])
    monkeypatch.setattr(costs, "_seconds", lambda *_: [next(taken)])
    assert costs.measure(network, (1, 2, 3), repeats=3) == CostTable((1, 2, 3), (1.0, 2.0, 3.0), unrest=1.1)


def test_costs_are_linear_between_the_measured_widths_and_beyond() -> None:
    assert [float(TABLE.cost(rows)) for rows in (1, 2, 4, 6)] == [0.5, 1.0, 2.0, 3.0]


def test_measuring_ends_in_time_and_what_it_had_no_time_for_is_uncertain(network: FlatNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(costs, "_seconds", lambda forward, device, repeats: counts.append(repeats) or [0.001])
    assert measure(network, (1, 2), repeats=3).unrest == 1.0
    assert len(counts) == 2 * (costs.WARM_UP + 3)
    monkeypatch.setattr(costs, "MOST_SECONDS", 0.0)
    counts.clear()
    assert measure(network, (1, 2), repeats=3).unrest > costs.CALM
    assert len(counts) == 2 * (costs.WARM_UP + 1)
