from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engines import EXACT, SLIDING, SLOTS, Plain, check, is_idle, new_request, run

from refusion.decoding.events import Event
from refusion.decoding.params import SlotSettings
from refusion.engine.core import Engine
from refusion.engine.costs import CostTable
from refusion.engine.requests import GAP, Answer, final_tokens
from refusion.errors import RequestError

PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15], [16, 17], [18], [7, 8, 9, 20, 21, 22, 23, 24, 25], [7, 8, 9, 20, 21, 22, 23, 24, 30]]
KINDS = ("refusion", "autoregressive")
NewEngine = Callable[..., Engine]


def answer_all(engine: Engine, prompts: list[list[int]], **options: object) -> list[Answer]:
    """Answers by prompt."""
    answers: list[Answer] = []
    for index, prompt in enumerate(prompts):
        engine.add(new_request(prompt, answers, index=index, **options))  # type: ignore[arg-type]
    run(engine)
    return sorted(answers, key=lambda answer: answer.request)


# ---- the same tokens as the plain decoder ----


@pytest.mark.parametrize("kind", [*KINDS, "sliding", "exact"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_tokens": 64, "max_num_seqs": 3},
        {"max_prompt_rows": 2, "page_size": 2},
        {"max_decode_rows": 40},
        {"costs": CostTable((1, 1000), (0.001, 1.0))},
        {"runs_ahead": True},
        {"runs_ahead": True, "cache_tokens": 64, "max_num_seqs": 3},
        {"runs_ahead": True, "max_num_seqs": 3, "idle_share": 0.8},
        {"runs_ahead": True, "costs": CostTable((1, 1000), (0.001, 1.0))},
    ],
    ids=[
        "roomy",
        "short of pages",
        "prompts in pieces",
        "few rows",
        "dear rows",
        "ahead of reports",
        "ahead and short of pages",
        "ahead of some who left",
        "behind reports",
    ],
)
def test_tokens_and_forwards_are_those_of_the_plain_decoder(
    new_engine: NewEngine, plain: Plain, kind: str, sampling: dict[str, float], settings: dict[str, Any]
) -> None:
    # Many ids end an answer, so that requests finish at different times and others take their seats.
    sliding = {"sliding": SLIDING, "exact": EXACT}
    how = {"decoder": "refusion", "slots": sliding[kind]} if kind in sliding else {"decoder": kind}
    options = {**how, "eos_ids": tuple(range(40, 52)), **sampling}
    engine = new_engine(**settings)
    answers = answer_all(engine, PROMPTS, **options)
    assert [answer.request for answer in answers] == list(range(len(PROMPTS)))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        token_ids, num_forwards = plain(new_request(prompt, [], **options))  # type: ignore[arg-type]
        assert answer.token_ids == token_ids
        # Preparing fewer lengths costs forwards and no tokens.
        has_few_rows = settings.keys() & {"max_decode_rows", "costs"}
        assert answer.num_forwards == num_forwards or (has_few_rows and answer.num_forwards >= num_forwards)
        assert answer.is_stopped == (answer.token_ids[-1] in range(40, 52))
        assert answer.num_generated == len(answer.token_ids)
        assert answer.first_token_seconds > 0
    assert is_idle(engine)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("costs", [CostTable((1, 64), (1.0, 1.0)), CostTable((1, 1000), (0.001, 1.0))], ids=["free rows", "dear rows"])
def test_exact_slots_write_what_one_by_one_decoding_does(
    new_engine: NewEngine, plain: Plain, sampling: dict[str, float], costs: CostTable
) -> None:
    for prompt, answer in zip(PROMPTS, answer_all(new_engine(costs=costs), PROMPTS, slots=EXACT, max_tokens=24, **sampling), strict=True):
        one_by_one = new_request(prompt, [], decoder="autoregressive", max_tokens=24, **sampling)  # type: ignore[arg-type]
        assert answer.token_ids == plain(one_by_one)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_is_an_answer(new_engine: NewEngine, plain: Plain, kind: str) -> None:
    answers = answer_all(new_engine(), [[7], [7, 8, 9, 10]], decoder=kind, max_tokens=1)
    for prompt, answer in zip([[7], [7, 8, 9, 10]], answers, strict=True):
        assert (answer.token_ids, answer.num_forwards) == plain(new_request(prompt, [], decoder=kind, max_tokens=1))


