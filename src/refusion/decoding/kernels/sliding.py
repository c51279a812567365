"""`SlidingRounds` in one launch each way: a program per seat writes the seat's rows, or judges them.

Where a seat's rows begin follows from the state of the seats before it, which every program adds up for itself. What passes is a prefix of
the chain, so one length says what the plain version says with a mask.
"""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from refusion.decoding.forward import Readout
from refusion.decoding.kernels.row_buffers import RowPointers, TilePointers, cut_tiles, own_rows, pad_rows, pad_tiles
from refusion.decoding.kernels.sliding_rows import (
    CHAIN,
    IS_DONE,
    MAX_TOKENS,
    NUM_DRAFTED,
    NUM_FORWARDS,
    NUM_KNOWN,
    NUM_WRITTEN,
    PLANS,
    PROMPT_LENGTH,
    SEED,
    Text,
    put_alternatives,
    put_chain,
    put_groups,
    put_plan,
    read_forward,
)
from refusion.decoding.kernels.sliding_verdicts import (
    TOKENS,
    WHOLE,
    Report,
    draft_next,
    passing_prefix,
    plan_next,
    put_report,
    reach_verdict,
    write_final,
)
from refusion.decoding.kernels.turn import Drawn
from refusion.decoding.sliding_report import num_lengths
from refusion.model.kernels.launch import launch
from refusion.model.kernels.stream import wait
from refusion.model.rows import Rows, Spans, Tiles

if TYPE_CHECKING:
    from refusion.decoding.sliding_rounds import SlidingRounds

# B = seats, K = tokens per slot, N = K + 1 most tokens of a chain, R = alternatives, T = decode rows of a forward
# C = lengths prepared at most, A = those with alternatives, M = masks of a group

MOST_AT_ONCE = 128  # rows of a part that are written at a time
FEW = 256  # numbers that one warp handles as fast as four


def lay_out(
    rounds: SlidingRounds, rows: Rows, spans: Spans, *, start: int, num_seats: int, candidates: int, tiles: Tiles | None, tile_start: int
) -> None:
    """See `refusion.decoding.rounds.Rounds.lay_out`."""
    sizes = _sizes(rounds)
    group_rows, alternative_rows = rounds.num_lengths * sizes["M"], sizes["A"] * sizes["R"] * (1 + sizes["M"])
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
        num_lengths(rounds.slots, candidates),
        **sizes,
        C=rounds.num_lengths,
        B_PADDED=triton.next_power_of_2(num_seats),
        GROUPS_PADDED=min(triton.next_power_of_2(max(group_rows, 1)), MOST_AT_ONCE),
        ALTERNATIVES_PADDED=min(triton.next_power_of_2(max(alternative_rows, 1)), MOST_AT_ONCE),
        IS_EXACT=rounds.slots.acceptance == "exact",
        TILE=0 if tiles is None else tiles.block,
        num_warps=1,
    )


def settle(rounds: SlidingRounds, readout: Readout, spans: Spans, *, start: int, num_seats: int, candidates: int) -> None:
    """See `refusion.decoding.rounds.Rounds.settle`."""
    sizes = _sizes(rounds)
    ups_padded = triton.next_power_of_2(max(sizes["R"], 1))
    launch(
        _settle,
        (num_seats,),
        rounds.table.values,
        rounds.table.values.stride(0),
        readout.token_ids,
        readout.confidence,
        readout.given_probability,
        readout.given_is_argmax.view(torch.uint8),
        readout.runner_ups,
        readout.runner_ups.stride(0),
        rounds.first_ids,
        rounds.eos_ids,
        spans.cached,
        spans.page_table,
        spans.page_table.stride(0),
        spans.page_table.shape[1],
        spans.page_size,
        spans.row_start,
        rounds.source,
        rounds.target,
        rounds.report,
        rounds.report.stride(0),
        len(readout.token_ids),
        start,
        num_lengths(rounds.slots, candidates),
        float(rounds.slots.token_threshold),
        **sizes,
        NUM_EOS=len(rounds.eos_ids),
        ACCEPTS_ARGMAX=rounds.slots.acceptance == "argmax",
        IS_EXACT=rounds.slots.acceptance == "exact",
        R_PADDED=ups_padded,
        num_warps=1 if sizes["N_PADDED"] * ups_padded <= FEW else 4,
    )


