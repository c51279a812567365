"""Attention of flat rows over pages and new rows: split-K/V flash decoding in Triton.

The columns of a query tile, [committed tokens | prompt rows | decode rows] of its seat, are cut into blocks and the blocks dealt out in
turn to `splits` programs, so that one long context fills the GPU and a prompt of thousands of rows is shared out too. A second kernel
merges the parts. The kernels themselves are in `attention_kernel`, their cuts are chosen in `attention_config`.

Batch invariance: with a given `Config` and a given tile size the result of a row depends on the rows of its own seat alone, bit for bit;
the parts are merged in the order of their programs. `choose_config` looks at shapes only, so the promise holds from forward to forward of
the same bucket.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from refusion.model.kernels.attention_config import MOST_PROGRAMS, Config, choose_config, next_power_of_2, padded_rows
from refusion.model.kernels.attention_kernel import attend_kernel, merge_kernel
from refusion.model.kernels.launch import launch
from refusion.model.rows import Rows, Spans, Tiles

# T = rows of the forward, N = tiles, H = key/value heads, G = query heads per key/value head, D = head dimension

MERGED_LANES = 8
"""Query rows that a program of the merging kernel has: few, so that there are many programs. They divide every tile, 16 rows at least."""
MERGED_PARTS = 6
"""Parts that it takes at a time: what most contexts have. Loads that are masked cost their instructions."""


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

    @classmethod
    def for_device(cls, block: int, num_groups: int, head_dim: int, device: torch.device) -> "Workspace":
        """For tiles of at most `block` rows, as many parts as there are programs at most."""
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(MOST_PROGRAMS * num_processors, padded_rows(block, num_groups), head_dim, device)


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
    *,
    in_place: bool = False,
) -> Tensor:
    """Attention of the queries [T, HG, D] over the committed tokens and the new rows of their seats -> [T, HG * D]; padding gives 0.

    `new_keys`, `new_values` [T, H, D] are this layer's new rows, `keys`, `values` [cache rows, H, D] its pages. The tiles must cover all
    rows that are not padding; the prompt rows of a seat must come in the order of their ranks. in_place: the result takes the place of
    the queries, and padding rows keep theirs: nobody needs to look for them.

    With programmatic dependent launch and `Config.is_eager`, the kernel launched right before may write nothing but queries and new rows.
    """
    num_rows, num_heads, head_dim = query.shape
    assert query.is_contiguous(), f"queries strided by {query.stride()}"
    out = query if in_place else torch.empty_like(query)
    _attend(query, new_keys, new_values, keys, values, out, rows, spans, tiles, workspace, config, None)
    return out.view(num_rows, num_heads * head_dim)


def rotate_and_attend(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
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
    """`rotate_and_store` and `attend` in one launch; the result [T, HG * D] takes the place of the queries in qkv.

    As there, padding rows of `new_keys` and `new_values` are not written, nor those of the result, which keep their queries.
    """
    assert all(tensor.is_contiguous() for tensor in (qkv, cos, sin)), "rows and tables must be contiguous"
    assert new_keys.stride() == new_values.stride(), "keys and values must be laid out alike"
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    query, raw_keys, raw_values = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    rotation = Rotation(positions, cos, sin, q_norm, k_norm, eps, new_keys, new_values)
    _attend(query, raw_keys, raw_values, keys, values, query, rows, spans, tiles, workspace, config, rotation)
    return qkv[:, : num_heads * head_dim]


class Rotation(NamedTuple):
    """How queries and new keys are normalised and rotated, and where new rows are left."""

    positions: Tensor
    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    new_keys: Tensor
    new_values: Tensor


def _attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    rows: Rows,
    spans: Spans,
    tiles: Tiles,
    workspace: Workspace,
    config: Config | None,
    rotation: Rotation | None,
) -> None:
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = new_keys.shape[1]
    num_groups = num_heads // num_kv_heads
    num_tiles, tile_rows = tiles.seat.shape[0], padded_rows(tiles.block, num_groups)
    if config is None:
        config = choose_config(num_tiles, num_kv_heads, tile_rows, head_dim, query.dtype, workspace.num_parts, tiles.is_long)
    num_parts = num_tiles * num_kv_heads * config.splits
    assert config.splits == 1 or (
        num_parts <= workspace.num_parts and tile_rows <= workspace.tile_rows and head_dim <= workspace.head_dim
    ), f"{num_parts} parts of {tile_rows} x {head_dim} do not fit a workspace of {tuple(workspace.mixed.shape)}"
    layouts = (keys.stride(), new_keys.stride())
    assert layouts == (values.stride(), new_values.stride()), "keys and values must be laid out alike"
    assert keys.stride(2) == new_keys.stride(2) == 1, "the numbers of a head must be neighbours"
    assert query.stride() == out.stride(), f"queries strided by {query.stride()}, results by {out.stride()}"
    kept = rotation or Rotation(rows.positions, query, query, None, None, 0.0, new_keys, new_values)
    launch(
        attend_kernel,
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
        kept.positions,
        kept.cos,
        kept.sin,
        query if kept.q_norm is None else kept.q_norm,
        query if kept.k_norm is None else kept.k_norm,
        kept.new_keys,
        kept.new_values,
        config.splits,
        num_rows,
        math.log2(math.e) / math.sqrt(head_dim),
        spans.page_table.shape[1],
        spans.page_table.stride(0),
        keys.stride(0),
        keys.stride(1),
        new_keys.stride(0),
        new_keys.stride(1),
        query.stride(0),
        kept.new_keys.stride(0),
        kept.new_keys.stride(1),
        kept.eps,
        PAGE=spans.page_size,
        BLOCK=tiles.block,
        G=num_groups,
        G_PADDED=next_power_of_2(num_groups),
        Q=tile_rows,
        D=head_dim,
        C=config.columns,
        NEW=config.new_columns,
        SHARED=config.splits > 1,
        CLEAR=out is not query,
        EAGER=config.is_eager,
        LATE=config.is_late,
        LONG=config.is_long,
        ROTATES=rotation is not None,
        HAS_NORM=kept.q_norm is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if config.splits > 1:
        _merge(out, num_kv_heads, num_groups, head_dim, spans, tiles, workspace, config)


def _merge(
    out: Tensor, num_kv_heads: int, num_groups: int, head_dim: int, spans: Spans, tiles: Tiles, workspace: Workspace, config: Config
) -> None:
    """The parts in the workspace to the rows of `out`."""
    tile_rows = padded_rows(tiles.block, num_groups)
    launch(
        merge_kernel,
        (tiles.seat.shape[0], num_kv_heads, tile_rows // MERGED_LANES),
        out,
        workspace.mixed,
        workspace.best,
        workspace.total,
        spans.cached,
        spans.prompt_start,
        spans.prompt_end,
        spans.row_start,
        spans.row_end,
        tiles.seat,
        tiles.first,
        tiles.end,
        config.splits,
        out.stride(0),
        G=num_groups,
        G_PADDED=next_power_of_2(num_groups),
        Q=tile_rows,
        D=head_dim,
        C=config.columns,
        NEW=config.new_columns,
        LANES=MERGED_LANES,
        PARTS=MERGED_PARTS,
        num_warps=4,
    )
