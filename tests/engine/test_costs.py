"""Cost tables: measured once, kept, and measured anew where what was kept cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from refusion.engine import costs
from refusion.engine.costs import CostTable, measured_costs
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
    for spoilt in ("", "{", "[]", '{"widths": [1], "seconds": [1.0]}', '{"widths": [1, 2], "seconds": ["a", "b"]}'):
        file.write_text(spoilt)
        assert measured_costs(network) == TABLE
    assert len(measured) == 6


def test_costs_are_linear_between_the_measured_widths_and_beyond() -> None:
    assert [float(TABLE.cost(rows)) for rows in (1, 2, 4, 6)] == [0.5, 1.0, 2.0, 3.0]
