"""`DiffusionRounds` in one launch each way: rows are laid out in chunks that find their seats, and a program per seat settles its block."""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from refusion.decoding.diffusion_params import BlockDiffusionParams
from refusion.decoding.forward import Readout
from refusion.decoding.kernels.constants import NO_PARENT, PADDING
from refusion.model.kernels.launch import launch
from refusion.model.kernels.stream import wait
from refusion.model.rows import Rows, Spans, Tiles

if TYPE_CHECKING:
    from refusion.decoding.diffusion_rounds import DiffusionRounds

# B = seats, T = decode rows, K = tokens of a block

# Columns of the table, as `refusion.decoding.diffusion_rounds.SCALARS` names them; the text follows.
PROMPT_LENGTH, SEED, END, FIRST, STEP, NUM_DRAFTS, NUM_FORWARDS, IS_DONE, TEXT = (tl.constexpr(column) for column in range(9))
KINDS = ("none", "prefix", "dual", "blocks", "blocks unfused")
NO_CACHE, PREFIX, DUAL, BLOCKS, BLOCKS_UNFUSED = (tl.constexpr(kind) for kind in range(5))
TOKENS = tl.constexpr(7)
"""First column of a report's tokens."""
_CHUNK = 128
CHUNK = tl.constexpr(_CHUNK)
OTHERS = tl.constexpr(32)
"""Tokens of a block that are compared with all others at a time."""


