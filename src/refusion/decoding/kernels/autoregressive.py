"""`AutoregressiveRounds` in one launch each way: a single program has all seats in its lanes."""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from refusion.decoding.forward import Readout
from refusion.decoding.kernels.constants import NO_PARENT
from refusion.decoding.kernels.row_buffers import RowPointers, TilePointers, pad_rows, pad_tiles, put_owner, put_rows, put_tiles
from refusion.model.kernels.launch import launch
from refusion.model.kernels.stream import wait
from refusion.model.rows import Rows, Spans, Tiles

if TYPE_CHECKING:
    from refusion.decoding.autoregressive_rounds import AutoregressiveRounds

# B = seats, T = decode rows

# Columns of the table, as `AutoregressiveRounds.columns` names them.
PROMPT_LENGTH, SEED, MAX_TOKENS, IS_DONE, LAST_TOKEN, NUM_TOKENS = (tl.constexpr(column) for column in range(6))


def lay_out(
    rounds: AutoregressiveRounds, rows: Rows, spans: Spans, *, start: int, num_seats: int, tiles: Tiles | None, tile_start: int
) -> None:
    """See `refusion.decoding.rounds.Rounds.lay_out`."""
    launch(
        _lay_out,
        (1,),
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
        rounds.given_ids,
        rounds.seeds,
        rounds.attempts,
        spans.row_start,
        spans.row_end,
        rows.seat if tiles is None else tiles.seat,
        rows.seat if tiles is None else tiles.first,
        rows.seat if tiles is None else tiles.end,
        0 if tiles is None else len(tiles.seat),
        tile_start,
        num_seats,
        rows.num_rows,
        start,
        B_PADDED=triton.next_power_of_2(num_seats),
        HAS_TILES=tiles is not None,
        num_warps=4,
    )


def settle(rounds: AutoregressiveRounds, readout: Readout, spans: Spans, *, start: int, num_seats: int) -> None:
    """See `refusion.decoding.rounds.Rounds.settle`."""
    launch(
        _settle,
        (1,),
        rounds.table.values,
        rounds.table.values.stride(0),
        readout.token_ids,
        rounds.eos_ids,
        spans.cached,
        spans.page_table,
        spans.page_table.stride(0),
        spans.page_table.shape[1],
        spans.page_size,
        spans.row_start,
        spans.row_end,
        rounds.source,
        rounds.target,
        rounds.report,
        rounds.report.stride(0),
        num_seats,
        start,
        NUM_EOS=len(rounds.eos_ids),
        B_PADDED=triton.next_power_of_2(num_seats),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_tiles", "tile_start", "num_seats", "num_rows", "start"])
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
    given_ids,
    seeds,
    attempts,
    row_start,
    row_end,
    tile_seat,
    tile_first,
    tile_end,
    num_tiles,
    tile_start,
    num_seats,
    num_rows,
    start,
    B_PADDED: tl.constexpr,
    HAS_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    rows = RowPointers(
        token_ids, positions, seat_of, segment, rank, parent, visible, is_trunk, given_ids, seeds, attempts, num_rows
    )  # fmt: skip
    tiles = TilePointers(tile_seat, tile_first, tile_end, num_tiles)
    seat = tl.arange(0, B_PADDED)
    is_seat = seat < num_seats
    line = table + seat.to(tl.int64) * line_stride
    is_active = is_seat & (tl.load(line + IS_DONE, mask=is_seat, other=1) == 0)
    last = tl.cumsum(is_active.to(tl.int32), 0)
    row = last - is_active.to(tl.int32)
    tl.store(row_start + seat, start + tl.minimum(row, num_rows), mask=is_seat)
    tl.store(row_end + seat, start + tl.minimum(last, num_rows), mask=is_seat)
    is_row = is_active & (row < num_rows)
    token = tl.load(line + LAST_TOKEN, mask=is_row, other=0)
    position = tl.load(line + PROMPT_LENGTH, mask=is_row, other=0) + tl.load(line + NUM_TOKENS, mask=is_row, other=0) - 1
    put_owner(rows, row, is_row, seat, seed=tl.load(line + SEED, mask=is_row, other=0), attempt=1)
    put_rows(rows, row, is_row, token, position, segment=0, rank=0, parent=NO_PARENT, visible=0, is_trunk=0)
    total = tl.minimum(tl.sum(is_active.to(tl.int32), 0), num_rows)
    pad_rows(rows, total, 0, 1)
    if HAS_TILES:
        tile = tile_start + row
        put_tiles(tiles, tile, is_row & (tile < num_tiles), seat, first=start + row, end=start + row + 1)
        pad_tiles(tiles, tile_start + total, 0, 1)


@triton.jit(do_not_specialize=["num_seats", "start"])
def _settle(
    table,
    line_stride,
    drawn_ids,
    eos_ids,
    cached,
    page_table,
    page_stride,
    num_pages,
    page_size,
    row_start,
    row_end,
    source,
    target,
    report,
    report_stride,
    num_seats,
    start,
    NUM_EOS: tl.constexpr,
    B_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    seat = tl.arange(0, B_PADDED)
    is_seat = seat < num_seats
    line = table + seat.to(tl.int64) * line_stride
    is_active = is_seat & (tl.load(line + IS_DONE, mask=is_seat, other=1) == 0)
    row = tl.load(row_start + seat, mask=is_seat, other=0)
    is_there = is_active & (tl.load(row_end + seat, mask=is_seat, other=0) > row)
    token = tl.load(drawn_ids + row - start, mask=is_there, other=0).to(tl.int32)
    num_tokens = tl.load(line + NUM_TOKENS, mask=is_seat, other=0).to(tl.int32) + is_active.to(tl.int32)
    is_end = num_tokens >= tl.load(line + MAX_TOKENS, mask=is_seat, other=0)
    for index in tl.static_range(NUM_EOS):
        is_end |= token == tl.load(eos_ids + index)
    is_done = (is_end | ~is_active).to(tl.int32)
    place = tl.load(cached + seat, mask=is_seat, other=0)
    in_table = tl.minimum(place, num_pages * page_size - 1)
    page = tl.load(page_table + seat * page_stride + in_table // page_size, mask=is_there, other=0)
    tl.debug_barrier()  # everything is read before anything is written
    tl.store(source + seat, tl.where(is_there, row, -1), mask=is_seat)
    tl.store(target + seat, tl.where(is_there, page * page_size + in_table % page_size, -1), mask=is_seat)
    tl.store(cached + seat, place + 1, mask=is_there)
    tl.store(line + LAST_TOKEN, token, mask=is_active)
    tl.store(line + NUM_TOKENS, num_tokens, mask=is_active)
    tl.store(line + IS_DONE, is_done, mask=is_active)
    columns = report + seat * report_stride
    tl.store(columns, is_done, mask=is_seat)
    tl.store(columns + 1, num_tokens, mask=is_seat)
    tl.store(columns + 2, (is_active & ~is_there).to(tl.int32), mask=is_seat)
    tl.store(columns + 3, is_active.to(tl.int32), mask=is_seat)
    tl.store(columns + 4, is_active.to(tl.int32), mask=is_seat)
    tl.store(columns + 5, token, mask=is_seat)
