"""Which positions a diffusion decoder forwards next: what both of its kernels ask about a seat.

The plain twin is `refusion.decoding.diffusion_kinds`.
"""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from typing import NamedTuple

import triton
import triton.language as tl

# B = seats, K = tokens of a block

# Columns of the table, as `refusion.decoding.diffusion_state.SCALARS` names them; the text follows.
PROMPT_LENGTH, SEED, END, FIRST, STEP, NUM_DRAFTS, NUM_FORWARDS, IS_DONE, TEXT = (tl.constexpr(column) for column in range(9))
# Names of `refusion.decoding.diffusion_kinds`.
KINDS = ("none", "prefix", "dual", "blocks", "blocks unfused")
NO_CACHE, PREFIX, DUAL, BLOCKS, BLOCKS_UNFUSED = (tl.constexpr(kind) for kind in range(5))


class Progress(NamedTuple):
    """How far seats have come, int32: one of them, or all [B]."""

    end: tl.tensor  # of the answer, as a position
    first: tl.tensor  # position of the first token of the block in work
    step: tl.tensor  # forwards that have read this block
    is_done: tl.tensor
    cached: tl.tensor  # tokens in the cache


class Stretch(NamedTuple):
    """The positions [start, stop) that seats forward next, and the blocks [first, block_end) that may be read."""

    start: tl.tensor
    stop: tl.tensor  # start where a seat has nothing to do
    first: tl.tensor
    block_end: tl.tensor


@triton.jit
def read_progress(table, line_stride, cached, seat, is_seat):
    """The `Progress` of these seats; they are done where `is_seat` is false."""
    line = table + seat.to(tl.int64) * line_stride
    return Progress(
        tl.load(line + END, mask=is_seat, other=0).to(tl.int32),
        tl.load(line + FIRST, mask=is_seat, other=0).to(tl.int32),
        tl.load(line + STEP, mask=is_seat, other=1).to(tl.int32),
        tl.load(line + IS_DONE, mask=is_seat, other=1).to(tl.int32),
        tl.load(cached + seat, mask=is_seat, other=0),
    )


@triton.jit
def next_stretch(progress, prefill_rows, K: tl.constexpr, KIND: tl.constexpr):
    """The `Stretch` of seats that have come so far."""
    first, end = progress.first, progress.end
    block_end = tl.minimum(first + K, end)
    if KIND >= BLOCKS:
        start = progress.cached
        limit = start + prefill_rows
        if KIND == BLOCKS:
            stop = tl.where(first > limit, limit, block_end)
        else:
            stop = tl.where(start < first, tl.minimum(first, limit), block_end)
    else:
        is_first = progress.step == 0
        start = first * 0 if KIND == NO_CACHE else tl.where(is_first, 0, first)
        stop = tl.where(is_first, end, block_end) if KIND == DUAL else end
    return Stretch(start, tl.where(progress.is_done == 0, stop, start), first, block_end)
