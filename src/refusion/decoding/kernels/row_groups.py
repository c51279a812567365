"""The rows of one seat, group by group as `refusion.decoding.layout` orders them; all but the last return the row behind theirs.

Segments: the slots themselves 0 to W - 1 (in a verify forward all are the chain, 0), the plan W, copies of drafts from W + 1 on,
candidates from 2W + 1 on, alternatives behind all candidates.
"""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from typing import NamedTuple

import triton
import triton.language as tl

from refusion.decoding.kernels.agenda import num_drafted, num_tried
from refusion.decoding.kernels.constants import NO_PARENT, REMASK, TRUNK, VERIFY
from refusion.decoding.kernels.row_buffers import put_rows

# W = slots of a block, K = tokens per slot, C = candidate lengths, A = those with alternatives, R = alternatives


class Block(NamedTuple):
    """The block of slots that a forward judges or drafts anew."""

    phase: tl.tensor
    verified: tl.tensor  # pointer to [W]: tokens that stand, -1: the slot is not being verified
    drafts: tl.tensor  # pointer to [W * K]
    position: tl.tensor  # of its first token


@triton.jit
def put_drafts(rows, row, block, W: tl.constexpr, K: tl.constexpr, MOST_MASKS: tl.constexpr, K_PADDED: tl.constexpr):
    """The drafts of the slots, on the trunk, or what stands before a remask."""
    place = tl.arange(0, K_PADDED)
    is_judging = block.phase != REMASK
    is_chain = block.phase == VERIFY
    nth = 0
    for slot in range(W):
        stands = tl.load(block.verified + slot).to(tl.int32)
        if stands >= 0:
            drafted = num_drafted(block.phase, K, MOST_MASKS)
            count = tl.where(is_judging, tl.minimum(stands + drafted, K), stands)
            is_row = place < count
            draft = block.drafts + slot * K + place
            put_rows(
                rows,
                row + place,
                is_row,
                token=tl.load(draft, mask=is_row, other=0),
                position=block.position + slot * K + place,
                segment=tl.where(is_chain, 0, slot),
                rank=tl.where(is_chain, nth * K + place, place),
                parent=NO_PARENT,
                visible=0,
                is_trunk=is_judging.to(tl.int32),
                given=tl.load(draft + 1, mask=is_row & is_judging & (place < K - 1), other=0),
            )
            row += count
            nth += 1
    return row


@triton.jit
def put_plan(rows, row, is_planned, position, mask_id, W: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr):
    """Masks for the slots where `is_planned` [W] (a pointer) is not 0; `position` is that of the first slot."""
    place = tl.arange(0, K_PADDED)
    for slot in range(W):
        if tl.load(is_planned + slot) != 0:
            put_rows(
                rows,
                row + place,
                place < K,
                token=mask_id,
                position=position + slot * K + place,
                segment=W,
                rank=slot * K + place,
                parent=TRUNK,
                visible=0,
                is_trunk=0,
            )
            row += K
    return row


@triton.jit
def put_copies(rows, row, block, W: tl.constexpr, K: tl.constexpr, C, K_PADDED: tl.constexpr):
    """Drafts that candidates may stand behind, once more and without the slots before them; the first slot has none before it."""
    place = tl.arange(0, K_PADDED)
    nth = 0
    for slot in range(W):
        if tl.load(block.verified + slot) >= 0:
            if nth > 0:
                is_row = place < C
                put_rows(
                    rows,
                    row + place,
                    is_row,
                    token=tl.load(block.drafts + slot * K + place, mask=is_row, other=0),
                    position=block.position + slot * K + place,
                    segment=W + 1 + slot,
                    rank=place,
                    parent=NO_PARENT,
                    visible=0,
                    is_trunk=0,
                )
                row += C
            nth += 1
    return row


@triton.jit
def put_candidates(
    rows, row, block, mask_id,
    W: tl.constexpr, K: tl.constexpr, C, MOST_MASKS: tl.constexpr, K_PADDED: tl.constexpr,
):  # fmt: skip
    """Masks behind every length that may be accepted; in a remask forward behind what stands."""
    is_remask = block.phase == REMASK
    nth = 0
    for slot in range(W):
        stands = tl.load(block.verified + slot).to(tl.int32)
        if stands >= 0:
            parent = _prefix_segment(block.phase, slot, nth, W)
            candidate = tl.where(is_remask, 0, 1)
            most = tl.minimum(C, num_drafted(block.phase, K, MOST_MASKS))
            last_candidate = tl.where(is_remask, 0, tl.minimum(most, K - 1 - stands))
            while candidate <= last_candidate:
                length = stands + candidate
                end = tl.minimum(length + MOST_MASKS, K)
                segment = 2 * W + 1 + slot * (C + 1) + candidate
                _put_masks(rows, row, block, slot, length, end, mask_id, segment, parent, K, K_PADDED)
                row += end - length
                candidate += 1
            nth += 1
    return row


@triton.jit
def put_alternatives(
    rows, row, block, runner_ups, mask_id,
    W: tl.constexpr, K: tl.constexpr, C, R: tl.constexpr, A,
    MOST_MASKS: tl.constexpr, K_PADDED: tl.constexpr,
):  # fmt: skip
    """Behind the first lengths that may be accepted: each runner-up of the draft that would be rejected, and masks behind it."""
    place = tl.arange(0, K_PADDED)
    nth = 0
    for slot in range(W):
        stands = tl.load(block.verified + slot).to(tl.int32)
        if stands >= 0:
            parent = _prefix_segment(block.phase, slot, nth, W)
            tried = 1
            while tried <= num_tried(K - stands, A):
                length = stands + tried
                end = tl.minimum(length + 1 + MOST_MASKS, K)
                for which in tl.static_range(R):
                    runner_up = tl.maximum(tl.load(runner_ups + (slot * K + length) * R + which), 0)  # -1: nothing was drafted
                    token = tl.where(place == length, runner_up, mask_id)
                    segment = 2 * W + 1 + W * (C + 1) + (slot * A + tried - 1) * R + which
                    _put_masks(rows, row, block, slot, length, end, token, segment, parent, K, K_PADDED)
                    row += end - length
                tried += 1
            nth += 1


@triton.jit
def _put_masks(rows, row, block, slot, length, end, token, segment, parent, K: tl.constexpr, K_PADDED: tl.constexpr):
    """Places [length, end) of a slot, which see the first `length` rows of `parent`."""
    place = tl.arange(0, K_PADDED)
    put_rows(
        rows,
        row + place - length,
        (place >= length) & (place < end),
        token=token,
        position=block.position + slot * K + place,
        segment=segment,
        rank=place,
        parent=parent,
        visible=length,
        is_trunk=0,
    )


@triton.jit
def _prefix_segment(phase, slot, nth, W: tl.constexpr):
    """The segment that holds the drafts of a slot: its own, but in a verify forward the chain for the first slot, a copy for others."""
    return tl.where(phase == VERIFY, tl.where(nth == 0, 0, W + 1 + slot), slot)
