from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engines import SLOTS, Plain, is_idle, new_request, run

from refusion.decoding.params import SlotSettings
from refusion.decoding.refusion_report import AGENDA, ReportColumns, rows_needed
from refusion.decoding.rounds import IS_DONE, NUM_ROWS
from refusion.decoding.sliding_report import NUM_DRAFTED, NUM_KNOWN, PLANS, final_columns, report_width
from refusion.decoding.state import DONE, INFILL, PLAN, REMASK, VERIFY
from refusion.engine.auto import Auto
from refusion.engine.candidates import Candidates
from refusion.engine.commits import Demand
from refusion.engine.core import Engine
from refusion.engine.costs import CostTable
from refusion.engine.experience import Experience
from refusion.engine.requests import Answer, lane_key
from refusion.engine.sliding import FEW, SlidingDemand, SlidingExperience

FLAT = CostTable((1, 1000), (1.0, 1.0))
STEEP = CostTable((1, 1000), (0.01, 10.0))  # every row costs the same
BENT = CostTable((1, 100, 1000), (1.0, 1.0, 10.0))  # a hundred rows for the price of one
H100 = CostTable((1, 16, 64, 128, 192, 512, 4096), (7.1e-4, 8.8e-4, 1e-3, 1.2e-3, 1.4e-3, 2.4e-3, 1.3e-2))
LONG = SlotSettings(slot_size=16, block_size=16)
SLIDING_SLOTS = SlotSettings(slot_size=16, acceptance="exact", infill_length=4, alternatives=2, sliding=True)
ASKED = new_request([7], [], decoder="auto")


def auto(costs: CostTable, tokens_per_forward: float = 2.0) -> tuple[Auto, Candidates]:
    candidates = Candidates(lambda: costs, 4096, tokens_per_forward=tokens_per_forward)
    return Auto(lambda: costs, candidates, 4096), candidates


def experience_of(candidates: Candidates) -> Experience:
    key = lane_key(ASKED, "refusion")
    assert key.slots is not None
    return candidates.experience(key.slots, key.width)


# ---- how many lengths ----


def test_free_rows_are_all_used_and_dear_ones_are_not() -> None:
    experience = Experience(LONG, 1)
    assert experience.ladder == (15, 8, 4, 2, 1, 0)
    assert Candidates(lambda: FLAT, 4096).choose(experience, 1).candidates == 15
    assert Candidates(lambda: STEEP, 4096).choose(experience, 1).candidates == 1
    by_seats = [Candidates(lambda: H100, 4096).choose(experience, seats).candidates for seats in (1, 8, 32)]
    assert by_seats == sorted(by_seats, reverse=True)
    assert by_seats[0] > by_seats[-1] >= 1


def test_lengths_that_a_forward_cannot_hold_are_not_prepared() -> None:
    experience = Experience(LONG, 1)
    fits = [Candidates(lambda: FLAT, 4096).choose(experience, seats).candidates for seats in (16, 32, 64, 128)]
    assert fits[0] == 15
    assert fits == sorted(fits, reverse=True)
    assert all(
        experience.rows_per_forward[experience.ladder.index(chosen)] * seats < 4096
        for chosen, seats in zip(fits, (16, 32, 64, 128), strict=True)
    )


def test_a_number_given_in_the_settings_is_the_number_used() -> None:
    experience = Experience(SlotSettings(slot_size=16, block_size=16, max_candidates=3), 1)
    assert Candidates(lambda: STEEP, 4096).choose(experience, 1).candidates == 3
    none = Experience(SlotSettings(slot_size=16, block_size=16, max_candidates=0), 1)
    assert Candidates(lambda: FLAT, 4096).choose(none, 4).candidates == 0


def test_without_costs_the_settings_decide_and_nothing_is_measured() -> None:
    assert Candidates(None, 4096).choose(Experience(LONG, 1), 4).candidates == 15


