from __future__ import annotations

from pathlib import Path

import pytest

from refusion.engine.costs import CostTable


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_speed_follows_from_rows_and_costs() -> None:
    """12 tokens in forwards of 4 and 8 rows (20 + 40 ms, 1 ms each on the host); one by one they take 12 x 10 ms."""
    from cpu_slots import Count, predicted  # type: ignore[import-not-found]  # a script of the benchmarks folder

    costs = CostTable((4, 8), (0.02, 0.04))
    figures = predicted({"chat": Count(12, [4, 8])}, costs, 0.001, 0.01)
    assert figures["tokens_per_forward_chat"] == 6.0
    assert figures["rows_chat"] == 6.0
    assert figures["speedup_chat"] == pytest.approx(0.12 / 0.062)
    assert figures["speedup_mean"] == pytest.approx(figures["speedup_chat"])


def test_no_choice_prepares_for_a_length_that_cannot_occur() -> None:
    from cpu_slots import choices  # type: ignore[import-not-found]  # a script of the benchmarks folder

    found = list(choices())
    assert all((slots.max_candidates or 0) < (slots.slot_size or 0) for slots in found)
    assert len(set(found)) == len(found)
