"""The plan of a forward: a draft of every open slot of a block, and which slots are confident enough to be verified next."""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from typing import NamedTuple

import triton
import triton.language as tl

from refusion.decoding.kernels.constants import CHOSEN

# S = slots, W = slots of a block, K = tokens per slot, the latter two padded


class Plan(NamedTuple):
    """What was planned."""

    takes: tl.tensor  # [W] planned slots, if the plan holds
    picks: tl.tensor  # [W] those to be verified next
    scores: tl.tensor  # [W] confidence
    row: tl.tensor  # [W, K]
    cell: tl.tensor  # [W, K] places in the answer
    drafts: tl.tensor  # [W, K]


@triton.jit
def read_plan(turn, holds, grid, drawn, first_row, slot_threshold, S: tl.constexpr, K: tl.constexpr, W_PADDED: tl.constexpr):
    """The `Plan` whose slots have their rows from `first_row` [W] on."""
    takes = turn.is_planned & holds
    cell = tl.minimum(turn.plan + grid.slot, S - 1)[:, None] * K + grid.place
    row = tl.minimum(first_row[:, None] + grid.place, drawn.num_rows - 1)
    drafts = tl.load(drawn.token_ids + row, mask=takes[:, None] & grid.is_cell, other=0).to(tl.int32)
    scores = tl.load(drawn.confidence + tl.minimum(first_row, drawn.num_rows - 1), mask=takes, other=0.0)
    return Plan(takes, _confident_slots(scores, takes, grid.slot, slot_threshold, W_PADDED), scores, row, cell, drafts)


@triton.jit
def put_plan(answer, plan, is_new, first_slot, slot):
    """Write the drafts where `is_new` [W, K]; the picked slots begin their verification."""
    tl.store(answer.status + first_slot + slot, CHOSEN, mask=plan.picks)
    tl.store(answer.lengths + first_slot + slot, 0, mask=plan.picks)
    tl.store(answer.token_ids + plan.cell, plan.drafts, mask=is_new)


@triton.jit
def _confident_slots(scores, takes, slot, slot_threshold, W_PADDED: tl.constexpr):
    """The slots above the threshold, or else the first of the best."""
    is_sure = takes & (scores > slot_threshold)
    best = tl.max(tl.where(takes, scores, -1.0), 0)
    best_slot = tl.min(tl.where(takes & (scores == best), slot, W_PADDED), 0)
    return tl.where(tl.sum(is_sure.to(tl.int32), 0) > 0, is_sure, takes & (slot == best_slot))
