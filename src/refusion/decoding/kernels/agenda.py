"""The agenda of a seat, read and written: what its next forward is, and how many rows that takes.

`refusion.decoding.refusion_report` says what stands in it.
"""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

import triton
import triton.language as tl

from refusion.decoding.kernels.constants import AGENDA_VERIFIED, CHOSEN, CLOSED, DONE, INFILL, OPEN, PLAN, REMASK, VERIFY

# B = seats, S = slots, W = slots of a block, K = tokens per slot, C = candidate lengths, A = those with alternatives, R = alternatives


@triton.jit
def rows_needed(
    agendas,
    line_stride,
    seats,
    is_seat,
    W: tl.constexpr,
    K: tl.constexpr,
    C,
    R: tl.constexpr,
    A,
    MOST_MASKS: tl.constexpr,
):
    """[B] as `refusion.decoding.refusion_report.rows_needed` reckons them on the host."""
    agenda = agendas + seats.to(tl.int64) * line_stride
    phase = tl.load(agenda, mask=is_seat, other=DONE).to(tl.int32)
    num_chosen = tl.zeros_like(phase)
    drafts = tl.zeros_like(phase)
    groups = tl.zeros_like(phase)
    plan = tl.zeros_like(phase)
    remasked = tl.zeros_like(phase)
    for slot in range(W):
        verified = tl.load(agenda + AGENDA_VERIFIED + slot, mask=is_seat, other=-1).to(tl.int32)
        left = tl.where(verified >= 0, K - verified, 0)
        num_chosen += (verified >= 0).to(tl.int32)
        drafted = num_drafted(phase, K, MOST_MASKS)
        drafts += tl.where(verified >= 0, tl.minimum(verified + drafted, K), 0)
        groups += group_rows(left, tl.minimum(tl.minimum(C, left), drafted), MOST_MASKS)
        groups += R * group_rows(left, num_tried(left, A), MOST_MASKS + 1)
        remasked += tl.where(verified >= 0, verified + tl.minimum(left, MOST_MASKS), 0)
        plan += tl.load(agenda + AGENDA_VERIFIED + W + slot, mask=is_seat, other=0).to(tl.int32) * K
    solo = tl.where(phase == VERIFY, tl.maximum(num_chosen - 1, 0) * C, 0)
    judged = tl.where((phase == VERIFY) | (phase == INFILL), drafts + solo + groups, 0)
    return tl.where(phase == DONE, 0, plan) + judged + tl.where(phase == REMASK, remasked, 0)


@triton.jit
def read_agenda(agenda):
    """The phase of the next forward, and the first slots of the block in work and of the block to plan."""
    return tl.load(agenda).to(tl.int32), tl.load(agenda + 1).to(tl.int32), tl.load(agenda + 2).to(tl.int32)


@triton.jit
def group_rows(left, num_candidates, MOST: tl.constexpr):
    """Rows of the candidates 1, 2, ... `num_candidates` of a slot with `left` tokens to go: left - 1, left - 2, ..., none above MOST."""
    cut = tl.minimum(tl.maximum(left - MOST, 0), num_candidates)  # so many of them are above it
    return cut * MOST + (num_candidates - cut) * left - (num_candidates * (num_candidates + 1) - cut * (cut + 1)) // 2


@triton.jit
def num_drafted(phase, K: tl.constexpr, MOST_MASKS: tl.constexpr):
    """Drafts behind the tokens of a slot that stand, at most: a plan drafts whole slots, an infill as much as a group has masks."""
    return tl.where(phase == INFILL, MOST_MASKS, K)


@triton.jit
def num_tried(left, A):
    """Accepted lengths with alternatives of a slot with `left` tokens to go: a runner-up needs a token behind it."""
    return tl.minimum(A, tl.maximum(left - 2, 0))


@triton.jit
def close_behind(status, last, W: tl.constexpr, S: tl.constexpr, S_PADDED: tl.constexpr):
    """Close open and chosen slots behind slot `last`. Returns whether any such slot is left, and the first slot of its block."""
    slot = tl.arange(0, S_PADDED)
    now = tl.load(status + slot, mask=slot < S, other=CLOSED).to(tl.int32)
    is_unfinished = (now == OPEN) | (now == CHOSEN)
    tl.store(status + slot, CLOSED, mask=is_unfinished & (slot > last))
    first = tl.min(tl.where(is_unfinished & (slot <= last), slot, S), 0)
    return first < S, tl.where(first < S, first // W * W, 0)


@triton.jit
def write_agenda(
    agenda, status, lengths, phase, window, slot, is_slot,
    W: tl.constexpr, K: tl.constexpr, S: tl.constexpr, MOST_MASKS: tl.constexpr, FUSES_PLAN: tl.constexpr,
):  # fmt: skip
    """What the next forward is: its phase, the block's slots being verified, and the slots to plan: this block's, else the next one's."""
    now = tl.load(status + window + slot, mask=is_slot, other=CLOSED)
    verified = tl.where(now == CHOSEN, tl.load(lengths + window + slot, mask=is_slot, other=0), -1)
    block_goes_on = tl.sum((now == OPEN).to(tl.int32), 0) > 0
    following = window + W + slot
    later = tl.load(status + following, mask=is_slot & (following < S), other=CLOSED)
    plans = phase == PLAN
    if FUSES_PLAN:
        falls_short = (now == CHOSEN) & (verified + MOST_MASKS < K)
        plans |= (phase == VERIFY) | ((phase == INFILL) & (tl.sum(falls_short.to(tl.int32), 0) == 0))
    is_planned = tl.where(block_goes_on, now == OPEN, later == OPEN) & plans
    tl.store(agenda, phase)
    tl.store(agenda + 1, window)
    tl.store(agenda + 2, tl.where(block_goes_on, window, tl.minimum(window + W, S - 1)))
    tl.store(agenda + AGENDA_VERIFIED + slot, verified, mask=is_slot)
    tl.store(agenda + AGENDA_VERIFIED + W + slot, is_planned.to(tl.int32), mask=is_slot)
