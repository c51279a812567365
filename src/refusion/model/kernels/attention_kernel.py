"""The kernels behind `refusion.model.kernels.attention`.

No mask is materialised: who sees whom follows from the per-row arrays (`refusion.model.rows.may_see`). What stands between the launch and
the first product is a chain of dependent look-ups, tile -> seat -> page -> keys, and for short contexts that chain is nearly all the
time there is. So look-ups of one depth are issued together; the first block of a program has the number of its split, and thus a
page that can be looked up before the length of the context is known; and the new rows, which the previous kernel left in the L2 cache,
are taken first, while the memory brings the first committed tokens.

Where several programs share the columns of a tile (SHARED) their parts are merged by a kernel of its own: the last program to arrive
would read them all while the others have nothing to do, and its instructions and registers would be everybody's.

With ROTATES queries and new keys come as the projection left them, and every program normalises and rotates what it reads: a few rows that
several programs turn alike cost less than a kernel that turns them once. One program of every tile and head leaves the new rows behind.
"""

import triton
import triton.language as tl

from refusion.model.kernels.attention_blocks import (
    Rotation,
    ask_for_block,
    find_page,
    load_block,
    load_columns,
    load_rotated,
    load_view,
    load_whole_block,
    may_see_rows,
)
from refusion.model.kernels.attention_softmax import Parts, fold, merge, put_part
from refusion.model.kernels.interpreter import repair
from refusion.model.kernels.stream import release, wait

# C = committed tokens of a block, NEW = new rows of a block
# G = query heads per key/value head, D = head dimension, Q = BLOCK * G: query rows of a tile, padded

repair()


