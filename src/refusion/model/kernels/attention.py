"""Attention of flat rows over pages and new rows: split-K/V flash decoding in Triton.

The columns of a query tile, [committed tokens | prompt rows | decode rows] of its seat, are cut into blocks and the blocks dealt out evenly
to `splits` programs, so that one long context fills the GPU and a prompt of thousands of rows is shared out too. The program that arrives
last merges the parts. No mask is materialised: who sees whom follows from the per-row arrays (`refusion.model.rows.may_see`).

Batch invariance: with a given `Config` and a given tile size the result of a row depends on the rows of its own seat alone, bit for bit;
the parts are merged in the order of their columns, whichever program does it. `choose_config` looks at shapes only, so the promise holds
from forward to forward of the same bucket.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from refusion.model.kernels.interpreter import repair
from refusion.model.kernels.launch import launch
from refusion.model.kernels.stream import INTERPRETED, wait
from refusion.model.rows import Rows, Spans, Tiles

# T = rows of the forward, N = tiles, C = columns of a block
# H = key/value heads, G = query heads per key/value head, D = head dimension, Q = block * G: query rows of a tile, padded

repair()

MAX_SPLITS = 32  # more parts than this cost the merging program more than their readers save


@dataclass(frozen=True, slots=True)
class Config:
    """How the kernel is cut and compiled."""

    splits: int  # programs that share the columns of a tile
    columns: int  # columns of a block
    num_warps: int
    num_stages: int  # blocks of K/V in flight


class Workspace:
    """Parts that wait to be merged. One serves all layers and all graphs, for their launches follow one another."""

    def __init__(self, num_parts: int, tile_rows: int, head_dim: int, device: torch.device) -> None:
        """Room for `num_parts` parts (tiles * H * splits) of at most `tile_rows` = `padded_rows(block, G)` query rows."""
        self.num_parts = num_parts
        self.tile_rows = tile_rows
        self.head_dim = head_dim
        self.mixed = torch.empty(num_parts, tile_rows, head_dim, dtype=torch.float32, device=device)
        self.best = torch.empty(num_parts, tile_rows, dtype=torch.float32, device=device)
        self.total = torch.empty(num_parts, tile_rows, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(num_parts, dtype=torch.int32, device=device)  # zero between launches: the last program sees to it

    @classmethod
    def for_device(cls, block: int, num_groups: int, head_dim: int, device: torch.device) -> "Workspace":
        """Two parts per multiprocessor, for tiles of at most `block` rows."""
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(2 * num_processors, padded_rows(block, num_groups), head_dim, device)


def padded_rows(block: int, num_groups: int) -> int:
    """Query rows Q of a tile: every row brings its group of heads; matrix units want powers of two, 16 at least."""
    return max(16, next_power_of_2(block) * next_power_of_2(num_groups))


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def choose_splits(num_tiles: int, num_kv_heads: int, num_parts: int) -> int:
    """As many as the workspace has room for; one, which needs no room, once the tiles alone fill the GPU."""
    return max(1, min(MAX_SPLITS, num_parts // (num_tiles * num_kv_heads)))


def choose_config(num_tiles: int, num_kv_heads: int, tile_rows: int, head_dim: int, dtype: torch.dtype, num_parts: int) -> Config:
    """From shapes alone: what a graph was captured with stays right for every content."""
    splits = choose_splits(num_tiles, num_kv_heads, num_parts)
    if dtype.itemsize > 2:
        return Config(splits, columns=32, num_warps=8, num_stages=2)  # exact float32 products take their operands through registers
    if tile_rows >= 128:
        return Config(splits, columns=64, num_warps=8, num_stages=3)
    return Config(splits, columns=64, num_warps=4, num_stages=3)


def attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    spans: Spans,
    tiles: Tiles,
    workspace: Workspace,
    config: Config | None = None,
) -> Tensor:
    """Attention of the queries [T, HG, D] over the committed tokens and the new rows of their seats -> [T, HG * D]; padding gives 0.

    `new_keys`, `new_values` [T, H, D] are this layer's new rows, `keys`, `values` [cache rows, H, D] its pages. The tiles must cover all
    rows that are not padding; the prompt rows of a seat must come in the order of their ranks.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = new_keys.shape[1]
    num_groups = num_heads // num_kv_heads
    num_tiles, tile_rows = tiles.seat.shape[0], padded_rows(tiles.block, num_groups)
    if config is None:
        config = choose_config(num_tiles, num_kv_heads, tile_rows, head_dim, query.dtype, workspace.num_parts)
    num_parts = num_tiles * num_kv_heads * config.splits
    assert config.splits == 1 or (
        num_parts <= workspace.num_parts and tile_rows <= workspace.tile_rows and head_dim <= workspace.head_dim
    ), f"{num_parts} parts of {tile_rows} x {head_dim} do not fit a workspace of {tuple(workspace.mixed.shape)}"
    layouts = (keys.stride(), new_keys.stride())
    assert layouts == (values.stride(), new_values.stride()), "keys and values must be laid out alike"
    assert query.stride(2) == keys.stride(2) == new_keys.stride(2) == 1, "the numbers of a head must be neighbours"
    out = torch.empty(num_rows, num_heads * head_dim, dtype=query.dtype, device=query.device)
    launch(
        _attend,
        (num_tiles, num_kv_heads, config.splits),
        query,
        new_keys,
        new_values,
        keys,
        values,
        out,
        rows.seat,
        rows.segment,
        rows.rank,
        rows.parent,
        rows.visible,
        rows.is_trunk,
        spans.cached,
        spans.prompt_start,
        spans.prompt_end,
        spans.row_start,
        spans.row_end,
        spans.page_table,
        tiles.seat,
        tiles.first,
        tiles.end,
        workspace.mixed,
        workspace.best,
        workspace.total,
        workspace.arrived,
        num_rows,
        math.log2(math.e) / math.sqrt(head_dim),
        spans.page_table.stride(0),
        keys.stride(0),
        keys.stride(1),
        new_keys.stride(0),
        new_keys.stride(1),
        PAGE=spans.page_size,
        BLOCK=tiles.block,
        G=num_groups,
        G_PADDED=next_power_of_2(num_groups),
        Q=tile_rows,
        D=head_dim,
        C=config.columns,
        MERGE_STAGES=max(1, min(4, 16384 // (tile_rows * head_dim))),  # 64 KB in flight: less than the blocks of K/V took
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


# One binary for all buckets, whose index tensors may be slices: their lengths and alignment are nothing to compile for.
@triton.jit(
    do_not_specialize=["num_rows", "table_stride"],
    do_not_specialize_on_alignment=[
        "row_seat", "segment", "rank", "parent", "visible", "is_trunk",
        "cached", "prompt_start", "prompt_end", "row_start", "row_end", "page_table",
        "tile_seat", "tile_first", "tile_end",
    ],
)  # fmt: skip
def _attend(
    query,
    new_keys,
    new_values,
    keys,
    values,
    out,
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
    num_rows,
    scale,  # log2(e) / sqrt(D): exponents are of base 2
    table_stride,
    page_row_stride,
    page_head_stride,
    new_row_stride,
    new_head_stride,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    # Tiles are the fastest axis: those of a seat run side by side and find its K/V in the L2 cache. Late tiles of a prompt, which see the
    # most, start first.
    tile, head, split = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)
    wait(PDL)

    seat, first, end = tl.load(tile_seat + tile), tl.load(tile_first + tile), tl.load(tile_end + tile)
    lane = tl.arange(0, Q)
    dim = tl.arange(0, D)
    place = lane // G_PADDED  # row inside the tile
    group = lane % G_PADDED
    width = tl.num_programs(1) * G * D
    inside = (head * G + group)[:, None] * D + dim[None, :]  # [Q, D], place inside a row of `query` and `out`

    if split == num_splits - 1:  # padding rows are in no tile: every tile clears those among its share of all rows
        for start in range(tile * BLOCK, num_rows, tl.num_programs(0) * BLOCK):
            row = start + place
            is_padding = (place < BLOCK) & (group < G) & (row < num_rows)
            is_padding &= tl.load(row_seat + row, mask=is_padding, other=0) < 0
            tl.store(out + row[:, None] * width + inside, tl.zeros([Q, D], out.dtype.element_ty), mask=is_padding[:, None])

    if seat < 0:
        return
    num_cached = tl.load(cached + seat)
    prompt_first, prompt_stop = tl.load(prompt_start + seat), tl.load(prompt_end + seat)
    decode_first, decode_stop = tl.load(row_start + seat), tl.load(row_end + seat)
    row = first + place
    is_row = (row < end) & (group < G)
    asked = tl.load(query + row[:, None] * width + inside, mask=is_row[:, None], other=0.0)  # [Q, D]

    # A prompt tile sees the prompt up to its own last row and no decode rows; a decode tile sees both.
    is_prompt = (first >= prompt_first) & (first < prompt_stop)
    prompt_stop = tl.where(is_prompt, end, prompt_stop)
    decode_stop = tl.where(is_prompt, decode_first, decode_stop)
    last_seen = tl.where(is_prompt, row, prompt_stop - 1)  # [Q], last prompt row each row sees

    # Blocks of columns, and the share of this program: [low, high).
    cached_blocks = tl.cdiv(num_cached, C)
    prompt_blocks = tl.cdiv(prompt_stop - prompt_first, C)
    decode_blocks = tl.cdiv(decode_stop - decode_first, C)
    num_blocks = cached_blocks + prompt_blocks + decode_blocks
    share = tl.cdiv(num_blocks, num_splits)
    num_parts = tl.cdiv(num_blocks, share)  # programs that have a share at all
    if split >= num_parts:
        return
    low = split * share
    high = tl.minimum(low + share, num_blocks)

    best = tl.full([Q], float("-inf"), tl.float32)
    total = tl.zeros([Q], tl.float32)
    mixed = tl.zeros([Q, D], tl.float32)
    column = tl.arange(0, C)
    pages = page_table + seat * table_stride
    head_keys = keys + head * page_head_stride
    head_values = values + head * page_head_stride

    full = tl.minimum(high, num_cached // C)  # blocks of committed tokens that need no mask
    for block in tl.range(low, full):
        where = _cache_rows(pages, block, column, num_cached, PAGE, C) * page_row_stride
        key = tl.load(head_keys + where[:, None] + dim[None, :])
        value = tl.load(head_values + where[:, None] + dim[None, :])
        scores = _dot(asked, tl.trans(key), tl.zeros([Q, C], tl.float32))
        best, total, mixed = _fold(scores, value, scale, best, total, mixed)

    for block in tl.range(tl.maximum(low, full), tl.minimum(high, cached_blocks), num_stages=1):  # the last one, if it is ragged
        is_column = block * C + column < num_cached
        where = _cache_rows(pages, block, column, num_cached, PAGE, C) * page_row_stride
        key = _load(head_keys, where, is_column, dim)
        value = _load(head_values, where, is_column, dim)
        scores = _dot(asked, tl.trans(key), tl.zeros([Q, C], tl.float32))
        scores = tl.where(is_column[None, :], scores, float("-inf"))
        best, total, mixed = _fold(scores, value, scale, best, total, mixed)

    head_keys = new_keys + head * new_head_stride
    head_values = new_values + head * new_head_stride
    before = cached_blocks
    for block in tl.range(tl.maximum(low, before) - before, tl.minimum(high - before, prompt_blocks)):
        new = prompt_first + block * C + column
        where = new.to(tl.int64) * new_row_stride
        is_column = new < prompt_stop
        key = _load(head_keys, where, is_column, dim)
        value = _load(head_values, where, is_column, dim)
        scores = _dot(asked, tl.trans(key), tl.zeros([Q, C], tl.float32))
        scores = tl.where(new[None, :] <= last_seen[:, None], scores, float("-inf"))
        best, total, mixed = _fold(scores, value, scale, best, total, mixed)

    before += prompt_blocks
    if high > before:
        my_segment = tl.load(segment + row, mask=is_row, other=0)
        my_rank = tl.load(rank + row, mask=is_row, other=0)
        my_parent = tl.load(parent + row, mask=is_row, other=0)
        my_visible = tl.load(visible + row, mask=is_row, other=0)
        for block in tl.range(tl.maximum(low, before) - before, high - before):
            new = decode_first + block * C + column
            where = new.to(tl.int64) * new_row_stride
            is_column = new < decode_stop
            key = _load(head_keys, where, is_column, dim)
            value = _load(head_values, where, is_column, dim)
            its_segment = tl.load(segment + new, mask=is_column, other=-9)  # -9: nobody's segment, nobody's parent
            its_rank = tl.load(rank + new, mask=is_column, other=0)
            on_trunk = tl.load(is_trunk + new, mask=is_column, other=0) != 0
            is_seen = (my_segment[:, None] == its_segment[None, :]) & (its_rank[None, :] <= my_rank[:, None])
            is_seen |= (my_parent[:, None] == its_segment[None, :]) & (its_rank[None, :] < my_visible[:, None])
            is_seen |= (my_parent[:, None] == -2) & on_trunk[None, :]  # segments.TRUNK
            scores = _dot(asked, tl.trans(key), tl.zeros([Q, C], tl.float32))
            scores = tl.where(is_seen, scores, float("-inf"))
            best, total, mixed = _fold(scores, value, scale, best, total, mixed)

    is_last = num_parts == 1
    if num_parts > 1:
        owner = tile * tl.num_programs(1) + head
        part = owner * num_splits + split
        tl.store(part_mixed + (part * Q + lane)[:, None] * D + dim[None, :], mixed)
        tl.store(part_best + part * Q + lane, best)
        tl.store(part_total + part * Q + lane, total)
        tl.debug_barrier()  # all threads have stored before one of them says so
        is_last = tl.atomic_add(arrived + owner, 1, sem="acq_rel") == num_parts - 1
        if is_last:
            best, total, mixed = _merge(part_mixed, part_best, part_total, owner * num_splits, num_parts, Q, D, MERGE_STAGES)
            tl.store(arrived + owner, 0)  # for the next launch
    if is_last:
        mixed /= tl.where(total == 0.0, 1.0, total)[:, None]  # the rows that only fill the tile may have seen nothing
        tl.store(out + row[:, None] * width + inside, mixed.to(out.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _cache_rows(pages, block, column, num_cached, PAGE: tl.constexpr, C: tl.constexpr):
    """[C] rows of the page pool of a block of committed tokens (of row 0 of their page's past the last one). int64: pools are large."""
    place = block * C + column
    if PAGE % C == 0:  # the whole block lies in one page
        page = tl.load(pages + block * C // PAGE).to(tl.int64)
        return page * PAGE + (block * C % PAGE + column)
    else:
        page = tl.load(pages + place // PAGE, mask=place < num_cached, other=0).to(tl.int64)
        return page * PAGE + place % PAGE


@triton.jit
def _load(head, where, is_column, dim):
    """[C, D] keys or values, zero where there is no column: a NaN would survive its weight of zero."""
    return tl.load(head + where[:, None] + dim[None, :], mask=is_column[:, None], other=0.0)


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
def _merge(part_mixed, part_best, part_total, first, num_parts, Q: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr):
    """Join the parts of a tile and head in the order of their columns. Past L1, which may hold what other programs have overwritten."""
    lane = tl.arange(0, Q)
    dim = tl.arange(0, D)
    best = tl.full([Q], float("-inf"), tl.float32)
    total = tl.zeros([Q], tl.float32)
    mixed = tl.zeros([Q, D], tl.float32)
    for part in tl.range(first, first + num_parts, num_stages=STAGES):
        its_best = tl.load(part_best + part * Q + lane, cache_modifier=".cg")
        its_total = tl.load(part_total + part * Q + lane, cache_modifier=".cg")
        its_mixed = tl.load(part_mixed + (part * Q + lane)[:, None] * D + dim[None, :], cache_modifier=".cg")
        new_best = tl.maximum(best, its_best)
        anchor = tl.where(new_best == float("-inf"), 0.0, new_best)
        shrink, its_shrink = tl.math.exp2(best - anchor), tl.math.exp2(its_best - anchor)
        total = total * shrink + its_total * its_shrink
        mixed = mixed * shrink[:, None] + its_mixed * its_shrink[:, None]
        best = new_best
    return best, total, mixed
