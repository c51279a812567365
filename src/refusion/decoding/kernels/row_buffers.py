"""Writing rows, their padding and their query tiles: what the layout kernels of all rounds share."""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

import triton
import triton.language as tl

from refusion.decoding.kernels.constants import PADDING

CHUNK = tl.constexpr(128)
# Loops are written with `while`: numpy refuses the interpreter's scalars as arguments of `range`.


@triton.jit
def own_rows(seat_of, seeds, attempts, seat, seed, attempt, begin, end):
    """Rows [begin, end) belong to this seat and draw with its noise."""
    first = begin
    while first < end:
        row = first + tl.arange(0, CHUNK)
        tl.store(seat_of + row, seat, mask=row < end)
        tl.store(seeds + row, seed, mask=row < end)
        tl.store(attempts + row, attempt, mask=row < end)
        first += CHUNK


@triton.jit
def pad_rows(
    token_ids, positions, seat_of, segment, rank, parent, visible, is_trunk, given_ids, seeds, attempts, begin, num_rows, part, num_parts
):
    """Rows [begin, num_rows) are nobody's; this program writes every `num_parts`-th chunk of them."""
    first = begin + part * CHUNK
    while first < num_rows:
        row = first + tl.arange(0, CHUNK)
        is_row = row < num_rows
        tl.store(seat_of + row, PADDING, mask=is_row)
        tl.store(token_ids + row, 0, mask=is_row)
        tl.store(positions + row, 0, mask=is_row)
        tl.store(segment + row, 0, mask=is_row)
        tl.store(rank + row, 0, mask=is_row)
        tl.store(parent + row, 0, mask=is_row)
        tl.store(visible + row, 0, mask=is_row)
        tl.store(is_trunk + row, 0, mask=is_row)
        tl.store(given_ids + row, 0, mask=is_row)
        tl.store(seeds + row, 0, mask=is_row)
        tl.store(attempts + row, 0, mask=is_row)
        first += num_parts * CHUNK


@triton.jit
def cut_tiles(tile_seat, tile_first, tile_end, seat, tile, begin, end, num_tiles, BLOCK: tl.constexpr):
    """Tiles from `tile` on hold the flat rows [begin, end) of a seat."""
    first = begin
    while first < end:
        index = (first - begin) // BLOCK + tl.arange(0, CHUNK)
        start = begin + index * BLOCK
        is_tile = (start < end) & (tile + index < num_tiles)
        tl.store(tile_seat + tile + index, seat, mask=is_tile)
        tl.store(tile_first + tile + index, start, mask=is_tile)
        tl.store(tile_end + tile + index, tl.minimum(start + BLOCK, end), mask=is_tile)
        first += CHUNK * BLOCK


@triton.jit
def pad_tiles(tile_seat, tile_first, tile_end, begin, num_tiles, part, num_parts):
    """Tiles [begin, num_tiles) are unused; this program writes every `num_parts`-th chunk of them."""
    first = begin + part * CHUNK
    while first < num_tiles:
        index = first + tl.arange(0, CHUNK)
        is_tile = index < num_tiles
        tl.store(tile_seat + index, PADDING, mask=is_tile)
        tl.store(tile_first + index, 0, mask=is_tile)
        tl.store(tile_end + index, 0, mask=is_tile)
        first += num_parts * CHUNK
