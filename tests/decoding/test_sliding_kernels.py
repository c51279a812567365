"""The kernels of sliding slots beside the plain tensor functions: the same numbers everywhere, whatever a network says.

In Triton's interpreter without a GPU (TRITON_INTERPRET=1), compiled with one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_rounds_kernels import DEVICE, EOS_IDS, MASK, Side, check_equal, random_readout, run_both  # first: it says how triton runs

from refusion.decoding.params import SlotSettings
from refusion.decoding.rounds import OVERFLOW
from refusion.decoding.sliding_report import most_rows
from refusion.decoding.sliding_rounds import SlidingRounds


def both_sides(slots: SlotSettings, num_seats: int) -> list[Side]:
    def side(use_kernels: bool) -> Side:
        where = {"mask_id": MASK, "eos_ids": EOS_IDS, "device": DEVICE, "max_rows": 2000}
        return Side(SlidingRounds(slots, num_seats, use_kernels=use_kernels, **where), num_seats)

    return [side(use_kernels) for use_kernels in (False, True)]


# Per case: slot_size, infill_length, max_candidates, alternatives, seats, most tokens of an answer, acceptance.
CASES = [
    (2, None, None, 0, 4, 5, "paper"),
    (2, None, 1, 3, 4, 30, "exact"),
    (3, 1, 2, 2, 4, 12, "paper"),  # as many tokens of a chain as lanes
    (4, 2, 0, 0, 5, 30, "argmax"),
    (4, None, 0, 2, 3, 9, "exact"),
    (5, 3, 4, 1, 4, 40, "argmax"),
    (8, 4, None, 3, 3, 60, "paper"),
    (8, None, 7, 0, 3, 3, "argmax"),
    (16, 8, 2, 2, 3, 100, "exact"),
    (16, 16, 4, 3, 2, 40, "exact"),
    (1, None, None, 0, 4, 6, "paper"),  # no drafts at all
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sliding_kernels_do_what_the_plain_rounds_do(case: tuple[int, int | None, int | None, int, int, int, Any]) -> None:
    slot_size, infill_length, max_candidates, alternatives, num_seats, max_tokens, acceptance = case
    number = CASES.index(case)
    slots = SlotSettings(
        slot_size=slot_size,
        infill_length=infill_length,
        max_candidates=max_candidates,
        alternatives=alternatives,
        token_threshold=0.4,
        acceptance=acceptance,
        sliding=True,
    )
    assert num_seats * most_rows(slots) <= 800, "the rows that `run_both` has"
    plain, kernels = both_sides(slots, num_seats)
    agreement, eos = ((0.7, 0.02), (0.4, 0.01), (0.1, 0.03))[number % 3]
    known = run_both(plain, kernels, max_tokens, 8, agreement=agreement, eos=eos, max_candidates=5)
    assert known == ({0, 1, 2} if alternatives and max_candidates != 0 else {0, 1}), "the draws are such that runner-ups are right"


def test_rows_beyond_the_bucket_are_left_out_and_reported() -> None:
    slots = SlotSettings(slot_size=4, infill_length=2, alternatives=1, sliding=True)
    sides = both_sides(slots, 4)
    for side in sides:
        for seat, (known, drafted) in enumerate(((0, 0), (1, 3), (2, 1), (1, 0))):
            side.rounds.admit(seat, prompt_length=2, seed=seat, max_tokens=16)
            for name, value in (("num_known", known), ("num_drafted", drafted), ("num_written", 2 * known)):
                side.rounds.table.column(name, 4)[seat] = value
        side.spans.cached.fill_(2)
        side.rounds.table.group("chain", 4).fill_(3)
        side.lay_out(20, 2, 4, 0)
        assert side.rows.seat.tolist() == [-77] * 2 + [0] * 4 + [1] * 16
        assert (side.spans.row_start.tolist(), side.spans.row_end.tolist()) == ([2, 6, 22, 22], [6, 22, 22, 22])
    check_equal(*sides)
    for side in sides:
        side.settle(random_readout(20, np.random.default_rng(0), 0.5, 0.1, 1), 4, 0)
        # Seat 1: a chain of 4, two groups of 2, a plan of 4, two alternatives of 3; seat 2: 3 + 2 + 4 + 3; seat 3: 1 + 4.
        assert side.rounds.report[:, OVERFLOW].tolist() == [0, 2, 12, 5]
    check_equal(*sides)


@pytest.mark.parametrize("num_rows", [1, 9, 30, 47])
def test_a_forward_without_room_is_the_same_on_both_sides(num_rows: int) -> None:
    """Nothing of such a forward is used, but neither side may read or write beyond its arrays, nor may they disagree."""
    sides = both_sides(SlotSettings(slot_size=4, alternatives=2, sliding=True), 3)
    rng = np.random.default_rng(num_rows)
    for side in sides:
        for seat in range(3):
            side.rounds.admit(seat, prompt_length=3, seed=seat, max_tokens=20)
    for _ in range(6):
        readout = random_readout(num_rows, rng, 0.5, 0.0, 2)
        for side in sides:
            side.lay_out(num_rows, 1, 3, 0)
        check_equal(*sides)
        for side in sides:
            side.settle(readout, 3, 0)
        check_equal(*sides)


def test_runner_ups_may_be_columns_of_a_wider_tensor() -> None:
    """As `refusion.model.ops.next_best` returns them."""
    sides = both_sides(SlotSettings(slot_size=8, alternatives=2, sliding=True), 2)
    readout = random_readout(30, np.random.default_rng(4), 0.5, 0.0, 2)
    wide = torch.cat((readout.token_ids[:, None], readout.runner_ups), dim=1)
    for side in sides:
        for seat in range(2):
            side.rounds.admit(seat, prompt_length=3, seed=0, max_tokens=9)
        side.lay_out(30, 0, 2, 0)
        side.settle(replace(readout, runner_ups=wide[:, 1:]), 2, 0)
    check_equal(*sides)
    first_draft = sides[1].rounds.table.group("runner_ups", 2).view(2, -1, 2)[:, 1]  # of the mask behind the first of each seat
    assert torch.equal(first_draft, readout.runner_ups[[1, 9]])


def test_a_seat_without_a_first_token_does_not_end() -> None:
    """Where no prompt ran to its end, the token that stands is -1 until one does, and that is no EOS."""
    sides = both_sides(SlotSettings(slot_size=3, alternatives=1, sliding=True), 2)
    for side in sides:
        side.rounds.admit(1, prompt_length=3, seed=0, max_tokens=9)
        side.lay_out(12, 0, 2, 0)
        side.settle(random_readout(12, np.random.default_rng(3), 0.5, 0.0, 1), 2, 0)
        assert side.rounds.table.column("is_done", 2).tolist() == [1, 0]
    check_equal(*sides)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA graphs")
@pytest.mark.parametrize("use_kernels", [False, True])
@pytest.mark.parametrize("alternatives", [0, 2])
def test_a_captured_graph_does_what_the_calls_do(use_kernels: bool, alternatives: int) -> None:
    num_seats, num_rows = 3, 200
    slots = SlotSettings(slot_size=8, infill_length=4, alternatives=alternatives, sliding=True)
    called, replayed = (both_sides(slots, num_seats)[use_kernels] for _ in range(2))
    rng = np.random.default_rng(1)
    readout = random_readout(num_rows, rng, 0.6, 0.02, alternatives)

    def forward(one: Side) -> None:
        one.rounds.lay_out(one.rows, one.spans, start=0, num_seats=num_seats, candidates=0, tiles=one.tiles, tile_start=0)
        one.rounds.settle(readout, one.spans, num_seats=num_seats, candidates=0)

    for one in (called, replayed):
        one.lay_out(num_rows, 0, num_seats, 0)  # makes the buffers
        forward(one)  # loads the kernels
        for seat in range(num_seats):
            one.rounds.admit(seat, prompt_length=3, seed=seat, max_tokens=60)
            one.spans.cached[seat] = 3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(replayed)
    for count in range(12):
        new = random_readout(num_rows, rng, 0.6, 0.02, alternatives)
        for name in ("token_ids", "confidence", "given_probability", "given_is_argmax", "runner_ups"):
            getattr(readout, name).copy_(getattr(new, name))
        for one in (called, replayed):
            one.rounds.first_ids.fill_(2 if count == 0 else -1)
        forward(called)
        graph.replay()
        check_equal(called, replayed)