def test_rows_for_the_worst_case_are_taken_where_they_cost_less_than_waiting_for_the_report() -> None:
    experience = Experience(LONG, 1)
    assert Candidates(lambda: FLAT, 4096, runs_ahead=True).choose(experience, 1) == (15, True)
    assert not Candidates(lambda: FLAT, 4096).choose(experience, 1).leads
    assert not Candidates(lambda: STEEP, 4096, runs_ahead=True).choose(experience, 1).leads
    crowded = Candidates(lambda: FLAT, 100, runs_ahead=True).choose(experience, 2)  # the most rows of two seats do not fit
    assert not crowded.leads
    assert crowded.candidates > 0
    assert Candidates(lambda: H100, 4096, runs_ahead=True).choose(experience, 1).leads
    one, other = (Candidates(lambda: H100, 4096, runs_ahead=ahead) for ahead in (True, False))
    assert (one.seconds_of_turn(H100, experience, 1) <= other.seconds_of_turn(H100, experience, 1)).all()


def test_seats_of_a_bucket_share_a_number() -> None:
    candidates, experience = Candidates(lambda: H100, 4096), Experience(LONG, 1)
    assert len({candidates.choose(experience, seats).candidates for seats in range(17, 33)}) == 1


def test_a_number_in_use_stays_until_experience_speaks_clearly_against_it() -> None:
    candidates, experience = Candidates(lambda: H100, 4096), Experience(LONG, 1)
    first = candidates.choose(experience, 4).candidates
    assert first > 1
    experience.advanced = np.eye(17)[0]  # every slot is completed at once
    assert candidates.choose(experience, 4).candidates == first  # not yet asked again
    experience.version += 1
    assert candidates.choose(experience, 4).candidates == 1
    experience.advanced = Experience(LONG, 1).advanced
    experience.version += 1
    assert candidates.choose(experience, 4).candidates == first


# ---- what is expected and learned ----


def test_expectations_are_shares_and_fall_with_more_lengths() -> None:
    for slots in (LONG, SLOTS, SlotSettings(slot_size=1), SlotSettings(slot_size=32, block_size=128)):
        experience = Experience(slots, 1)
        assert experience.advanced.sum() == pytest.approx(1.0)
        assert (np.diff(experience.uncovered) >= 0).all()  # the ladder falls
        assert (np.diff(experience.rows) <= 0).all()
    mean = (np.arange(17) * Experience(LONG, 1).advanced).sum() / 0.9
    assert mean == pytest.approx(2.5, abs=0.1)


def test_what_is_learned_does_not_depend_on_the_number_used(new_engine: Callable[..., Engine]) -> None:
    """The same answers, with all lengths prepared and with none: remask forwards are counted apart."""
    found = []
    for limit in (2048, 16):
        engine = new_engine(max_num_seqs=1, max_decode_rows=limit)
        answers: list[Answer] = []
        for index in range(6):
            engine.add(new_request([7, 8, index], answers, index=index, max_tokens=64))
        run(engine)
        experience = engine.scheduler.candidates.experience(SLOTS, 2)
        found.append((experience.weight, experience.tokens, experience.share_judged, *experience.advanced, *experience.rows))
        assert experience.weight > 100
    assert found[0] == pytest.approx(found[1])


def test_lengths_of_exact_sliding_slots_follow_the_cost_of_rows() -> None:
    experience = SlidingExperience(SLIDING_SLOTS, 2.6)
    assert experience.ladder == (4, 3, 2, 1, 0)
    assert experience.tokens_per_forward[0] == pytest.approx(2.6)
    assert (np.diff(experience.tokens_per_forward) < 0).all()  # the ladder falls
    assert (np.diff(experience.rows_per_forward) < 0).all()
    assert Candidates(lambda: FLAT, 4096).choose(experience, 1).candidates == 4
    assert Candidates(lambda: STEEP, 4096).choose(experience, 1).candidates == 0
    by_seats = [Candidates(lambda: H100, 4096).choose(experience, seats).candidates for seats in (1, 8, 32, 128)]
    assert by_seats == sorted(by_seats, reverse=True)
    assert by_seats[0] > by_seats[-1]
    asked = SlidingExperience(replace(SLIDING_SLOTS, max_candidates=3))
    assert Candidates(lambda: STEEP, 4096).choose(asked, 1).candidates == 3
    assert [Candidates(lambda: STEEP, 4096).choose(asked, seats).candidates for seats in (64, 128, 256)] == [3, 1, 0]  # what fits
    assert SlidingExperience(replace(SLIDING_SLOTS, acceptance="argmax", max_candidates=3)).ladder == (3,)


