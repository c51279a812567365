"""What the next forward of a sliding seat is made of, and its rows, part by part as `SlidingRounds` orders them.

Segments: the chain 0, a group of masks the length it stands behind, the plan C + 1, alternatives behind that.
"""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from typing import NamedTuple

import triton
import triton.language as tl

from refusion.decoding import sliding_report
from refusion.decoding.kernels.constants import NO_PARENT, TRUNK
from refusion.decoding.kernels.row_buffers import put_rows

# B = seats, K = tokens per slot, N = K + 1 most tokens of a chain, padded, R = alternatives
# C = lengths prepared at most, A = those with alternatives, M = masks of a group

# Columns of the table, as `SlidingRounds` names them; the runner-ups follow the chain.
PROMPT_LENGTH, SEED, MAX_TOKENS, IS_DONE, NUM_KNOWN, NUM_DRAFTED, PLANS, NUM_WRITTEN, NUM_FORWARDS, CHAIN = (
    tl.constexpr(column) for column in range(10)
)
CHAIN_SEGMENT = tl.constexpr(0)
SHORT = tl.constexpr(sliding_report.SHORT)


class Forward(NamedTuple):
    """What the next forward of seats is made of: one of them, or all [B]."""

    is_active: tl.tensor
    known: tl.tensor  # tokens of the chain that are final
    drafted: tl.tensor  # and those behind them
    plans: tl.tensor  # how, see `sliding_report`
    lengths: tl.tensor  # with a group of masks behind them
    planned: tl.tensor
    tried: tl.tensor  # lengths with alternatives
    needed: tl.tensor  # rows in all, 0 of a seat that is done


class Text(NamedTuple):
    """Where the chain stands in the text of a seat."""

    prompt_length: tl.tensor
    begin: tl.tensor  # place of the chain's first token in the answer
    last: tl.tensor  # place that nothing stands behind


@triton.jit
def read_forward(
    table, line_stride, seat, is_seat, num_lengths, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The `Forward` of these seats; they are done where `is_seat` is false."""
    line = table + seat.to(tl.int64) * line_stride
    is_active = tl.load(line + IS_DONE, mask=is_seat, other=1) == 0
    known = tl.load(line + NUM_KNOWN, mask=is_seat, other=0).to(tl.int32)
    drafted = tl.load(line + NUM_DRAFTED, mask=is_seat, other=0).to(tl.int32)
    plans = tl.load(line + PLANS, mask=is_seat, other=0).to(tl.int32)
    lengths = tl.minimum(drafted, num_lengths)
    tried = tl.minimum(lengths, A)
    planned = tl.where(plans != SHORT, K, M)
    needed = known + drafted + lengths * M + planned + tried * (R * (1 + M))
    return Forward(is_active, known, drafted, plans, lengths, planned, tried, tl.where(is_active, needed, 0))


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
