"""The diffusion baselines over flat rows, all state on the device: the tokens of `refusion.decoding.diffusion`, for many requests at once.

Prompt and answer of a request lie side by side in one line of the seat table, masks where nothing is written yet, and every forward runs
one stretch of that line. A row sees the cache and the rows of its seat with no higher rank: all ranks equal is bidirectional attention,
the number of the block as rank is attention that is bidirectional inside a block and causal between blocks. Only the rows of the block in
work are read. With `use_kernels`, `refusion.decoding.kernels.diffusion_layout` and `.diffusion_settle` do the same in one launch each.
"""

# torch leaves the types of tolist open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.diffusion_params import BlockDiffusionParams, DiffusionParams
from refusion.decoding.forward import Readout
from refusion.decoding.packing import put_tiles
from refusion.decoding.rounds import IS_DONE, NUM_COMMON, NUM_FORWARDS, NUM_ROWS, OVERFLOW, SeatReport, SlotNews
from refusion.decoding.seats import SeatTable
from refusion.model.rows import PADDING, Rows, Spans, Tiles
from refusion.model.segments import NO_PARENT

# B = seats, K = tokens of a block, N = positions of prompt and answer, T = decode rows of a forward, R = report columns

CACHED, NEXT_ROWS, PLACE, TOKENS = range(NUM_COMMON, NUM_COMMON + 4)
"""Columns of a report behind the common ones: tokens in the cache now; rows of the next forward; place in the answer of the block that
was read; then [K] its tokens that became final, -1 for the others."""


@dataclass(frozen=True, slots=True)
class _State:
    """The first seats, in place. All [B] but the text."""

    prompt_length: Tensor
    seed: Tensor
    end: Tensor  # of the answer, as a position
    first: Tensor  # position of the first token of the block in work
    step: Tensor  # forwards that have read this block
    num_drafts: Tensor  # forwards that have read any, keys the noise
    num_forwards: Tensor
    is_done: Tensor
    text: Tensor  # [B, N]


SCALARS = ("prompt_length", "seed", "end", "first", "step", "num_drafts", "num_forwards", "is_done")


@dataclass(frozen=True, slots=True)
class _Stretch:
    """The positions [start, stop) that a seat forwards next, and the block [first, block_end) that may be read. All [B]."""

    start: Tensor
    stop: Tensor  # start where the seat has nothing to do
    first: Tensor
    block_end: Tensor

    @property
    def is_read(self) -> Tensor:
        return self.stop > self.first