@pytest.mark.parametrize("acceptance", ["exact", "argmax"])
def test_runner_ups_that_are_never_right_are_seen_through(acceptance: Any) -> None:
    """Every draft fails at once, and no runner-up is right: one token a forward."""
    slots = replace(SLIDING_SLOTS, acceptance=acceptance)
    experience, demand = SlidingExperience(slots, 2.6), SlidingDemand(slots)
    before = np.zeros((1, report_width(16)), dtype=np.int32)
    before[0, [NUM_KNOWN, NUM_DRAFTED]] = 1, 3
    report = before.copy()
    report[0, final_columns(16)] = -1
    report[0, final_columns(16).start] = 7
    report[0, NUM_ROWS] = demand.total(before, slots.candidates())
    for _ in range(20_000):
        experience.learn(demand, before, report, np.array([True]), 1)
    assert experience.tokens_per_forward[0] == pytest.approx(1.0, abs=0.02)


def test_what_sliding_slots_teach_does_not_depend_on_the_number_used(new_engine: Callable[..., Engine]) -> None:
    """With all lengths prepared and with none, but for drafts that stand behind a correction or not."""
    found = []
    slots = SlotSettings(slot_size=6, block_size=6, acceptance="exact", infill_length=3, sliding=True)  # as a lane says it
    for costs in (FLAT, STEEP):
        engine = new_engine(max_num_seqs=1, costs=costs)
        answers: list[Answer] = []
        for index in range(12):
            engine.add(new_request([7, 8, index], answers, index=index, max_tokens=64, slots=slots, eos_ids=(9999,)))
        run(engine)
        experience = engine.scheduler.candidates.experience(slots, 1)
        assert isinstance(experience, SlidingExperience)
        assert experience.weight > 200
        seen = sum(answer.num_generated for answer in answers) / sum(answer.num_forwards for answer in answers)
        used = experience.ladder.index(4 if costs is FLAT else 0)
        assert experience.tokens_per_forward[used] == pytest.approx(seen, rel=0.1)
        found.append(experience)
    assert found[0].tokens_per_forward == pytest.approx(found[1].tokens_per_forward, rel=0.1)
    assert found[0].rows == pytest.approx(found[1].rows, rel=0.15)


@pytest.mark.parametrize(("alternatives", "infill_length"), [(0, None), (2, None), (2, 3)])
@pytest.mark.parametrize("width", [1, 3])
def test_rows_by_table_are_those_the_layout_needs(width: int, alternatives: int, infill_length: int | None) -> None:
    columns, draw = ReportColumns(width, 8), np.random.default_rng(0)
    reports = np.zeros((500, columns.total), dtype=np.int32)
    phase = draw.choice([PLAN, VERIFY, REMASK, INFILL, DONE], 500)
    reports[:, columns.agenda] = phase
    verified = draw.integers(-1, 9, (500, width))
    verified[phase == PLAN] = -1
    planned = draw.integers(0, 2, (500, width))
    planned[phase == REMASK] = 0
    first = columns.agenda + AGENDA
    reports[:, first : first + width], reports[:, first + width : first + 2 * width] = verified, planned
    slots = SlotSettings(slot_size=8, alternatives=alternatives, infill_length=infill_length)
    demand = Demand(columns, slots)
    for candidates in (0, 1, 4, 7, 20):
        needed = rows_needed(reports[:, columns.agenda : first + 2 * width], slots, min(candidates, 7))
        for size in (0, 1, 500):
            assert demand.total(reports[:size], candidates) == needed[:size].sum()


