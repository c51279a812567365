"""`RefusionRounds.lay_out` in one launch: a program per seat writes the seat's rows, in the order of `refusion.decoding.layout`.

Where a seat's rows begin follows from the agendas of the seats before it, which every program adds up for itself.
"""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from refusion.decoding.kernels.agenda import read_agenda, rows_needed
from refusion.decoding.kernels.constants import AGENDA_VERIFIED, DONE, INFILL, REMASK, VERIFY
from refusion.decoding.kernels.row_buffers import RowPointers, TilePointers, cut_tiles, own_rows, pad_rows, pad_tiles
from refusion.decoding.kernels.row_groups import Block, put_alternatives, put_candidates, put_copies, put_drafts, put_plan
from refusion.decoding.params import ALTERNATIVE_LENGTHS
from refusion.model.kernels.launch import launch
from refusion.model.kernels.stream import wait
from refusion.model.rows import Rows, Spans, Tiles

if TYPE_CHECKING:
    from refusion.decoding.refusion_rounds import RefusionRounds

# B = seats, T = decode rows, W = slots of a block, K = tokens per slot
# C = candidate lengths, A = those with alternatives, R = alternatives


def lay_out(
    rounds: RefusionRounds,
    rows: Rows,
    spans: Spans,
    *,
    start: int,
    num_seats: int,
    num_candidates: int,
    tiles: Tiles | None,
    tile_start: int,
) -> None:
    """See `refusion.decoding.rounds.Rounds.lay_out`."""
    first = rounds.table.first
    launch(
        _lay_out,
        (num_seats,),
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
        rounds.mask_id,
        PROMPT_LENGTH=first["prompt_length"],
        SEED=first["seed"],
        NUM_DRAFTS=first["num_drafts"],
        AGENDA=first["agenda"],
        TOKEN_IDS=first["token_ids"],
        RUNNER_UPS=first.get("runner_ups", 0),
        W=rounds.width,
        K=rounds.slot_size,
        C=num_candidates,
        R=rounds.slots.alternatives,
        A=min(ALTERNATIVE_LENGTHS, num_candidates),
        MOST_MASKS=rounds.slots.most_masks,
        B_PADDED=triton.next_power_of_2(num_seats),
        K_PADDED=triton.next_power_of_2(rounds.slot_size),
        TILE=0 if tiles is None else tiles.block,
        num_warps=1,
    )


@triton.jit(do_not_specialize=["num_tiles", "tile_start", "num_seats", "num_rows", "start", "mask_id", "C", "A"])
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
    mask_id,
    PROMPT_LENGTH: tl.constexpr,
    SEED: tl.constexpr,
    NUM_DRAFTS: tl.constexpr,
    AGENDA: tl.constexpr,
    TOKEN_IDS: tl.constexpr,
    RUNNER_UPS: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    C,
    R: tl.constexpr,
    A,
    MOST_MASKS: tl.constexpr,
    B_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    rows = RowPointers(
        token_ids, positions, seat_of, segment, rank, parent, visible, is_trunk, given_ids, seeds, attempts, num_rows
    )  # fmt: skip
    seat = tl.program_id(0)
    seats = tl.arange(0, B_PADDED)
    needed = rows_needed(table + AGENDA, line_stride, seats, seats < num_seats, W, K, C, R, A, MOST_MASKS)  # [B]
    last = tl.cumsum(needed, 0)
    begins = tl.minimum(last - needed, num_rows)
    ends = tl.minimum(last, num_rows)
    begin = tl.sum(tl.where(seats == seat, begins, 0), 0)
    end = tl.sum(tl.where(seats == seat, ends, 0), 0)
    tl.store(row_start + seat, start + begin)
    tl.store(row_end + seat, start + end)

    line = table + seat.to(tl.int64) * line_stride
    own_rows(rows, begin, end, seat, seed=tl.load(line + SEED), attempt=tl.load(line + NUM_DRAFTS) + 1)
    pad_rows(rows, tl.minimum(tl.sum(needed, 0), num_rows), seat, num_seats)
    if TILE > 0:
        tiles = TilePointers(tile_seat, tile_first, tile_end, num_tiles)
        tile_counts = tl.cdiv(ends - begins, TILE)
        tile = tile_start + tl.sum(tl.where(seats < seat, tile_counts, 0), 0)
        cut_tiles(tiles, tile, seat, start + begin, start + end, TILE)
        pad_tiles(tiles, tile_start + tl.sum(tile_counts, 0), seat, num_seats)

    phase, window, plan = read_agenda(line + AGENDA)
    prompt_length = tl.load(line + PROMPT_LENGTH).to(tl.int32)
    verified = line + AGENDA + AGENDA_VERIFIED
    block = Block(phase, verified, line + TOKEN_IDS + window * K, prompt_length + window * K)
    is_judging = (phase == VERIFY) | (phase == INFILL)
    row = begin
    if is_judging | (phase == REMASK):
        row = put_drafts(rows, row, block, W, K, MOST_MASKS, K_PADDED)
    if phase != DONE:
        row = put_plan(rows, row, verified + W, prompt_length + plan * K, mask_id, W, K, K_PADDED)
    if (phase == VERIFY) & (C > 0):
        row = put_copies(rows, row, block, W, K, C, K_PADDED)
    if is_judging | (phase == REMASK):
        row = put_candidates(rows, row, block, mask_id, W, K, C, MOST_MASKS, K_PADDED)
    if R > 0 and is_judging:
        runner_ups = line + RUNNER_UPS + window * (K * R)
        put_alternatives(rows, row, block, runner_ups, mask_id, W, K, C, R, A, MOST_MASKS, K_PADDED)
