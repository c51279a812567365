"""What the attention kernel reads: pages, blocks of keys and values, rotated rows, and who sees which new rows."""

from typing import NamedTuple

import triton
import triton.language as tl

from refusion.model.kernels.stream import ask
from refusion.model.segments import TRUNK as _TRUNK

# C = committed tokens of a block, NEW = new rows of a block, D = head dimension, Q = query rows of a tile, padded

TRUNK = tl.constexpr(_TRUNK)


class View(NamedTuple):
    """What query rows see of the new rows: see `refusion.model.rows`. [Q]"""

    segment: tl.tensor
    rank: tl.tensor
    parent: tl.tensor
    visible: tl.tensor


class Rotation(NamedTuple):
    """How rows are normalised and rotated."""

    cos: tl.tensor  # pointer to [positions, D / 2]
    sin: tl.tensor
    eps: tl.tensor


@triton.jit
def load_view(segment, rank, parent, visible, row, is_row):
    """The `View` of `row` [Q]."""
    return View(
        tl.load(segment + row, mask=is_row, other=0),
        tl.load(rank + row, mask=is_row, other=0),
        tl.load(parent + row, mask=is_row, other=0),
        tl.load(visible + row, mask=is_row, other=0),
    )


@triton.jit
def may_see_rows(mine, segment, rank, is_trunk, column, is_column):
    """[Q, NEW] which decode rows are seen: `refusion.model.rows.may_see`."""
    its_segment = tl.load(segment + column, mask=is_column, other=-9)  # -9: nobody's segment, nobody's parent
    its_rank = tl.load(rank + column, mask=is_column, other=0)
    on_trunk = tl.load(is_trunk + column, mask=is_column, other=0) != 0
    is_seen = (mine.segment[:, None] == its_segment[None, :]) & (its_rank[None, :] <= mine.rank[:, None])
    is_seen |= (mine.parent[:, None] == its_segment[None, :]) & (its_rank[None, :] < mine.visible[:, None])
    is_seen |= (mine.parent[:, None] == TRUNK) & on_trunk[None, :]
    return is_seen


@triton.jit
def find_page(pages, block, column, num_pages, PAGE: tl.constexpr, C: tl.constexpr):
    """The page of a block, or the pages [C] of its columns; any page if the table ends before them."""
    if PAGE % C == 0:
        return tl.load(pages + tl.minimum(block * C // PAGE, num_pages - 1))
    else:
        return tl.load(pages + tl.minimum((block * C + column) // PAGE, num_pages - 1))


@triton.jit
def ask_for_block(head_keys, head_values, page, block, column, page_row_stride, PAGE: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Ask the L2 cache for the keys and values of a block that lies in one page."""
    per_line: tl.constexpr = 1024 // head_keys.dtype.element_ty.primitive_bitwidth
    lines = tl.arange(0, D // per_line if per_line < D else 1) * per_line
    start = (page.to(tl.int64) * PAGE + block * C % PAGE + column.to(tl.int64)) * page_row_stride
    ask((head_keys + start[:, None] + lines[None, :]).to(tl.int64))
    ask((head_values + start[:, None] + lines[None, :]).to(tl.int64))


@triton.jit
def load_block(head, page, block, column, inner, is_there, dim, row_stride, PAGE: tl.constexpr, C: tl.constexpr):
    """[C, D] keys or values of a block of committed tokens; `inner` [C, D] is their place in a page from the first on."""
    if PAGE % C == 0:
        start = (page.to(tl.int64) * PAGE + block * C % PAGE) * row_stride
        return tl.load(head + start + inner, mask=is_there[:, None], other=0.0)
    else:
        return load_columns(head, (page.to(tl.int64) * PAGE + (block * C + column) % PAGE) * row_stride, is_there, dim)


@triton.jit
def load_whole_block(head, page, block, column, inner, dim, row_stride, PAGE: tl.constexpr, C: tl.constexpr):
    """`load_block` of one whose tokens are all there."""
    if PAGE % C == 0:
        return tl.load(head + (page.to(tl.int64) * PAGE + block * C % PAGE) * row_stride + inner)
    else:
        return tl.load(head + ((page.to(tl.int64) * PAGE + (block * C + column) % PAGE) * row_stride)[:, None] + dim[None, :])


@triton.jit
def load_columns(head, where, is_column, dim):
    """[C, D] keys or values, zero where there is no column: a NaN would survive its weight of zero."""
    return tl.load(head + where[:, None] + dim[None, :], mask=is_column[:, None], other=0.0)


@triton.jit
def load_rotated(source, where, is_there, position, rotation, gains, HAS_NORM: tl.constexpr, D: tl.constexpr):
    """[C, D] normalised (Qwen3) and rotated rows of one head, in the steps of `refusion.model.kernels.rotary`; zero where there is none.

    Every number is loaded beside the one it turns with, half a head away: the second time it comes from the L1 cache.
    """
    dim = tl.arange(0, D)
    other = (dim + D // 2) % D
    numbers = load_columns(source, where, is_there, dim)
    dtype = numbers.dtype
    left, right = numbers.to(tl.float32), load_columns(source, where, is_there, other).to(tl.float32)
    angle = position[:, None] * (D // 2) + (dim % (D // 2))[None, :]
    turn = tl.load(rotation.cos + angle, mask=is_there[:, None], other=0.0)
    lift = tl.load(rotation.sin + angle, mask=is_there[:, None], other=0.0)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(left * left, 1) / D + rotation.eps)[:, None]
        left = (left * scale).to(dtype).to(tl.float32) * tl.load(gains + dim).to(tl.float32)[None, :]
        right = (right * scale).to(dtype).to(tl.float32) * tl.load(gains + other).to(tl.float32)[None, :]
        left, right = left.to(dtype).to(tl.float32), right.to(dtype).to(tl.float32)
    lift = tl.where((dim < D // 2)[None, :], -lift, lift)
    return (left * turn + right * lift).to(dtype)