def test_blocks_said_in_two_ways_share_a_lane(new_engine: NewEngine, plain: Plain) -> None:
    engine = new_engine()
    answers: list[Answer] = []
    requests = [
        new_request([7, 8], answers, index=0, slots=SlotSettings(slot_size=4, serial_blocks=2), max_tokens=16),
        new_request([7, 8], answers, index=1, slots=SlotSettings(slot_size=4, block_size=8), max_tokens=11),
    ]
    for request in requests:
        engine.add(request)
    run(engine)
    assert len(engine.scheduler.lanes) == 1
    for answer in answers:
        assert answer.token_ids == plain(requests[answer.request])[0]


def test_many_lanes_take_turns(new_engine: NewEngine, plain: Plain) -> None:
    engine = new_engine(cache_tokens=96)
    answers: list[Answer] = []
    requests = [
        new_request([7 + index, 8], answers, index=index, decoder=kind, temperature=temperature, eos_ids=(eos,))
        for index, (kind, temperature, eos) in enumerate((kind, t, eos) for kind in KINDS for t in (0.0, 1.0) for eos in (2, 40, 41))
    ]
    for request in requests:
        engine.add(request)
    run(engine)
    assert len(answers) == len(requests) == 12
    assert all(answer.token_ids == plain(requests[answer.request])[0] for answer in answers)
    assert len(engine.scheduler.lanes) <= 12
    engine.add(new_request([9], answers, eos_ids=(42,)))  # a new lane: those that stand empty are dropped
    assert len(engine.scheduler.lanes) <= 8
    run(engine)


# ---- pages ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_beginning_is_not_computed_again(new_engine: NewEngine, plain: Plain, kind: str) -> None:
    engine = new_engine()
    prompts = [list(range(10, 22)), [*range(10, 20), 30, 31], list(range(10, 22)), [*range(10, 18)]]  # 3 pages of 4
    for index, (prompt, shared) in enumerate(zip(prompts, (0, 8, 8, 4), strict=True)):
        before = engine.scheduler.paging.num_shared_tokens
        (answer,) = answer_all(engine, [prompt], decoder=kind)
        # The last row of a prompt says how the answer begins, so its page is never taken over.
        assert engine.scheduler.paging.num_shared_tokens - before == shared, index
        assert answer.token_ids == plain(new_request(prompt, [], decoder=kind))[0]
    off = new_engine(prefix_caching=False)
    answer_all(off, prompts, decoder=kind)
    assert off.scheduler.paging.num_shared_tokens == 0
    assert is_idle(off)


@pytest.mark.parametrize("kind", KINDS)
def test_the_youngest_makes_room_and_goes_on_where_it_stopped(new_engine: NewEngine, plain: Plain, kind: str) -> None:
    engine = new_engine(cache_tokens=44, max_num_seqs=3, prefix_caching=False)
    answers: list[Answer] = []
    requests = [new_request([10 + index] * 4, answers, index=index, decoder=kind, temperature=1.0, max_tokens=24) for index in range(4)]
    for request in requests:
        engine.add(request)
    for _ in range(500):
        engine.step()
        check(engine)
    assert engine.scheduler.num_preempted > 0
    assert len(answers) == 4
    assert answers[0].request == 0  # nobody overtakes the oldest by taking its pages
    assert all((answer.token_ids, answer.num_forwards) == plain(requests[answer.request]) for answer in answers)


