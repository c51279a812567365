"""`SlidingRounds` in one launch each way: a program per seat writes the seat's rows, or judges them.

Where a seat's rows begin follows from the state of the seats before it, which every program adds up for itself. What passes is a prefix of
the chain, so one length says what the plain version says with a mask.
"""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from refusion.decoding import sliding_report
from refusion.decoding.forward import Readout
from refusion.decoding.kernels.constants import NO_PARENT, TRUNK
from refusion.decoding.kernels.row_buffers import RowPointers, TilePointers, cut_tiles, own_rows, pad_rows, pad_tiles, put_rows
from refusion.decoding.kernels.turn import Drawn
from refusion.model.kernels.launch import launch
from refusion.model.kernels.stream import wait
from refusion.model.rows import Rows, Spans, Tiles

if TYPE_CHECKING:
    from refusion.decoding.sliding_rounds import SlidingRounds

# B = seats, K = tokens per slot, N = K + 1 most tokens of a chain, R = alternatives, T = decode rows of a forward
# C = prepared lengths, A = those with alternatives, M = masks of a group

# Columns of the table, as `SlidingRounds` names them; the runner-ups follow the chain.
PROMPT_LENGTH, SEED, MAX_TOKENS, IS_DONE, NUM_KNOWN, NUM_DRAFTED, IS_WHOLE, NUM_WRITTEN, NUM_FORWARDS, CHAIN = (
    tl.constexpr(column) for column in range(10)
)
CHAIN_SEGMENT = tl.constexpr(0)
TOKENS = tl.constexpr(sliding_report.TOKENS)
MOST_AT_ONCE = 128  # rows of a part that are written at a time
FEW = 256  # numbers that one warp handles as fast as four


class Forward(NamedTuple):
    """What the next forward of seats is made of: one of them, or all [B]."""

    is_active: tl.tensor
    known: tl.tensor  # tokens of the chain that are final
    drafted: tl.tensor  # and those behind them
    is_whole: tl.tensor
    lengths: tl.tensor  # with a group of masks behind them
    planned: tl.tensor
    tried: tl.tensor  # lengths with alternatives
    needed: tl.tensor  # rows in all, 0 of a seat that is done


class Text(NamedTuple):
    """Where the chain stands in the text of a seat."""

    prompt_length: tl.tensor
    begin: tl.tensor  # place of the chain's first token in the answer
    last: tl.tensor  # place that nothing stands behind


class Verdict(NamedTuple):
    """What passes, and what stands behind it."""

    stands: tl.tensor  # tokens of the chain
    named: tl.tensor  # the token behind them
    is_all: tl.tensor
    is_hit: tl.tensor  # it is a runner-up of the draft that failed
    second: tl.tensor  # then the token behind that one
    behind: tl.tensor  # and the row which names it


class Report(NamedTuple):
    """A line of `refusion.decoding.sliding_report` without the tokens, as its columns are ordered."""

    is_done: tl.tensor
    num_forwards: tl.tensor
    overflow: tl.tensor
    num_rows: tl.tensor
    cached: tl.tensor
    num_known: tl.tensor
    num_drafted: tl.tensor
    is_whole: tl.tensor
    has_end: tl.tensor
    place: tl.tensor


def lay_out(rounds: SlidingRounds, rows: Rows, spans: Spans, *, start: int, num_seats: int, tiles: Tiles | None, tile_start: int) -> None:
    """See `refusion.decoding.rounds.Rounds.lay_out`."""
    sizes = _sizes(rounds)
    group_rows, alternative_rows = sizes["C"] * sizes["M"], sizes["A"] * sizes["R"] * (1 + sizes["M"])
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
        **sizes,
        B_PADDED=triton.next_power_of_2(num_seats),
        GROUPS_PADDED=min(triton.next_power_of_2(max(group_rows, 1)), MOST_AT_ONCE),
        ALTERNATIVES_PADDED=min(triton.next_power_of_2(max(alternative_rows, 1)), MOST_AT_ONCE),
        TILE=0 if tiles is None else tiles.block,
        num_warps=1,
    )


