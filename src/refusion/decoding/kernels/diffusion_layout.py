"""`DiffusionRounds.lay_out` in one launch: a few programs per seat write the rows of its stretch, in turns."""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from refusion.decoding.kernels.constants import NO_PARENT
from refusion.decoding.kernels.diffusion_stretch import (
    BLOCKS,
    DUAL,
    KINDS,
    NO_CACHE,
    NUM_DRAFTS,
    PROMPT_LENGTH,
    SEED,
    TEXT,
    next_stretch,
    read_progress,
)
from refusion.decoding.kernels.row_buffers import CHUNK, RowPointers, TilePointers, cut_tiles, pad_rows, pad_tiles, put_rows
from refusion.model.kernels.launch import launch
from refusion.model.kernels.stream import wait
from refusion.model.rows import Rows, Spans, Tiles

if TYPE_CHECKING:
    from refusion.decoding.diffusion_rounds import DiffusionRounds

# B = seats, T = decode rows, K = tokens of a block

MOST_PROGRAMS = 512
"""Of a launch, about: what a large GPU runs at once. Few seats, whose rows may be many, get more of them each."""


class KeepPointers(NamedTuple):
    """Which decode rows [T] join the cache, and where."""

    source: tl.tensor  # flat row, -1 for none
    target: tl.tensor  # cache row
    pages: tl.tensor  # of this seat
    num_pages: tl.tensor
    page_size: tl.tensor


class ReadPointers(NamedTuple):
    """What is read of a forward, by token of every seat's block [B * K]."""

    reads: tl.tensor  # decode row
    seeds: tl.tensor
    attempts: tl.tensor