def _sizes(rounds: SlidingRounds) -> dict[str, Any]:
    """What the settings fix."""
    slots = rounds.slots
    return {
        "K": rounds.slot_size,
        "M": slots.most_masks,
        "R": slots.alternatives,
        "A": rounds.num_tried,
        "N_PADDED": triton.next_power_of_2(rounds.num_kept),
    }


@triton.jit(do_not_specialize=["num_tiles", "tile_start", "num_seats", "num_rows", "start", "mask_id", "num_lengths"])
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
    num_lengths,
    K: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    N_PADDED: tl.constexpr,
    C: tl.constexpr,
    B_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    ALTERNATIVES_PADDED: tl.constexpr,
    IS_EXACT: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    rows = RowPointers(
        token_ids, positions, seat_of, segment, rank, parent, visible, is_trunk, given_ids, seeds, attempts, num_rows
    )  # fmt: skip
    seat = tl.program_id(0)
    seats = tl.arange(0, B_PADDED)
    needed = read_forward(table, line_stride, seats, seats < num_seats, num_lengths, K, M, R, A).needed  # [B]
    last = tl.cumsum(needed, 0)
    begins = tl.minimum(last - needed, num_rows)
    ends = tl.minimum(last, num_rows)
    begin = tl.sum(tl.where(seats == seat, begins, 0), 0)
    end = tl.sum(tl.where(seats == seat, ends, 0), 0)
    tl.store(row_start + seat, start + begin)
    tl.store(row_end + seat, start + end)

    line = table + seat.to(tl.int64) * line_stride
    written = tl.load(line + NUM_WRITTEN).to(tl.int32)
    own_rows(rows, begin, end, seat, seed=tl.load(line + SEED), attempt=tl.where(IS_EXACT, 1, written + 1))
    pad_rows(rows, tl.minimum(tl.sum(needed, 0), num_rows), seat, num_seats)
    if TILE > 0:
        tiles = TilePointers(tile_seat, tile_first, tile_end, num_tiles)
        tile_counts = tl.cdiv(ends - begins, TILE)
        tile = tile_start + tl.sum(tl.where(seats < seat, tile_counts, 0), 0)
        cut_tiles(tiles, tile, seat, start + begin, start + end, TILE)
        pad_tiles(tiles, tile_start + tl.sum(tile_counts, 0), seat, num_seats)

    forward = read_forward(table, line_stride, seat, True, num_lengths, K, M, R, A)
    if forward.is_active:
        last_place = tl.load(line + MAX_TOKENS).to(tl.int32) - 1
        text = Text(tl.load(line + PROMPT_LENGTH).to(tl.int32), written - forward.known, last_place)
        row = put_chain(rows, begin, forward, text, line + CHAIN, N_PADDED)
        if C > 0:
            row = put_groups(rows, row, forward, text, mask_id, M, GROUPS_PADDED)
        row = put_plan(rows, row, forward, text, mask_id, C, N_PADDED)
        if A > 0:
            put_alternatives(rows, row, forward, text, line + CHAIN + K + 1, mask_id, M, C, R, ALTERNATIVES_PADDED)


