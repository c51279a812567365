"""The diffusion baselines over flat rows, all state on the device: the tokens of `refusion.decoding.diffusion`, for many requests at once.

Prompt and answer of a request lie side by side in one line of the seat table, masks where nothing is written yet, and every forward runs
one stretch of that line. A row sees the cache and the rows of its seat with no higher rank: all ranks equal is bidirectional attention,
the number of the block as rank is attention that is bidirectional inside a block and causal between blocks. Only the rows of the block in
work are read. With `use_kernels`, `refusion.decoding.kernels.diffusion_layout` and `.diffusion_settle` do the same in one launch each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.diffusion_kinds import kind_of
from refusion.decoding.diffusion_params import DiffusionParams
from refusion.decoding.diffusion_report import NEXT_ROWS, TOKENS, DiffusionReport, seat_report
from refusion.decoding.diffusion_state import SCALARS, DiffusionState, Stretch
from refusion.decoding.diffusion_verdicts import BlockVerdict, judge_blocks
from refusion.decoding.forward import Readout
from refusion.decoding.packing import put_tiles
from refusion.decoding.rounds import SeatReport
from refusion.decoding.seats import SeatedRounds, SeatTable
from refusion.model.rows import PADDING, Rows, Spans, Tiles
from refusion.model.segments import NO_PARENT

# B = seats, K = tokens of a block, N = positions of prompt and answer, T = decode rows of a forward, R = report columns


@dataclass(frozen=True, slots=True)
class _Owners:
    """Whose the decode rows are. [T]"""

    is_row: Tensor  # somebody's
    seat: Tensor
    position: Tensor


class DiffusionRounds(SeatedRounds):
    """See `refusion.decoding.rounds.Rounds`. Unlike other rounds, these are read by `reads` alone: a readout has a row [B * K] for every
    token of a seat's block, as have `given_ids`, `seeds` and `attempts`; `source` and `target` have an entry for every decode row.
    """

    def __init__(
        self,
        params: DiffusionParams,
        num_positions: int,
        num_seats: int,
        *,
        block_size: int,
        prefill_rows: int,
        mask_id: int,
        eos_ids: Tensor,
        device: torch.device,
        use_kernels: bool,
        max_rows: int,
    ) -> None:
        """num_positions: N, room for prompt and whole blocks. block_size: K. prefill_rows: prompt tokens of a forward of block diffusion,
        rounded to whole blocks. max_rows: most decode rows of a forward."""
        self.params, self.block_size, self.num_positions = params, block_size, num_positions
        self.prefill_rows = max(prefill_rows // block_size, 1) * block_size
        self.kind = kind_of(params, block_size, self.prefill_rows)
        self.mask_id, self.eos_ids, self.use_kernels, self.max_rows = mask_id, eos_ids, use_kernels, max_rows
        self.table = SeatTable(num_seats, {**dict.fromkeys(SCALARS, 1), "text": num_positions}, device)
        self.table.column("is_done", num_seats).fill_(1)
        self.report_width = TOKENS + block_size
        num_read = num_seats * block_size
        self.reads = torch.zeros(num_read, dtype=torch.int32, device=device)
        """[B * K] decode row of each token of each seat's block; any row where it is not read."""
        self.given_ids = torch.zeros(num_read, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(num_read, dtype=torch.int64, device=device)
        self.attempts = torch.zeros(num_read, dtype=torch.int32, device=device)
        self.source = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self.target = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self.report = torch.zeros(num_seats, self.report_width, dtype=torch.int32, device=device)

    @property
    def has_cache(self) -> bool:
        """Whether any row is ever kept."""
        return self.kind.has_cache

    @property
    def most_committed(self) -> int:
        """Tokens of one request that one forward can make final."""
        if self.params.threshold is not None:
            return self.block_size
        return -(-self.block_size // self.params.steps_per_block)

    def admit(
        self, seat: int, *, prompt_length: int, seed: int, max_tokens: int, last_token: int = -1, prompt_ids: Sequence[int] = ()
    ) -> None:
        """prompt_ids: all of the prompt; its tokens are decode rows here, so `last_token` says nothing new."""
        assert len(prompt_ids) == prompt_length, f"{len(prompt_ids)} tokens of a prompt of {prompt_length}"
        num_answer = self.kind.num_answer(max_tokens)
        num_blocks = -(-num_answer // self.block_size)
        assert prompt_length + num_blocks * self.block_size <= self.num_positions, f"{prompt_length} + {max_tokens} tokens do not fit"
        text = [*prompt_ids, *[self.mask_id] * num_answer]
        values = (prompt_length, seed, prompt_length + num_answer, prompt_length, 0, 0, 0, 0)
        self.table.write(seat, {**dict(zip(SCALARS, values, strict=True)), "text": text})

    def first_rows(self, prompt_length: int, max_tokens: int) -> int:
        """Decode rows of a request's first forward."""
        return self.kind.first_rows(prompt_length, max_tokens)

    def retire(self, seat: int) -> None:
        self.table.write(seat, dict(zip(SCALARS, (0, 0, 0, 0, 0, 0, 0, 1), strict=True)))

    def num_rows(self, report: np.ndarray, candidates: int) -> np.ndarray:
        return report[:, NEXT_ROWS]

    def read(self, report_row: np.ndarray) -> SeatReport:
        return seat_report(report_row, self.block_size)

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
        assert rows.num_rows <= self.max_rows, f"{rows.num_rows} rows, but room for {self.max_rows}"
        if self.use_kernels:
            from refusion.decoding.kernels.diffusion_layout import lay_out  # triton is there only where there are kernels

            lay_out(self, rows, spans, start=start, num_seats=num_seats, tiles=tiles, tile_start=tile_start)
            return
        state = self.state(num_seats)
        spans.cached.copy_(self.kind.visible(state, spans.cached))
        stretch = self._stretch(state, spans.cached)
        last = stretch.num_rows.cumsum(dim=0)  # [B]
        begin = last - stretch.num_rows
        owners = self._owners(stretch, begin, last, rows.num_rows)
        self._put_rows(rows, state, owners)
        spans.row_start.copy_(begin.clamp(max=rows.num_rows) + start)
        spans.row_end.copy_(last.clamp(max=rows.num_rows) + start)
        if self.kind.has_cache:
            self._put_kept(state, stretch, spans, owners, start)
        self._put_reads(state, begin + stretch.first - stretch.start, rows.num_rows)
        if tiles is not None:
            put_tiles(spans, tiles, tile_start)

    @torch.no_grad()
    def settle(self, readout: Readout, spans: Spans, *, num_seats: int, candidates: int) -> None:
        if self.use_kernels:
            from refusion.decoding.kernels.diffusion_settle import settle

            settle(self, readout, spans, num_seats=num_seats)
            return
        state = self.state(num_seats)
        stretch = self._stretch(state, spans.cached)
        verdict = judge_blocks(state, stretch, readout, self.params, self.block_size, self.mask_id, self.eos_ids)
        place = stretch.first - state.prompt_length
        self._advance(state, stretch, verdict, spans)
        following = self._stretch(state, self.kind.visible(state, spans.cached))
        report = DiffusionReport(
            is_done=state.is_done,
            num_forwards=state.num_forwards,
            overflow=stretch.num_rows - (spans.row_end - spans.row_start),
            num_rows=stretch.num_rows,
            cached=spans.cached,
            next_rows=following.num_rows,
            place=torch.where(stretch.is_read, place, 0),
            token_ids=torch.where(verdict.is_final, verdict.after, -1),
        )
        self.report[:num_seats].copy_(report.columns())

    def state(self, num_seats: int) -> DiffusionState:
        """Views of the first seats."""
        columns = {name: self.table.column(name, num_seats) for name in SCALARS}
        return DiffusionState(**columns, text=self.table.group("text", num_seats))

    def _stretch(self, state: DiffusionState, cached: Tensor) -> Stretch:
        """What every seat forwards next."""
        block_end = torch.minimum(state.first + self.block_size, state.end)
        start, stop = self.kind.reach(state, cached.long(), block_end)
        stop = torch.where(state.is_done == 0, stop, start)
        return Stretch(start, stop, state.first.clone(), block_end)  # the state may change before this is used up

    def _owners(self, stretch: Stretch, begin: Tensor, last: Tensor, num_rows: int) -> _Owners:
        """Seat after seat has the rows [begin, last); begin, last: [B]."""
        index = torch.arange(num_rows, device=last.device)
        owner = torch.searchsorted(last, index, right=True)  # [T], B for padding
        is_row, seat = owner < len(last), owner.clamp(max=len(last) - 1)
        return _Owners(is_row, seat, torch.where(is_row, stretch.start[seat] + index - begin[seat], 0))

    def _put_rows(self, rows: Rows, state: DiffusionState, owners: _Owners) -> None:
        is_row, seat, position = owners.is_row, owners.seat, owners.position
        rows.token_ids.copy_(torch.where(is_row, state.text[seat, position], 0))
        rows.positions.copy_(position)
        rows.seat.copy_(torch.where(is_row, seat, PADDING))
        rows.rank.copy_(torch.where(is_row, self.kind.rank(position, state.prompt_length[seat]), 0))
        rows.parent.copy_(torch.where(is_row, NO_PARENT, 0))
        for nothing in (rows.segment, rows.visible, rows.is_trunk):
            nothing.zero_()

    def _put_kept(self, state: DiffusionState, stretch: Stretch, spans: Spans, owners: _Owners, start: int) -> None:
        """Rows that join the cache, by decode row."""
        num_rows = len(owners.seat)
        kept = self.kind.kept(state, stretch, owners.seat, owners.position)
        is_kept = owners.is_row & kept.is_kept
        place = kept.place.clamp(max=spans.page_table.shape[1] * spans.page_size - 1)
        index = torch.arange(num_rows, device=place.device) + start
        self.source[:num_rows].copy_(torch.where(is_kept, index, -1))
        self.target[:num_rows].copy_(torch.where(is_kept, spans.cache_rows(owners.seat, place), -1))

    def _put_reads(self, state: DiffusionState, first: Tensor, num_rows: int) -> None:
        """Every seat reads K rows from `first` [B] on, with its noise."""
        read = first[:, None] + torch.arange(self.block_size, device=first.device)  # [B, K]
        num_read = read.numel()
        self.reads[:num_read].copy_(read.clamp(0, max(num_rows - 1, 0)).flatten())
        self.seeds[:num_read].copy_(state.seed[:, None].expand_as(read).flatten())
        self.attempts[:num_read].copy_((state.num_drafts + 1)[:, None].expand_as(read).flatten())

    def _advance(self, state: DiffusionState, stretch: Stretch, verdict: BlockVerdict, spans: Spans) -> None:
        """Write the verdict, and go on to the next block where this one is whole."""
        cached = spans.cached.long()
        counts = self.kind.counts(state, stretch, cached)
        spans.cached.copy_(self.kind.cached_after(state, stretch, cached))
        state.text.scatter_(1, verdict.position, verdict.after)
        ends = verdict.is_whole & (stretch.block_end >= state.end)
        if self.kind.stops_early:
            ends = ends | verdict.has_ended
        state.is_done.copy_(torch.where(ends, 1, state.is_done))
        state.num_forwards.add_(counts.long())
        state.num_drafts.add_(stretch.is_read.long())
        state.step.copy_(torch.where(verdict.is_whole, 0, state.step + stretch.is_read.long()))
        state.first.add_(verdict.is_whole.long() * self.block_size)