def lay_out(rounds: DiffusionRounds, rows: Rows, spans: Spans, *, start: int, num_seats: int, tiles: Tiles | None, tile_start: int) -> None:
    """See `refusion.decoding.rounds.Rounds.lay_out`."""
    num_tiles = 0 if tiles is None else len(tiles.seat)
    num_read = num_seats * rounds.block_size
    launch(
        _lay_out,
        (-(-max(rows.num_rows, num_read, num_tiles - tile_start, 1) // _CHUNK),),
        rounds.table.values,
        rounds.table.values.stride(0),
        rows.token_ids,
        rows.positions,
        rows.seat,
        rows.segment,
        rows.rank,
        rows.parent,
        rows.visible,
        rows.is_trunk,
        rounds.reads,
        rounds.seeds,
        rounds.attempts,
        rounds.source,
        rounds.target,
        spans.cached,
        spans.row_start,
        spans.row_end,
        spans.page_table,
        spans.page_table.stride(0),
        spans.page_table.shape[1],
        spans.page_size,
        rows.seat if tiles is None else tiles.seat,
        rows.seat if tiles is None else tiles.first,
        rows.seat if tiles is None else tiles.end,
        num_tiles,
        tile_start,
        num_seats,
        rows.num_rows,
        start,
        rounds.prefill_rows,
        rounds.num_positions,
        K=rounds.block_size,
        KIND=_kind(rounds),
        B_PADDED=triton.next_power_of_2(num_seats),
        TILE=0 if tiles is None else tiles.block,
        num_warps=4,
    )


def settle(rounds: DiffusionRounds, readout: Readout, spans: Spans, *, num_seats: int) -> None:
    """See `refusion.decoding.rounds.Rounds.settle`."""
    params = rounds.params
    launch(
        _settle,
        (num_seats,),
        rounds.table.values,
        rounds.table.values.stride(0),
        readout.token_ids,
        readout.confidence,
        rounds.eos_ids,
        spans.cached,
        spans.row_start,
        spans.row_end,
        rounds.report,
        rounds.report.stride(0),
        rounds.mask_id,
        -1.0 if params.threshold is None else params.threshold,
        params.steps_per_block,
        rounds.prefill_rows,
        rounds.num_positions,
        K=rounds.block_size,
        K_PADDED=triton.next_power_of_2(rounds.block_size),
        KIND=_kind(rounds),
        BY_THRESHOLD=params.threshold is not None,
        STOPS_EARLY=isinstance(params, BlockDiffusionParams) or params.early_stop,
        NUM_EOS=len(rounds.eos_ids),
        num_warps=4,
    )


def _kind(rounds: DiffusionRounds) -> int:
    params = rounds.params
    if isinstance(params, BlockDiffusionParams):
        return KINDS.index("blocks" if params.fuse_commit else "blocks unfused")
    return KINDS.index(params.cache)


@triton.jit
def _stretch(first, end, step, is_done, cached, prefill_rows, K: tl.constexpr, KIND: tl.constexpr):
    """(start, stop, block end) of what seats forward next: `DiffusionRounds._stretch`."""
    block_end = tl.minimum(first + K, end)
    if KIND >= BLOCKS:
        start = cached
        limit = cached + prefill_rows
        if KIND == BLOCKS:
            stop = tl.where(first > limit, limit, block_end)
        else:
            stop = tl.where(cached < first, tl.minimum(first, limit), block_end)
    else:
        start = first * 0 if KIND == NO_CACHE else tl.where(step == 0, 0, first)
        stop = tl.where(step == 0, end, block_end) if KIND == DUAL else end
    return start, tl.where(is_done == 0, stop, start), block_end


@triton.jit
def _seat_stretch(table, line_stride, cached, seat, is_seat, prefill_rows, K: tl.constexpr, KIND: tl.constexpr):
    """(first, step, start, stop, block end) of these seats, int32; nothing to do where `is_seat` is false."""
    line = table + seat.to(tl.int64) * line_stride
    first = tl.load(line + FIRST, mask=is_seat, other=0).to(tl.int32)
    end = tl.load(line + END, mask=is_seat, other=0).to(tl.int32)
    step = tl.load(line + STEP, mask=is_seat, other=1).to(tl.int32)
    is_done = tl.load(line + IS_DONE, mask=is_seat, other=1).to(tl.int32)
    in_cache = first * 0
    if KIND >= BLOCKS:
        in_cache = tl.load(cached + seat, mask=is_seat, other=0)
    # To a type checker `tl.where` never returns.
    start, stop, block_end = _stretch(first, end, step, is_done, in_cache, prefill_rows, K, KIND)  # pyright: ignore[reportGeneralTypeIssues]
    return first, step, start, stop, block_end


@triton.jit
def _pick(values, seat, owner):
    """[n] values [B] of the owners [n]; 0 for those that are nobody."""
    return tl.sum(tl.where(seat[None, :] == owner[:, None], values[None, :], 0), 1)


@triton.jit(do_not_specialize=["num_pages", "num_tiles", "tile_start", "num_seats", "num_rows", "start", "prefill_rows", "num_positions"])
def _lay_out(
    table,
    line_stride,
    token_ids,
    positions,
    seat_of,
    segment,
    rank,
    parent,
    visible,
    is_trunk,
    reads,
    seeds,
    attempts,
    source,
    target,
    cached,
    row_start,
    row_end,
    page_table,
    page_stride,
    num_pages,
    page_size,
    tile_seat,
    tile_first,
    tile_end,
    num_tiles,
    tile_start,
    num_seats,
    num_rows,
    start,
    prefill_rows,
    num_positions,
    K: tl.constexpr,
    KIND: tl.constexpr,
    B_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    part = tl.program_id(0)
    index = part * CHUNK + tl.arange(0, CHUNK)
    seat = tl.arange(0, B_PADDED)
    is_seat = seat < num_seats
    first, step, begin_at, stop_at, block_end = _seat_stretch(table, line_stride, cached, seat, is_seat, prefill_rows, K, KIND)
    need = stop_at - begin_at
    last = tl.cumsum(need, 0)
    begin = last - need
    if part == 0:
        tl.store(row_start + seat, start + tl.minimum(begin, num_rows), mask=is_seat)
        tl.store(row_end + seat, start + tl.minimum(last, num_rows), mask=is_seat)
        if KIND < BLOCKS:  # nobody here looks at it before; masked diffusion begins every block anew
            tl.store(cached + seat, 0, mask=is_seat & (step == 0))

    # The rows of this chunk: owner, then place in the owner's stretch.
    owner = tl.sum(((last[None, :] <= index[:, None]) & is_seat[None, :]).to(tl.int32), 1)
    is_ours = index < num_rows
    is_row = is_ours & (owner < num_seats)
    line = table + owner.to(tl.int64) * line_stride
    position = tl.where(is_row, _pick(begin_at, seat, owner) + index - _pick(begin, seat, owner), 0)
    prompt_length = tl.load(line + PROMPT_LENGTH, mask=is_row, other=0).to(tl.int32)
    number = position * 0
    if KIND >= BLOCKS:
        behind = tl.maximum(position - prompt_length, 0)
        number = tl.where(position < prompt_length, position // K, (prompt_length + K - 1) // K + behind // K)
    text = tl.load(line + TEXT + position, mask=is_row & (position < num_positions), other=0)
    tl.store(token_ids + index, text.to(tl.int32), mask=is_ours)
    tl.store(positions + index, position, mask=is_ours)
    tl.store(seat_of + index, tl.where(is_row, owner, PADDING), mask=is_ours)
    tl.store(segment + index, 0, mask=is_ours)
    tl.store(rank + index, number, mask=is_ours)
    tl.store(parent + index, tl.where(is_row, NO_PARENT, 0), mask=is_ours)
    tl.store(visible + index, 0, mask=is_ours)
    tl.store(is_trunk + index, 0, mask=is_ours)
    if KIND != NO_CACHE:
        block_first, block_stop = _pick(first, seat, owner), _pick(block_end, seat, owner)
        is_kept = is_row & (position < block_first)
        place = position
        if KIND < BLOCKS:
            is_first = _pick(step, seat, owner) == 0
            if KIND == DUAL:
                is_kept |= is_row & (position >= block_stop)
                place = tl.where(position >= block_stop, position - (block_stop - block_first), position)
            is_kept &= is_first
        place = tl.minimum(place, num_pages * page_size - 1)
        page = tl.load(page_table + owner * page_stride + place // page_size, mask=is_kept, other=0)
        tl.store(source + index, tl.where(is_kept, start + index, -1), mask=is_ours)
        tl.store(target + index, tl.where(is_kept, page * page_size + place % page_size, -1), mask=is_ours)

    # What is read: K rows of every seat.
    reader = index // K
    is_read = reader < num_seats
    row = _pick(begin + first - begin_at, seat, reader) + index % K
    reader_line = table + reader.to(tl.int64) * line_stride
    tl.store(reads + index, tl.maximum(tl.minimum(row, num_rows - 1), 0), mask=is_read)
    tl.store(seeds + index, tl.load(reader_line + SEED, mask=is_read, other=0), mask=is_read)
    tl.store(attempts + index, tl.load(reader_line + NUM_DRAFTS, mask=is_read, other=0).to(tl.int32) + 1, mask=is_read)

    if TILE > 0:
        row_first, row_stop = tl.minimum(begin, num_rows), tl.minimum(last, num_rows)
        count = (row_stop - row_first + TILE - 1) // TILE
        last_tile = tl.cumsum(count, 0)
        holder = tl.sum(((last_tile[None, :] <= index[:, None]) & is_seat[None, :]).to(tl.int32), 1)
        is_used = holder < num_seats
        from_row = _pick(row_first, seat, holder) + (index - _pick(last_tile - count, seat, holder)) * TILE
        to_row = tl.minimum(from_row + TILE, _pick(row_stop, seat, holder))
        is_tile = tile_start + index < num_tiles
        tl.store(tile_seat + tile_start + index, tl.where(is_used, holder, PADDING), mask=is_tile)
        tl.store(tile_first + tile_start + index, tl.where(is_used, start + from_row, 0), mask=is_tile)
        tl.store(tile_end + tile_start + index, tl.where(is_used, start + to_row, 0), mask=is_tile)


@triton.jit(do_not_specialize=["mask_id", "threshold", "steps_per_block", "prefill_rows", "num_positions"])
def _settle(
    table,
    line_stride,
    drawn_ids,
    confidences,
    eos_ids,
    cached,
    row_start,
    row_end,
    report,
    report_stride,
    mask_id,
    threshold,
    steps_per_block,
    prefill_rows,
    num_positions,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    KIND: tl.constexpr,
    BY_THRESHOLD: tl.constexpr,
    STOPS_EARLY: tl.constexpr,
    NUM_EOS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    seat = tl.program_id(0)
    line = table + seat.to(tl.int64) * line_stride
    prompt_length = tl.load(line + PROMPT_LENGTH).to(tl.int32)
    end = tl.load(line + END).to(tl.int32)
    first = tl.load(line + FIRST).to(tl.int32)
    step = tl.load(line + STEP).to(tl.int32)
    num_drafts = tl.load(line + NUM_DRAFTS).to(tl.int32)
    num_forwards = tl.load(line + NUM_FORWARDS).to(tl.int32)
    is_done = tl.load(line + IS_DONE).to(tl.int32)
    in_cache = tl.load(cached + seat)
    start, stop, block_end = _stretch(first, end, step, is_done, in_cache, prefill_rows, K, KIND)
    need = stop - start
    is_active = need > 0
    is_read = stop > first

    token = tl.arange(0, K_PADDED)
    at = first + token
    is_token = (token < K) & (at < num_positions)
    in_block = is_token & (at < block_end) & is_read
    before = tl.load(line + TEXT + at, mask=is_token, other=0).to(tl.int32)
    drawn = tl.load(drawn_ids + seat * K + token, mask=token < K, other=0).to(tl.int32)
    confidence = tl.load(confidences + seat * K + token, mask=token < K, other=0.0)
    is_masked = in_block & (before == mask_id)
    num_masked = tl.sum(is_masked.to(tl.int32), 0)
    num_better = token * 0  # masked tokens that go first
    for chunk in tl.range(0, K_PADDED, OTHERS):
        other = chunk + tl.arange(0, OTHERS)
        other_at = first + other
        is_other = (other < K) & (other_at < block_end) & (other_at < num_positions) & is_read
        is_other &= tl.load(line + TEXT + other_at, mask=is_other, other=0).to(tl.int32) == mask_id
        theirs = tl.load(confidences + seat * K + other, mask=is_other, other=-1.0)
        is_better = theirs[None, :] > confidence[:, None]
        is_better |= (theirs[None, :] == confidence[:, None]) & (other[None, :] < token[:, None])
        num_better += tl.sum((is_better & is_other[None, :]).to(tl.int32), 1)
    if BY_THRESHOLD:
        is_final = is_masked & ((confidence > threshold) | (num_better == 0))
    else:
        steps_left = tl.maximum(steps_per_block - step, 1)
        is_final = is_masked & (num_better < (num_masked + steps_left - 1) // steps_left)
    after = tl.where(is_final, drawn, before)
    is_open = is_masked & ~is_final
    first_open = tl.min(tl.where(is_open, token, K_PADDED), 0)
    is_eos = token < 0
    for index in tl.static_range(NUM_EOS):
        is_eos |= after == tl.load(eos_ids + index).to(tl.int32)
    has_ended = tl.max((in_block & is_eos & (token < first_open)).to(tl.int32), 0) != 0
    is_whole = is_read & (first_open == K_PADDED)

    counts = is_active
    now_cached = in_cache
    if KIND >= BLOCKS:
        counts = is_active & (is_read | (in_cache >= prompt_length))
        now_cached = tl.where(is_active, tl.minimum(stop, first), in_cache)
    elif KIND != NO_CACHE:
        everything = first if KIND == PREFIX else end - (block_end - first)
        now_cached = tl.where(is_active & (step == 0), everything, in_cache)
    ends = is_whole & (block_end >= end)
    if STOPS_EARLY:
        ends = ends | has_ended
    is_done = tl.where(ends, 1, is_done)
    num_forwards += counts.to(tl.int32)
    num_drafts += is_read.to(tl.int32)
    step = tl.where(is_whole, 0, step + is_read.to(tl.int32))
    next_first = tl.where(is_whole, first + K, first)
    next_start, next_stop, _ = _stretch(next_first, end, step, is_done, now_cached, prefill_rows, K, KIND)
    overflow = need - (tl.load(row_end + seat) - tl.load(row_start + seat))

    tl.debug_barrier()  # everything is read before anything is written
    tl.store(line + TEXT + at, after.to(tl.int64), mask=is_final)
    tl.store(line + FIRST, next_first.to(tl.int64))
    tl.store(line + STEP, step.to(tl.int64))
    tl.store(line + NUM_DRAFTS, num_drafts.to(tl.int64))
    tl.store(line + NUM_FORWARDS, num_forwards.to(tl.int64))
    tl.store(line + IS_DONE, is_done.to(tl.int64))
    tl.store(cached + seat, now_cached)
    columns = report + seat * report_stride
    tl.store(columns, is_done)
    tl.store(columns + 1, num_forwards)
    tl.store(columns + 2, overflow)
    tl.store(columns + 3, need)
    tl.store(columns + 4, now_cached)
    tl.store(columns + 5, next_stop - next_start)
    tl.store(columns + 6, tl.where(is_read, first - prompt_length, 0))
    tl.store(columns + TOKENS + token, tl.where(is_final, after, -1), mask=token < K)
