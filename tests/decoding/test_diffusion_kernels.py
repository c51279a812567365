"""The kernels of the diffusion rounds beside the plain tensor functions: the same numbers everywhere, whatever a network says.

In Triton's interpreter without a GPU (TRITON_INTERPRET=1), compiled with one.
"""

from __future__ import annotations

import os
from dataclasses import fields

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, whose own functions read it too
pytest.importorskip("triton")

from refusion.decoding.diffusion_params import BlockCache, BlockDiffusionParams, DiffusionParams, MaskedDiffusionParams
from refusion.decoding.diffusion_rounds import DiffusionRounds
from refusion.decoding.forward import Readout
from refusion.decoding.kernels import diffusion_layout
from refusion.decoding.rounds import OVERFLOW
from refusion.model.rows import Rows, Spans, Tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MASK, PAGE_SIZE, TILE, NUM_POSITIONS = 1, 4, 3, 44
EOS_IDS = torch.tensor([0, 6], device=DEVICE)
NUM_STEPS = 14 if DEVICE.type == "cpu" else 200
PARAMS: dict[str, tuple[DiffusionParams, int]] = {
    "masked": (MaskedDiffusionParams(block_size=6, steps=4), 6),
    "masked, one block": (MaskedDiffusionParams(block_size=99, threshold=0.4, early_stop=True), 32),
    "prefix": (MaskedDiffusionParams(block_size=5, steps=2, cache="prefix"), 5),
    "dual": (MaskedDiffusionParams(block_size=4, threshold=0.9, cache="dual"), 4),
    "blocks": (BlockDiffusionParams(block_size=4, threshold=0.5), 4),
    "blocks of one": (BlockDiffusionParams(block_size=1, steps=1), 1),
    "unfused": (BlockDiffusionParams(block_size=3, steps=2, fuse_commit=False), 3),
}


class Side:
    """One implementation with everything it writes to."""

    def __init__(
        self, params: DiffusionParams, block_size: int, num_seats: int, *, use_kernels: bool, num_positions: int = NUM_POSITIONS
    ) -> None:
        self.rounds = DiffusionRounds(
            params,
            num_positions,
            num_seats,
            block_size=block_size,
            prefill_rows=6,
            mask_id=MASK,
            eos_ids=EOS_IDS,
            device=DEVICE,
            use_kernels=use_kernels,
            max_rows=num_seats * num_positions,
        )
        num_pages = num_positions // PAGE_SIZE
        nothing = [torch.zeros(num_seats, dtype=torch.int32, device=DEVICE) for _ in range(5)]
        pages = torch.randperm(num_seats * num_pages, generator=torch.Generator().manual_seed(2)).int().to(DEVICE)
        self.spans = Spans(*nothing, pages.view(num_seats, num_pages), PAGE_SIZE)

    def lay_out(self, num_rows: int, start: int, num_seats: int) -> None:
        self.rows = Rows.empty(start + num_rows, DEVICE)
        for field in fields(Rows):
            getattr(self.rows, field.name).fill_(-77)  # every row has to be written
        num_tiles = 5 + num_rows // TILE + num_seats
        self.tiles = Tiles(*torch.full((3, num_tiles), -77, dtype=torch.int32, device=DEVICE), TILE)
        where = {"start": start, "num_seats": num_seats, "candidates": 0}
        self.rounds.lay_out(self.rows.narrow(start, num_rows), self.spans_of(num_seats), **where, tiles=self.tiles, tile_start=5)

    def settle(self, readout: Readout, num_seats: int) -> None:
        self.rounds.settle(readout, self.spans_of(num_seats), num_seats=num_seats, candidates=0)

    def spans_of(self, num_seats: int) -> Spans:
        parts = [getattr(self.spans, field.name) for field in fields(Spans)]
        return Spans(*(part[:num_seats] if isinstance(part, torch.Tensor) else part for part in parts))

    def numbers(self) -> dict[str, torch.Tensor]:
        """Everything that counts, by name."""
        found = {f"rows.{field.name}": getattr(self.rows, field.name) for field in fields(Rows)}
        found |= {f"tiles.{name}": getattr(self.tiles, name) for name in ("seat", "first", "end")}
        return found | self.state()

    def state(self) -> dict[str, torch.Tensor]:
        rounds = self.rounds
        names = ("reads", "given_ids", "seeds", "attempts", "source", "target", "report")
        spans = {f"spans.{name}": getattr(self.spans, name) for name in ("cached", "row_start", "row_end")}
        return {"table": rounds.table.values, **{name: getattr(rounds, name) for name in names}, **spans}


def check_equal(plain: Side, kernels: Side) -> None:
    ours = kernels.numbers()
    for name, expected in plain.numbers().items():
        assert torch.equal(ours[name], expected), f"{name}: {ours[name].tolist()} is not {expected.tolist()}"


def random_readout(num_rows: int, rng: np.random.Generator) -> Readout:
    """Few distinct probabilities, so that ties and equal thresholds come up."""
    ids = np.where(rng.random(num_rows) < 0.05, rng.choice([0, 6], num_rows), rng.integers(2, 6, num_rows))
    sure = rng.choice(np.array([0.0, 0.3, 0.4, 0.5, 0.9, 1.0], dtype=np.float32), num_rows)
    nothing = torch.zeros(num_rows, device=DEVICE)
    drawn, confidence = torch.from_numpy(ids).to(DEVICE), torch.from_numpy(sure).to(DEVICE)
    return Readout(drawn, confidence, nothing, nothing.bool(), torch.zeros(num_rows, 0, dtype=torch.long, device=DEVICE))


