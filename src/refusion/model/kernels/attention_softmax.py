"""The running softmax of the attention kernel, and the merging of what several programs have of one tile."""

from typing import NamedTuple

import triton
import triton.language as tl

from refusion.model.kernels.attention_config import MAX_SPLITS as _MAX_SPLITS
from refusion.model.kernels.stream import INTERPRETED

# C = tokens of a block, D = head dimension, Q = query rows of a tile, padded

MAX_SPLITS = tl.constexpr(_MAX_SPLITS)


class Parts(NamedTuple):
    """Pointers to what the programs of a split tile leave for those that merge."""

    mixed: tl.tensor  # [parts, Q, D]
    best: tl.tensor  # [parts, Q]
    total: tl.tensor  # [parts, Q]


@triton.jit
def fold(asked, key, value, is_seen, scale, best, total, mixed, ALL_SEEN: tl.constexpr):
    """Take a block of columns into the running softmax; with ALL_SEEN every row sees all of them, and `is_seen` is nothing."""
    scores = _dot(asked, tl.trans(key), tl.zeros([asked.shape[0], key.shape[0]], tl.float32))
    if not ALL_SEEN:
        scores = tl.where(is_seen, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1) * scale)
    anchor = new_best
    if not ALL_SEEN:
        anchor = tl.where(new_best == float("-inf"), 0.0, new_best)  # a row that has seen nothing yet must not make -inf - -inf
    weight = tl.math.exp2(scores * scale - anchor[:, None])
    shrink = tl.math.exp2(best - anchor)
    total = total * shrink + tl.sum(weight, 1)
    mixed = _dot(weight.to(value.dtype), value, mixed * shrink[:, None])
    return new_best, total, mixed


@triton.jit
def put_part(parts, part, is_row, best, total, mixed, Q: tl.constexpr, D: tl.constexpr):
    """Leave what this program has for those that merge."""
    lane, dim = tl.arange(0, Q), tl.arange(0, D)
    tl.store(parts.mixed + (part * Q + lane)[:, None] * D + dim[None, :], mixed, mask=is_row[:, None])
    tl.store(parts.best + part * Q + lane, best, mask=is_row)
    tl.store(parts.total + part * Q + lane, total, mask=is_row)


@triton.jit
def merge(parts, first_part, num_parts, lane, is_row, Q: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    """Totals and mixed values of all parts of a tile and head, the parts in their order, for some of its query rows: `lane` [L].

    The weights of the parts come first, from all maxima at once; no load waits for the sum of an earlier one then. Past L1, which may
    hold what other programs have overwritten.
    """
    dim = tl.arange(0, D)
    part = tl.arange(0, MAX_SPLITS)
    is_there = (part < num_parts)[:, None] & is_row[None, :]
    where = (first_part + part)[:, None] * Q + lane[None, :]
    bests = tl.load(parts.best + where, mask=is_there, other=float("-inf"), cache_modifier=".cg")  # [MAX_SPLITS, L]
    totals = tl.load(parts.total + where, mask=is_there, other=0.0, cache_modifier=".cg")
    best = tl.max(bests, 0)
    anchor = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(totals * tl.math.exp2(bests - anchor[None, :]), 0)
    mixed = tl.zeros([lane.shape[0], D], tl.float32)
    for start in tl.range(0, num_parts, PARTS):
        for step in tl.static_range(PARTS):  # unrolled: their loads are in flight together
            is_some = is_row & (start + step < num_parts)
            here = (first_part + start + step) * Q + lane
            its_best = tl.load(parts.best + here, mask=is_some, other=float("-inf"), cache_modifier=".cg")
            its_mixed = tl.load(parts.mixed + here[:, None] * D + dim[None, :], mask=is_some[:, None], other=0.0, cache_modifier=".cg")
            mixed += its_mixed * tl.math.exp2(its_best - anchor)[:, None]
    return total, mixed


@triton.jit
def _dot(left, right, acc):
    """acc + left @ right."""
    if INTERPRETED:  # which multiplies bfloat16 as if they were integers; float32 holds the same products exactly
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")
