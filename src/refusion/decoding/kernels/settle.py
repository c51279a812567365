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
from refusion.decoding.kernels.agenda import close_behind, group_rows, num_tried, write_agenda
from refusion.decoding.kernels.constants import (
    AGENDA_VERIFIED,
    CHOSEN,
    CLOSED,
    COMMITTED,
    DONE,
    INFILL,
    OPEN,
    PLAN,
    REMASK,
    VERIFY,
)
from refusion.decoding.kernels.verdicts import judge_chain, judge_slots
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


@triton.jit(do_not_specialize=["num_rows", "start", "mask_id"])
def _settle(
    table,
    line_stride,
    drawn_ids,
    confidence,
    given_probability,
    given_is_argmax,
    drawn_runner_ups,
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
    C: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
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
    agenda, status, lengths, token_ids = line + AGENDA, line + STATUS, line + LENGTHS, line + TOKEN_IDS
    phase = tl.load(agenda).to(tl.int32)
    window = tl.load(agenda + 1).to(tl.int32)  # first slot
    plan = tl.load(agenda + 2).to(tl.int32)  # first slot
    num_drafts = tl.load(line + NUM_DRAFTS)
    num_forwards = tl.load(line + NUM_FORWARDS).to(tl.int32)
    num_cached = tl.load(cached + seat)
    begin = tl.load(row_start + seat) - start
    num_there = tl.load(row_end + seat) - start - begin
    runs = phase != DONE
    is_judging = (phase == VERIFY) | (phase == INFILL)

    slot = tl.arange(0, W_PADDED)
    place = tl.arange(0, K_PADDED)[None, :]
    is_slot = slot < W
    is_cell = is_slot[:, None] & (place < K)
    cell = slot[:, None] * K + place  # [W, K]
    verified = tl.load(agenda + AGENDA_VERIFIED + slot, mask=is_slot, other=-1).to(tl.int32)
    is_chosen = (verified >= 0) & (is_judging | (phase == REMASK))
    is_planned = (tl.load(agenda + AGENDA_VERIFIED + W + slot, mask=is_slot, other=0) != 0) & runs
    drafts = tl.load(token_ids + window * K + cell, mask=is_cell, other=0).to(tl.int32)

    # Where the rows of this forward are, as `refusion.decoding.kernels.layout` wrote them.
    chosen, planned = is_chosen.to(tl.int32), is_planned.to(tl.int32)
    num_chosen, num_planned = tl.sum(chosen, 0), tl.sum(planned, 0)
    left = tl.where(is_chosen, K - verified, 0)
    num_draft_rows = tl.where(phase == REMASK, verified, K) * chosen
    num_group_rows = tl.where(phase == REMASK, tl.minimum(left, MOST_MASKS), group_rows(left, tl.minimum(C, left), MOST_MASKS))
    num_solo_rows = tl.where(phase == VERIFY, tl.maximum(num_chosen - 1, 0) * C, 0)
    draft_row = begin + tl.cumsum(num_draft_rows, 0) - num_draft_rows  # [W] first row of the slot
    plan_begin = begin + tl.sum(num_draft_rows, 0)
    plan_row = plan_begin + (tl.cumsum(planned, 0) - planned) * K
    group_begin = plan_begin + num_planned * K + num_solo_rows
    group_row = group_begin + tl.cumsum(num_group_rows, 0) - num_group_rows
    tried_begin = group_begin + tl.sum(num_group_rows, 0)
    num_tried_rows = tl.where(is_judging, R * group_rows(left, num_tried(left, A), MOST_MASKS + 1), 0)
    tried_row = tried_begin + tl.cumsum(num_tried_rows, 0) - num_tried_rows
    num_needed = tried_begin + tl.sum(num_tried_rows, 0) - begin

    # Judge every draft by the row before it; the verified prefix stands and the first unverified token passes unconditionally.
    judge = tl.minimum(draft_row[:, None] + place - 1, num_rows - 1)
    is_judged = is_cell & (is_chosen & is_judging)[:, None] & (place >= 1)
    passes = tl.load(given_probability + judge, mask=is_judged, other=0.0) > token_threshold
    if ACCEPTS_ARGMAX:
        passes |= tl.load(given_is_argmax + judge, mask=is_judged, other=0) != 0
    passes |= place <= verified[:, None]
    is_eos = drafts == -1
    for index in tl.static_range(NUM_EOS):
        is_eos |= drafts == tl.load(eos_ids + index).to(tl.int32)
    prefix = tl.min(tl.where(is_cell & ~passes, place, K), 1)  # [W] tokens of the longest passing prefix
    end = tl.min(tl.where(is_cell & is_eos, place, K), 1)  # [W] place of the first EOS, K without
    chain_lengths, chain_is_full, needs_infill = judge_chain(is_chosen, prefix, end, slot, num_chosen, K, W_PADDED)
    stands, is_unfinished, ends_slot = judge_slots(is_chosen, prefix, end, slot, K, W_PADDED)

    is_infilled = (phase == INFILL) & (tl.sum(is_unfinished.to(tl.int32), 0) == 0)
    goes_on = ((phase == VERIFY) & needs_infill) | ((phase == INFILL) & ~is_infilled)
    num_committed = tl.where(phase == VERIFY, chain_lengths, tl.where(is_infilled, stands, 0))  # [W]
    is_ended = end < num_committed
    is_whole = (tl.sum(num_committed, 0) > 0) & (tl.sum(is_ended.to(tl.int32), 0) == 0)
    plan_holds = phase == PLAN
    if FUSES_PLAN:
        plan_holds |= ((phase == VERIFY) & chain_is_full) | (is_infilled & is_whole)
    plan_holds &= num_planned > 0

    # The next drafts of slots in infill: the group of the accepted length, or the masks of a remask forward.
    accepted = stands
    stands = tl.where(phase == REMASK, verified, stands)
    step = tl.where(phase == REMASK, 0, stands - verified)
    is_covered = tl.sum((is_unfinished & (step > C)).to(tl.int32), 0) == 0
    takes = (goes_on & is_covered & is_unfinished) | ((phase == REMASK) & is_chosen)
    is_new = takes[:, None] & is_cell & (place >= stands[:, None])
    group = group_row + tl.where(step > 0, group_rows(left, step - 1, MOST_MASKS), 0)
    is_drafted = is_new & (place < stands[:, None] + MOST_MASKS)
    group_cell = tl.minimum(group[:, None] + place - stands[:, None], num_rows - 1)
    proposed = tl.load(drawn_ids + group_cell, mask=is_drafted, other=0).to(tl.int32)
    next_drafts = tl.where(is_new, tl.where(is_drafted, proposed, mask_id), drafts)
    next_stands = stands
    goes = goes_on & is_unfinished
    is_rejected = is_cell & (place == stands[:, None])
    if CORRECTS:
        # The row that rejected token a of a slot predicts a better one; it replaces the mask's, also through a remask forward.
        is_first = is_rejected & goes[:, None]
        next_drafts = tl.where(is_rejected & (phase == REMASK), drafts, next_drafts)
        next_drafts = tl.where(is_first, tl.load(drawn_ids + judge, mask=is_first, other=0).to(tl.int32), next_drafts)
    if R > 0:
        # Where the correction is a runner-up of the draft it replaces, it stands, and what was made behind it are the next drafts.
        which = tl.arange(0, R_PADDED)[None, None, :]
        is_cell_of_each = is_cell[:, :, None] & (which < R)
        runner_ups = line + RUNNER_UPS
        own = runner_ups + (window * K + cell)[:, :, None] * R + which  # [W, K, R]
        was_runner_up = tl.load(own, mask=is_cell_of_each, other=-1).to(tl.int32)
        is_drafted_each = is_drafted[:, :, None] & (which < R)
        proposed_each = tl.load(drawn_runner_ups + group_cell[:, :, None] * R + which, mask=is_drafted_each, other=-1).to(tl.int32)
        next_runner_up = tl.where(is_new[:, :, None], proposed_each, was_runner_up)
        starts = is_rejected & (goes | ((phase == REMASK) & is_chosen))[:, None]
        next_runner_up = tl.where(starts[:, :, None], -1, next_runner_up)

        judged = tl.load(drawn_ids + judge, mask=starts, other=-2).to(tl.int32)  # [W, K], at the place of the correction alone
        hits = was_runner_up == judged[:, :, None]
        hit = tl.sum(tl.sum(tl.where(hits & starts[:, :, None], which + 1, 0), 2), 1)  # [W] 0: none, else the runner-up's number + 1
        correction = tl.max(judged, 1)
        ends_there = correction == -1
        for index in tl.static_range(NUM_EOS):
            ends_there |= correction == tl.load(eos_ids + index).to(tl.int32)
        is_hit = goes & (step <= MOST_TRIED) & (stands < K - 1) & (hit > 0) & ~ends_there
        next_runner_up = tl.where((is_rejected & is_hit[:, None])[:, :, None], was_runner_up, next_runner_up)
        if A > 0:
            behind = is_cell & (is_hit & is_covered)[:, None] & (place > stands[:, None])
            is_next = place == stands[:, None] + 1  # named by the runner-up's own row, the later ones by their masks
            is_tried = behind & (place < stands[:, None] + 1 + MOST_MASKS)
            size = tl.minimum(MOST_MASKS + 1, K - stands)
            first = tried_row + R * group_rows(left, step - 1, MOST_MASKS + 1) + (hit - 1) * size
            row = tl.minimum(first[:, None] + tl.where(is_next, 0, place - stands[:, None]), num_rows - 1)
            proposed = tl.load(drawn_ids + row, mask=is_tried, other=0).to(tl.int32)
            next_drafts = tl.where(behind, tl.where(is_tried, proposed, mask_id), next_drafts)
            is_named = (is_tried & ~is_next)[:, :, None] & (which < R)
            proposed_each = tl.load(drawn_runner_ups + row[:, :, None] * R + which, mask=is_named, other=-1).to(tl.int32)
            next_runner_up = tl.where(behind[:, :, None], proposed_each, next_runner_up)
        next_stands = stands + is_hit.to(tl.int32)
        # What stands through a runner-up that was not tried ahead has its next token from this remask forward.
        is_last = is_cell & (place == stands[:, None] - 1)
        was_hit = tl.max(tl.max(((was_runner_up == drafts[:, :, None]) & is_last[:, :, None]).to(tl.int32), 2), 1) > 0
        next_drafts = tl.where(is_rejected & (was_hit & (phase == REMASK) & is_chosen)[:, None], judged, next_drafts)

    # The plan, where it holds.
    takes_plan = is_planned & plan_holds
    plan_cell = tl.minimum(plan + slot, S - 1)[:, None] * K + place
    plan_rows = tl.minimum(plan_row[:, None] + place, num_rows - 1)
    plan_drafts = tl.load(drawn_ids + plan_rows, mask=takes_plan[:, None] & is_cell, other=0).to(tl.int32)
    if R > 0:
        planned_cell = plan_rows[:, :, None] * R + which
        is_planned_each = (takes_plan[:, None] & is_cell)[:, :, None] & (which < R)
        plan_runner_ups = tl.load(drawn_runner_ups + planned_cell, mask=is_planned_each, other=0)
    scores = tl.load(confidence + tl.minimum(plan_row, num_rows - 1), mask=takes_plan, other=0.0)
    is_sure = takes_plan & (scores > slot_threshold)
    best = tl.max(tl.where(takes_plan, scores, -1.0), 0)
    best_slot = tl.min(tl.where(takes_plan & (scores == best), slot, W_PADDED), 0)
    picks = tl.where(tl.sum(is_sure.to(tl.int32), 0) > 0, is_sure, takes_plan & (slot == best_slot))

    # What is kept: its rows, in text order, to the next cache rows.
    rank = (tl.cumsum(num_committed, 0) - num_committed)[:, None] + place
    is_kept = is_cell & (place < num_committed[:, None])
    token_place = tl.minimum(num_cached + rank, num_pages * page_size - 1)
    page = tl.load(page_table + seat.to(tl.int64) * page_stride + token_place // page_size, mask=is_kept, other=0)
    keep = seat * (W * K) + cell
    kept_row = start + tl.minimum(draft_row[:, None] + place, num_rows - 1)

    if CORRECTS:
        # The last row of a slot that is final now names the first token of the slot behind it, if that is still open.
        ends_whole = is_chosen & (num_committed == K) & ~is_ended & (window + slot + 1 < S)
        first_named = tl.load(drawn_ids + tl.minimum(draft_row + K - 1, num_rows - 1), mask=ends_whole, other=0)

    tl.debug_barrier()  # everything is read before anything is written
    tl.store(source + keep, tl.where(is_kept, kept_row, -1), mask=is_cell)
    tl.store(target + keep, tl.where(is_kept, page * page_size + token_place % page_size, -1), mask=is_cell)
    tl.store(cached + seat, num_cached + tl.sum(num_committed, 0))
    stays = goes_on | (phase == REMASK)
    next_status = tl.where(num_committed > 0, COMMITTED, OPEN)
    tl.store(status + window + slot, next_status, mask=is_chosen & ((num_committed > 0) | ~stays))
    next_lengths = tl.where(is_chosen & stays, next_stands, num_committed)
    tl.store(lengths + window + slot, next_lengths, mask=is_chosen & runs)
    tl.store(token_ids + window * K + cell, next_drafts, mask=is_cell & is_chosen[:, None])
    is_new_plan = takes_plan[:, None] & is_cell
    if CORRECTS:
        tl.debug_barrier()
        following = window + slot + 1
        is_named = ends_whole & (tl.load(status + following, mask=ends_whole, other=CLOSED) == OPEN)
        tl.store(token_ids + following * K, first_named, mask=is_named)
        tl.store(lengths + following, 1, mask=is_named)
        tl.debug_barrier()
        has_first = tl.load(lengths + plan + slot, mask=takes_plan, other=0) == 1  # the plan leaves the first token alone
        is_new_plan &= ~(has_first[:, None] & (place == 0))
        tl.debug_barrier()
    tl.store(status + plan + slot, CHOSEN, mask=picks)
    tl.store(lengths + plan + slot, 0, mask=picks)
    tl.store(token_ids + plan_cell, plan_drafts, mask=is_new_plan)
    if R > 0:
        tl.store(own, next_runner_up, mask=is_cell_of_each & is_chosen[:, None, None])
        plan_runner_ups = tl.where(is_new_plan[:, :, None], plan_runner_ups, -1)
        tl.store(runner_ups + plan_cell[:, :, None] * R + which, plan_runner_ups, mask=is_planned_each)

    # Slots behind the end of the answer are closed; the first slot with something to write begins the next window.
    tl.debug_barrier()
    ends = is_ended | (ends_slot & goes_on)
    last = tl.min(tl.where(ends, window + slot, S), 0)
    has_work, next_window = close_behind(status, last, W, S, S_PADDED)

    tl.debug_barrier()
    next_phase = tl.where(goes_on, tl.where(is_covered, INFILL, REMASK), PLAN)
    next_phase = tl.where(phase == REMASK, INFILL, next_phase)
    next_phase = tl.where(plan_holds, VERIFY, next_phase)
    next_phase = tl.where(has_work & runs, next_phase, DONE)
    has_drafted = plan_holds | (phase == REMASK) | (goes_on & is_covered)
    num_forwards += runs.to(tl.int32)
    tl.store(line + PHASE, next_phase)
    tl.store(line + NUM_DRAFTS, num_drafts + has_drafted.to(tl.int32))
    tl.store(line + NUM_FORWARDS, num_forwards)
    out = report + seat.to(tl.int64) * report_stride
    if runs:
        write_agenda(agenda, status, lengths, next_phase, next_window, slot, is_slot, W, S, FUSES_PLAN)

    tl.debug_barrier()
    tl.store(out, (next_phase == DONE).to(tl.int32))
    tl.store(out + 1, num_forwards)
    tl.store(out + 2, num_needed - num_there)
    tl.store(out + 3, num_needed)
    AGENDA_COLUMNS: tl.constexpr = triton.next_power_of_2(AGENDA_VERIFIED + 2 * W)
    column = tl.arange(0, AGENDA_COLUMNS)
    is_column = column < AGENDA_VERIFIED + 2 * W
    tl.store(out + REPORT_AGENDA + column, tl.load(agenda + column, mask=is_column, other=0), mask=is_column)
    done_now = out + REPORT_PHASE
    tl.store(done_now, phase)
    tl.store(done_now + 1, window)
    tl.store(done_now + 2, plan)
    by_slot = done_now + 3 + slot
    num_accepted = tl.where(goes_on | is_infilled, accepted, num_committed)
    tl.store(by_slot, tl.where(is_chosen & is_judging, num_accepted, -1), mask=is_slot)
    tl.store(by_slot + W, num_committed, mask=is_slot)
    tl.store(by_slot + 2 * W, takes_plan.to(tl.int32), mask=is_slot)
    tl.store(by_slot + 3 * W, scores.to(tl.int32, bitcast=True), mask=is_slot)
    tl.store(out + REPORT_DRAFTS + cell, drafts, mask=is_cell)
    tl.store(out + REPORT_DRAFTS + W * K + cell, tl.load(token_ids + plan_cell, mask=is_cell, other=0), mask=is_cell)
