"""`DiffusionRounds.settle` in one launch: a program per seat judges its block and moves on."""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from refusion.decoding import diffusion_report
from refusion.decoding.forward import Readout
from refusion.decoding.kernels.diffusion_stretch import (
    BLOCKS,
    FIRST,
    IS_DONE,
    KINDS,
    NO_CACHE,
    NUM_DRAFTS,
    NUM_FORWARDS,
    PREFIX,
    PROMPT_LENGTH,
    STEP,
    TEXT,
    Progress,
    next_stretch,
    read_progress,
)
from refusion.model.kernels.launch import launch
from refusion.model.kernels.stream import wait
from refusion.model.rows import Spans

if TYPE_CHECKING:
    from refusion.decoding.diffusion_rounds import DiffusionRounds

# K = tokens of a block, padded

TOKENS = tl.constexpr(diffusion_report.TOKENS)
OTHERS = tl.constexpr(32)
"""Tokens of a block that are compared with all others at a time."""


class Block(NamedTuple):
    """Some tokens of the block in work. [K], or of as many tokens as were asked for"""

    token: tl.tensor  # place in the block
    is_read: tl.tensor  # the forward read it
    before: tl.tensor
    is_masked: tl.tensor  # read, and nothing final yet


class Verdict(NamedTuple):
    """What became of the block."""

    after: tl.tensor  # [K]
    is_final: tl.tensor  # [K] it was a mask until now
    is_whole: tl.tensor  # nothing is masked any more
    has_ended: tl.tensor  # an EOS has everything before it written


class Report(NamedTuple):
    """A `refusion.decoding.diffusion_report.DiffusionReport` without the tokens, as its columns are ordered."""

    is_done: tl.tensor
    num_forwards: tl.tensor
    overflow: tl.tensor
    num_rows: tl.tensor
    cached: tl.tensor
    next_rows: tl.tensor
    place: tl.tensor


def settle(rounds: DiffusionRounds, readout: Readout, spans: Spans, *, num_seats: int) -> None:
    """See `refusion.decoding.rounds.Rounds.settle`."""
    params = rounds.params
    launch(
        _settle,
        (num_seats,),
        rounds.table.values,
        rounds.table.values.stride(0),
        readout.token_ids,
        readout.confidence,
        rounds.eos_ids,
        spans.cached,
        spans.row_start,
        spans.row_end,
        rounds.report,
        rounds.report.stride(0),
        rounds.mask_id,
        -1.0 if params.threshold is None else params.threshold,
        params.steps_per_block,
        rounds.prefill_rows,
        rounds.num_positions,
        K=rounds.block_size,
        K_PADDED=triton.next_power_of_2(rounds.block_size),
        KIND=KINDS.index(rounds.kind.name),
        BY_THRESHOLD=params.threshold is not None,
        STOPS_EARLY=rounds.kind.stops_early,
        NUM_EOS=len(rounds.eos_ids),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["mask_id", "threshold", "steps_per_block", "prefill_rows", "num_positions"])