def lay_out(rounds: DiffusionRounds, rows: Rows, spans: Spans, *, start: int, num_seats: int, tiles: Tiles | None, tile_start: int) -> None:
    """See `refusion.decoding.rounds.Rounds.lay_out`."""
    num_chunks = -(-max(rows.num_rows, 1) // CHUNK.value)
    launch(
        _lay_out,
        (num_seats, min(num_chunks, -(-MOST_PROGRAMS // num_seats))),
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
        0 if tiles is None else len(tiles.seat),
        tile_start,
        num_seats,
        rows.num_rows,
        start,
        rounds.prefill_rows,
        rounds.num_positions,
        K=rounds.block_size,
        KIND=KINDS.index(rounds.kind.name),
        B_PADDED=triton.next_power_of_2(num_seats),
        TILE=0 if tiles is None else tiles.block,
        num_warps=4,
    )


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
    seat, part, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    rows = RowPointers(token_ids, positions, seat_of, segment, rank, parent, visible, is_trunk, None, None, None, num_rows)
    keeps = KeepPointers(source, target, page_table + seat * page_stride, num_pages, page_size)
    line = table + seat.to(tl.int64) * line_stride

    # Where the rows of every seat are, and of this one.
    seats = tl.arange(0, B_PADDED)
    everyone = next_stretch(read_progress(table, line_stride, cached, seats, seats < num_seats), prefill_rows, K, KIND)
    needed = everyone.stop - everyone.start  # [B]
    last = tl.cumsum(needed, 0)
    begin = tl.sum(tl.where(seats == seat, last - needed, 0), 0)
    end = begin + tl.sum(tl.where(seats == seat, needed, 0), 0)
    there, there_end = tl.minimum(begin, num_rows), tl.minimum(end, num_rows)

    progress = read_progress(table, line_stride, cached, seat, True)
    stretch = next_stretch(progress, prefill_rows, K, KIND)
    prompt_length = tl.load(line + PROMPT_LENGTH).to(tl.int32)
    first = begin + part * CHUNK
    while first < there_end:
        row = first + tl.arange(0, CHUNK)
        is_row = row < there_end
        position = stretch.start + row - begin
        put_text(rows, row, is_row, line + TEXT, position, prompt_length, num_positions, K, KIND)
        tl.store(rows.seat + row, seat, mask=is_row)
        if KIND != NO_CACHE:
            put_kept(keeps, row, is_row, position, stretch, progress.step, start, KIND)
        first += num_parts * CHUNK

    # What belongs to nobody, or to the seat as a whole.
    program, num_programs = part * num_seats + seat, num_parts * num_seats
    total = tl.minimum(tl.sum(needed, 0), num_rows)
    pad_rows(rows, total, program, num_programs)
    if KIND != NO_CACHE:
        pad_kept(keeps, total, num_rows, program, num_programs)
    if TILE > 0:
        tiles = TilePointers(tile_seat, tile_first, tile_end, num_tiles)
        tile_counts = tl.cdiv(tl.minimum(last, num_rows) - tl.minimum(last - needed, num_rows), TILE)
        pad_tiles(tiles, tile_start + tl.sum(tile_counts, 0), program, num_programs)
        if part == 0:
            tile = tile_start + tl.sum(tl.where(seats < seat, tile_counts, 0), 0)
            cut_tiles(tiles, tile, seat, start + there, start + there_end, TILE)
    if part == 0:
        tl.store(row_start + seat, start + there)
        tl.store(row_end + seat, start + there_end)
        if KIND < BLOCKS:  # nobody here looks at it before; masked diffusion begins every block anew
            tl.store(cached + seat, 0, mask=progress.step == 0)
        read = ReadPointers(reads + seat * K, seeds + seat * K, attempts + seat * K)
        attempt = tl.load(line + NUM_DRAFTS).to(tl.int32) + 1
        put_reads(read, begin + stretch.first - stretch.start, num_rows, tl.load(line + SEED), attempt, K)


@triton.jit
def put_text(rows, row, is_row, text, position, prompt_length, num_positions, K: tl.constexpr, KIND: tl.constexpr):
    """Write rows with the tokens at these positions; all of one rank, or ranked by the number of their block."""
    token = tl.load(text + position, mask=is_row & (position < num_positions), other=0)
    rank = position * 0
    if KIND >= BLOCKS:  # prompt and answer are cut into blocks of their own
        behind = tl.maximum(position - prompt_length, 0)
        rank = tl.where(position < prompt_length, position // K, (prompt_length + K - 1) // K + behind // K)
    put_rows(rows, row, is_row, token, position, segment=0, rank=rank, parent=NO_PARENT, visible=0, is_trunk=0)


@triton.jit
def put_kept(keeps, row, is_row, position, stretch, step, start, KIND: tl.constexpr):
    """Write which rows join the cache: what lies before the block in work, with `DUAL` also what lies behind it."""
    is_kept = is_row & (position < stretch.first)
    place = position
    if KIND < BLOCKS:
        if KIND == DUAL:
            is_behind = position >= stretch.block_end
            is_kept |= is_row & is_behind
            place = tl.where(is_behind, position - (stretch.block_end - stretch.first), position)
        is_kept &= step == 0
    place = tl.minimum(place, keeps.num_pages * keeps.page_size - 1)
    page = tl.load(keeps.pages + place // keeps.page_size, mask=is_kept, other=0)
    tl.store(keeps.source + row, tl.where(is_kept, start + row, -1), mask=is_row)
    tl.store(keeps.target + row, tl.where(is_kept, page * keeps.page_size + place % keeps.page_size, -1), mask=is_row)


@triton.jit
def pad_kept(keeps, begin, num_rows, part, num_parts):
    """Rows from `begin` on are not kept; this program writes every `num_parts`-th chunk of them."""
    first = begin + part * CHUNK
    while first < num_rows:
        row = first + tl.arange(0, CHUNK)
        tl.store(keeps.source + row, -1, mask=row < num_rows)
        tl.store(keeps.target + row, -1, mask=row < num_rows)
        first += num_parts * CHUNK


@triton.jit
def put_reads(read, row, num_rows, seed, attempt, K: tl.constexpr):
    """The block in work is K rows from `row` on; any row where it is not in the forward."""
    for first in tl.range(0, K, CHUNK):  # pyright: ignore[reportGeneralTypeIssues]: a type checker cannot iterate it
        token = first + tl.arange(0, CHUNK)
        is_token = token < K
        tl.store(read.reads + token, tl.maximum(tl.minimum(row + token, num_rows - 1), 0), mask=is_token)
        tl.store(read.seeds + token, seed, mask=is_token)
        tl.store(read.attempts + token, attempt, mask=is_token)