@triton.jit(do_not_specialize=["runner_ups_stride", "num_rows", "start", "num_lengths"])
def _settle(
    table,
    line_stride,
    drawn_ids,
    confidence,
    given_probability,
    given_is_argmax,
    drawn_runner_ups,
    runner_ups_stride,
    first_ids,
    eos_ids,
    cached,
    page_table,
    page_stride,
    num_pages,
    page_size,
    row_start,
    source,
    target,
    report,
    report_stride,
    num_rows,
    start,
    num_lengths,
    token_threshold,
    K: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    N_PADDED: tl.constexpr,
    NUM_EOS: tl.constexpr,
    ACCEPTS_ARGMAX: tl.constexpr,
    IS_EXACT: tl.constexpr,
    R_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    N: tl.constexpr = K + 1
    seat = tl.program_id(0)
    line = table + seat.to(tl.int64) * line_stride
    chain, runner_ups = line + CHAIN, line + CHAIN + N
    drawn = Drawn(drawn_ids, confidence, given_probability, given_is_argmax, drawn_runner_ups, num_rows)
    forward = read_forward(table, line_stride, seat, True, num_lengths, K, M, R, A)
    is_active = forward.is_active
    written = tl.load(line + NUM_WRITTEN).to(tl.int32)
    max_tokens = tl.load(line + MAX_TOKENS).to(tl.int32)
    num_forwards = tl.load(line + NUM_FORWARDS).to(tl.int32) + is_active.to(tl.int32)
    num_cached = tl.load(cached + seat)
    first_id = tl.load(first_ids + seat)
    begin = tl.load(row_start + seat) - start
    pages = page_table + seat.to(tl.int64) * page_stride
    place = tl.arange(0, N_PADDED)
    is_place = place < N

    stands = passing_prefix(forward, drawn, begin, chain, place, token_threshold, N, ACCEPTS_ARGMAX, IS_EXACT)
    verdict = reach_verdict(forward, drawn, begin, stands, first_id, runner_ups, eos_ids, K, M, R, A, R_PADDED, NUM_EOS)
    after = draft_next(forward, verdict, drawn, begin, place, runner_ups_stride, eos_ids, M, R, R_PADDED, N_PADDED, NUM_EOS)
    final, num_final, is_ended = write_final(forward, verdict, chain, max_tokens - written, place, eos_ids, N, N_PADDED, NUM_EOS)
    is_done = (~is_active | is_ended | (written + num_final >= max_tokens)).to(tl.int32)
    kept = tl.where(is_active, tl.minimum(stands, forward.known + num_final), 0)  # so many rows of the chain join the cache
    is_kept = place < kept
    cache_place = tl.minimum(num_cached + place, num_pages * page_size - 1)
    page = tl.load(pages + cache_place // page_size, mask=is_kept, other=0)
    known = tl.where(is_active, after.known, forward.known)
    drafted = tl.where(is_active, after.drafted, forward.drafted)
    plans = tl.where(is_active, plan_next(forward, verdict, M), forward.plans)

    tl.debug_barrier()  # everything is read before anything is written
    tl.store(source + seat * N + place, tl.where(is_kept, start + begin + place, -1), mask=is_place)
    tl.store(target + seat * N + place, tl.where(is_kept, page * page_size + cache_place % page_size, -1), mask=is_place)
    tl.store(cached + seat, num_cached + kept)
    tl.store(line + IS_DONE, is_done, mask=is_active)
    tl.store(line + NUM_KNOWN, known, mask=is_active)
    tl.store(line + NUM_DRAFTED, drafted, mask=is_active)
    tl.store(line + PLANS, plans, mask=is_active)
    tl.store(line + NUM_WRITTEN, written + num_final, mask=is_active)
    tl.store(line + NUM_FORWARDS, num_forwards, mask=is_active)
    tl.store(chain + place, after.chain, mask=is_place & is_active)
    width: tl.constexpr = R if R > 0 else 1  # without alternatives one column a token stays, of -1
    which = tl.arange(0, R_PADDED)[None, :]
    tl.store(runner_ups + place[:, None] * width + which, after.runner_ups, mask=(is_place & is_active)[:, None] & (which < width))

    out = report + seat.to(tl.int64) * report_stride
    overflow = tl.minimum(tl.maximum(begin + forward.needed - num_rows, 0), forward.needed)
    score = tl.where(is_active, after.score, 0.0).to(tl.int32, bitcast=True)
    num_passed = tl.where(is_active & (forward.drafted > 0), stands - forward.known, -1)
    put_report(
        out,
        Report(
            is_done, num_forwards, overflow, forward.needed, num_cached + kept, known, drafted, plans, after.has_end, score, num_passed,
            (forward.plans == WHOLE).to(tl.int32), written,
        ),
    )  # fmt: skip
    tl.store(out + TOKENS + place, tl.where(is_active & (place < num_final), final, -1), mask=is_place)
    tl.store(out + TOKENS + N + place, tl.where(is_active & after.is_draft, after.chain, -1), mask=is_place)
