"""`RefusionRounds.settle` in one launch: a program per seat judges the seat's rows, with the decisions of `refusion.decoding.settling`.

Everything that is committed or stands is a prefix of its slot, so lengths [W] say what the plain version says with masks [W, K].
"""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from refusion.decoding.forward import Readout
from refusion.decoding.kernels.agenda import close_behind, write_agenda
from refusion.decoding.kernels.constants import CLOSED, COMMITTED, DONE, INFILL, OPEN, PLAN, REMASK, VERIFY
from refusion.decoding.kernels.next_drafts import draft_anew, follow_infill, fresh_cells, replace_rejected
from refusion.decoding.kernels.plan import put_plan, read_plan
from refusion.decoding.kernels.runner_ups import load_runner_ups, store_runner_ups, take_runner_ups
from refusion.decoding.kernels.seat_report import report_agenda, report_drafts, report_progress, report_turn
from refusion.decoding.kernels.turn import Answer, Drawn, block_grid, find_rows, read_turn
from refusion.decoding.kernels.verdicts import first_eos, passing_prefix, reach_verdict
from refusion.decoding.params import ALTERNATIVE_LENGTHS
from refusion.model.kernels.launch import launch
from refusion.model.kernels.stream import wait
from refusion.model.rows import Spans

if TYPE_CHECKING:
    from refusion.decoding.refusion_rounds import RefusionRounds

# S = slots, W = slots of a block, K = tokens per slot, C = candidate lengths, A = those with alternatives, R = alternatives
# T = decode rows

FEW = 256  # numbers that one warp handles as fast as four


def settle(rounds: RefusionRounds, readout: Readout, spans: Spans, *, start: int, num_seats: int, num_candidates: int) -> None:
    """See `refusion.decoding.rounds.Rounds.settle`."""
    first, columns, slots = rounds.table.first, rounds.columns, rounds.slots
    sizes = {"W": rounds.width, "K": rounds.slot_size, "S": rounds.num_slots, "R": max(slots.alternatives, 1)}
    padded: dict[str, Any] = {f"{name}_PADDED": triton.next_power_of_2(size) for name, size in sizes.items()}
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
        rounds.first_ids,
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
        len(readout.token_ids),
        start,
        float(slots.slot_threshold),
        float(slots.token_threshold),
        rounds.mask_id,
        NUM_EOS=len(rounds.eos_ids),
        PHASE=first["phase"],
        NUM_DRAFTS=first["num_drafts"],
        NUM_FORWARDS=first["num_forwards"],
        AGENDA=first["agenda"],
        STATUS=first["status"],
        LENGTHS=first["lengths"],
        TOKEN_IDS=first["token_ids"],
        RUNNER_UPS=first.get("runner_ups", 0),
        REPORT_AGENDA=columns.agenda,
        REPORT_PHASE=columns.phase,
        REPORT_DRAFTS=columns.drafts,
        W=rounds.width,
        K=rounds.slot_size,
        S=rounds.num_slots,
        C=num_candidates,
        R=slots.alternatives,
        A=min(ALTERNATIVE_LENGTHS, num_candidates),
        MOST_TRIED=ALTERNATIVE_LENGTHS,
        MOST_MASKS=slots.most_masks,
        ACCEPTS_ARGMAX=slots.acceptance == "argmax",
        CORRECTS=slots.correction == "autoregressive",
        FUSES_PLAN=slots.fuse_plan,
        **padded,
        num_warps=1 if max(padded["W_PADDED"] * padded["K_PADDED"] * padded["R_PADDED"], padded["S_PADDED"]) <= FEW else 4,
    )


