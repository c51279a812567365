"""The device side of a decoder over flat rows: all state of the running requests in tensors, two calls around each forward.

`lay_out` writes the rows of the next forward, `settle` turns its readout into the next state. Nothing in them looks at data from the
host, so a whole forward can be captured in a CUDA graph; the host learns what happened from a report of numbers, whenever it likes. A
request sits on a *seat*; who sits where, and the pages of the cache, are the engine's business.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.forward import Readout, readout_logits
from refusion.decoding.forward import Rows as ReadRows
from refusion.decoding.packing import put_rows, put_tiles
from refusion.decoding.sampling import Draw
from refusion.decoding.seats import SeatTable
from refusion.model.rows import PADDING, Rows, Spans, Tiles
from refusion.model.segments import NO_PARENT

# B = seats, T = decode rows of a forward, M = rows a seat may keep of one forward, R = report columns, V = vocabulary

IS_DONE, NUM_FORWARDS, OVERFLOW, NUM_ROWS = range(4)
"""The first columns of every report: nothing left to write; forwards so far; rows that did not fit (must be 0); rows of this forward."""
NUM_COMMON = 4


@dataclass(frozen=True, slots=True)
class SlotNews:
    """What happened to one slot in one forward."""

    slot: int
    offset: int  # place of its first token in the answer
    token_ids: tuple[int, ...]
    score: float = 0.0  # planned: confidence of the first token


@dataclass(frozen=True, slots=True)
class SeatReport:
    """What one forward did for one request, on the host."""

    is_done: bool
    num_forwards: int
    num_rows: int
    committed: list[SlotNews]  # tokens that became final
    verified: list[SlotNews]  # tokens of verified slots that stand now
    infilled: list[SlotNews]  # the same of slots in infill
    planned: list[SlotNews]  # new drafts


class Rounds(Protocol):
    """A decoder whose state lives on the device. The methods up to `restore` are called between forwards."""

    report_width: int
    num_kept: int
    """M: rows a seat may keep of one forward."""
    fresh_rows: int
    """Decode rows that hold the first forward of a seat just admitted."""
    given_ids: Tensor
    """[at least T] int32: by decode row, the token whose probability is wanted."""
    seeds: Tensor
    """[at least T] int64: noise keys by decode row."""
    attempts: Tensor
    """[at least T] int32: noise keys by decode row."""
    source: Tensor
    """[B * M] int32: flat rows to keep, -1 for none; seat b has entries b * M to (b + 1) * M."""
    target: Tensor
    """[B * M] int32: the cache rows they go to."""
    report: Tensor
    """[B, R] int32, for `read` and `num_rows`."""

    def admit(self, seat: int, *, prompt_length: int, seed: int, max_tokens: int, last_token: int = -1) -> None:
        """Start a request. last_token: of the prompt; rounds that run it as a decode row do so in their first forward."""
        ...

    def retire(self, seat: int) -> None:
        """The seat takes no more rows."""
        ...

    def move(self, source: int, target: int) -> None:
        """Put the request of one seat on another as well."""
        ...

    def snapshot(self, seat: int) -> dict[str, Tensor]:
        """The whole state of a seat in host memory."""
        ...

    def restore(self, seat: int, snapshot: dict[str, Tensor]) -> None:
        """Go on from a snapshot, on any seat."""
        ...

    def lay_out(
        self,
        rows: Rows,
        spans: Spans,
        *,
        start: int,
        num_seats: int,
        candidates: int,
        tiles: Tiles | None = None,
        tile_start: int = 0,
    ) -> None:
        """Fill all T decode rows, whose first is flat row `start`, for the first seats; also `spans`, and `tiles` from `tile_start` on."""
        ...

    def settle(self, readout: Readout, spans: Spans, *, num_seats: int, candidates: int) -> None:
        """Judge the forward laid out last by the readout [T] of its decode rows: next state, rows to keep, report."""
        ...

    def num_rows(self, report: np.ndarray, candidates: int) -> np.ndarray:
        """[B] decode rows each seat needs in its next forward, from the reports [B, R] of its last one."""
        ...

    def read(self, report_row: np.ndarray) -> SeatReport:
        """What a report [R] says."""
        ...


def sampled_readout(
    logits: Tensor,
    banned_ids: Tensor,
    given_ids: Tensor,
    temperature: Tensor,
    top_p: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    attempts: Tensor,
    num_runner_ups: int = 0,
) -> Readout:
    """Readout [T] of float32 logits [T, V], which are overwritten; everything but `banned_ids` [N] has one value a row.

    top_p None: no row filters.
    """
    draw = Draw(temperature, 1.0 if top_p is None else top_p, seeds, attempts)
    rows = ReadRows(seeds, attempts.long(), positions.long(), given_ids.long())
    return readout_logits(logits, banned_ids, draw, rows, num_runner_ups)


class RowBuffers:
    """What every kind of rounds hands out at fixed addresses."""

    def __init__(self, num_seats: int, num_kept: int, report_width: int, max_rows: int, device: torch.device) -> None:
        self.given_ids = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.attempts = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.source = torch.full((num_seats * num_kept,), -1, dtype=torch.int32, device=device)
        self.target = torch.full((num_seats * num_kept,), -1, dtype=torch.int32, device=device)
        self.report = torch.zeros(num_seats, report_width, dtype=torch.int32, device=device)


def cache_targets(spans: Spans, place: Tensor, is_kept: Tensor) -> Tensor:
    """Cache rows of the committed tokens `place` [B, M] of every seat, -1 where nothing is kept."""
    seat = torch.arange(place.shape[0], device=place.device)[:, None].expand_as(place)
    last = spans.page_table.shape[1] * spans.page_size - 1
    return torch.where(is_kept, spans.cache_rows(seat, place.clamp(max=last)), -1)


class AutoregressiveRounds:
    """One decode row per request: its last token, whose successor the forward yields. The prompt's last token is the first one.

    Same tokens as `refusion.decoding.autoregressive.AutoregressiveDecoder`.
    """

    num_kept = 1
    fresh_rows = 1
    report_width = NUM_COMMON + 2  # and: whether a token was written, the token
    columns = ("prompt_length", "seed", "max_tokens", "is_done", "last_token", "num_tokens")

    def __init__(self, num_seats: int, *, eos_ids: Tensor, device: torch.device, use_kernels: bool, max_rows: int | None = None) -> None:
        """max_rows: most decode rows of a forward; without it, room for every seat and some padding."""
        self.eos_ids, self.use_kernels = eos_ids, use_kernels
        self.table = SeatTable(num_seats, dict.fromkeys(self.columns, 1), device)
        self.table.column("is_done", num_seats).fill_(1)
        buffers = RowBuffers(num_seats, 1, self.report_width, max_rows or 2 * num_seats + 64, device)
        self.given_ids, self.seeds, self.attempts = buffers.given_ids, buffers.seeds, buffers.attempts
        self.source, self.target, self.report = buffers.source, buffers.target, buffers.report

    def admit(self, seat: int, *, prompt_length: int, seed: int, max_tokens: int, last_token: int = -1) -> None:
        assert last_token >= 0, "autoregressive rounds start from the prompt's last token"
        values = (prompt_length, seed, max_tokens, 0, last_token, 0)
        self.table.write(seat, dict(zip(self.columns, values, strict=True)))

    def retire(self, seat: int) -> None:
        self.table.column("is_done", seat + 1)[seat].fill_(1)

    def move(self, source: int, target: int) -> None:
        self.table.move(source, target)

    def snapshot(self, seat: int) -> dict[str, Tensor]:
        return self.table.snapshot(seat)

    def restore(self, seat: int, snapshot: dict[str, Tensor]) -> None:
        self.table.restore(seat, snapshot)

    def num_rows(self, report: np.ndarray, candidates: int) -> np.ndarray:
        return 1 - report[:, IS_DONE]

    def read(self, report_row: np.ndarray) -> SeatReport:
        is_done, num_forwards, overflow, num_rows, is_written, token = (int(value) for value in report_row)
        assert overflow == 0, f"{overflow} rows of a seat did not fit into its forward"
        place = num_forwards - 1
        committed = [SlotNews(place, place, (token,))] if is_written else []
        return SeatReport(bool(is_done), num_forwards, num_rows, committed, [], [], [])

    @torch.no_grad()
    def lay_out(
        self,
        rows: Rows,
        spans: Spans,
        *,
        start: int,
        num_seats: int,
        candidates: int,
        tiles: Tiles | None = None,
        tile_start: int = 0,
    ) -> None:
        self._start, num_rows = start, rows.num_rows
        if self.use_kernels:
            from refusion.decoding.kernels.autoregressive import lay_out  # triton is there only where there are kernels

            lay_out(self, rows, spans, start=start, num_seats=num_seats, tiles=tiles, tile_start=tile_start)
            return
        state = {name: self.table.column(name, num_seats) for name in self.columns}
        is_active = state["is_done"] == 0
        end = is_active.cumsum(dim=0)  # [B]
        target = torch.where(is_active, end - 1, num_rows).clamp(max=num_rows)
        one = torch.ones_like(end)
        placed = (
            (rows.token_ids, state["last_token"], 0),
            (rows.positions, state["prompt_length"] + state["num_tokens"] - 1, 0),
            (rows.seat, one.cumsum(dim=0) - 1, PADDING),
            (rows.parent, NO_PARENT * one, 0),
            (self.seeds[:num_rows], state["seed"], 0),
            (self.attempts[:num_rows], one, 0),
        )
        for into, value, padding in placed:
            put_rows(into, target, value, padding)
        for into in (rows.segment, rows.rank, rows.visible, rows.is_trunk, self.given_ids[:num_rows]):
            into.zero_()
        spans.row_start.copy_((end - is_active.long()).clamp(max=num_rows) + start)
        spans.row_end.copy_(end.clamp(max=num_rows) + start)
        if tiles is not None:
            put_tiles(spans, tiles, tile_start)

    @torch.no_grad()
    def settle(self, readout: Readout, spans: Spans, *, num_seats: int, candidates: int) -> None:
        if self.use_kernels:
            from refusion.decoding.kernels.autoregressive import settle

            settle(self, readout, spans, start=self._start, num_seats=num_seats)
            return
        state = {name: self.table.column(name, num_seats) for name in self.columns}
        is_active = state["is_done"] == 0
        is_there = spans.row_end > spans.row_start  # false also for a row that did not fit
        row = (spans.row_start.long() - self._start).clamp(max=len(readout.token_ids) - 1)
        token = readout.token_ids[row].long()
        is_end = (token[:, None] == self.eos_ids).any(dim=1) | (state["num_tokens"] + 1 >= state["max_tokens"])
        self.source[:num_seats].copy_(torch.where(is_there, spans.row_start, -1))
        self.target[:num_seats].copy_(cache_targets(spans, spans.cached[:, None].long(), is_there[:, None])[:, 0])
        spans.cached.add_(is_there.int())
        state["last_token"].copy_(torch.where(is_active, token, state["last_token"]))
        state["num_tokens"].add_(is_active.long())
        state["is_done"].copy_((~is_active | is_end).long())
        parts = (state["is_done"], state["num_tokens"], is_active & ~is_there, is_active, is_active, torch.where(is_active, token, 0))
        self.report[:num_seats].copy_(torch.stack([part.int() for part in parts], dim=1))