def settle(rounds: SlidingRounds, readout: Readout, spans: Spans, *, start: int, num_seats: int) -> None:
    """See `refusion.decoding.rounds.Rounds.settle`."""
    sizes = _sizes(rounds)
    ups_padded = triton.next_power_of_2(max(sizes["R"], 1))
    launch(
        _settle,
        (num_seats,),
        rounds.table.values,
        rounds.table.values.stride(0),
        readout.token_ids,
        readout.given_probability,
        readout.given_is_argmax.view(torch.uint8),
        readout.runner_ups,
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
        float(rounds.slots.token_threshold),
        **sizes,
        NUM_EOS=len(rounds.eos_ids),
        ACCEPTS_ARGMAX=rounds.slots.acceptance == "argmax",
        R_PADDED=ups_padded,
        num_warps=1 if sizes["N_PADDED"] * ups_padded <= FEW else 4,
    )


def _sizes(rounds: SlidingRounds) -> dict[str, Any]:
    """What the settings fix."""
    slots = rounds.slots
    return {
        "K": rounds.slot_size,
        "M": slots.most_masks,
        "C": rounds.num_lengths,
        "R": slots.alternatives,
        "A": rounds.num_tried,
        "N_PADDED": triton.next_power_of_2(rounds.num_kept),
    }


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
    K: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    N_PADDED: tl.constexpr,
    B_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    ALTERNATIVES_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    rows = RowPointers(
        token_ids, positions, seat_of, segment, rank, parent, visible, is_trunk, given_ids, seeds, attempts, num_rows
    )  # fmt: skip
    seat = tl.program_id(0)
    seats = tl.arange(0, B_PADDED)
    needed = read_forward(table, line_stride, seats, seats < num_seats, K, M, C, R, A).needed  # [B]
    last = tl.cumsum(needed, 0)
    begins = tl.minimum(last - needed, num_rows)
    ends = tl.minimum(last, num_rows)
    begin = tl.sum(tl.where(seats == seat, begins, 0), 0)
    end = tl.sum(tl.where(seats == seat, ends, 0), 0)
    tl.store(row_start + seat, start + begin)
    tl.store(row_end + seat, start + end)

    line = table + seat.to(tl.int64) * line_stride
    written = tl.load(line + NUM_WRITTEN).to(tl.int32)
    own_rows(rows, begin, end, seat, seed=tl.load(line + SEED), attempt=written + 1)
    pad_rows(rows, tl.minimum(tl.sum(needed, 0), num_rows), seat, num_seats)
    if TILE > 0:
        tiles = TilePointers(tile_seat, tile_first, tile_end, num_tiles)
        tile_counts = tl.cdiv(ends - begins, TILE)
        tile = tile_start + tl.sum(tl.where(seats < seat, tile_counts, 0), 0)
        cut_tiles(tiles, tile, seat, start + begin, start + end, TILE)
        pad_tiles(tiles, tile_start + tl.sum(tile_counts, 0), seat, num_seats)

    forward = read_forward(table, line_stride, seat, True, K, M, C, R, A)
    if forward.is_active:
        last_place = tl.load(line + MAX_TOKENS).to(tl.int32) - 1
        text = Text(tl.load(line + PROMPT_LENGTH).to(tl.int32), written - forward.known, last_place)
        row = put_chain(rows, begin, forward, text, line + CHAIN, N_PADDED)
        if C > 0:
            row = put_groups(rows, row, forward, text, mask_id, M, GROUPS_PADDED)
        row = put_plan(rows, row, forward, text, mask_id, C, N_PADDED)
        if A > 0:
            put_alternatives(rows, row, forward, text, line + CHAIN + K + 1, mask_id, M, C, R, ALTERNATIVES_PADDED)