@triton.jit(do_not_specialize=["num_rows", "start", "mask_id", "C", "A"])
def _settle(
    table,
    line_stride,
    drawn_ids,
    confidence,
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
    row_end,
    source,
    target,
    report,
    report_stride,
    num_rows,
    start,
    slot_threshold,
    token_threshold,
    mask_id,
    NUM_EOS: tl.constexpr,
    PHASE: tl.constexpr,
    NUM_DRAFTS: tl.constexpr,
    NUM_FORWARDS: tl.constexpr,
    AGENDA: tl.constexpr,
    STATUS: tl.constexpr,
    LENGTHS: tl.constexpr,
    TOKEN_IDS: tl.constexpr,
    RUNNER_UPS: tl.constexpr,
    REPORT_AGENDA: tl.constexpr,
    REPORT_PHASE: tl.constexpr,
    REPORT_DRAFTS: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    C,
    R: tl.constexpr,
    A,
    MOST_TRIED: tl.constexpr,
    MOST_MASKS: tl.constexpr,
    ACCEPTS_ARGMAX: tl.constexpr,
    CORRECTS: tl.constexpr,
    FUSES_PLAN: tl.constexpr,
    R_PADDED: tl.constexpr,
    W_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
    S_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    seat = tl.program_id(0)
    line = table + seat.to(tl.int64) * line_stride
    agenda = line + AGENDA
    answer = Answer(line + STATUS, line + LENGTHS, line + TOKEN_IDS, line + RUNNER_UPS)
    drawn = Drawn(drawn_ids, confidence, given_probability, given_is_argmax, drawn_runner_ups, num_rows)
    num_drafts = tl.load(line + NUM_DRAFTS)
    num_forwards = tl.load(line + NUM_FORWARDS).to(tl.int32)
    num_cached = tl.load(cached + seat)
    begin = tl.load(row_start + seat) - start
    num_there = tl.load(row_end + seat) - start - begin
    pages = page_table + seat.to(tl.int64) * page_stride

    # What becomes of the drafts.
    grid = block_grid(W, K, W_PADDED, K_PADDED)
    turn = read_turn(agenda, answer.token_ids, grid, W, K)
    at = find_rows(turn, begin, K, C, R, A, MOST_MASKS)
    judge = tl.minimum(at.drafts[:, None] + grid.place - 1, num_rows - 1)  # [W, K] every draft is judged by the row before it
    prefix = passing_prefix(turn, grid, drawn, judge, token_threshold, K, MOST_MASKS, ACCEPTS_ARGMAX)
    end = first_eos(turn.drafts, grid, eos_ids, K, NUM_EOS)
    verdict = reach_verdict(turn, prefix, end, grid.slot, K, W_PADDED, FUSES_PLAN)

    # What is drafted next, and what is kept.
    infill = follow_infill(turn, verdict, grid, C)
    fresh = fresh_cells(infill, grid, turn.left, at.candidates, num_rows, MOST_MASKS)
    next_drafts = draft_anew(turn.drafts, fresh, drawn, mask_id)
    next_stands = infill.stands
    if CORRECTS:
        next_drafts = replace_rejected(next_drafts, turn.drafts, infill, drawn, judge)
    if R > 0:
        runner_ups = load_runner_ups(answer.runner_ups, turn.window * K + grid.cell, grid.is_cell, -1, R, R_PADDED).to(tl.int32)
        next_drafts, next_runner_ups, is_hit = take_runner_ups(
            next_drafts, runner_ups, turn, infill, fresh, grid, drawn, judge, at.alternatives, eos_ids, mask_id,
            K, R, R_PADDED, A, MOST_TRIED, MOST_MASKS, NUM_EOS,
        )  # fmt: skip
        next_stands = infill.stands + is_hit.to(tl.int32)
    plan = read_plan(turn, verdict.plan_holds, grid, drawn, at.plan, slot_threshold, S, K, W_PADDED)
    is_new_plan = plan.takes[:, None] & grid.is_cell
    if R > 0:
        plan_runner_ups = load_runner_ups(drawn.runner_ups, plan.row, is_new_plan, 0, R, R_PADDED)
    kept_row, cache_row = _kept_rows(verdict.num_committed, grid, at.drafts, start, num_rows, num_cached, pages, num_pages, page_size)
    if CORRECTS:
        ends_whole, first_named = _named_behind(turn, verdict, grid, at.drafts, drawn, K, S)

    tl.debug_barrier()  # everything is read before anything is written
    keep = seat * (W * K) + grid.cell
    tl.store(source + keep, kept_row, mask=grid.is_cell)
    tl.store(target + keep, cache_row, mask=grid.is_cell)
    tl.store(cached + seat, num_cached + tl.sum(verdict.num_committed, 0))
    _put_block(answer, turn, verdict, grid, next_drafts, next_stands, K)
    is_overwritten = is_new_plan
    if CORRECTS:
        tl.debug_barrier()
        _put_named(answer, turn.window + grid.slot + 1, ends_whole, first_named, K)
        first = tl.load(first_ids + seat)  # a prompt has ended in this forward: nothing is committed yet
        _put_named(answer, grid.slot, (grid.slot == 0) & (first >= 0) & (turn.phase == PLAN), first + tl.zeros_like(grid.slot), K)
        tl.debug_barrier()
        has_first = tl.load(answer.lengths + turn.plan + grid.slot, mask=plan.takes, other=0) == 1
        is_overwritten &= ~(has_first[:, None] & (grid.place == 0))  # the plan leaves the first token alone
        tl.debug_barrier()
    put_plan(answer, plan, is_overwritten, turn.plan, grid.slot)
    if R > 0:
        is_chosen_cell = grid.is_cell & turn.is_chosen[:, None]
        store_runner_ups(answer.runner_ups, turn.window * K + grid.cell, next_runner_ups, is_chosen_cell, R, R_PADDED)
        plan_runner_ups = tl.where(is_overwritten[:, :, None], plan_runner_ups, -1)
        store_runner_ups(answer.runner_ups, plan.cell, plan_runner_ups, is_new_plan, R, R_PADDED)

    # Slots behind the end of the answer are closed; the first slot with something to write begins the next window.
    tl.debug_barrier()
    ends = verdict.is_ended | (verdict.ends_slot & verdict.goes_on)
    last = tl.min(tl.where(ends, turn.window + grid.slot, S), 0)
    has_work, next_window = close_behind(answer.status, last, W, S, S_PADDED)

    tl.debug_barrier()
    next_phase = tl.where(has_work & turn.runs, _next_phase(turn.phase, verdict, infill.is_covered), DONE)
    has_drafted = verdict.plan_holds | (turn.phase == REMASK) | (verdict.goes_on & infill.is_covered)
    num_forwards += turn.runs.to(tl.int32)
    tl.store(line + PHASE, next_phase)
    tl.store(line + NUM_DRAFTS, num_drafts + has_drafted.to(tl.int32))
    tl.store(line + NUM_FORWARDS, num_forwards)
    if turn.runs:
        write_agenda(
            agenda, answer.status, answer.lengths, next_phase, next_window, grid.slot, grid.is_slot, W, K, S, MOST_MASKS, FUSES_PLAN
        )

    tl.debug_barrier()  # the agenda is read again
    out = report + seat.to(tl.int64) * report_stride
    report_progress(out, next_phase, num_forwards, at.num_needed - num_there, at.num_needed)
    report_agenda(out + REPORT_AGENDA, agenda, W)
    report_turn(out + REPORT_PHASE, turn, verdict, plan, grid, W)
    report_drafts(out + REPORT_DRAFTS, turn, plan, answer.token_ids, grid, W, K)


@triton.jit
def _kept_rows(num_committed, grid, draft_row, start, num_rows, num_cached, pages, num_pages, page_size):
    """What is kept, in text order: its rows of the forward, and the next rows of the cache; -1 where nothing is. [W, K]"""
    rank = (tl.cumsum(num_committed, 0) - num_committed)[:, None] + grid.place
    is_kept = grid.is_cell & (grid.place < num_committed[:, None])
    row = start + tl.minimum(draft_row[:, None] + grid.place, num_rows - 1)
    place = tl.minimum(num_cached + rank, num_pages * page_size - 1)
    page = tl.load(pages + place // page_size, mask=is_kept, other=0)
    return tl.where(is_kept, row, -1), tl.where(is_kept, page * page_size + place % page_size, -1)


@triton.jit
def _named_behind(turn, verdict, grid, draft_row, drawn, K: tl.constexpr, S: tl.constexpr):
    """Slots [W] that are final now and whose last row names the first token of the slot behind, and that token."""
    is_full = turn.is_chosen & (verdict.num_committed == K)
    ends_whole = is_full & ~verdict.is_ended & (turn.window + grid.slot + 1 < S)
    last_row = tl.minimum(draft_row + K - 1, drawn.num_rows - 1)
    return ends_whole, tl.load(drawn.token_ids + last_row, mask=ends_whole, other=0)


@triton.jit
def _put_block(answer, turn, verdict, grid, next_drafts, next_stands, K: tl.constexpr):
    """Write what became of the chosen slots; those of which nothing stands are open again, unless their infill goes on."""
    stays = verdict.goes_on | (turn.phase == REMASK)
    is_committed = verdict.num_committed > 0
    block = turn.window + grid.slot
    tl.store(answer.status + block, tl.where(is_committed, COMMITTED, OPEN), mask=turn.is_chosen & (is_committed | ~stays))
    next_lengths = tl.where(turn.is_chosen & stays, next_stands, verdict.num_committed)
    tl.store(answer.lengths + block, next_lengths, mask=turn.is_chosen & turn.runs)
    tl.store(answer.token_ids + turn.window * K + grid.cell, next_drafts, mask=grid.is_cell & turn.is_chosen[:, None])


@triton.jit
def _put_named(answer, slot, is_named, token, K: tl.constexpr):
    """`token` [W] is the first of `slot` [W] where `is_named`, if that slot is still open."""
    is_open = is_named & (tl.load(answer.status + slot, mask=is_named, other=CLOSED) == OPEN)
    tl.store(answer.token_ids + slot * K, token, mask=is_open)
    tl.store(answer.lengths + slot, 1, mask=is_open)


@triton.jit
def _next_phase(phase, verdict, is_covered):
    """Of a seat that has work left."""
    next_phase = tl.where(verdict.goes_on, tl.where(is_covered, INFILL, REMASK), PLAN)
    next_phase = tl.where(phase == REMASK, INFILL, next_phase)
    return tl.where(verdict.plan_holds, VERIFY, next_phase)
