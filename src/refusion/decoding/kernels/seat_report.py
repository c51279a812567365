"""The line of a seat in the report: see `refusion.decoding.refusion_report`."""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

import triton
import triton.language as tl

from refusion.decoding.kernels.constants import AGENDA_VERIFIED, DONE

# W = slots of a block, K = tokens per slot


@triton.jit
def report_progress(line, next_phase, num_forwards, num_missing, num_needed):
    """What the reports of all decoders begin with."""
    tl.store(line, (next_phase == DONE).to(tl.int32))
    tl.store(line + 1, num_forwards)
    tl.store(line + 2, num_missing)
    tl.store(line + 3, num_needed)


@triton.jit
def report_agenda(columns, agenda, W: tl.constexpr):
    """Copy the next agenda."""
    PADDED: tl.constexpr = triton.next_power_of_2(AGENDA_VERIFIED + 2 * W)
    column = tl.arange(0, PADDED)
    is_column = column < AGENDA_VERIFIED + 2 * W
    tl.store(columns + column, tl.load(agenda + column, mask=is_column, other=0), mask=is_column)


@triton.jit
def report_turn(columns, turn, verdict, plan, grid, W: tl.constexpr):
    """What this forward was, and per slot: accepted and committed tokens, whether its plan was taken, with which confidence."""
    tl.store(columns, turn.phase)
    tl.store(columns + 1, turn.window)
    tl.store(columns + 2, turn.plan)
    by_slot = columns + 3 + grid.slot
    num_accepted = tl.where(verdict.goes_on | verdict.is_infilled, verdict.stands, verdict.num_committed)
    tl.store(by_slot, tl.where(turn.is_chosen & turn.is_judging, num_accepted, -1), mask=grid.is_slot)
    tl.store(by_slot + W, verdict.num_committed, mask=grid.is_slot)
    tl.store(by_slot + 2 * W, plan.takes.to(tl.int32), mask=grid.is_slot)
    tl.store(by_slot + 3 * W, plan.scores.to(tl.int32, bitcast=True), mask=grid.is_slot)


@triton.jit
def report_drafts(columns, turn, plan, token_ids, grid, W: tl.constexpr, K: tl.constexpr):
    """The drafts that were judged, and what now stands where the plan is."""
    tl.store(columns + grid.cell, turn.drafts, mask=grid.is_cell)
    tl.store(columns + W * K + grid.cell, tl.load(token_ids + plan.cell, mask=grid.is_cell, other=0), mask=grid.is_cell)
