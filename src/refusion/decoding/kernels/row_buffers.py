"""Writing rows, their padding and their query tiles: what the layout kernels of all rounds share."""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from typing import NamedTuple

import triton
import triton.language as tl

from refusion.decoding.kernels.constants import PADDING

CHUNK = tl.constexpr(128)
# Loops are written with `while`: numpy refuses the interpreter's scalars as arguments of `range`.


class RowPointers(NamedTuple):
    """Pointers to the decode rows of a forward: the arrays of `refusion.model.rows.Rows`, and what each row is judged by and draws with.

    The latter, from `given_ids` to `attempts`, are None where rounds keep them by something else than the row.
    """

    token_ids: tl.tensor
    positions: tl.tensor
    seat: tl.tensor
    segment: tl.tensor
    rank: tl.tensor
    parent: tl.tensor
    visible: tl.tensor
    is_trunk: tl.tensor
    given_ids: tl.tensor
    seeds: tl.tensor
    attempts: tl.tensor
    num_rows: tl.tensor


class TilePointers(NamedTuple):
    """The arrays of `refusion.model.rows.Tiles`."""

    seat: tl.tensor
    first: tl.tensor
    end: tl.tensor
    num_tiles: tl.tensor


@triton.jit
def put_rows(rows, at, is_row, token, position, segment, rank, parent, visible, is_trunk, given=0):
    """Write rows `at` where `is_row`; those past the last one have no room, and the seat's report says so."""
    is_row &= at < rows.num_rows
    tl.store(rows.token_ids + at, token, mask=is_row)
    if rows.given_ids is not None:
        tl.store(rows.given_ids + at, given, mask=is_row)
    tl.store(rows.positions + at, position, mask=is_row)
    tl.store(rows.segment + at, segment, mask=is_row)
    tl.store(rows.rank + at, rank, mask=is_row)
    tl.store(rows.parent + at, parent, mask=is_row)
    tl.store(rows.visible + at, visible, mask=is_row)
    tl.store(rows.is_trunk + at, is_trunk, mask=is_row)


@triton.jit
def put_owner(rows, at, is_row, seat, seed, attempt):
    """Rows `at` belong to `seat` and draw with its noise."""
    tl.store(rows.seat + at, seat, mask=is_row)
    if rows.seeds is not None:
        tl.store(rows.seeds + at, seed, mask=is_row)
        tl.store(rows.attempts + at, attempt, mask=is_row)


@triton.jit
def own_rows(rows, begin, end, seat, seed, attempt):
    """Rows [begin, end) belong to this seat and draw with its noise."""
    first = begin
    while first < end:
        row = first + tl.arange(0, CHUNK)
        put_owner(rows, row, row < end, seat, seed, attempt)
        first += CHUNK


@triton.jit
def pad_rows(rows, begin, part, num_parts):
    """Rows from `begin` on are nobody's; this program writes every `num_parts`-th chunk of them."""
    first = begin + part * CHUNK
    while first < rows.num_rows:
        row = first + tl.arange(0, CHUNK)
        is_row = row < rows.num_rows
        put_owner(rows, row, is_row, PADDING, 0, 0)
        put_rows(rows, row, is_row, token=0, position=0, segment=0, rank=0, parent=0, visible=0, is_trunk=0)
        first += num_parts * CHUNK


@triton.jit
def put_tiles(tiles, at, is_tile, seat, first, end):
    """Tiles `at` hold the flat rows [first, end) of `seat`."""
    tl.store(tiles.seat + at, seat, mask=is_tile)
    tl.store(tiles.first + at, first, mask=is_tile)
    tl.store(tiles.end + at, end, mask=is_tile)


@triton.jit
def cut_tiles(tiles, tile, seat, begin, end, BLOCK: tl.constexpr):
    """Tiles from `tile` on hold the flat rows [begin, end) of a seat."""
    first = begin
    while first < end:
        index = (first - begin) // BLOCK + tl.arange(0, CHUNK)
        start = begin + index * BLOCK
        is_tile = (start < end) & (tile + index < tiles.num_tiles)
        put_tiles(tiles, tile + index, is_tile, seat, start, tl.minimum(start + BLOCK, end))
        first += CHUNK * BLOCK


@triton.jit
def pad_tiles(tiles, begin, part, num_parts):
    """Tiles from `begin` on are unused; this program writes every `num_parts`-th chunk of them."""
    first = begin + part * CHUNK
    while first < tiles.num_tiles:
        index = first + tl.arange(0, CHUNK)
        put_tiles(tiles, index, index < tiles.num_tiles, PADDING, 0, 0)
        first += num_parts * CHUNK