class DiffusionRounds:
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
        self.is_block = isinstance(params, BlockDiffusionParams)
        self.prefill_rows = max(prefill_rows // block_size, 1) * block_size
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
        return isinstance(self.params, BlockDiffusionParams) or self.params.cache != "none"

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
        num_answer = self.num_answer(max_tokens)
        num_blocks = -(-num_answer // self.block_size)
        assert prompt_length + num_blocks * self.block_size <= self.num_positions, f"{prompt_length} + {max_tokens} tokens do not fit"
        text = [*prompt_ids, *[self.mask_id] * num_answer]
        values = (prompt_length, seed, prompt_length + num_answer, prompt_length, 0, 0, 0, 0)
        self.table.write(seat, {**dict(zip(SCALARS, values, strict=True)), "text": text})

    def num_answer(self, max_tokens: int) -> int:
        """Masks of an answer: masked diffusion takes the length as it is, block diffusion writes whole blocks."""
        return -(-max_tokens // self.block_size) * self.block_size if self.is_block else max_tokens

    def first_rows(self, prompt_length: int, max_tokens: int) -> int:
        """Decode rows of a request's first forward."""
        if not isinstance(self.params, BlockDiffusionParams):
            return prompt_length + max_tokens
        if prompt_length > self.prefill_rows or not self.params.fuse_commit:
            return min(prompt_length, self.prefill_rows)
        return prompt_length + self.block_size

    def retire(self, seat: int) -> None:
        self.table.write(seat, dict(zip(SCALARS, (0, 0, 0, 0, 0, 0, 0, 1), strict=True)))

    def move(self, source: int, target: int) -> None:
        self.table.move(source, target)

    def snapshot(self, seat: int) -> dict[str, Tensor]:
        return self.table.snapshot(seat)

    def restore(self, seat: int, snapshot: dict[str, Tensor]) -> None:
        self.table.restore(seat, snapshot)

    def num_rows(self, report: np.ndarray, candidates: int) -> np.ndarray:
        return report[:, NEXT_ROWS]

    def read(self, report_row: np.ndarray) -> SeatReport:
        assert report_row[OVERFLOW] == 0, f"{report_row[OVERFLOW]} rows of a seat did not fit into its forward"
        place = int(report_row[PLACE])
        return SeatReport(
            is_done=bool(report_row[IS_DONE]),
            num_forwards=int(report_row[NUM_FORWARDS]),
            num_rows=int(report_row[NUM_ROWS]),
            committed=_runs(report_row[TOKENS:].tolist(), place, place // self.block_size),
            verified=[],
            infilled=[],
            planned=[],
        )

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
        spans.cached.copy_(self._visible(state, spans.cached))
        stretch = self._stretch(state, spans.cached.long())
        last = (stretch.stop - stretch.start).cumsum(dim=0)  # [B]
        begin = last - (stretch.stop - stretch.start)
        index = torch.arange(rows.num_rows, device=last.device)
        owner = torch.searchsorted(last, index, right=True)  # [T], B for padding
        is_row, seat = owner < num_seats, owner.clamp(max=num_seats - 1)
        position = torch.where(is_row, stretch.start[seat] + index - begin[seat], 0)
        rows.token_ids.copy_(torch.where(is_row, state.text[seat, position], 0))
        rows.positions.copy_(position)
        rows.seat.copy_(torch.where(is_row, seat, PADDING))
        rows.rank.copy_(torch.where(is_row, self._rank(position, state.prompt_length[seat]), 0))
        rows.parent.copy_(torch.where(is_row, NO_PARENT, 0))
        for nothing in (rows.segment, rows.visible, rows.is_trunk):
            nothing.zero_()
        spans.row_start.copy_(begin.clamp(max=rows.num_rows) + start)
        spans.row_end.copy_(last.clamp(max=rows.num_rows) + start)
        self._keep(state, stretch, spans, seat, position, is_row, start)
        place = torch.arange(self.block_size, device=last.device)
        read = (begin + stretch.first - stretch.start)[:, None] + place  # [B, K]
        num_read = num_seats * self.block_size
        self.reads[:num_read].copy_(read.clamp(0, max(rows.num_rows - 1, 0)).flatten())
        self.seeds[:num_read].copy_(state.seed[:, None].expand_as(read).flatten())
        self.attempts[:num_read].copy_((state.num_drafts + 1)[:, None].expand_as(read).flatten())
        if tiles is not None:
            put_tiles(spans, tiles, tile_start)

    @torch.no_grad()
    def settle(self, readout: Readout, spans: Spans, *, num_seats: int, candidates: int) -> None:
        if self.use_kernels:
            from refusion.decoding.kernels.diffusion_settle import settle

            settle(self, readout, spans, num_seats=num_seats)
            return
        state = self.state(num_seats)
        cached = spans.cached.long()
        stretch = self._stretch(state, cached)
        is_active = stretch.stop > stretch.start
        place = torch.arange(self.block_size, device=cached.device)
        position = state.first[:, None] + place  # [B, K]
        is_read = stretch.is_read[:, None] & (position < stretch.block_end[:, None])
        at = position.clamp(max=self.num_positions - 1)
        before = state.text.gather(1, at)
        is_masked = is_read & (before == self.mask_id)
        confidence = readout.confidence[: position.numel()].view_as(position)
        is_final = is_masked & self._chosen(confidence, is_masked, state.step)
        drawn = readout.token_ids[: position.numel()].view_as(position).long()
        after = torch.where(is_final, drawn, before)
        state.text.scatter_(1, at, after)

        is_open = is_masked & ~is_final
        is_certain = is_read & (is_open.long().cumsum(dim=1) == 0)  # nothing before it is masked
        has_ended = (is_certain[:, :, None] & (after[:, :, None] == self.eos_ids)).any(dim=2).any(dim=1)
        if isinstance(self.params, BlockDiffusionParams) or self.params.early_stop:
            ends = has_ended
        else:
            ends = torch.zeros_like(has_ended)
        is_whole = stretch.is_read & ~is_open.any(dim=1)
        counts = is_active & (stretch.is_read | (cached >= state.prompt_length)) if self.is_block else is_active
        block = state.first - state.prompt_length
        spans.cached.copy_(self._cached_after(state, stretch, cached, is_active))
        state.is_done.copy_(torch.where(ends | (is_whole & (stretch.block_end >= state.end)), 1, state.is_done))
        state.num_forwards.add_(counts.long())
        state.num_drafts.add_(stretch.is_read.long())
        state.step.copy_(torch.where(is_whole, 0, state.step + stretch.is_read.long()))
        state.first.add_(is_whole.long() * self.block_size)

        need = (stretch.stop - stretch.start)[:, None]
        overflow = need - (spans.row_end - spans.row_start)[:, None]
        following = self._stretch(state, self._visible(state, spans.cached).long())
        groups = (
            state.is_done[:, None],
            state.num_forwards[:, None],
            overflow,
            need,
            spans.cached[:, None],
            (following.stop - following.start)[:, None],
            torch.where(stretch.is_read, block, 0)[:, None],
            torch.where(is_final, after, -1),
        )
        self.report[:num_seats].copy_(torch.cat([group.int() for group in groups], dim=1))

    def state(self, num_seats: int) -> _State:
        """Views of the first seats."""
        columns = {name: self.table.column(name, num_seats) for name in SCALARS}
        return _State(**columns, text=self.table.group("text", num_seats))

    def _visible(self, state: _State, cached: Tensor) -> Tensor:
        """Cached tokens that the next forward sees: masked diffusion begins every block anew."""
        return cached if self.is_block else torch.where(state.step == 0, 0, cached)

    def _stretch(self, state: _State, cached: Tensor) -> _Stretch:
        """What every seat forwards next."""
        block_end = torch.minimum(state.first + self.block_size, state.end)
        params = self.params
        if isinstance(params, BlockDiffusionParams):
            start = cached
            limit = cached + self.prefill_rows
            if params.fuse_commit:
                stop = torch.where(state.first > limit, limit, block_end)
            else:
                stop = torch.where(cached < state.first, torch.minimum(state.first, limit), block_end)
        else:
            is_first = state.step == 0
            start = torch.zeros_like(state.first) if params.cache == "none" else torch.where(is_first, 0, state.first)
            stop = torch.where(is_first, state.end, block_end) if params.cache == "dual" else state.end
        stop = torch.where(state.is_done == 0, stop, start)
        return _Stretch(start, stop, state.first.clone(), block_end)  # the state may change before this is used up

    def _rank(self, position: Tensor, prompt_length: Tensor) -> Tensor:
        """[T] number of the block; prompt and answer are cut into blocks of their own, as in training."""
        if not self.is_block:
            return torch.zeros_like(position)
        size = self.block_size
        behind = (position - prompt_length).clamp(min=0)
        num_before = torch.div(prompt_length + size - 1, size, rounding_mode="floor")
        in_answer = num_before + torch.div(behind, size, rounding_mode="floor")
        return torch.where(position < prompt_length, torch.div(position, size, rounding_mode="floor"), in_answer)

    def _keep(self, state: _State, stretch: _Stretch, spans: Spans, seat: Tensor, position: Tensor, is_row: Tensor, start: int) -> None:
        """Rows that join the cache, by decode row."""
        if not self.has_cache:
            return
        first, block_end = stretch.first[seat], stretch.block_end[seat]
        is_kept, place = is_row & (position < first), position
        if not isinstance(self.params, BlockDiffusionParams):
            is_kept = is_kept & (state.step[seat] == 0)
            if self.params.cache == "dual":
                is_behind = position >= block_end
                is_kept = is_kept | (is_row & is_behind & (state.step[seat] == 0))
                place = torch.where(is_behind, position - (block_end - first), position)
        place = place.clamp(max=spans.page_table.shape[1] * spans.page_size - 1)
        index = torch.arange(len(position), device=position.device) + start
        self.source[: len(position)].copy_(torch.where(is_kept, index, -1))
        self.target[: len(position)].copy_(torch.where(is_kept, spans.cache_rows(seat, place), -1))

    def _cached_after(self, state: _State, stretch: _Stretch, cached: Tensor, is_active: Tensor) -> Tensor:
        if isinstance(self.params, BlockDiffusionParams):
            return torch.where(is_active, torch.minimum(stretch.stop, stretch.first), cached)
        if self.params.cache == "none":
            return cached
        everything = stretch.first if self.params.cache == "prefix" else state.end - (stretch.block_end - stretch.first)
        return torch.where(is_active & (state.step == 0), everything, cached)

    def _chosen(self, confidence: Tensor, is_masked: Tensor, step: Tensor) -> Tensor:
        """[B, K] bool: the most confident masks of each block, by threshold or as many as this step has to commit."""
        order = torch.where(is_masked, confidence, -1.0).sort(dim=1, descending=True, stable=True).indices
        places = torch.arange(self.block_size, device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, places)
        if self.params.threshold is not None:
            return (confidence > self.params.threshold) | (rank == 0)
        steps_left = (self.params.steps_per_block - step).clamp(min=1)
        num_masked = is_masked.sum(dim=1)
        count = torch.div(num_masked + steps_left - 1, steps_left, rounding_mode="floor")
        return rank < count[:, None]


def _runs(token_ids: list[int], place: int, block: int) -> list[SlotNews]:
    """Neighbouring final tokens of a block as one piece of news each."""
    news: list[SlotNews] = []
    run: list[int] = []
    for index, token in enumerate([*token_ids, -1]):
        if token >= 0:
            run.append(token)
        elif run:
            news.append(SlotNews(block, place + index - len(run), tuple(run)))
            run = []
    return news
