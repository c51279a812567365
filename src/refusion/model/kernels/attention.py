"""Attention of flat rows over pages and new rows: split-K/V flash decoding in Triton.

The columns of a query tile, [committed tokens | prompt rows | decode rows] of its seat, are cut into blocks and the blocks dealt out in
turn to `splits` programs, so that one long context fills the GPU and a prompt of thousands of rows is shared out too. The program that
arrives last merges the parts. The kernel itself is in `attention_kernel`, its cuts are chosen in `attention_config`.

Batch invariance: with a given `Config` and a given tile size the result of a row depends on the rows of its own seat alone, bit for bit;
the parts are merged in the order of their programs, whichever of them does it. `choose_config` looks at shapes only, so the promise holds
from forward to forward of the same bucket.
"""

import math

import torch
from torch import Tensor

from refusion.model.kernels.attention_config import Config, choose_config, next_power_of_2, padded_rows
from refusion.model.kernels.attention_kernel import attend_kernel
from refusion.model.kernels.launch import launch
from refusion.model.rows import Rows, Spans, Tiles

# T = rows of the forward, N = tiles, H = key/value heads, G = query heads per key/value head, D = head dimension


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
    assert keys.stride(2) == new_keys.stride(2) == 1, "the numbers of a head must be neighbours"
    assert query.is_contiguous(), f"queries strided by {query.stride()}"
    flat = query.view(num_rows, num_heads * head_dim)
    out = flat if in_place else torch.empty_like(flat)
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
        workspace.arrived,
        config.splits,
        num_rows,
        math.log2(math.e) / math.sqrt(head_dim),
        spans.page_table.shape[1],
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
        NEW=config.new_columns,
        PARTS=config.merge_parts,
        CLEAR=not in_place,
        EAGER=config.is_eager,
        LATE=config.is_late,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
