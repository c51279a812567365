"""`RefusionRounds.lay_out` in one launch: a program per seat writes the seat's rows, in the order of `refusion.decoding.layout`.

Where a seat's rows begin follows from the agendas of the seats before it, which every program adds up for itself.
"""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from refusion.decoding.kernels.agenda import num_tried, rows_needed
from refusion.decoding.kernels.constants import AGENDA_VERIFIED, DONE, INFILL, NO_PARENT, REMASK, TRUNK, VERIFY
from refusion.decoding.kernels.row_buffers import cut_tiles, own_rows, pad_rows, pad_tiles
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


@triton.jit(do_not_specialize=["num_tiles", "tile_start", "num_seats", "num_rows", "start", "mask_id"])
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
    C: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    MOST_MASKS: tl.constexpr,
    B_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    seat = tl.program_id(0)
    seats = tl.arange(0, B_PADDED)
    needed = rows_needed(table + AGENDA, line_stride, seats, seats < num_seats, W, K, C, R, A, MOST_MASKS)  # [B]
    last = tl.cumsum(needed, 0)
    begins = tl.minimum(last - needed, num_rows)
    ends = tl.minimum(last, num_rows)
    begin = tl.sum(tl.where(seats == seat, begins, 0), 0)
    end = tl.sum(tl.where(seats == seat, ends, 0), 0)
    total = tl.minimum(tl.sum(needed, 0), num_rows)
    tl.store(row_start + seat, start + begin)
    tl.store(row_end + seat, start + end)

    line = table + seat.to(tl.int64) * line_stride
    own_rows(seat_of, seeds, attempts, seat, tl.load(line + SEED), tl.load(line + NUM_DRAFTS) + 1, begin, end)
    pad_rows(
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
        total,
        num_rows,
        seat,
        num_seats,
    )
    if TILE > 0:
        tile_counts = tl.cdiv(ends - begins, TILE)
        tile = tile_start + tl.sum(tl.where(seats < seat, tile_counts, 0), 0)
        cut_tiles(tile_seat, tile_first, tile_end, seat, tile, start + begin, start + end, num_tiles, TILE)
        pad_tiles(tile_seat, tile_first, tile_end, tile_start + tl.sum(tile_counts, 0), num_tiles, seat, num_seats)

    agenda = line + AGENDA
    phase = tl.load(agenda).to(tl.int32)
    prompt_length = tl.load(line + PROMPT_LENGTH).to(tl.int32)
    window_position = prompt_length + tl.load(agenda + 1).to(tl.int32) * K
    plan_position = prompt_length + tl.load(agenda + 2).to(tl.int32) * K
    drafts = line + TOKEN_IDS + tl.load(agenda + 1) * K
    verified = agenda + AGENDA_VERIFIED
    place = tl.arange(0, K_PADDED)
    row = begin

    if (phase == VERIFY) | (phase == INFILL) | (phase == REMASK):
        judges = phase != REMASK
        nth = 0
        for slot in range(W):
            stands = tl.load(verified + slot).to(tl.int32)
            if stands >= 0:
                count = tl.where(judges, K, stands)
                at = row + place
                is_row = (place < count) & (at < num_rows)
                is_judge = judges & (place < K - 1)
                tl.store(token_ids + at, tl.load(drafts + slot * K + place, mask=is_row, other=0), mask=is_row)
                following = tl.load(drafts + slot * K + place + 1, mask=is_row & is_judge, other=0)
                tl.store(given_ids + at, following, mask=is_row)
                tl.store(positions + at, window_position + slot * K + place, mask=is_row)
                tl.store(segment + at, tl.where(phase == VERIFY, 0, slot), mask=is_row)
                tl.store(rank + at, tl.where(phase == VERIFY, nth * K + place, place), mask=is_row)
                tl.store(parent + at, NO_PARENT, mask=is_row)
                tl.store(visible + at, 0, mask=is_row)
                tl.store(is_trunk + at, judges.to(tl.int32), mask=is_row)
                row += count
                nth += 1

    if phase != DONE:
        for slot in range(W):
            if tl.load(verified + W + slot) != 0:
                at = row + place
                is_row = (place < K) & (at < num_rows)
                tl.store(token_ids + at, mask_id, mask=is_row)
                tl.store(given_ids + at, 0, mask=is_row)
                tl.store(positions + at, plan_position + slot * K + place, mask=is_row)
                tl.store(segment + at, W, mask=is_row)
                tl.store(rank + at, slot * K + place, mask=is_row)
                tl.store(parent + at, TRUNK, mask=is_row)
                tl.store(visible + at, 0, mask=is_row)
                tl.store(is_trunk + at, 0, mask=is_row)
                row += K

    if (phase == VERIFY) & (C > 0):
        nth = 0
        for slot in range(W):
            if tl.load(verified + slot) >= 0:
                if nth > 0:
                    at = row + place
                    is_row = (place < C) & (at < num_rows)
                    tl.store(token_ids + at, tl.load(drafts + slot * K + place, mask=is_row, other=0), mask=is_row)
                    tl.store(given_ids + at, 0, mask=is_row)
                    tl.store(positions + at, window_position + slot * K + place, mask=is_row)
                    tl.store(segment + at, W + 1 + slot, mask=is_row)
                    tl.store(rank + at, place, mask=is_row)
                    tl.store(parent + at, NO_PARENT, mask=is_row)
                    tl.store(visible + at, 0, mask=is_row)
                    tl.store(is_trunk + at, 0, mask=is_row)
                    row += C
                nth += 1

    if (phase == VERIFY) | (phase == INFILL) | (phase == REMASK):
        nth = 0
        for slot in range(W):
            stands = tl.load(verified + slot).to(tl.int32)
            if stands >= 0:
                # In a verify forward the first slot's prefix is the chain itself, the others' a copy; otherwise every slot stands alone.
                in_verify = tl.where(nth == 0, 0, W + 1 + slot)
                seen = tl.where(phase == VERIFY, in_verify, slot)
                candidate = tl.where(phase == REMASK, 0, 1)
                last_candidate = tl.where(phase == REMASK, 0, tl.minimum(C, K - 1 - stands))
                while candidate <= last_candidate:
                    length = stands + candidate
                    at = row + place - length
                    end = tl.minimum(length + MOST_MASKS, K)
                    is_row = (place >= length) & (place < end) & (at < num_rows)
                    tl.store(token_ids + at, mask_id, mask=is_row)
                    tl.store(given_ids + at, 0, mask=is_row)
                    tl.store(positions + at, window_position + slot * K + place, mask=is_row)
                    tl.store(segment + at, 2 * W + 1 + slot * (C + 1) + candidate, mask=is_row)
                    tl.store(rank + at, place, mask=is_row)
                    tl.store(parent + at, seen, mask=is_row)
                    tl.store(visible + at, length, mask=is_row)
                    tl.store(is_trunk + at, 0, mask=is_row)
                    row += end - length
                    candidate += 1
                nth += 1

    if R * A > 0:
        runner_ups = line + RUNNER_UPS + tl.load(agenda + 1) * (K * R)
        nth = 0
        for slot in range(W):
            stands = tl.load(verified + slot).to(tl.int32)
            if (stands >= 0) & ((phase == VERIFY) | (phase == INFILL)):
                in_verify = tl.where(nth == 0, 0, W + 1 + slot)
                seen = tl.where(phase == VERIFY, in_verify, slot)
                tried = 1
                while tried <= num_tried(K - stands, A):
                    length = stands + tried
                    end = tl.minimum(length + 1 + MOST_MASKS, K)
                    for which in tl.static_range(R):
                        at = row + place - length
                        is_row = (place >= length) & (place < end) & (at < num_rows)
                        runner_up = tl.maximum(tl.load(runner_ups + (slot * K + length) * R + which), 0)  # -1: nothing was drafted
                        number = (slot * A + tried - 1) * R + which
                        tl.store(token_ids + at, tl.where(place == length, runner_up, mask_id), mask=is_row)
                        tl.store(given_ids + at, 0, mask=is_row)
                        tl.store(positions + at, window_position + slot * K + place, mask=is_row)
                        tl.store(segment + at, 2 * W + 1 + W * (C + 1) + number, mask=is_row)
                        tl.store(rank + at, place, mask=is_row)
                        tl.store(parent + at, seen, mask=is_row)
                        tl.store(visible + at, length, mask=is_row)
                        tl.store(is_trunk + at, 0, mask=is_row)
                        row += end - length
                    tried += 1
                nth += 1