# One binary for all buckets, whose index tensors may be slices: their lengths and alignment are nothing to compile for.
@triton.jit(
    do_not_specialize=["num_splits", "num_rows", "num_pages", "table_stride"],
    do_not_specialize_on_alignment=[
        "row_seat", "segment", "rank", "parent", "visible", "is_trunk",
        "cached", "prompt_start", "prompt_end", "row_start", "row_end", "page_table",
        "tile_seat", "tile_first", "tile_end", "positions",
    ],
)  # fmt: skip
def attend_kernel(
    query,
    new_keys,
    new_values,
    keys,
    values,
    out,  # may be `query`: a program writes the rows that it alone has read, or `merge_kernel` does
    row_seat,
    segment,
    rank,
    parent,
    visible,
    is_trunk,
    cached,
    prompt_start,
    prompt_end,
    row_start,
    row_end,
    page_table,
    tile_seat,
    tile_first,
    tile_end,
    part_mixed,
    part_best,
    part_total,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    kept_keys,
    kept_values,
    num_splits,
    num_rows,
    scale,  # log2(e) / sqrt(D): exponents are of base 2
    num_pages,
    table_stride,
    page_row_stride,
    page_head_stride,
    new_row_stride,
    new_head_stride,
    query_row_stride,
    kept_row_stride,
    kept_head_stride,
    eps,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    NEW: tl.constexpr,
    SHARED: tl.constexpr,
    CLEAR: tl.constexpr,
    EAGER: tl.constexpr,
    LATE: tl.constexpr,
    LONG: tl.constexpr,
    ROTATES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    rotation = Rotation(cos, sin, eps)
    # Tiles are the fastest axis: those of a seat run side by side and find its K/V in the L2 cache. Late tiles of a prompt, which see the
    # most, start first.
    tile, head, split = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    owner = tile * tl.num_programs(1) + head
    if not EAGER:
        wait(PDL, LATE)

    seat, first, end = tl.load(tile_seat + tile), tl.load(tile_first + tile), tl.load(tile_end + tile)
    some_seat = tl.maximum(seat, 0)  # programs of unused tiles must get as far as the wait: `launch` says why
    pages = page_table + some_seat * table_stride
    column = tl.arange(0, C)
    page = find_page(pages, split, column, num_pages, PAGE, C)
    num_cached = tl.load(cached + some_seat)
    prompt_first, prompt_stop = tl.load(prompt_start + some_seat), tl.load(prompt_end + some_seat)
    decode_first, decode_stop = tl.load(row_start + some_seat), tl.load(row_end + some_seat)

    lane = tl.arange(0, Q)
    dim = tl.arange(0, D)
    place = lane // G_PADDED  # row inside the tile
    group = lane % G_PADDED
    row = first + place
    is_row = (row < end) & (group < G)
    mine = load_view(segment, rank, parent, visible, row, is_row)
    my_position = tl.load(positions + row, mask=is_row, other=0) if ROTATES else row

    head_keys = keys + head * page_head_stride
    head_values = values + head * page_head_stride
    inner = (column * page_row_stride)[:, None] + dim[None, :]  # here: reckoned in the loop it costs registers
    if EAGER:
        if PDL and PAGE % C == 0 and ((split * C < num_cached) & (seat >= 0)):
            ask_for_block(head_keys, head_values, page, split, column, page_row_stride, PAGE, C, D)
        wait(PDL, LATE)

    inside = (head * G + group)[:, None] * D + dim[None, :]  # [Q, D], place inside a row of `query` and `out`
    if CLEAR and split == num_splits - 1:
        _clear_padding(out, row_seat, tile * BLOCK, num_rows, place, group < G, query_row_stride, inside, BLOCK, Q, D)
    if seat < 0:
        return

    is_prompt, prompt_stop, decode_stop = seen_rows(first, end, prompt_first, prompt_stop, decode_first, decode_stop)
    last_seen = tl.where(is_prompt, row, prompt_stop - 1)  # [Q], last prompt row each row sees

    # Blocks of columns are dealt out in turn, those of committed tokens first.
    cached_blocks = tl.cdiv(num_cached, C)
    prompt_blocks = tl.cdiv(prompt_stop - prompt_first, NEW)
    decode_blocks = tl.cdiv(decode_stop - decode_first, NEW)
    num_parts = tl.minimum(num_splits, cached_blocks + prompt_blocks + decode_blocks)  # programs that have a block at all
    head_new_keys = new_keys + head * new_head_stride
    head_new_values = new_values + head * new_head_stride
    if ROTATES and split == num_splits - 1:  # which has the fewest blocks
        _keep_new_rows(
            kept_keys, kept_values, kept_row_stride, head * kept_head_stride,
            head_new_keys, head_new_values, new_row_stride, first, end, positions, rotation, k_norm, HAS_NORM, BLOCK, D,
        )  # fmt: skip
    if split >= num_parts:
        return
    if ROTATES:
        my_query = row.to(tl.int64) * query_row_stride + (head * G + group) * D
        asked = load_rotated(query, my_query, is_row, my_position, rotation, q_norm, HAS_NORM, D)  # [Q, D]
    else:
        asked = tl.load(query + row[:, None] * query_row_stride + inside, mask=is_row[:, None], other=0.0)
    best = tl.full([Q], float("-inf"), tl.float32)
    total = tl.zeros([Q], tl.float32)
    mixed = tl.zeros([Q, D], tl.float32)

    new_column = tl.arange(0, NEW)
    # One loop for prompt and decode rows, one for whole and ragged blocks of committed tokens: a kernel that runs a few microseconds is
    # paid by its instructions, which every launch reads anew. A long context is worth a loop without masks.
    for block in tl.range(_turn(split, cached_blocks, num_splits), prompt_blocks + decode_blocks, num_splits, num_stages=1):
        is_decode = block >= prompt_blocks
        new = tl.where(is_decode, decode_first + (block - prompt_blocks) * NEW, prompt_first + block * NEW) + new_column
        is_column = new < tl.where(is_decode, decode_stop, prompt_stop)
        new_where = new.to(tl.int64) * new_row_stride
        if ROTATES:
            new_position = tl.load(positions + new, mask=is_column, other=0)
            new_key = load_rotated(head_new_keys, new_where, is_column, new_position, rotation, k_norm, HAS_NORM, D)
        else:
            new_key = load_columns(head_new_keys, new_where, is_column, dim)
        new_value = load_columns(head_new_values, new_where, is_column, dim)
        is_seen = may_see_rows(mine, segment, rank, is_trunk, new, is_column)
        is_seen = tl.where(is_decode, is_seen, new[None, :] <= last_seen[:, None])
        best, total, mixed = fold(asked, new_key, new_value, is_seen & is_column[None, :], scale, best, total, mixed, ALL_SEEN=False)

    ragged = split
    if LONG:
        whole_blocks = num_cached // C
        for block in tl.range(split, whole_blocks, num_splits):
            next_page = find_page(pages, block + num_splits, column, num_pages, PAGE, C)
            key = load_whole_block(head_keys, page, block, column, inner, dim, page_row_stride, PAGE, C)
            value = load_whole_block(head_values, page, block, column, inner, dim, page_row_stride, PAGE, C)
            page = next_page
            best, total, mixed = fold(asked, key, value, None, scale, best, total, mixed, ALL_SEEN=True)
        ragged = whole_blocks + _turn(split, whole_blocks, num_splits)
    for block in tl.range(ragged, cached_blocks, num_splits, num_stages=1 if LONG else None):
        next_page = find_page(pages, block + num_splits, column, num_pages, PAGE, C)  # a round ahead of its use
        is_there = block * C + column < num_cached
        key = load_block(head_keys, page, block, column, inner, is_there, dim, page_row_stride, PAGE, C)
        value = load_block(head_values, page, block, column, inner, is_there, dim, page_row_stride, PAGE, C)
        page = next_page
        best, total, mixed = fold(asked, key, value, is_there[None, :], scale, best, total, mixed, ALL_SEEN=False)
    release(PDL, LATE)

    if SHARED:
        put_part(Parts(part_mixed, part_best, part_total), owner * num_splits + split, is_row, best, total, mixed, Q, D)
    else:
        mixed /= tl.where(total == 0.0, 1.0, total)[:, None]  # the rows that only fill the tile may have seen nothing
        tl.store(out + row[:, None] * query_row_stride + inside, mixed.to(out.dtype.element_ty), mask=is_row[:, None])


@triton.jit(
    do_not_specialize=["num_splits"],
    do_not_specialize_on_alignment=[
        "cached", "prompt_start", "prompt_end", "row_start", "row_end", "tile_seat", "tile_first", "tile_end",
    ],
)  # fmt: skip
def merge_kernel(
    out,
    part_mixed,
    part_best,
    part_total,
    cached,
    prompt_start,
    prompt_end,
    row_start,
    row_end,
    tile_seat,
    tile_first,
    tile_end,
    num_splits,
    row_stride,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    NEW: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """What `attend_kernel` left of every tile and head to the rows of `out`, LANES query rows a program."""
    tile, head = tl.program_id(0), tl.program_id(1)
    seat, first, end = tl.load(tile_seat + tile), tl.load(tile_first + tile), tl.load(tile_end + tile)
    some_seat = tl.maximum(seat, 0)
    prompt_first, prompt_stop = tl.load(prompt_start + some_seat), tl.load(prompt_end + some_seat)
    decode_first, decode_stop = tl.load(row_start + some_seat), tl.load(row_end + some_seat)
    _, prompt_stop, decode_stop = seen_rows(  # pyright: ignore[reportGeneralTypeIssues]: a call inside a kernel, not Python's
        first, end, prompt_first, prompt_stop, decode_first, decode_stop
    )
    num_blocks = tl.cdiv(tl.load(cached + some_seat), C)
    num_blocks += tl.cdiv(prompt_stop - prompt_first, NEW) + tl.cdiv(decode_stop - decode_first, NEW)
    wait(PDL)
    lane = tl.program_id(2) * LANES + tl.arange(0, LANES)
    row, group = first + lane // G_PADDED, lane % G_PADDED
    is_row = (row < end) & (group < G)
    if seat < 0:
        return
    parts = Parts(part_mixed, part_best, part_total)
    owner = tile * tl.num_programs(1) + head
    total, mixed = merge(parts, owner * num_splits, tl.minimum(num_splits, num_blocks), lane, is_row, Q, D, PARTS)
    mixed /= tl.where(total == 0.0, 1.0, total)[:, None]
    where = (row * row_stride + (head * G + group) * D)[:, None] + tl.arange(0, D)[None, :]
    tl.store(out + where, mixed.to(out.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def seen_rows(first, end, prompt_first, prompt_stop, decode_first, decode_stop):
    """Whether rows [first, end) are of the prompt, and up to where they see prompt and decode rows.

    A prompt tile sees the prompt up to its own last row and no decode rows; a decode tile sees both.
    """
    is_prompt = (first >= prompt_first) & (first < prompt_stop)
    return is_prompt, tl.where(is_prompt, end, prompt_stop), tl.where(is_prompt, decode_first, decode_stop)


@triton.jit
def _clear_padding(
    out, row_seat, first, num_rows, place, is_head, row_stride, inside, BLOCK: tl.constexpr, Q: tl.constexpr, D: tl.constexpr
):
    """Padding rows are in no tile: every tile clears those among its share of all rows, which begins at `first`."""
    for start in range(first, num_rows, tl.num_programs(0) * BLOCK):
        row = start + place
        is_padding = (place < BLOCK) & is_head & (row < num_rows)
        is_padding &= tl.load(row_seat + row, mask=is_padding, other=0) < 0
        tl.store(out + row[:, None] * row_stride + inside, tl.zeros([Q, D], out.dtype.element_ty), mask=is_padding[:, None])


@triton.jit
def _keep_new_rows(
    kept_keys, kept_values, kept_row_stride, kept_offset, new_keys, new_values, new_row_stride, first, end, positions, rotation, k_norm,
    HAS_NORM: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Leave rows [first, end) of one head behind, their keys normalised and rotated."""
    dim = tl.arange(0, D)
    row = first + tl.arange(0, BLOCK)
    is_row = row < end
    where = row.to(tl.int64) * new_row_stride
    position = tl.load(positions + row, mask=is_row, other=0)
    kept = (row.to(tl.int64) * kept_row_stride)[:, None] + kept_offset + dim[None, :]
    tl.store(kept_keys + kept, load_rotated(new_keys, where, is_row, position, rotation, k_norm, HAS_NORM, D), mask=is_row[:, None])
    tl.store(kept_values + kept, load_columns(new_values, where, is_row, dim), mask=is_row[:, None])


@triton.jit
def _turn(split, before, num_splits):
    """First block whose turn is that of `split`, `before` blocks having been dealt out."""
    return (split + num_splits - before % num_splits) % num_splits
