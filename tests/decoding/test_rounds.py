"""Rounds over flat rows against the padded decoders: same tokens, same forwards, whoever shares the forward and wherever a request sits."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flat import NetworkRows, Request, ScriptedRows, Server
from golden_traces import EOS_ID, MANY, MASK_ID, decode_traces, forward_of, read_traces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import ScriptedForward, hashed_language

from refusion.decoding.autoregressive import AutoregressiveDecoder
from refusion.decoding.autoregressive_rounds import AutoregressiveRounds
from refusion.decoding.events import Event, seat_events, step_events
from refusion.decoding.flat_readout import sampled_readout
from refusion.decoding.forward import Rows, readout_logits
from refusion.decoding.params import SamplingParams, SlotSettings
from refusion.decoding.refusion import ReFusionDecoder
from refusion.decoding.refusion_rounds import RefusionRounds
from refusion.decoding.sampling import Draw
from refusion.engine.commits import Demand
from refusion.model.transformer import Transformer

MASK, EOS, VOCAB = 1, 0, 6
EOS_IDS = torch.tensor([EOS])
CPU = torch.device("cpu")


def refusion_rounds(slots: SlotSettings, most_tokens: int, num_seats: int) -> RefusionRounds:
    width = min(slots.slots_per_block(most_tokens), slots.num_slots(most_tokens))
    num_slots = -(-slots.num_slots(most_tokens) // width) * width
    return RefusionRounds(slots, width, num_slots, num_seats, mask_id=MASK, eos_ids=EOS_IDS, device=CPU, use_kernels=False)


def padded(script: Any, request: Request, slots: SlotSettings | None, **sampling: Any) -> tuple[list[int], int]:
    """(answer, forwards) of the plain decoder, alone."""
    params = SamplingParams(max_tokens=request.max_tokens, seed=request.seed, **sampling)
    forward = ScriptedForward(script, [MASK])
    if slots is None:
        decoder: Any = AutoregressiveDecoder(forward, params, eos_ids=EOS_IDS)
    else:
        decoder = ReFusionDecoder(forward, slots, params, mask_id=MASK, eos_ids=EOS_IDS)
    decoder.start(torch.tensor([request.prompt]), torch.tensor([len(request.prompt)]), torch.tensor([request.seed]))
    while not decoder.is_done.all():
        decoder.step()
    return decoder.answer(0), int(decoder.num_forwards[0])


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    count = draw(st.integers(1, 4))
    return [
        Request(
            prompt=draw(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=5)),
            max_tokens=draw(st.integers(1, 14)),
            seed=draw(st.integers(-5, 5)),
            arrival=draw(st.integers(0, 6)),
            chunk=draw(st.sampled_from([1, 2, 1000])),
        )
        for _ in range(count)
    ]


@st.composite
def slot_settings(draw: st.DrawFn) -> SlotSettings:
    slot_size = draw(st.integers(1, 6))
    correction = draw(st.sampled_from(["paper", "autoregressive"]))
    return SlotSettings(
        slot_size=slot_size,
        block_size=slot_size * draw(st.integers(1, 3)),
        slot_threshold=draw(st.sampled_from([0.0, 0.3, 0.9])),
        token_threshold=draw(st.sampled_from([0.0, 0.2, 0.4, 0.8])),
        acceptance=draw(st.sampled_from(["paper", "argmax"])),
        correction=correction,
        infill_length=draw(st.sampled_from([None, None, 1, 2, 4])),
        alternatives=0 if correction == "paper" else draw(st.sampled_from([0, 1, 3])),
        max_candidates=draw(st.sampled_from([None, 0, 1, 2])),
        fuse_plan=draw(st.booleans()),
    )


def server(rounds: Any, script: Any, num_seats: int, **kwargs: Any) -> Server:
    return Server(rounds, ScriptedRows(script, num_seats * 16 * 4), num_seats=num_seats, pages_per_seat=16, banned=[MASK], **kwargs)


DRAWING = st.sampled_from([{}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.7}])
LANGUAGE = st.builds(
    lambda peak, bonus: hashed_language(VOCAB, peak=peak, eos_id=EOS, eos_bonus=bonus),
    st.sampled_from([2.0, 8.0]),
    st.sampled_from([-4.0, 0.0, 2.0]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(slot_settings(), requests(), DRAWING, LANGUAGE, st.integers(1, 3))
def test_requests_that_come_and_go_get_the_tokens_and_forwards_of_the_padded_decoder(
    slots: SlotSettings, asked: list[Request], drawing: dict[str, float], script: Any, num_seats: int
) -> None:
    server(refusion_rounds(slots, 14, num_seats), script, num_seats, **drawing).serve(asked, lambda forward: slots.candidates())
    for request in asked:
        token_ids, num_forwards = padded(script, request, slots, **drawing)
        assert request.text([EOS]) == token_ids
        assert request.reports[-1].num_forwards == len(request.reports) == num_forwards


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(slot_settings(), requests(), LANGUAGE, st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_candidates_that_change_change_no_token(slots: SlotSettings, asked: list[Request], script: Any, candidates: list[int]) -> None:
    server(refusion_rounds(slots, 14, 2), script, 2).serve(asked, lambda forward: candidates[forward % len(candidates)])
    assert [request.text([EOS]) for request in asked] == [padded(script, request, slots)[0] for request in asked]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(slot_settings(), requests(), DRAWING, LANGUAGE, st.integers(0, 6))
def test_no_forward_needs_more_rows_than_the_agenda_before_it_allows(
    slots: SlotSettings, asked: list[Request], drawing: dict[str, float], script: Any, candidates: int
) -> None:
    slots = replace(slots, block_size=slots.slot_size)
    rounds = refusion_rounds(slots, 14, 2)
    demand, before = Demand(rounds.columns, slots), np.zeros((2, rounds.report_width), dtype=np.int32)

    def check(server: Server) -> None:
        assert server.last is not None
        needed = rounds.num_rows(server.last, candidates)
        for seat, request in enumerate(server.seats):
            if request is not None and len(request.reports) > 1:  # it had an agenda, and has another one
                assert needed[seat] <= demand.most_next(before[seat : seat + 1], candidates)
        before[:] = server.last

    server(rounds, script, 2, **drawing).serve(asked, lambda forward: candidates, check)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests(), DRAWING, LANGUAGE, st.integers(1, 3))
def test_autoregressive_rounds_give_the_tokens_of_the_padded_decoder(
    asked: list[Request], drawing: dict[str, float], script: Any, num_seats: int
) -> None:
    rounds = AutoregressiveRounds(num_seats, eos_ids=EOS_IDS, device=CPU, use_kernels=False)
    server(rounds, script, num_seats, is_autoregressive=True, **drawing).serve(asked)
    for request in asked:
        assert (request.text([EOS]), len(request.reports)) == padded(script, request, None, **drawing)


@pytest.mark.parametrize("is_autoregressive", [False, True], ids=["refusion", "autoregressive"])
def test_seats_can_be_moved_and_saved_in_the_middle(is_autoregressive: bool) -> None:
    script = hashed_language(VOCAB, peak=5.0, eos_id=EOS, eos_bonus=-4.0)
    slots = SlotSettings(slot_size=3, block_size=6, token_threshold=0.3)
    num_seats = 4
    rounds: Any = (
        AutoregressiveRounds(num_seats, eos_ids=EOS_IDS, device=CPU, use_kernels=False)
        if is_autoregressive
        else refusion_rounds(slots, 14, num_seats)
    )
    asked = [Request([2, 3, index + 1], 14 - index, seed=index) for index in range(3)]
    run = server(rounds, script, num_seats, is_autoregressive=is_autoregressive, temperature=0.9)
    rest: list[int] = []

    def shuffle(run: Server) -> None:
        """Every request moves to the free seat in turn; every third forward it also goes through host memory."""
        free = run.seats.index(None)
        sitting = [seat for seat, request in enumerate(run.seats) if request is not None]
        if not sitting:
            return
        seat = sitting[run.num_forwards % len(sitting)]
        if run.num_forwards % 3:
            run.move(seat, free)
        else:
            rest.append(seat)
            saved = rounds.snapshot(seat)
            rounds.admit(seat, prompt_length=1, seed=9, max_tokens=3, last_token=2)
            rounds.restore(seat, saved)

    run.serve(asked, after_forward=shuffle)
    assert rest, "nothing was ever saved"
    for request in asked:
        expected, num_forwards = padded(script, request, None if is_autoregressive else slots, temperature=0.9)
        assert (request.text([EOS]), len(request.reports)) == (expected, num_forwards)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(slot_settings(), requests(), LANGUAGE)
def test_a_report_tells_the_events_of_the_padded_decoder(slots: SlotSettings, asked: list[Request], script: Any) -> None:
    server(refusion_rounds(slots, 14, 2), script, 2).serve(asked, lambda forward: slots.candidates())
    for index, request in enumerate(asked):
        decoder = ReFusionDecoder(
            ScriptedForward(script, [MASK]), slots, SamplingParams(max_tokens=request.max_tokens), mask_id=MASK, eos_ids=EOS_IDS
        )
        decoder.start(torch.tensor([request.prompt]), torch.tensor([len(request.prompt)]), torch.tensor([request.seed]))
        expected: list[Event] = []
        while not decoder.is_done.all():
            report = decoder.step()
            expected += step_events(report, decoder.state.token_ids[0].tolist(), 0, index, int(decoder.num_forwards[0]))
        assert [event for report in request.reports for event in seat_events(report, index)] == expected


def test_every_autoregressive_token_is_a_committed_slot_of_one() -> None:
    script = hashed_language(VOCAB, eos_id=EOS, eos_bonus=-9.0)
    asked = Request([2, 3], 3)
    server(AutoregressiveRounds(1, eos_ids=EOS_IDS, device=CPU, use_kernels=False), script, 1, is_autoregressive=True).serve([asked])
    events = [event for report in asked.reports for event in seat_events(report, 7)]
    assert events == [Event("committed", 7, place + 1, place, place, (token,)) for place, token in enumerate(asked.text([EOS]))]


@pytest.mark.parametrize("name", ["decode.json", "decode_infill.json"])
def test_golden_traces_come_out_of_shared_forwards(golden_model: Transformer, golden_dir: Path, name: str) -> None:
    traces = read_traces(golden_dir / name)[::3]
    padded_answers = decode_traces(forward_of(golden_model), traces)
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, trace in enumerate(traces):
        groups[tuple(trace[key] for key in ("gen_length", "slot_size", "serial_blocks", "slot_threshold", "token_threshold"))].append(index)
    for (length, slot_size, serial_blocks, slot_threshold, token_threshold), members in groups.items():
        slots = SlotSettings(
            slot_size=slot_size,
            serial_blocks=serial_blocks,
            slot_threshold=slot_threshold,
            token_threshold=token_threshold,
            acceptance="paper",
            correction="paper",
            max_candidates=MANY,
        )
        num_seats, width = 3, slots.slots_per_block(length)
        eos_ids = torch.tensor([EOS_ID])
        rounds = RefusionRounds(
            slots, width, width * serial_blocks, num_seats, mask_id=MASK_ID, eos_ids=eos_ids, device=CPU, use_kernels=False
        )
        pages = -(-(max(len(traces[index]["prompt_ids"]) for index in members) + length) // 4) + 1
        run = Server(rounds, NetworkRows(golden_model, num_seats * pages * 4), num_seats=num_seats, pages_per_seat=pages)
        asked = [Request(traces[index]["prompt_ids"], length, arrival=2 * place, chunk=11) for place, index in enumerate(members)]
        run.serve(asked, lambda forward: MANY)
        for request, index in zip(asked, members, strict=True):
            assert request.text([EOS_ID]) == traces[index]["output_ids"]
            assert request.reports[-1].num_forwards == padded_answers[index].num_forwards


def test_rows_drawn_together_are_drawn_as_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, banned = 4 * torch.randn(6, 30, generator=generator), torch.tensor([4, 7])
    temperature, top_p = torch.tensor([0.5, 1.0, 2.0, 0.5, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 0.3, 0.6, 0.9])
    seeds, positions, attempts = torch.tensor([2**62, -1, 0, 1, 2, 3]), torch.arange(6).int(), torch.tensor([1, 2, 3, 4, 5, 6]).int()
    given = torch.tensor([0, 1, 2, 3, 5, 6]).int()
    together = sampled_readout(logits.clone(), banned, given, temperature, top_p, seeds, positions, attempts)
    for row in range(6):
        one = slice(row, row + 1)
        draw = Draw(float(temperature[row]), float(top_p[row]), seeds[one], attempts[one])
        alone = readout_logits(logits[one].clone(), banned, draw, Rows(seeds[one], attempts[one], positions[one], given[one].long()))
        for name in ("token_ids", "confidence", "given_probability", "given_is_argmax"):
            assert torch.equal(getattr(together, name)[one], getattr(alone, name)), name
