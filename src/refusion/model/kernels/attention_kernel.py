"""The kernel behind `refusion.model.kernels.attention`.

No mask is materialised: who sees whom follows from the per-row arrays (`refusion.model.rows.may_see`). What stands between the launch and
the first product is a chain of dependent look-ups, tile -> seat -> page -> keys, and for short contexts that chain and the merge are all
the time there is. So look-ups of one depth are issued together; the first block of a program has the number of its split, and thus a
page that can be looked up before the length of the context is known; and the new rows, which the previous kernel left in the L2 cache,
are taken first, while the memory brings the first committed tokens.

With ROTATES queries and new keys come as the projection left them, and every program normalises and rotates what it reads: a few rows that
several programs turn alike cost less than a kernel that turns them once. One program of every tile and head leaves the new rows behind.
"""

import triton
import triton.language as tl

from refusion.model.kernels.attention_config import MAX_SPLITS as _MAX_SPLITS
from refusion.model.kernels.interpreter import repair
from refusion.model.kernels.stream import INTERPRETED, ask, release, wait

# C = committed tokens of a block, NEW = new rows of a block
# G = query heads per key/value head, D = head dimension, Q = BLOCK * G: query rows of a tile, padded

repair()

MAX_SPLITS = tl.constexpr(_MAX_SPLITS)


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
    out,  # may be `query`: the last program of a tile and head writes, after all of them have read
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
    arrived,
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
    PARTS: tl.constexpr,
    CLEAR: tl.constexpr,
    EAGER: tl.constexpr,
    LATE: tl.constexpr,
    ROTATES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
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
    page = _page(pages, split, column, num_pages, PAGE, C)
    num_cached = tl.load(cached + some_seat)
    prompt_first, prompt_stop = tl.load(prompt_start + some_seat), tl.load(prompt_end + some_seat)
    decode_first, decode_stop = tl.load(row_start + some_seat), tl.load(row_end + some_seat)

    lane = tl.arange(0, Q)
    dim = tl.arange(0, D)
    place = lane // G_PADDED  # row inside the tile
    group = lane % G_PADDED
    row = first + place
    is_row = (row < end) & (group < G)
    my_segment = tl.load(segment + row, mask=is_row, other=0)
    my_rank = tl.load(rank + row, mask=is_row, other=0)
    my_parent = tl.load(parent + row, mask=is_row, other=0)
    my_visible = tl.load(visible + row, mask=is_row, other=0)
    my_position = tl.load(positions + row, mask=is_row, other=0) if ROTATES else row

    head_keys = keys + head * page_head_stride
    head_values = values + head * page_head_stride
    inner = (column * page_row_stride)[:, None] + dim[None, :]  # [C, D], where a block lies in one page
    if EAGER:
        if PDL and PAGE % C == 0:  # noqa: SIM102 - one is a constant, the other is not
            if (split * C < num_cached) & (seat >= 0):
                per_line: tl.constexpr = 1024 // keys.dtype.element_ty.primitive_bitwidth
                lines = tl.arange(0, D // per_line if per_line < D else 1) * per_line
                start = (page.to(tl.int64) * PAGE + split * C % PAGE + column.to(tl.int64)) * page_row_stride
                ask((head_keys + start[:, None] + lines[None, :]).to(tl.int64))
                ask((head_values + start[:, None] + lines[None, :]).to(tl.int64))
        wait(PDL, LATE)

    inside = (head * G + group)[:, None] * D + dim[None, :]  # [Q, D], place inside a row of `query` and `out`
    if CLEAR:  # noqa: SIM102 - as above
        if split == num_splits - 1:  # padding rows are in no tile: every tile clears those among its share of all rows
            for start in range(tile * BLOCK, num_rows, tl.num_programs(0) * BLOCK):
                cleared = start + place
                is_padding = (place < BLOCK) & (group < G) & (cleared < num_rows)
                is_padding &= tl.load(row_seat + cleared, mask=is_padding, other=0) < 0
                tl.store(
                    out + cleared[:, None] * query_row_stride + inside, tl.zeros([Q, D], out.dtype.element_ty), mask=is_padding[:, None]
                )
    if seat < 0:
        return

    # A prompt tile sees the prompt up to its own last row and no decode rows; a decode tile sees both.
    is_prompt = (first >= prompt_first) & (first < prompt_stop)
    prompt_stop = tl.where(is_prompt, end, prompt_stop)
    decode_stop = tl.where(is_prompt, decode_first, decode_stop)
    last_seen = tl.where(is_prompt, row, prompt_stop - 1)  # [Q], last prompt row each row sees

    # Blocks of columns are dealt out in turn, those of committed tokens first.
    cached_blocks = tl.cdiv(num_cached, C)
    prompt_blocks = tl.cdiv(prompt_stop - prompt_first, NEW)
    decode_blocks = tl.cdiv(decode_stop - decode_first, NEW)
    num_parts = tl.minimum(num_splits, cached_blocks + prompt_blocks + decode_blocks)  # programs that have a block at all
    head_new_keys = new_keys + head * new_head_stride
    head_new_values = new_values + head * new_head_stride
    if ROTATES:  # noqa: SIM102 - as above
        if split == num_splits - 1:  # which has the fewest blocks
            mine = first + tl.arange(0, BLOCK)
            is_mine = mine < end
            my_where = mine.to(tl.int64) * new_row_stride
            position = tl.load(positions + mine, mask=is_mine, other=0)
            kept = (mine.to(tl.int64) * kept_row_stride)[:, None] + head * kept_head_stride + dim[None, :]
            kept_key = _rotated(head_new_keys, my_where, is_mine, position, cos, sin, k_norm, eps, HAS_NORM, D)
            tl.store(kept_keys + kept, kept_key, mask=is_mine[:, None])
            tl.store(kept_values + kept, _load(head_new_values, my_where, is_mine, dim), mask=is_mine[:, None])
    if split >= num_parts:
        return
    if ROTATES:
        my_query = row.to(tl.int64) * query_row_stride + (head * G + group) * D
        asked = _rotated(query, my_query, is_row, my_position, cos, sin, q_norm, eps, HAS_NORM, D)  # [Q, D]
    else:
        asked = tl.load(query + row[:, None] * query_row_stride + inside, mask=is_row[:, None], other=0.0)
    best = tl.full([Q], float("-inf"), tl.float32)
    total = tl.zeros([Q], tl.float32)
    mixed = tl.zeros([Q, D], tl.float32)

    new_column = tl.arange(0, NEW)
    # One loop for prompt and decode rows, one for whole and ragged blocks of committed tokens: a kernel that runs a few microseconds is
    # paid by its instructions, which every launch reads anew.
    for block in tl.range(_turn(split, cached_blocks, num_splits), prompt_blocks + decode_blocks, num_splits, num_stages=1):
        is_decode = block >= prompt_blocks
        new = tl.where(is_decode, decode_first + (block - prompt_blocks) * NEW, prompt_first + block * NEW) + new_column
        is_column = new < tl.where(is_decode, decode_stop, prompt_stop)
        new_where = new.to(tl.int64) * new_row_stride
        if ROTATES:
            new_position = tl.load(positions + new, mask=is_column, other=0)
            new_key = _rotated(head_new_keys, new_where, is_column, new_position, cos, sin, k_norm, eps, HAS_NORM, D)
        else:
            new_key = _load(head_new_keys, new_where, is_column, dim)
        new_value = _load(head_new_values, new_where, is_column, dim)
        its_segment = tl.load(segment + new, mask=is_column, other=-9)  # -9: nobody's segment, nobody's parent
        its_rank = tl.load(rank + new, mask=is_column, other=0)
        on_trunk = tl.load(is_trunk + new, mask=is_column, other=0) != 0
        is_seen = (my_segment[:, None] == its_segment[None, :]) & (its_rank[None, :] <= my_rank[:, None])
        is_seen |= (my_parent[:, None] == its_segment[None, :]) & (its_rank[None, :] < my_visible[:, None])
        is_seen |= (my_parent[:, None] == -2) & on_trunk[None, :]  # segments.TRUNK
        is_seen = tl.where(is_decode, is_seen, new[None, :] <= last_seen[:, None])
        new_scores = _dot(asked, tl.trans(new_key), tl.zeros([Q, NEW], tl.float32))
        new_scores = tl.where(is_seen & is_column[None, :], new_scores, float("-inf"))
        best, total, mixed = _fold(new_scores, new_value, scale, best, total, mixed)

    for block in tl.range(split, cached_blocks, num_splits):
        next_page = _page(pages, block + num_splits, column, num_pages, PAGE, C)  # a round ahead of its use
        is_there = block * C + column < num_cached
        if PAGE % C == 0:
            start = (page.to(tl.int64) * PAGE + block * C % PAGE) * page_row_stride
            key = tl.load(head_keys + start + inner, mask=is_there[:, None], other=0.0)
            value = tl.load(head_values + start + inner, mask=is_there[:, None], other=0.0)
        else:
            where = (page.to(tl.int64) * PAGE + (block * C + column) % PAGE) * page_row_stride
            key = _load(head_keys, where, is_there, dim)
            value = _load(head_values, where, is_there, dim)
        page = next_page
        scores = _dot(asked, tl.trans(key), tl.zeros([Q, C], tl.float32))
        scores = tl.where(is_there[None, :], scores, float("-inf"))
        best, total, mixed = _fold(scores, value, scale, best, total, mixed)
    release(PDL, LATE)

    is_last = num_parts == 1
    if num_parts > 1:
        part = owner * num_splits + split
        tl.store(part_mixed + (part * Q + lane)[:, None] * D + dim[None, :], mixed, mask=is_row[:, None])
        tl.store(part_best + part * Q + lane, best, mask=is_row)
        tl.store(part_total + part * Q + lane, total, mask=is_row)
        tl.debug_barrier()  # all threads have stored before one of them says so
        is_last = tl.atomic_add(arrived + owner, 1, sem="acq_rel") == num_parts - 1
        if is_last:
            total, mixed = _merge(part_mixed, part_best, part_total, owner * num_splits, num_parts, is_row, Q, D, PARTS)
            tl.store(arrived + owner, 0)  # for the next launch
    if is_last:
        mixed /= tl.where(total == 0.0, 1.0, total)[:, None]  # the rows that only fill the tile may have seen nothing
        tl.store(out + row[:, None] * query_row_stride + inside, mixed.to(out.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _turn(split, before, num_splits):
    """First block whose turn is that of `split`, `before` blocks having been dealt out."""
    return (split + num_splits - before % num_splits) % num_splits


@triton.jit
def _page(pages, block, column, num_pages, PAGE: tl.constexpr, C: tl.constexpr):
    """The page of a block, or the pages [C] of its columns; any page if the table ends before them."""
    if PAGE % C == 0:
        return tl.load(pages + tl.minimum(block * C // PAGE, num_pages - 1))
    else:
        return tl.load(pages + tl.minimum((block * C + column) // PAGE, num_pages - 1))


@triton.jit
def _load(head, where, is_column, dim):
    """[C, D] keys or values, zero where there is no column: a NaN would survive its weight of zero."""
    return tl.load(head + where[:, None] + dim[None, :], mask=is_column[:, None], other=0.0)


@triton.jit
def _rotated(source, where, is_there, position, cos, sin, gains, eps, HAS_NORM: tl.constexpr, D: tl.constexpr):
    """[C, D] normalised (Qwen3) and rotated rows of one head, in the steps of `refusion.model.kernels.rotary`; zero where there is none.

    Every number is loaded beside the one it turns with, half a head away: the second time it comes from the L1 cache.
    """
    dim = tl.arange(0, D)
    other = (dim + D // 2) % D
    numbers = _load(source, where, is_there, dim)
    dtype = numbers.dtype
    left, right = numbers.to(tl.float32), _load(source, where, is_there, other).to(tl.float32)
    angle = position[:, None] * (D // 2) + (dim % (D // 2))[None, :]
    turn = tl.load(cos + angle, mask=is_there[:, None], other=0.0)
    lift = tl.load(sin + angle, mask=is_there[:, None], other=0.0)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(left * left, 1) / D + eps)[:, None]
        left = (left * scale).to(dtype).to(tl.float32) * tl.load(gains + dim).to(tl.float32)[None, :]
        right = (right * scale).to(dtype).to(tl.float32) * tl.load(gains + other).to(tl.float32)[None, :]
        left, right = left.to(dtype).to(tl.float32), right.to(dtype).to(tl.float32)
    lift = tl.where((dim < D // 2)[None, :], -lift, lift)
    return (left * turn + right * lift).to(dtype)


@triton.jit
def _dot(left, right, acc):
    """acc + left @ right."""
    if INTERPRETED:  # which multiplies bfloat16 as if they were integers; float32 holds the same products exactly
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _fold(scores, value, scale, best, total, mixed):
    """Take a block of columns into the running softmax; `scores` [Q, C] are unscaled and -inf where nothing is seen."""
    new_best = tl.maximum(best, tl.max(scores, 1) * scale)
    anchor = tl.where(new_best == float("-inf"), 0.0, new_best)  # a row that has seen nothing yet must not make -inf - -inf
    weight = tl.math.exp2(scores * scale - anchor[:, None])
    shrink = tl.math.exp2(best - anchor)
    total = total * shrink + tl.sum(weight, 1)
    mixed = _dot(weight.to(value.dtype), value, mixed * shrink[:, None])
    return new_best, total, mixed


@triton.jit
def _merge(
    part_mixed, part_best, part_total, first_part, num_parts, is_row,
    Q: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Totals and mixed values of all parts of a tile and head, the parts in their order.

    The weights of the parts come first, from all maxima at once; no load waits for the sum of an earlier one then. Past L1, which may
    hold what other programs have overwritten.
    """
    lane, dim = tl.arange(0, Q), tl.arange(0, D)
    part = tl.arange(0, MAX_SPLITS)
    is_there = (part < num_parts)[:, None] & is_row[None, :]
    where = (first_part + part)[:, None] * Q + lane[None, :]
    bests = tl.load(part_best + where, mask=is_there, other=float("-inf"), cache_modifier=".cg")  # [MAX_SPLITS, Q]
    totals = tl.load(part_total + where, mask=is_there, other=0.0, cache_modifier=".cg")
    best = tl.max(bests, 0)
    anchor = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(totals * tl.math.exp2(bests - anchor[None, :]), 0)
    mixed = tl.zeros([Q, D], tl.float32)
    for start in tl.range(0, num_parts, PARTS):
        for step in tl.static_range(PARTS):  # unrolled: their loads are in flight together
            is_some = is_row & (start + step < num_parts)
            here = (first_part + start + step) * Q + lane
            its_best = tl.load(part_best + here, mask=is_some, other=float("-inf"), cache_modifier=".cg")
            its_mixed = tl.load(part_mixed + here[:, None] * D + dim[None, :], mask=is_some[:, None], other=0.0, cache_modifier=".cg")
            mixed += its_mixed * tl.math.exp2(its_best - anchor)[:, None]
    return total, mixed