@triton.jit
def read_forward(
    table, line_stride, seat, is_seat,
    K: tl.constexpr, M: tl.constexpr, C: tl.constexpr, R: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The `Forward` of these seats; they are done where `is_seat` is false."""
    line = table + seat.to(tl.int64) * line_stride
    is_active = tl.load(line + IS_DONE, mask=is_seat, other=1) == 0
    known = tl.load(line + NUM_KNOWN, mask=is_seat, other=0).to(tl.int32)
    drafted = tl.load(line + NUM_DRAFTED, mask=is_seat, other=0).to(tl.int32)
    is_whole = tl.load(line + IS_WHOLE, mask=is_seat, other=0).to(tl.int32)
    lengths, tried = tl.minimum(drafted, C), tl.minimum(drafted, A)
    planned = tl.where(is_whole != 0, K, M)
    needed = known + drafted + lengths * M + planned + tried * (R * (1 + M))
    return Forward(is_active, known, drafted, is_whole, lengths, planned, tried, tl.where(is_active, needed, 0))


@triton.jit
def position_of(text, place):
    """Of what stands `place` tokens behind the chain's first one; masks behind the end stand at the end."""
    return text.prompt_length + tl.minimum(text.begin + place, text.last)


@triton.jit
def put_chain(rows, row, forward, text, chain, N_PADDED: tl.constexpr):
    """What is known and the drafts, on the trunk; each row judges the draft behind it. Like the next two, returns the row behind."""
    place = tl.arange(0, N_PADDED)
    count = forward.known + forward.drafted
    put_rows(
        rows,
        row + place,
        place < count,
        token=tl.load(chain + place, mask=place < count, other=0),
        position=position_of(text, place),
        segment=CHAIN_SEGMENT,
        rank=place,
        parent=NO_PARENT,
        visible=0,
        is_trunk=1,
        given=tl.load(chain + 1 + place, mask=place + 1 < count, other=0),
    )
    return row + count


@triton.jit
def put_groups(rows, row, forward, text, mask_id, M: tl.constexpr, PADDED: tl.constexpr):
    """Masks behind every prepared length of accepted drafts."""
    count = forward.lengths * M
    first = 0
    while first < count:
        index = first + tl.arange(0, PADDED)
        seen = forward.known + index // M
        put_rows(
            rows,
            row + index,
            index < count,
            token=mask_id,
            position=position_of(text, seen + index % M),
            segment=1 + index // M,
            rank=index % M,
            parent=CHAIN_SEGMENT,
            visible=seen,
            is_trunk=0,
        )
        first += PADDED
    return row + count


@triton.jit
def put_plan(rows, row, forward, text, mask_id, C: tl.constexpr, N_PADDED: tl.constexpr):
    """Masks behind the whole chain."""
    place = tl.arange(0, N_PADDED)
    put_rows(
        rows,
        row + place,
        place < forward.planned,
        token=mask_id,
        position=position_of(text, forward.known + forward.drafted + place),
        segment=C + 1,
        rank=place,
        parent=TRUNK,
        visible=0,
        is_trunk=0,
    )
    return row + forward.planned


@triton.jit
def put_alternatives(
    rows, row, forward, text, runner_ups, mask_id,
    M: tl.constexpr, C: tl.constexpr, R: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Behind the first lengths of accepted drafts: each runner-up of the draft that would fail there, and masks behind it."""
    count = forward.tried * (R * (1 + M))
    first = 0
    while first < count:
        index = first + tl.arange(0, PADDED)
        nth, place = index // (1 + M), index % (1 + M)
        seen = forward.known + nth // R
        is_first = (index < count) & (place == 0)
        runner_up = tl.load(runner_ups + seen * R + nth % R, mask=is_first, other=0).to(tl.int32)
        put_rows(
            rows,
            row + index,
            index < count,
            token=tl.where(is_first, tl.maximum(runner_up, 0), mask_id),  # -1: nothing was drafted
            position=position_of(text, seen + place),
            segment=C + 2 + nth,
            rank=place,
            parent=CHAIN_SEGMENT,
            visible=seen,
            is_trunk=0,
        )
        first += PADDED


@triton.jit(do_not_specialize=["num_rows", "start"])
def _settle(
    table,
    line_stride,
    drawn_ids,
    given_probability,
    given_is_argmax,
    drawn_runner_ups,
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
    token_threshold,
    K: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    N_PADDED: tl.constexpr,
    NUM_EOS: tl.constexpr,
    ACCEPTS_ARGMAX: tl.constexpr,
    R_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    N: tl.constexpr = K + 1
    seat = tl.program_id(0)
    line = table + seat.to(tl.int64) * line_stride
    chain, runner_ups = line + CHAIN, line + CHAIN + N
    drawn = Drawn(drawn_ids, None, given_probability, given_is_argmax, drawn_runner_ups, num_rows)
    forward = read_forward(table, line_stride, seat, True, K, M, C, R, A)
    written = tl.load(line + NUM_WRITTEN).to(tl.int32)
    max_tokens = tl.load(line + MAX_TOKENS).to(tl.int32)
    num_forwards = tl.load(line + NUM_FORWARDS).to(tl.int32)
    num_cached = tl.load(cached + seat)
    begin = tl.load(row_start + seat) - start
    place = tl.arange(0, N_PADDED)
    is_place = place < N

    stands = passing_prefix(forward, drawn, begin, place, token_threshold, N, ACCEPTS_ARGMAX)
    first_id = tl.load(first_ids + seat)
    verdict = reach_verdict(forward, drawn, begin, stands, first_id, runner_ups, eos_ids, K, M, R, A, R_PADDED, NUM_EOS)
    next_known = 1 + verdict.is_hit.to(tl.int32)
    drafts_row, num_drafts = find_drafts(forward, verdict, begin, M, C)
    is_draft = (place >= next_known) & (place < next_known + num_drafts)
    row = there(drafts_row + place - next_known, num_rows)
    next_chain = tl.load(drawn.token_ids + row, mask=is_draft, other=0).to(tl.int32)
    has_end = tl.max((is_draft & ends_text(next_chain, eos_ids, NUM_EOS)).to(tl.int32), 0)
    next_chain = tl.where(place == 0, verdict.named, next_chain)
    next_chain = tl.where(verdict.is_hit & (place == 1), verdict.second, next_chain)
    which = tl.arange(0, R_PADDED)[None, :]
    next_runner_ups = tl.full([N_PADDED, R_PADDED], -1, tl.int64)
    if R > 0:
        is_ranked = is_draft[:, None] & (which < R)
        next_runner_ups = tl.load(drawn.runner_ups + row[:, None] * R + which, mask=is_ranked, other=-1).to(tl.int64)

    # What is final now: the accepted drafts and what is known, through the first EOS and no more than was asked for.
    accepted = stands - forward.known
    final = tl.load(chain + tl.minimum(forward.known + place, N - 1), mask=place < accepted, other=0).to(tl.int32)
    final = tl.where(place < accepted, final, tl.where(place == accepted, verdict.named, verdict.second))
    num_final = tl.minimum(accepted + next_known, max_tokens - written)
    end = tl.min(tl.where(ends_text(final, eos_ids, NUM_EOS) & (place < num_final), place, N_PADDED), 0)
    num_final = tl.where(end < N_PADDED, end + 1, num_final)
    is_active = forward.is_active
    is_done = ~is_active | (end < N_PADDED) | (written + num_final >= max_tokens)

    # The first rows of the chain join the cache.
    kept = tl.where(is_active, tl.minimum(stands, forward.known + num_final), 0)
    is_kept = place < kept
    cache_place = tl.minimum(num_cached + place, num_pages * page_size - 1)
    page = tl.load(page_table + seat.to(tl.int64) * page_stride + cache_place // page_size, mask=is_kept, other=0)

    tl.debug_barrier()  # everything is read before anything is written
    tl.store(source + seat * N + place, tl.where(is_kept, begin + place + start, -1), mask=is_place)
    tl.store(target + seat * N + place, tl.where(is_kept, page * page_size + cache_place % page_size, -1), mask=is_place)
    tl.store(cached + seat, num_cached + kept)
    known = tl.where(is_active, next_known, forward.known)
    drafted = tl.where(is_active, num_drafts, forward.drafted)
    is_whole = tl.where(is_active, verdict.is_all.to(tl.int32), forward.is_whole)
    num_forwards += is_active.to(tl.int32)
    tl.store(line + IS_DONE, is_done.to(tl.int64), mask=is_active)
    tl.store(line + NUM_KNOWN, known, mask=is_active)
    tl.store(line + NUM_DRAFTED, drafted, mask=is_active)
    tl.store(line + IS_WHOLE, is_whole, mask=is_active)
    tl.store(line + NUM_WRITTEN, written + num_final, mask=is_active)
    tl.store(line + NUM_FORWARDS, num_forwards, mask=is_active)
    tl.store(chain + place, next_chain, mask=is_place & is_active)
    width: tl.constexpr = R if R > 0 else 1  # without alternatives one column a token stays, of -1
    is_cell = (is_place & is_active)[:, None] & (which < width)
    tl.store(runner_ups + place[:, None] * width + which, next_runner_ups, mask=is_cell)
    out = report + seat.to(tl.int64) * report_stride
    overflow = tl.minimum(tl.maximum(begin + forward.needed - num_rows, 0), forward.needed)
    put_report(
        out,
        Report(
            is_done.to(tl.int32), num_forwards, overflow, forward.needed, num_cached + kept, known, drafted, is_whole, has_end, written
        ),
    )  # fmt: skip
    tl.store(out + TOKENS + place, tl.where(is_active & (place < num_final), final, -1), mask=is_place)


@triton.jit
def there(row, num_rows):
    """Row numbers that are safe to read: rows that did not fit, or are nobody's, are read somewhere."""
    return tl.minimum(tl.maximum(row, 0), num_rows - 1)


@triton.jit
def ends_text(tokens, eos_ids, NUM_EOS: tl.constexpr):
    """Which tokens end an answer."""
    found = tokens != tokens
    for index in tl.static_range(NUM_EOS):  # pyright: ignore[reportGeneralTypeIssues]: Triton unrolls it
        found |= tokens == tl.load(eos_ids + index).to(tl.int32)
    return found


@triton.jit
def passing_prefix(forward, drawn, begin, place, token_threshold, N: tl.constexpr, ACCEPTS_ARGMAX: tl.constexpr):
    """How many tokens of the chain stand: those known, and drafts up to the first that the row before it does not let pass."""
    is_judged = (place >= forward.known) & (place < forward.known + forward.drafted)
    judge = there(begin + place - 1, drawn.num_rows)
    passes = tl.load(drawn.given_probability + judge, mask=is_judged, other=0.0) > token_threshold
    if ACCEPTS_ARGMAX:
        passes |= tl.load(drawn.given_is_argmax + judge, mask=is_judged, other=0) != 0
    stays = (passes & is_judged) | (place < forward.known)
    return tl.min(tl.where(stays, N, place), 0)


@triton.jit
def reach_verdict(
    forward, drawn, begin, stands, first_id, runner_ups, eos_ids,
    K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, A: tl.constexpr, R_PADDED: tl.constexpr, NUM_EOS: tl.constexpr,
):  # fmt: skip
    """The `Verdict` where `stands` tokens of the chain do."""
    named = tl.load(drawn.token_ids + there(begin + stands - 1, drawn.num_rows)).to(tl.int32)
    named = tl.where(stands > 0, named, first_id)
    is_all = stands == forward.known + forward.drafted
    is_hit = stands < 0
    second = named
    behind = begin
    if A > 0:
        which = tl.arange(0, R_PADDED)
        failed = runner_ups + tl.minimum(stands, K) * R
        is_same = tl.load(failed + which, mask=which < R, other=-1) == named
        hit = tl.min(tl.where(is_same & (which < R), which, R), 0)
        can_hit = ~is_all & (stands - forward.known < A)
        is_hit = can_hit & (hit < R) & ~ends_text(named, eos_ids, NUM_EOS)
        alternatives = begin + forward.known + forward.drafted + forward.lengths * M + forward.planned
        behind = alternatives + ((stands - forward.known) * R + hit) * (1 + M)
        second = tl.load(drawn.token_ids + there(behind, drawn.num_rows), mask=is_hit, other=0).to(tl.int32)
    return Verdict(stands, named, is_all, is_hit, second, behind)


@triton.jit
def find_drafts(forward, verdict, begin, M: tl.constexpr, C: tl.constexpr):
    """The first row that drafts what comes behind all that is known then, and how many do.

    They are masks behind the first of their group, whose place the last known token has.
    """
    groups = begin + forward.known + forward.drafted
    accepted = verdict.stands - forward.known
    has_group = verdict.is_hit | (accepted < C)
    group = tl.where(verdict.is_hit, verdict.behind + 1, groups + accepted * M)
    row = tl.where(verdict.is_all, groups + forward.lengths * M, group)
    count = tl.where(verdict.is_all, forward.planned, tl.where(has_group, M, 1))
    return row + 1, count - 1


@triton.jit
def put_report(out, report):
    """Write all columns before the tokens."""
    for index in tl.static_range(TOKENS):  # pyright: ignore[reportGeneralTypeIssues]: Triton unrolls it
        tl.store(out + index, report[index])
