"""Batch-invariant scheduling: what a request does in a forward is the same alone and beside others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engines import Plain, is_idle, new_request, run

from refusion.decoding.params import SlotSettings
from refusion.decoding.refusion_report import most_rows, rows_needed
from refusion.decoding.state import INFILL, PLAN, REMASK, VERIFY
from refusion.engine.core import Engine
from refusion.engine.requests import Answer, lane_key
from refusion.engine.runner import Pending
from refusion.errors import ConfigError, RequestError

PROMPTS = [[7 + index % 50] * length for index, length in enumerate((3, 1, 20, 9, 14, 8, 30, 2))]
SETTINGS = {"batch_invariant": True, "max_prompt_rows": 8, "max_num_seqs": 4}
LONG = SlotSettings(slot_size=6, block_size=12, slot_threshold=0.3, token_threshold=0.1)
NewEngine = Callable[..., Engine]
View = tuple[int, int, int]


def views_of(engine: Engine, prompts: dict[int, list[int]], **options: Any) -> tuple[dict[int, list[View]], list[Answer]]:
    """By request: (prompt rows, decode rows, candidate lengths) of every forward in which it has rows; and the answers."""
    views: dict[int, list[View]] = {index: [] for index in prompts}
    launch = engine.runner.launch

    def watching(lane: Any, *, prompt: Any, candidates: int, **shape: Any) -> Pending:
        pieces = {} if prompt is None else {seat: end - start for seat, start, end in prompt.spans}
        seats = next(seats for seats in engine.scheduler.lanes.values() if seats.lane is lane)
        pending = launch(lane, prompt=prompt, candidates=candidates, **shape)
        num_rows = (lane.spans.row_end - lane.spans.row_start).tolist()
        for seat, request in enumerate(seats.requests):
            if pieces.get(seat, 0) or num_rows[seat]:
                views[request.new.index].append((pieces.get(seat, 0), num_rows[seat], candidates))
        return pending

    engine.runner.launch = watching  # type: ignore[method-assign]
    answers: list[Answer] = []
    for index, prompt in prompts.items():
        engine.add(new_request(prompt, answers, index=index, **options))
    run(engine)
    return views, sorted(answers, key=lambda answer: answer.request)


@pytest.mark.parametrize("slots", [LONG, SlotSettings(slot_size=4, block_size=8, max_candidates=1)], ids=["all lengths", "one length"])
@pytest.mark.parametrize("kind", ["refusion", "autoregressive"])
def test_a_request_has_the_same_rows_alone_and_in_a_batch(new_engine: NewEngine, plain: Plain, kind: str, slots: SlotSettings) -> None:
    options = {"decoder": kind, "slots": slots, "eos_ids": tuple(range(40, 52))}
    together, answers = views_of(new_engine(**SETTINGS), dict(enumerate(PROMPTS)), **options)
    for index, prompt in enumerate(PROMPTS):
        alone, (answer,) = views_of(new_engine(**SETTINGS), {index: prompt}, **options)
        assert together[index] == alone[index]
        assert answers[index].token_ids == answer.token_ids == plain(new_request(prompt, [], **options))[0]
    if kind == "refusion":
        assert {candidates for _, _, candidates in together[0]} == {slots.candidates()}


def test_otherwise_prompts_are_cut_where_a_forward_is_full(new_engine: NewEngine) -> None:
    views, _ = views_of(new_engine(**(SETTINGS | {"batch_invariant": False})), dict(enumerate(PROMPTS)))
    pieces = [[piece for piece, _, _ in views[index] if piece] for index in range(len(PROMPTS))]
    assert any(piece != 8 for request in pieces for piece in request[:-1])


def test_preempted_requests_do_the_same_too(new_engine: NewEngine) -> None:
    engine = new_engine(**SETTINGS, cache_tokens=64)
    together, _ = views_of(engine, dict(enumerate(PROMPTS)), max_tokens=24)
    assert engine.scheduler.num_preempted > 0
    for index, prompt in enumerate(PROMPTS):
        alone, _ = views_of(new_engine(**SETTINGS), {index: prompt}, max_tokens=24)
        whole = np.array(alone[index])[:, 0].sum()
        # A prompt that was interrupted begins anew; from its last beginning on everything is as it is alone.
        assert together[index][-len(alone[index]) :] == alone[index]
        assert sum(piece for piece, _, _ in together[index][-len(alone[index]) :]) == whole
    assert is_idle(engine)


def test_seats_leave_room_for_all_lengths_of_every_seat(new_engine: NewEngine) -> None:
    views, _ = views_of(new_engine(**SETTINGS, max_decode_rows=80), dict(enumerate(PROMPTS)), slots=LONG)
    assert {candidates for view in views.values() for _, _, candidates in view} == {LONG.candidates()}
    with pytest.raises(RequestError, match=r"need 59 rows in a forward of at most 50; lower block_size or max_candidates or raise"):
        new_engine(**SETTINGS, max_decode_rows=50).check(new_request([7], [], slots=LONG))


def test_what_goes_by_the_load_is_refused(new_engine: NewEngine) -> None:
    with pytest.raises(RequestError, match="decoder 'auto' goes by the load"):
        new_engine(**SETTINGS).check(new_request([7], [], decoder="auto"))
    with pytest.raises(ConfigError, match="prefix_caching changes roundings"):
        new_engine(**SETTINGS, prefix_caching=True)
    assert not new_engine(**SETTINGS).scheduler.paging.prefix.is_on


@pytest.mark.parametrize("slots", [LONG, SlotSettings(slot_size=4), SlotSettings(slot_size=8, block_size=16, alternatives=1)], ids=str)
def test_the_rows_of_a_whole_block_are_the_most_a_seat_takes(slots: SlotSettings) -> None:
    width, candidates = lane_key(new_request([7], [], slots=slots), "refusion").width, slots.candidates()
    agendas = [
        [phase, 0, 0, *[verified] * width, *[planned] * width]
        for phase in (PLAN, VERIFY, INFILL, REMASK)
        for verified in range(-1, slots.slot_size)
        for planned in (0, 1)
    ]
    assert rows_needed(np.array(agendas), slots, candidates).max() == most_rows(slots, width, candidates)
