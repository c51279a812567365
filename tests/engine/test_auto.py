from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engines import SLOTS, Plain, is_idle, new_request, run

from refusion.engine.auto import Auto
from refusion.engine.candidates import ByBudget, ByCost, Load
from refusion.engine.core import Engine
from refusion.engine.costs import CostTable
from refusion.engine.requests import Answer

FLAT = CostTable((1, 1000), (1.0, 1.0))
STEEP = CostTable((1, 1000), (0.001, 1.0))  # every row costs the same
BENT = CostTable((1, 100, 1000), (1.0, 1.0, 10.0))  # a hundred rows for the price of one


def auto(costs: CostTable, tokens_per_forward: float = 2.0) -> Auto:
    return Auto(lambda: costs, ByBudget(100, 1000), tokens_per_forward=tokens_per_forward)


def load(most: int, num_rows: Callable[[int], int] = lambda candidates: 10 + 10 * candidates, **more: Any) -> Load:
    return Load(most, num_rows, **({"accepted": np.zeros(5), "share_judged": 1.0} | more))


ASKED = new_request([7], [], decoder="auto")


def test_free_rows_speak_for_slots_and_dear_ones_against() -> None:
    assert auto(FLAT)(ASKED, 1) == "refusion"
    assert auto(STEEP)(ASKED, 1) == "autoregressive"
    assert auto(BENT)(ASKED, 1) == "refusion"
    assert auto(BENT)(ASKED, 64) == "autoregressive"


def test_a_small_advantage_is_no_reason_to_switch() -> None:
    chooser = auto(FLAT, tokens_per_forward=1.01)
    assert chooser(ASKED, 1) == "refusion"
    for tokens, chosen in ((99, "refusion"), (95, "autoregressive"), (101, "autoregressive"), (110, "refusion")):
        for _ in range(100):
            chooser.learn(4, SLOTS.candidates(), num_requests=100, num_tokens=tokens, num_rows=1000)
        assert chooser(ASKED, 1) == chosen


def test_experience_outgrows_what_was_said_before() -> None:
    chooser = auto(FLAT, tokens_per_forward=2.0)
    for _ in range(500):
        chooser.learn(4, SLOTS.candidates(), num_requests=4, num_tokens=3, num_rows=40)
    assert chooser(ASKED, 1) == "autoregressive"  # fewer tokens than forwards
    for _ in range(1000):
        chooser.learn(4, SLOTS.candidates(), num_requests=4, num_tokens=9, num_rows=40)
    assert chooser(ASKED, 1) == "refusion"


def test_costs_are_measured_once_and_only_when_asked_for() -> None:
    num_measured = 0

    def measure() -> CostTable:
        nonlocal num_measured
        num_measured += 1
        return FLAT

    chooser = Auto(measure, ByBudget(100, 1000))
    chooser.learn(4, 3, num_requests=1, num_tokens=1, num_rows=1)
    assert num_measured == 0
    for load in (1, 2):
        chooser(ASKED, load)
    assert num_measured == 1


@pytest.mark.parametrize(
    ("most", "budget", "chosen"), [(15, 1000, 15), (15, 100, 8), (15, 50, 4), (15, 1, 1), (3, 1000, 3), (3, 35, 2), (0, 1, 0)]
)
def test_as_many_lengths_are_prepared_as_the_budget_allows(most: int, budget: int, chosen: int) -> None:
    assert ByBudget(budget, 1000)(load(most)) == chosen


def test_no_length_is_prepared_where_a_forward_could_not_hold_its_rows() -> None:
    assert ByBudget(1, 19)(load(15)) == 0


def test_where_every_row_costs_only_lengths_that_come_up_are_prepared() -> None:
    short = np.array([50, 30, 20, 0, 0])  # slots advance by two tokens at most
    by_cost = ByCost(lambda: STEEP, 1000)
    assert by_cost(load(4, num_rows=lambda candidates: 100 + candidates, accepted=short)) == 2
    assert by_cost(load(4, num_rows=lambda candidates: 1 + 100 * candidates, accepted=short)) == 0
    assert by_cost(load(4, accepted=short, share_judged=0.0)) == 0
    assert ByCost(lambda: FLAT, 25)(load(4, accepted=short)) == 1  # no more rows than a forward holds


@pytest.mark.parametrize(("costs", "decoders"), [(FLAT, {"refusion"}), (STEEP, {"autoregressive"})], ids=["free rows", "dear rows"])
def test_the_engine_decodes_each_request_as_chosen(
    new_engine: Callable[..., Engine], plain: Plain, costs: CostTable, decoders: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(costs=costs, max_num_seqs=2)
    monkeypatch.setattr(engine.auto, "learn", lambda *_, **__: None)  # a random model accepts next to nothing
    answers: list[Answer] = []
    requests = [new_request([7, 8, index], answers, index=index, decoder="auto") for index in range(5)]
    for request in requests:
        engine.add(request)
    aborted = engine.add(new_request([9], answers, index=9, decoder="auto"))
    engine.abort(aborted)
    run(engine)
    assert {answer.decoder for answer in answers} == decoders
    assert [answer.token_ids for answer in sorted(answers, key=lambda answer: answer.request)] == [
        plain(request, next(iter(decoders)))[0] for request in requests
    ]
    assert is_idle(engine)


def test_the_choice_follows_the_load(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine(costs=CostTable((1, 60, 1000), (1.0, 1.0, 100.0)), max_num_seqs=16, max_prompt_rows=64)
    answers: list[Answer] = []
    for index in range(16):
        engine.add(new_request([7, index], answers, index=index, decoder="auto"))
    run(engine)
    assert {answer.decoder for answer in answers} == {"autoregressive"}
    engine.add(new_request([7, 8], answers, index=16, decoder="auto"))
    run(engine)
    assert answers[-1].decoder == "refusion"