def _settle(
    table,
    line_stride,
    drawn_ids,
    confidences,
    eos_ids,
    cached,
    row_start,
    row_end,
    report,
    report_stride,
    mask_id,
    threshold,
    steps_per_block,
    prefill_rows,
    num_positions,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    KIND: tl.constexpr,
    BY_THRESHOLD: tl.constexpr,
    STOPS_EARLY: tl.constexpr,
    NUM_EOS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    seat = tl.program_id(0)
    line = table + seat.to(tl.int64) * line_stride
    text, confidences = line + TEXT, confidences + seat * K
    prompt_length = tl.load(line + PROMPT_LENGTH).to(tl.int32)
    num_drafts = tl.load(line + NUM_DRAFTS).to(tl.int32)
    num_forwards = tl.load(line + NUM_FORWARDS).to(tl.int32)
    progress = read_progress(table, line_stride, cached, seat, True)
    stretch = next_stretch(progress, prefill_rows, K, KIND)
    needed = stretch.stop - stretch.start
    overflow = needed - (tl.load(row_end + seat) - tl.load(row_start + seat))
    is_read = stretch.stop > stretch.first

    # What becomes of the block.
    block = read_block(text, tl.arange(0, K_PADDED), stretch, num_positions, mask_id, K)
    drawn = tl.load(drawn_ids + seat * K + block.token, mask=block.token < K, other=0).to(tl.int32)
    confidence = tl.load(confidences + block.token, mask=block.token < K, other=0.0)
    rank = rank_masks(text, confidences, block, confidence, stretch, num_positions, mask_id, K, K_PADDED)
    if BY_THRESHOLD:
        is_final = block.is_masked & ((confidence > threshold) | (rank == 0))
    else:
        is_final = block.is_masked & (rank < num_due(block, progress.step, steps_per_block))
    verdict = reach_verdict(block, is_final, drawn, is_read, eos_ids, K_PADDED, NUM_EOS)

    # Where the seat goes on.
    now = advance(progress, stretch, verdict, K, KIND, STOPS_EARLY)
    following = next_stretch(now, prefill_rows, K, KIND)
    num_forwards += counts_as_forward(progress, stretch, prompt_length, KIND).to(tl.int32)

    tl.debug_barrier()  # everything is read before anything is written
    tl.store(text + stretch.first + block.token, verdict.after.to(tl.int64), mask=is_final)
    tl.store(line + FIRST, now.first.to(tl.int64))
    tl.store(line + STEP, now.step.to(tl.int64))
    tl.store(line + NUM_DRAFTS, (num_drafts + is_read.to(tl.int32)).to(tl.int64))
    tl.store(line + NUM_FORWARDS, num_forwards.to(tl.int64))
    tl.store(line + IS_DONE, now.is_done.to(tl.int64))
    tl.store(cached + seat, now.cached)
    out = report + seat * report_stride
    place = tl.where(is_read, stretch.first - prompt_length, 0)
    put_report(out, Report(now.is_done, num_forwards, overflow, needed, now.cached, following.stop - following.start, place))
    tl.store(out + TOKENS + block.token, tl.where(is_final, verdict.after, -1), mask=block.token < K)


@triton.jit
def read_block(text, token, stretch, num_positions, mask_id, K: tl.constexpr):
    """These tokens of the `Block`."""
    at = stretch.first + token
    is_read = (token < K) & (at < num_positions) & (at < stretch.block_end) & (stretch.stop > stretch.first)
    before = tl.load(text + at, mask=is_read, other=0).to(tl.int32)
    return Block(token, is_read, before, is_read & (before == mask_id))


@triton.jit
def rank_masks(text, confidences, block, confidence, stretch, num_positions, mask_id, K: tl.constexpr, K_PADDED: tl.constexpr):
    """[K] masks that are more confident, or as confident and earlier."""
    rank = block.token * 0
    for first in tl.range(0, K_PADDED, OTHERS):  # pyright: ignore[reportGeneralTypeIssues]: a type checker cannot iterate it
        other = read_block(text, first + tl.arange(0, OTHERS), stretch, num_positions, mask_id, K)
        theirs = tl.load(confidences + other.token, mask=other.is_masked, other=-1.0)
        is_better = theirs[None, :] > confidence[:, None]
        is_better |= (theirs[None, :] == confidence[:, None]) & (other.token[None, :] < block.token[:, None])
        rank += tl.sum((is_better & other.is_masked[None, :]).to(tl.int32), 1)
    return rank


@triton.jit
def num_due(block, step, steps_per_block):
    """Masks that become final in this step, where all steps share them out evenly."""
    steps_left = tl.maximum(steps_per_block - step, 1)
    return (tl.sum(block.is_masked.to(tl.int32), 0) + steps_left - 1) // steps_left


@triton.jit
def reach_verdict(block, is_final, drawn, is_read, eos_ids, K_PADDED: tl.constexpr, NUM_EOS: tl.constexpr):
    """The `Verdict` where the masks `is_final` [K] become what was drawn."""
    after = tl.where(is_final, drawn, block.before)
    first_open = tl.min(tl.where(block.is_masked & ~is_final, block.token, K_PADDED), 0)
    is_eos = block.token < 0
    for index in tl.static_range(NUM_EOS):
        is_eos |= after == tl.load(eos_ids + index).to(tl.int32)
    has_ended = tl.max((block.is_read & is_eos & (block.token < first_open)).to(tl.int32), 0) != 0
    return Verdict(after, is_final, is_read & (first_open == K_PADDED), has_ended)


@triton.jit
def advance(progress, stretch, verdict, K: tl.constexpr, KIND: tl.constexpr, STOPS_EARLY: tl.constexpr):
    """The `Progress` after this forward: on to the next block where this one is whole."""
    is_active, is_read = stretch.stop > stretch.start, stretch.stop > stretch.first
    cached = progress.cached
    if KIND >= BLOCKS:
        cached = tl.where(is_active, tl.minimum(stretch.stop, stretch.first), cached)
    elif KIND != NO_CACHE:
        everything = stretch.first if KIND == PREFIX else progress.end - (stretch.block_end - stretch.first)
        cached = tl.where(is_active & (progress.step == 0), everything, cached)
    ends = verdict.is_whole & (stretch.block_end >= progress.end)
    if STOPS_EARLY:
        ends = ends | verdict.has_ended
    return Progress(
        progress.end,
        tl.where(verdict.is_whole, stretch.first + K, stretch.first),
        tl.where(verdict.is_whole, 0, progress.step + is_read.to(tl.int32)),
        tl.where(ends, 1, progress.is_done),
        cached,
    )


@triton.jit
def counts_as_forward(progress, stretch, prompt_length, KIND: tl.constexpr):
    """Whether this was a forward of the answer: block diffusion's prefill of the prompt is none."""
    is_active = stretch.stop > stretch.start
    if KIND >= BLOCKS:
        is_active = is_active & ((stretch.stop > stretch.first) | (progress.cached >= prompt_length))
    return is_active


@triton.jit
def put_report(out, report):
    """Write all columns before the tokens."""
    tl.store(out, report.is_done)
    tl.store(out + 1, report.num_forwards)
    tl.store(out + 2, report.overflow)
    tl.store(out + 3, report.num_rows)
    tl.store(out + 4, report.cached)
    tl.store(out + 5, report.next_rows)
    tl.store(out + 6, report.place)
