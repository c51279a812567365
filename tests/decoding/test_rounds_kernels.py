"""The kernels of the rounds beside the plain tensor functions: the same numbers everywhere, whatever a network says.

In Triton's interpreter without a GPU (TRITON_INTERPRET=1), compiled with one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, whose own functions read it too
pytest.importorskip("triton")

from refusion.decoding.autoregressive_rounds import AutoregressiveRounds
from refusion.decoding.forward import Readout
from refusion.decoding.params import SlotSettings
from refusion.decoding.refusion_rounds import RefusionRounds
from refusion.decoding.rounds import OVERFLOW
from refusion.decoding.state import INFILL, PLAN, REMASK, VERIFY
from refusion.model.rows import Rows, Spans, Tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MASK, VOCAB, PAGE_SIZE, PAGES, BLOCK = 1, 7, 4, 40, 3
EOS_IDS = torch.tensor([0, 6], device=DEVICE)
NUM_STEPS, AGING = (26, 2) if DEVICE.type == "cpu" else (300, 1)  # the interpreter is slow: there the kernels run every second forward only
WRITTEN_ROWS = ("given_ids", "seeds", "attempts")


class Side:
    """One implementation with everything it writes to."""

    def __init__(self, rounds: Any, num_seats: int) -> None:
        self.rounds = rounds
        nothing = [torch.zeros(num_seats, dtype=torch.int32, device=DEVICE) for _ in range(5)]
        pages = torch.randperm(num_seats * PAGES, generator=torch.Generator().manual_seed(2)).int().to(DEVICE)
        self.spans = Spans(*nothing, pages.view(num_seats, PAGES), PAGE_SIZE)

    def lay_out(self, num_rows: int, start: int, num_seats: int, candidates: int) -> None:
        self.rows = Rows.empty(start + num_rows, DEVICE)
        for field in fields(Rows):
            getattr(self.rows, field.name).fill_(-77)  # every row has to be written
        self.tiles = Tiles(
            *(torch.full((5 + num_rows // BLOCK + num_seats,), -77, dtype=torch.int32, device=DEVICE) for _ in range(3)), BLOCK
        )
        where = {"start": start, "num_seats": num_seats, "candidates": candidates}
        self.rounds.lay_out(self.rows.narrow(start, num_rows), self.spans_of(num_seats), **where, tiles=self.tiles, tile_start=5)

    def settle(self, readout: Readout, num_seats: int, candidates: int) -> None:
        self.rounds.settle(readout, self.spans_of(num_seats), num_seats=num_seats, candidates=candidates)

    def spans_of(self, num_seats: int) -> Spans:
        parts = [getattr(self.spans, field.name) for field in fields(Spans)]
        return Spans(*(part[:num_seats] if isinstance(part, torch.Tensor) else part for part in parts))

    def copy_from(self, other: Side) -> None:
        """Stand where the other one stands."""
        for mine, theirs in (
            (self.rounds.table.values, other.rounds.table.values),
            *((getattr(self.spans, name), getattr(other.spans, name)) for name in ("cached", "row_start", "row_end")),
            *((getattr(self.rounds, name), getattr(other.rounds, name)) for name in (*WRITTEN_ROWS, "source", "target", "report")),
        ):
            mine.copy_(theirs)

    def numbers(self) -> dict[str, torch.Tensor]:
        """Everything that counts, by name."""
        found = {f"rows.{field.name}": getattr(self.rows, field.name) for field in fields(Rows)}
        found |= {f"tiles.{name}": getattr(self.tiles, name) for name in ("seat", "first", "end")}
        found |= {f"spans.{name}": getattr(self.spans, name) for name in ("cached", "row_start", "row_end")}
        found |= {name: getattr(self.rounds, name) for name in (*WRITTEN_ROWS, "source", "target", "report")}
        for name in self.rounds.table.columns:
            found[f"table.{name}"] = self.rounds.table.group(name, len(self.rounds.table.values))
        return found


def check_equal(plain: Side, kernels: Side) -> None:
    ours = kernels.numbers()
    for name, expected in plain.numbers().items():
        assert torch.equal(ours[name], expected), f"{name}: {ours[name].tolist()} is not {expected.tolist()}"


def random_readout(num_rows: int, rng: np.random.Generator, agreement: float, eos: float, num_runner_ups: int = 0) -> Readout:
    """A network that says anything; few distinct probabilities, so that ties and equal thresholds come up."""
    ids = np.where(rng.random(num_rows) < eos, rng.choice([0, 6], num_rows), rng.integers(2, 6, num_rows))
    levels = np.array([0.0, 0.3, 0.4, 0.5, 0.9, 1.0], dtype=np.float32)
    sure = rng.choice(levels, num_rows)
    given = np.where(rng.random(num_rows) < agreement, np.float32(0.95), rng.choice(levels, num_rows))
    is_argmax = rng.random(num_rows) < 0.3
    # Next in a ring of few, so that corrections are often runner-ups, and as in a real readout never the token itself.
    runner_ups = ((ids[:, None] + np.arange(1, num_runner_ups + 1)) % 7).astype(np.int64)
    parts = (ids.astype(np.int64), sure, given.astype(np.float32), is_argmax, runner_ups)
    return Readout(*(torch.from_numpy(part).to(DEVICE) for part in parts))


def run_both(plain: Side, kernels: Side, max_tokens: int, seed: int, *, agreement: float, eos: float, max_candidates: int) -> set[int]:
    """Random requests on random seats: both sides must agree after every call that both make.

    Returns the phases that came up, or, where slots slide, how many tokens a forward knew.
    """
    rng = np.random.default_rng(seed)
    num_seats = len(plain.spans.cached)
    phases: set[int] = set()
    for forward in range(NUM_STEPS):
        for seat in range(num_seats):
            if forward == 0 or rng.random() < 0.1:
                length = int(rng.integers(1, 9))
                asked = {
                    "prompt_length": length,
                    "seed": int(rng.integers(-(2**62), 2**62)),
                    "max_tokens": int(rng.integers(1, max_tokens + 1)),
                }
                plain.rounds.admit(seat, **asked, last_token=3)
                plain.spans.cached[seat] = length
            elif rng.random() < 0.02:
                plain.rounds.retire(seat)
        running, start, candidates = int(rng.integers(1, num_seats + 1)), int(rng.integers(0, 4)), int(rng.integers(0, max_candidates + 1))
        plain.lay_out(800, 0, running, candidates)
        num_rows = max(int(plain.spans.row_end[:running].max()), 1) + int(rng.integers(0, 5))
        alternatives = plain.rounds.slots.alternatives if hasattr(plain.rounds, "slots") else 0
        readout = random_readout(num_rows, rng, agreement, eos, alternatives)
        sides = (plain, kernels) if forward % AGING == AGING - 1 else (plain,)
        if kernels in sides:
            kernels.copy_from(plain)
            for name in {"phase", "num_known"} & plain.rounds.table.columns.keys():
                phases |= set(plain.rounds.table.column(name, running).tolist())
        for side in sides:
            side.lay_out(num_rows, start, running, candidates)
        if kernels in sides:
            check_equal(plain, kernels)
        name_firsts(sides, running, np.random.default_rng(forward), eos)
        for side in sides:
            side.settle(readout, running, candidates)
        if kernels in sides:
            check_equal(plain, kernels)
        assert not plain.rounds.report[:, OVERFLOW].any()
    return phases


def name_firsts(sides: Sequence[Side], running: int, rng: np.random.Generator, eos: float) -> None:
    """Prompts that end in the first forward of a seat, as the runner says it; the same on all sides."""
    if not hasattr(sides[0].rounds, "first_ids"):
        return
    is_first = sides[0].rounds.table.column("num_forwards", running).cpu().numpy() == 0
    token = np.where(rng.random(running) < eos, int(EOS_IDS[0]), rng.integers(MASK + 1, VOCAB, running))
    first_ids = torch.from_numpy(np.where(is_first, token, -1)).int().to(DEVICE)
    for side in sides:
        side.rounds.first_ids[:running].copy_(first_ids)


RULES = [("paper", "paper", True), ("argmax", "autoregressive", True), ("paper", "autoregressive", False), ("argmax", "paper", True)]


@pytest.mark.parametrize(
    ("width", "slot_size", "alternatives"),
    [*((width, slot_size, 0) for width in (1, 2, 3) for slot_size in (1, 3, 4, 8)), (1, 8, 1), (1, 8, 2), (2, 4, 3), (1, 3, 2)],
)
def test_refusion_kernels_do_what_the_plain_rounds_do(width: int, slot_size: int, alternatives: int) -> None:
    seed = width * 100 + slot_size
    acceptance, correction, fuse_plan = RULES[(width + (1, 3, 4, 8).index(slot_size)) % 4]
    if alternatives:
        seed, acceptance, correction, fuse_plan = seed + 1002, "paper", "autoregressive", slot_size != 3
    infill_length = {(1, 8, 2): 3, (2, 4, 0): 2, (1, 8, 0): 5}.get((width, slot_size, alternatives))
    slots = SlotSettings(
        slot_size=slot_size,
        block_size=width * slot_size,
        slot_threshold=0.5,
        token_threshold=0.4,
        acceptance=acceptance,  # type: ignore[arg-type]
        correction=correction,  # type: ignore[arg-type]
        alternatives=alternatives,
        infill_length=infill_length,
        fuse_plan=fuse_plan,
    )
    num_slots, num_seats = 3 * width, 3
    plain, kernels = (
        Side(
            RefusionRounds(
                slots, width, num_slots, num_seats, mask_id=MASK, eos_ids=EOS_IDS, device=DEVICE, use_kernels=use_kernels, max_rows=2000
            ),
            num_seats,
        )
        for use_kernels in (False, True)
    )
    agreement, eos = ((0.8, 0.02), (0.6, 0.02), (0.4, 0.04))[seed % 3]
    most = slot_size // 2 if alternatives else slot_size
    most = min(most, infill_length - 1) if infill_length else most  # or no advance is ever too far, once a slot is in infill
    phases = run_both(plain, kernels, num_slots * slot_size, seed, agreement=agreement, eos=eos, max_candidates=most)
    assert VERIFY in phases
    assert slot_size < 8 or phases >= {PLAN, VERIFY, REMASK, INFILL}, "the draws are such that every kind of forward comes up"


def test_autoregressive_kernels_do_what_the_plain_rounds_do() -> None:
    num_seats = 5
    plain, kernels = (
        Side(AutoregressiveRounds(num_seats, eos_ids=EOS_IDS, device=DEVICE, use_kernels=use_kernels, max_rows=1000), num_seats)
        for use_kernels in (False, True)
    )
    run_both(plain, kernels, 12, 5, agreement=0.5, eos=0.1, max_candidates=0)


def test_rows_beyond_the_bucket_are_left_out_and_reported() -> None:
    slots = SlotSettings(slot_size=4, block_size=8)
    for use_kernels in (False, True):
        rounds = RefusionRounds(slots, 2, 4, 3, mask_id=MASK, eos_ids=EOS_IDS, device=DEVICE, use_kernels=use_kernels)
        side = Side(rounds, 3)
        for seat in range(3):
            rounds.admit(seat, prompt_length=2, seed=0, max_tokens=16)
        whole = Rows.empty(30, DEVICE)
        where = {"start": 2, "num_seats": 3, "candidates": 3}
        rounds.lay_out(whole.narrow(2, 12), side.spans, **where)
        assert whole.seat.tolist() == [-1] * 2 + [0] * 8 + [1] * 4 + [-1] * 16
        assert rounds.given_ids[12:].eq(0).all()
        assert (side.spans.row_start.tolist(), side.spans.row_end.tolist()) == ([2, 10, 14], [10, 14, 14])
        rounds.settle(random_readout(12, np.random.default_rng(0), 0.5, 0.1), side.spans, num_seats=3, candidates=3)
        assert rounds.report[:, OVERFLOW].tolist() == [0, 4, 8]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA graphs")
@pytest.mark.parametrize("use_kernels", [False, True])
@pytest.mark.parametrize("is_autoregressive", [False, True])
def test_a_captured_graph_does_what_the_calls_do(use_kernels: bool, is_autoregressive: bool) -> None:
    num_seats, num_rows = 3, 120
    slots = SlotSettings(slot_size=4, block_size=8)

    def side() -> Side:
        rounds: Any = (
            AutoregressiveRounds(num_seats, eos_ids=EOS_IDS, device=DEVICE, use_kernels=use_kernels, max_rows=500)
            if is_autoregressive
            else RefusionRounds(slots, 2, 8, num_seats, mask_id=MASK, eos_ids=EOS_IDS, device=DEVICE, use_kernels=use_kernels)
        )
        return Side(rounds, num_seats)

    called, replayed = side(), side()
    rng = np.random.default_rng(1)
    readout = random_readout(num_rows, rng, 0.6, 0.02)

    def forward(one: Side) -> None:
        one.rounds.lay_out(one.rows, one.spans, start=0, num_seats=num_seats, candidates=3, tiles=one.tiles, tile_start=0)
        one.rounds.settle(readout, one.spans, num_seats=num_seats, candidates=3)

    for one in (called, replayed):
        one.lay_out(num_rows, 0, num_seats, 3)  # makes the buffers
        forward(one)  # loads the kernels
        for seat in range(num_seats):
            one.rounds.admit(seat, prompt_length=3, seed=seat, max_tokens=30, last_token=2)
            one.spans.cached[seat] = 3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(replayed)
    for _ in range(8):
        new = random_readout(num_rows, rng, 0.6, 0.02)
        for name in ("token_ids", "confidence", "given_probability", "given_is_argmax"):
            getattr(readout, name).copy_(getattr(new, name))
        forward(called)
        graph.replay()
        check_equal(called, replayed)