@pytest.mark.parametrize("acceptance", ["exact", "argmax"])
@pytest.mark.parametrize(("alternatives", "infill_length"), [(0, None), (2, None), (2, 3)])
def test_rows_of_few_sliding_seats_are_looked_up_as_they_are_computed_for_many(
    alternatives: int, infill_length: int | None, acceptance: Any
) -> None:
    draw = np.random.default_rng(0)
    reports = draw.integers(-1, 9, (2000, report_width(8))).astype(np.int32)
    reports[:, IS_DONE], reports[:, NUM_KNOWN] = draw.integers(0, 2, 2000), draw.integers(0, 3, 2000)
    reports[:, NUM_DRAFTED], reports[:, PLANS] = draw.integers(0, 9, 2000), draw.integers(0, 3, 2000)
    slots = SlotSettings(slot_size=8, acceptance=acceptance, alternatives=alternatives, infill_length=infill_length, sliding=True)
    demand = SlidingDemand(slots)
    for candidates in range(slots.candidates() + 2):
        rows = demand.rows(reports, candidates)
        assert [demand.total(reports[seat : seat + 1], candidates) for seat in range(2000)] == rows.tolist()
        for size in range(2 * FEW):
            assert demand.total(reports[:size], candidates) == rows[:size].sum()


# ---- which decoder ----


def test_free_rows_speak_for_slots_and_dear_ones_against() -> None:
    assert auto(FLAT)[0](ASKED, 1) == "refusion"
    assert auto(STEEP)[0](ASKED, 1) == "autoregressive"
    assert auto(BENT)[0](ASKED, 1) == "refusion"
    assert auto(BENT)[0](ASKED, 64) == "autoregressive"


def test_fewer_lengths_mean_fewer_tokens_for_each_forward() -> None:
    chooser, _ = auto(H100, 2.3)
    asked = new_request([7], [], decoder="auto", slots=LONG, max_tokens=256)
    speeds = [slots / one for slots, one in (chooser.speeds(asked, load) for load in (1, 8, 32, 128))]
    assert speeds[0] > 1.2
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] < 0.7


def test_a_small_advantage_is_no_reason_to_switch() -> None:
    chooser, candidates = auto(FLAT, tokens_per_forward=1.1)
    assert chooser(ASKED, 1) == "refusion"
    for tokens, chosen in ((0.99, "refusion"), (0.95, "autoregressive"), (1.01, "autoregressive"), (1.1, "refusion")):
        experience_of(candidates).tokens = tokens
        experience_of(candidates).version += 1
        assert chooser(ASKED, 1) == chosen


def test_a_load_is_reckoned_once_as_long_as_experience_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chooser, candidates = auto(FLAT)
    reckoned: list[int] = []
    inner = chooser._reckon
    monkeypatch.setattr(chooser, "_reckon", lambda *given: reckoned.append(given[-1]) or inner(*given))
    for load in (1, 2, 1, 2, 2):
        chooser(ASKED, load)
    assert reckoned == [1, 2]
    experience_of(candidates).version += 1
    assert chooser.speeds(ASKED, 1) == inner(ASKED, 1)[2:]
    assert reckoned == [1, 2, 1]


def test_costs_are_measured_only_when_asked_for() -> None:
    num_measured = 0

    def measure() -> CostTable:
        nonlocal num_measured
        num_measured += 1
        return FLAT

    candidates = Candidates(None, 4096)
    chooser = Auto(measure, candidates, 4096)
    candidates.choose(experience_of(candidates), 4)
    assert num_measured == 0
    chooser(ASKED, 1)
    assert num_measured == 1


@pytest.mark.parametrize(("costs", "decoders"), [(FLAT, {"refusion"}), (STEEP, {"autoregressive"})], ids=["free rows", "dear rows"])
def test_the_engine_decodes_each_request_as_chosen(
    new_engine: Callable[..., Engine], plain: Plain, costs: CostTable, decoders: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(costs=costs, max_num_seqs=2)
    monkeypatch.setattr(Experience, "learn", lambda *_, **__: None)  # a random model accepts next to nothing
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