@pytest.mark.parametrize("name", PARAMS)
def test_kernels_do_what_the_plain_rounds_do(name: str) -> None:
    params, block_size = PARAMS[name]
    num_seats = 3
    plain, kernels = (Side(params, block_size, num_seats, use_kernels=use_kernels) for use_kernels in (False, True))
    rng = np.random.default_rng(len(name))
    num_done = 0
    for forward in range(NUM_STEPS):
        for seat in range(num_seats):
            if forward == 0 or rng.random() < 0.1:
                prompt = rng.integers(0, 9, int(rng.integers(1, 12))).tolist()
                most = NUM_POSITIONS - 12 - block_size + 1
                asked = {"seed": int(rng.integers(-(2**62), 2**62)), "max_tokens": int(rng.integers(1, most + 1))}
                plain.rounds.admit(seat, prompt_length=len(prompt), prompt_ids=prompt, **asked)
                plain.spans.cached[seat] = 0
            elif rng.random() < 0.02:
                plain.rounds.retire(seat)
        running, start = int(rng.integers(1, num_seats + 1)), int(rng.integers(0, 4))
        plain.lay_out(num_seats * NUM_POSITIONS, 0, running)
        num_rows = max(int(plain.spans.row_end[:running].max()), 1) + int(rng.integers(0, 5))
        readout = random_readout(num_seats * block_size, rng)
        for mine, theirs in zip(kernels.state().values(), plain.state().values(), strict=True):
            mine.copy_(theirs)
        for side in (plain, kernels):
            side.lay_out(num_rows, start, running)
        check_equal(plain, kernels)
        for side in (plain, kernels):
            side.settle(readout, running)
        check_equal(plain, kernels)
        assert not plain.rounds.report[:running, OVERFLOW].any()
        num_done += int(plain.rounds.table.column("is_done", running).sum())
    assert num_done > 0 or NUM_STEPS < 20


@pytest.mark.parametrize("most_programs", [1, 5, 512])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_programs_of_a_seat_take_turns_with_its_rows(cache: BlockCache, most_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion_layout, "MOST_PROGRAMS", most_programs)
    block_size, prompt_lengths = 150, (300, 1, 40)
    params = MaskedDiffusionParams(block_size=block_size, steps=3, cache=cache)
    plain, kernels = (Side(params, block_size, 3, use_kernels=use_kernels, num_positions=760) for use_kernels in (False, True))
    rng = np.random.default_rng(5)
    for side in (plain, kernels):
        for seat, length in enumerate(prompt_lengths):
            side.rounds.admit(seat, prompt_length=length, prompt_ids=[3] * length, seed=seat, max_tokens=310)
    for num_rows in (1300, 1400, 200):  # the last has no room for all
        readout = random_readout(3 * block_size, rng)
        for side in (plain, kernels):
            side.lay_out(num_rows, 2, 3)
        check_equal(plain, kernels)
        for side in (plain, kernels):
            side.settle(readout, 3)
        check_equal(plain, kernels)


def test_rows_beyond_the_bucket_are_left_out_and_reported() -> None:
    for use_kernels in (False, True):
        side = Side(*PARAMS["masked"], 3, use_kernels=use_kernels)
        for seat in range(3):
            side.rounds.admit(seat, prompt_length=2, seed=0, max_tokens=6, prompt_ids=[3, 4])
        side.lay_out(12, 2, 3)
        assert side.rows.seat.tolist() == [-77] * 2 + [0] * 8 + [1] * 4
        assert (side.spans.row_start.tolist(), side.spans.row_end.tolist()) == ([2, 10, 14], [10, 14, 14])
        side.settle(random_readout(18, np.random.default_rng(0)), 3)
        assert side.rounds.report[:, OVERFLOW].tolist() == [0, 4, 8]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA graphs")
@pytest.mark.parametrize("use_kernels", [False, True])
@pytest.mark.parametrize("name", PARAMS)
def test_a_captured_graph_does_what_the_calls_do(name: str, use_kernels: bool) -> None:
    params, block_size = PARAMS[name]
    called, replayed = (Side(params, block_size, 3, use_kernels=use_kernels) for _ in range(2))
    rng = np.random.default_rng(1)
    readout = random_readout(3 * block_size, rng)

    def forward(one: Side) -> None:
        one.rounds.lay_out(one.rows, one.spans, start=0, num_seats=3, candidates=0, tiles=one.tiles, tile_start=0)
        one.rounds.settle(readout, one.spans, num_seats=3, candidates=0)

    for one in (called, replayed):
        one.lay_out(120, 0, 3)  # makes the buffers
        forward(one)  # loads the kernels
        for seat in range(3):
            one.rounds.admit(seat, prompt_length=7, seed=seat, max_tokens=12, prompt_ids=[2, 3, 4, 5, 2, 3, 4])
            one.spans.cached[seat] = 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(replayed)
    for _ in range(10):
        new = random_readout(3 * block_size, rng)
        readout.token_ids.copy_(new.token_ids)
        readout.confidence.copy_(new.confidence)
        forward(called)
        graph.replay()
        check_equal(called, replayed)
