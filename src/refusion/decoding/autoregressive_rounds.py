"""Autoregressive decoding over flat rows, all state on the device: one token of every request a forward.

With `use_kernels`, `refusion.decoding.kernels.autoregressive` does the same in one launch each for `lay_out` and `settle`.
"""

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.forward import Readout
from refusion.decoding.packing import put_rows, put_tiles
from refusion.decoding.rounds import IS_DONE, NUM_COMMON, SeatReport, SlotNews
from refusion.decoding.row_buffers import RowBuffers, cache_targets
from refusion.decoding.seats import SeatedRounds, SeatTable
from refusion.model.rows import PADDING, Rows, Spans, Tiles
from refusion.model.segments import NO_PARENT

# B = seats, T = decode rows of a forward


class AutoregressiveRounds(SeatedRounds):
    """See `refusion.decoding.rounds.Rounds`. One decode row per request: its last token, whose successor the forward yields.

    The prompt's last token is the first one. Same tokens as `refusion.decoding.autoregressive.AutoregressiveDecoder`.
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
