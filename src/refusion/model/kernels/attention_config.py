"""How the attention kernel is cut and compiled for a shape. Shapes alone decide: what a graph was captured with fits every content."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

# Q = block * G: query rows of a tile, padded; D = head dimension

INVARIANT_SPLITS = 4  # enough for some thousand cached tokens; the workspace of a large batch grows with it
MAX_SPLITS = 32  # more parts than this cost the merging program more than their readers save
NARROW_HEAD = 64
"""Heads of at most so many numbers are cut as an H100's sweep said (results/attention-*-h100.json), wider ones as an H200's."""
LONG_SPLITS = 4  # up to here a long context is worth two programs a multiprocessor


@dataclass(frozen=True, slots=True)
class Config:
    """How the kernel is cut and compiled."""

    splits: int
    """Programs that share the columns of a tile."""
    columns: int
    """Committed tokens of a block."""
    new_columns: int
    """New rows of a block."""
    num_warps: int
    num_stages: int
    """Blocks of K/V in flight."""
    merge_parts: int = 1
    """Parts the merging program reads at a time; a power of two."""
    is_eager: bool = True
    """Look up tiles, spans and pages, and ask the L2 cache for the first block, before the previous kernel has ended: see `attend`."""
    is_late: bool = False
    """Let the next kernel start when the columns are done instead of right at the beginning."""
    is_long: bool = False
    """For long contexts: parts are merged by many programs of a kernel of its own; whole blocks are taken without a mask."""


Changes = Mapping[str, int | bool]
"""Fields of `Config`."""
_changes: Changes = {}


def set_changes(changes: Changes) -> None:
    """For measurements: what `choose_config` returns otherwise than it would, `splits` at most. Graphs captured before keep theirs."""
    global _changes
    _changes = dict(changes)


def choose_config(
    num_tiles: int, num_kv_heads: int, tile_rows: int, head_dim: int, dtype: torch.dtype, num_parts: int, is_long: bool = False
) -> Config:
    """The configuration for so many tiles of `tile_rows` = Q query rows; `num_parts` is what the workspace has room for.

    is_long: the contexts are so long that reading them takes longer than merging parts.
    """
    config = _chosen(num_tiles, num_kv_heads, tile_rows, head_dim, dtype, num_parts, is_long)
    if not _changes:
        return config
    return replace(config, **{**_changes, "splits": min(config.splits, int(_changes.get("splits", config.splits)))})


def _chosen(num_tiles: int, num_kv_heads: int, tile_rows: int, head_dim: int, dtype: torch.dtype, num_parts: int, is_long: bool) -> Config:
    splits = choose_splits(num_tiles, num_kv_heads, num_parts)
    if is_long and head_dim > NARROW_HEAD:
        splits = max(splits, min(LONG_SPLITS, choose_splits(num_tiles, num_kv_heads, 2 * num_parts)))
    if dtype.itemsize > 2:  # exact float32 products take their operands through registers
        return Config(splits, columns=32, new_columns=32, num_warps=8, num_stages=2)
    is_crowded = num_tiles * num_kv_heads * splits > num_parts // 2  # two programs of a multiprocessor share its memory
    # Swept on an H100 (results/attention-*-h100.json). Eight warps hide the look-ups of tiny tiles and bring wide heads faster.
    is_medium = 16 < tile_rows <= 64
    num_warps = 4 if is_medium and (head_dim <= 64 or tile_rows > 32 or is_crowded) else 8
    columns = 64 if is_crowded and tile_rows <= 64 else 128
    new_columns = 16 if tile_rows <= 16 else 32 if splits > 1 else 64  # tiles that small are those of seats with a row or few
    num_stages = 3 if tile_rows > 64 else 2
    if head_dim > NARROW_HEAD and tile_rows >= 64:  # tiles of 64 query rows leave room for a second program then
        columns, num_stages = 64, 3
    return Config(splits, columns, new_columns, num_warps, num_stages, parts_at_a_time(tile_rows, head_dim, num_warps))


def invariant_config() -> Config:
    """One for all shapes: the parts of a tile then follow from the spans of its own seat alone."""
    return Config(INVARIANT_SPLITS, columns=64, new_columns=32, num_warps=8, num_stages=2, merge_parts=2)


def choose_splits(num_tiles: int, num_kv_heads: int, num_parts: int) -> int:
    """So many that there is about one program per multiprocessor, for which the workspace has two parts; one (no merge) from then on."""
    return max(1, min(MAX_SPLITS, num_parts // 2 // (num_tiles * num_kv_heads)))


def parts_at_a_time(tile_rows: int, head_dim: int, num_warps: int) -> int:
    """Parts that fit into 128 registers of every thread."""
    return max(1, min(8, 128 * 32 * num_warps // (tile_rows * head_dim)))


def padded_rows(block: int, num_groups: int) -> int:
    """Query rows Q of a tile: every row brings its group of heads; matrix units want powers of two, 16 at least."""
    return max(16, next_power_of_2(block) * next_power_of_2(num_groups))


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
