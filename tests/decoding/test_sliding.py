"""Sliding slots over flat rows against the reference that runs one row at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flat import Request, ScriptedRows, Server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import Row, ScriptedForward, certain, hashed_language
from sliding_reference import SlidingReference

from refusion.decoding.autoregressive_rounds import AutoregressiveRounds
from refusion.decoding.events import Event, seat_events
from refusion.decoding.params import SamplingParams, SlotParams, SlotSettings
from refusion.decoding.sliding import SlidingTrace, decode_sliding
from refusion.decoding.sliding_report import most_rows
from refusion.decoding.sliding_rounds import SlidingRounds
from refusion.errors import ConfigError

MASK, EOS, VOCAB = 1, 0, 6
EOS_IDS = torch.tensor([EOS])
CPU = torch.device("cpu")
DRAWING = st.sampled_from([{}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.7}])


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    return [
        Request(
            prompt=draw(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=5)),
            max_tokens=draw(st.integers(1, 16)),
            seed=draw(st.integers(-5, 5)),
            arrival=draw(st.integers(0, 6)),
            chunk=draw(st.sampled_from([1, 2, 1000])),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]


@st.composite
def sliding_settings(draw: st.DrawFn) -> SlotSettings:
    return SlotSettings(
        slot_size=draw(st.integers(1, 6)),
        token_threshold=draw(st.sampled_from([0.0, 0.2, 0.4, 0.8, 1.0])),
        acceptance=draw(st.sampled_from(["paper", "argmax", "exact"])),
        infill_length=draw(st.sampled_from([None, 1, 2, 4])),
        alternatives=draw(st.sampled_from([0, 1, 3])),
        max_candidates=draw(st.sampled_from([None, 0, 1, 4])),
        sliding=True,
    )


LANGUAGE = st.builds(
    lambda peak, bonus: hashed_language(VOCAB, peak=peak, eos_id=EOS, eos_bonus=bonus),
    st.sampled_from([2.0, 8.0]),
    st.sampled_from([-4.0, 0.0, 2.0]),
)


def rounds_of(slots: SlotSettings, num_seats: int) -> SlidingRounds:
    return SlidingRounds(slots, num_seats, mask_id=MASK, eos_ids=EOS_IDS, device=CPU, use_kernels=False)


def server(rounds: SlidingRounds, script: Any, num_seats: int, **drawing: Any) -> Server:
    return Server(rounds, ScriptedRows(script, num_seats * 16 * 4), num_seats=num_seats, pages_per_seat=16, banned=[MASK], **drawing)


def reference(script: Any, request: Request, slots: SlotSettings, **drawing: Any) -> SlidingReference:
    return SlidingReference(
        script, request.prompt, slots, request.max_tokens, MASK, [EOS], banned=[MASK], seed=request.seed, **drawing
    ).run()


def plain(script: Any, request: Request, slots: SlotSettings, **drawing: Any) -> SlidingTrace:
    sampling = SamplingParams(max_tokens=request.max_tokens, seed=request.seed, **drawing)
    return decode_sliding(ScriptedForward(script, [MASK]), request.prompt, slots, sampling, mask_id=MASK, eos_ids=[EOS])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sliding_settings(), requests(), DRAWING, LANGUAGE, st.integers(1, 3))
def test_requests_that_come_and_go_get_the_tokens_and_forwards_of_the_reference(
    slots: SlotSettings, asked: list[Request], drawing: dict[str, float], script: Any, num_seats: int
) -> None:
    rounds = rounds_of(slots, num_seats)
    server(rounds, script, num_seats, **drawing).serve(asked, lambda forward: slots.candidates())
    for request in asked:
        expected = reference(script, request, slots, **drawing)
        assert (request.text([EOS]), len(request.reports)) == (expected.token_ids, expected.num_forwards)
        trace = plain(script, request, slots, **drawing)
        assert (trace.token_ids, trace.num_rounds) == (expected.token_ids, expected.num_forwards)
        assert all(report.num_rows <= most_rows(slots) for report in request.reports)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sliding_settings(), requests(), DRAWING, LANGUAGE, st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_exact_slots_write_what_one_token_at_a_time_does_whatever_is_prepared(
    slots: SlotSettings, asked: list[Request], drawing: dict[str, float], script: Any, wanted: list[int]
) -> None:
    """Also if the engine wants another number of lengths for every forward, and if tokens are drawn."""
    exact = replace(slots, acceptance="exact")
    server(rounds_of(exact, 2), script, 2, **drawing).serve(asked, lambda forward: wanted[forward % len(wanted)])
    one_by_one = [replace(request, answer={}, reports=[], num_prefilled=0) for request in asked]
    rounds = AutoregressiveRounds(2, eos_ids=EOS_IDS, device=CPU, use_kernels=False)
    Server(rounds, ScriptedRows(script, 128), num_seats=2, pages_per_seat=16, banned=[MASK], is_autoregressive=True, **drawing).serve(
        one_by_one
    )
    assert [request.text([EOS]) for request in asked] == [request.text([EOS]) for request in one_by_one]


def expected_events(trace: SlidingTrace, request: int) -> list[Event]:
    """The events of an answer, from the rounds of the plain twin."""
    events: list[Event] = []
    place = 0
    for number, (now, following) in enumerate(zip(trace.rounds, [*trace.rounds[1:], None], strict=True), 1):
        if now.drafts:
            kind = "infilled" if now.is_infill else "verified"
            events.append(Event(kind, request, number, place, place, tuple(now.final[: now.num_passed])))  # type: ignore[arg-type]
        events.append(Event("committed", request, number, place, place, tuple(now.final)))
        place += len(now.final)
        if following is not None and following.drafts:
            drafts = tuple(draft.token for draft in following.drafts)
            score = following.drafts[0].confidence
            events.append(Event("planned", request, number, place, place, drafts, score, is_infill=following.is_infill))
    return events


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sliding_settings(), requests(), DRAWING, LANGUAGE)
def test_a_report_tells_the_events_of_the_plain_twin(
    slots: SlotSettings, asked: list[Request], drawing: dict[str, float], script: Any
) -> None:
    server(rounds_of(slots, 2), script, 2, **drawing).serve(asked, lambda forward: slots.candidates())
    for index, request in enumerate(asked):
        events = [event for report in request.reports for event in seat_events(report, index)]
        expected = expected_events(plain(script, request, slots, **drawing), index)
        assert [replace(event, score=0.0) for event in events] == [replace(event, score=0.0) for event in expected]
        # Two ways to the same softmax in float32, at temperatures that scale the logits first.
        assert [event.score for event in events] == pytest.approx([event.score for event in expected], rel=1e-5)
        text: list[int] = []
        for before, event in zip([None, *events], events, strict=False):
            assert event.offset == len(text), "everything happens where the text ends"
            if event.kind == "committed":
                text += event.token_ids
            elif event.kind in ("verified", "infilled"):
                assert before is not None
                assert before.kind == "planned"
                assert event.kind == ("infilled" if before.is_infill else "verified")
                assert event.token_ids == before.token_ids[: len(event.token_ids)], "what passes was planned"
        assert text == request.text([EOS])


def test_exact_drafts_are_drawn_with_the_noise_of_what_they_are_to_be() -> None:
    """Where masks say what the rows in front of them do, every draft passes, however flat that is."""

    def script(row: Row) -> torch.Tensor:
        return torch.tensor([-20.0, 0.0, 0.0, 0.3, 0.1, 0.2])

    slots = SlotSettings(slot_size=5, acceptance="exact", sliding=True)
    asked = Request([2], 16)
    server(rounds_of(slots, 1), script, 1, temperature=1.5).serve([asked], lambda forward: slots.candidates())
    assert len(set(asked.text([EOS]))) > 1, "something is drawn"
    assert [len(report.committed[0].token_ids) for report in asked.reports] == [1, 5, 5, 5]


def test_by_hand() -> None:
    """The text counts 2, 3, 4, 5, 2, ...; masks count as well, but say 5 where a 4 should stand, with 4 as the runner-up."""
    right = {2: 3, 3: 4, 4: 5, 5: 2}

    def script(row: Row) -> torch.Tensor:
        known = {position: token for position, token in row.seen if token in right}
        last = max(known)
        token = known[last]
        for _ in range(row.position - last if row.token == MASK else 1):  # a mask names its own place, a token the next
            token = right[token]
        if row.token == MASK and token == 4:
            return certain({5: 0.6, 4: 0.3}, VOCAB)
        return certain({token: 0.9}, VOCAB)

    slots = SlotSettings(slot_size=4, infill_length=2, alternatives=1, max_candidates=2, token_threshold=1.0, sliding=True)
    asked = Request([2], 10)
    server(rounds_of(slots, 1), script, 1).serve([asked], lambda forward: 0)
    assert asked.text([EOS]) == [3, 4, 5, 2, 3, 4, 5, 2, 3, 4]
    # 3 is named by the prompt, and a slot planned: 5 (wrong), 5, 2. Then 4 is the runner-up and stands, its own row names 5, one mask
    # behind it drafts 2. That passes and 3 is named; the plan of two behind it has 5 (wrong) for 4. And so on, to the end.
    assert [[news.token_ids for news in report.committed] for report in asked.reports] == [
        [(3,)], [(4, 5)], [(2, 3)], [(4, 5)], [(2, 3)], [(4,)],
    ]  # fmt: skip
    told = [(each.kind, each.offset, each.token_ids) for report in asked.reports for each in seat_events(report, 0)]
    assert told == [
        ("committed", 0, (3,)), ("planned", 1, (5, 5, 2)),
        ("verified", 1, ()), ("committed", 1, (4, 5)), ("planned", 3, (2,)),
        ("infilled", 3, (2,)), ("committed", 3, (2, 3)), ("planned", 5, (5,)),
        ("verified", 5, ()), ("committed", 5, (4, 5)), ("planned", 7, (2,)),
        ("infilled", 7, (2,)), ("committed", 7, (2, 3)), ("planned", 9, (5,)),
        ("verified", 9, ()), ("committed", 9, (4,)),
    ]  # fmt: skip
    assert [news.is_infill for report in asked.reports for news in report.planned] == [False, True, False, True, False]
    scores = [news.score for report in asked.reports for news in report.planned]
    unsure, sure = 0.6 / (1 - 0.1 / 4), 0.9 / (1 - 0.1 / 5)  # without the share of the mask token, which is banned
    assert scores == pytest.approx([unsure, sure, unsure, sure, unsure])


@pytest.mark.parametrize(
    "wrong",
    [{"block_size": 16}, {"serial_blocks": 2}, {"correction": "paper"}, {"sliding": False, "acceptance": "exact"}],
    ids=["block", "serial", "correction", "exact"],
)
def test_what_cannot_slide_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(wrong)).split("_")[0]):
        SlotParams(**({"slot_size": 8, "sliding": True} | wrong))