# ---- the end of a request ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_ends_one_request_and_leaves_the_others_alone(new_engine: NewEngine, plain: Plain, kind: str) -> None:
    free = [plain(new_request(prompt, [], decoder=kind, temperature=1.0))[0] for prompt in PROMPTS]

    def find_stop(token_ids: list[int]) -> int | None:
        return 6 if token_ids[:6] == free[1][:6] else None

    stopped = answer_all(new_engine(), PROMPTS, decoder=kind, temperature=1.0, find_stop=find_stop)
    assert stopped[1].token_ids == free[1][:6]
    assert stopped[1].is_stopped
    assert 6 <= stopped[1].num_generated <= len(free[1])
    assert all(answer.token_ids == free[answer.request] for answer in stopped if answer.request != 1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_aborted_request_is_silent_from_then_on(new_engine: NewEngine, plain: Plain, kind: str) -> None:
    for num_steps in range(6):
        engine, answers, events = new_engine(max_num_seqs=2), [], []
        requests = [
            engine.add(new_request([7, 8, index], answers, index=index, decoder=kind, on_event=events.append)) for index in range(4)
        ]
        for _ in range(num_steps):
            engine.step()
        heard = len(events)
        for request in (requests[0], requests[3]):
            engine.abort(request)
            engine.abort(request)  # twice is once
        run(engine)
        check(engine)
        assert sorted(answer.request for answer in answers) == [1, 2]
        assert not [event for event in events[heard:] if event.request in (0, 3)]
        assert all(answer.token_ids == plain(new_request([7, 8, answer.request], [], decoder=kind))[0] for answer in answers)
        assert is_idle(engine)


def test_after_a_reset_the_engine_is_as_new(new_engine: NewEngine, plain: Plain) -> None:
    engine, answers = new_engine(), []
    for index in range(6):
        engine.add(new_request([7, 8, index], answers, index=index))
    for _ in range(3):
        engine.step()
    engine.reset(RequestError("interrupted"))
    assert [str(answer.error) for answer in answers] == ["interrupted"] * 6
    assert not engine.has_work
    (answer,) = answer_all(engine, [[7, 8, 9]])
    assert answer.token_ids == plain(new_request([7, 8, 9], []))[0]
    assert is_idle(engine)


def test_what_a_listener_raises_comes_out_and_loses_nothing(new_engine: NewEngine) -> None:
    engine, answers = new_engine(), []

    def listen(_: Event) -> None:
        raise ZeroDivisionError

    engine.add(new_request([7], answers, index=0, on_event=listen))
    engine.add(new_request([8], answers, index=1))
    num_raised = 0
    while engine.has_work:
        try:
            engine.step()
        except ZeroDivisionError:
            num_raised += 1
    assert num_raised > 0
    assert 1 in [answer.request for answer in answers]


# ---- events ----


@pytest.mark.parametrize("kind", [*KINDS, "sliding"])
def test_events_retell_every_answer(new_engine: NewEngine, kind: str) -> None:
    events: list[Event] = []
    how = {"slots": SLIDING} if kind == "sliding" else {"decoder": kind}
    answers = answer_all(new_engine(), PROMPTS, **how, on_event=events.append, temperature=1.0, eos_ids=(2, 40, 41, 42, 43))
    for answer in answers:
        own = [event for event in events if event.request == answer.request]
        written = {event.offset + place: token for event in own if event.kind == "committed" for place, token in enumerate(event.token_ids)}
        assert [written[place] for place in range(len(answer.token_ids))] == answer.token_ids
        assert own[-1].kind == "finished"
        assert own[-1].finish_reason == ("stop" if answer.is_stopped else "length")
        assert [event.forward for event in own] == sorted(event.forward for event in own)
        assert own[-1].forward == answer.num_forwards


def test_a_slot_is_planned_then_judged_then_committed(new_engine: NewEngine) -> None:
    events: list[Event] = []
    answer_all(new_engine(), PROMPTS[:1], on_event=events.append, temperature=1.0)
    drafts: dict[int, Event] = {}
    standing: dict[int, tuple[int, ...]] = {}
    for event in events:
        if event.kind == "planned":
            assert event.slot not in standing or not standing[event.slot]
            assert 0.0 < event.score <= 1.0
            assert len(event.token_ids) == 4
            drafts[event.slot] = event
        elif event.kind in ("verified", "infilled"):
            before = standing.get(event.slot, ())
            assert event.token_ids[: len(before)] == before  # what stands, stands
            assert event.kind == "infilled" or event.token_ids == drafts[event.slot].token_ids[: len(event.token_ids)]
            standing[event.slot] = event.token_ids
        elif event.kind == "committed":
            assert event.token_ids == standing[event.slot]
            assert event.offset == 4 * event.slot
    assert {event.kind for event in events} == {"planned", "verified", "infilled", "committed", "finished"}


@pytest.mark.parametrize("settings", [{}, {"runs_ahead": True, "cache_tokens": 64, "max_num_seqs": 3}], ids=["roomy", "ahead and short"])
def test_what_slides_is_drafted_where_the_text_ends_and_judged_there(new_engine: NewEngine, settings: dict[str, Any]) -> None:
    events: list[Event] = []
    answer_all(new_engine(**settings), PROMPTS, slots=SLIDING, on_event=events.append)
    for index in range(len(PROMPTS)):
        num_written, drafts, passed = 0, (), ()
        for event in (event for event in events if event.request == index and event.kind != "finished"):
            assert event.offset == event.slot == num_written
            if event.kind == "planned":
                drafts = event.token_ids
                assert 0.0 < event.score <= 1.0
                assert 1 <= len(drafts) < (SLIDING.most_masks if event.is_infill else SLIDING.slot_size)
            elif event.kind == "committed":
                assert event.token_ids[: len(passed)] == passed
                num_written, drafts, passed = num_written + len(event.token_ids), (), ()
            else:
                passed = event.token_ids
                assert drafts
                assert passed == drafts[: len(passed)]
    assert {event.kind for event in events} == {"planned", "verified", "infilled", "committed", "finished"}
    assert any(event.kind in ("verified", "infilled") and event.token_ids for event in events), "some drafts pass"


# ---- what does not fit ----


def test_a_request_that_can_never_fit_is_refused_at_the_door(new_engine: NewEngine) -> None:
    engine = new_engine(cache_tokens=32)
    with pytest.raises(RequestError, match=r"prompt 3 has 20 tokens and max_tokens is 16, .* KV cache of 32 tokens .* raise cache_tokens"):
        engine.add(new_request([7] * 20, [], index=3))
    assert not engine.has_work
    assert len(answer_all(engine, [[7] * 16])[0].token_ids) == 16  # the largest that fits


def test_blocks_wider_than_a_forward_are_refused(new_engine: NewEngine) -> None:
    engine = new_engine(max_decode_rows=15)
    with pytest.raises(
        RequestError, match="blocks of 8 tokens need 16 rows in a forward of at most 15; lower block_size or raise max_decode"
    ):
        engine.add(new_request([7], [], slots=SLOTS))
    assert len(answer_all(engine, [[7]], decoder="autoregressive")) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_too_large_for_the_memory_becomes_smaller_ones(
    new_engine: NewEngine, plain: Plain, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(max_num_seqs=6, prefix_caching=False)
    launch = engine.runner.launch

    def small_launch(lane: object, **shape: object) -> object:
        prompt = shape["prompt"]
        if shape["num_seats"] > 2 or (prompt is not None and len(prompt.token_ids) > 4):  # type: ignore[operator, attr-defined]
            raise RequestError("out of memory in a forward; lower max_num_seqs")
        return launch(lane, **shape)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.runner, "launch", small_launch)
    answers = answer_all(engine, PROMPTS, decoder=kind, temperature=1.0)
    assert len(answers) == len(PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert (answer.token_ids, answer.num_forwards) == plain(new_request(prompt, [], decoder=kind, temperature=1.0))
    assert is_idle(engine)


def test_memory_lost_under_way_ends_nobody_who_still_fits(new_engine: NewEngine, plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(max_num_seqs=6)
    launch, num_launched = engine.runner.launch, 0

    def failing_launch(lane: object, **shape: object) -> object:
        nonlocal num_launched
        num_launched += 1
        if num_launched > 3 and shape["num_seats"] > 1:  # type: ignore[operator]
            raise RequestError("out of memory in a forward; lower max_num_seqs")
        return launch(lane, **shape)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.runner, "launch", failing_launch)
    for prompt, answer in zip(PROMPTS, answer_all(engine, PROMPTS), strict=True):
        assert (answer.token_ids, answer.num_forwards) == plain(new_request(prompt, []))


def test_without_any_memory_every_request_ends_with_the_setting_to_change(new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine()

    def failing_launch(*_: object, **__: object) -> object:
        raise RequestError("out of memory in a forward; lower max_num_seqs")

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "launch", failing_launch)
        answers = answer_all(engine, PROMPTS)
    assert {str(answer.error) for answer in answers} == {"out of memory in a forward; lower max_num_seqs"}
    assert is_idle(engine)
    assert answer_all(engine, PROMPTS[:1])[0].error is None


@pytest.mark.parametrize("seed", range(200))
def test_an_answer_is_what_stands_before_the_first_gap_through_the_first_end(seed: int) -> None:
    draw = random.Random(seed)
    written = [draw.choice([GAP, 1, 2, 3, 7, 7, 7, 7]) if draw.random() < 0.3 else 9 for _ in range(draw.randint(1, 40))]
    new = new_request([7], [], eos_ids=tuple(draw.sample([1, 2, 3], draw.randint(1, 3))), max_tokens=draw.randint(1, 40))
    expected: list[int] = []
    for token in written[: new.sampling.max_tokens]:
        if token == GAP:
            break
        expected.append(token)
        if token in new.eos_ids:
            break
    assert final_tokens(np.array(written, dtype=np.int32), new) == expected
