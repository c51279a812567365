"""How the attention kernel is cut and compiled for a shape. Shapes alone decide: what a graph was captured with fits every content."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

# Q = block * G: query rows of a tile, padded; D = head dimension

INVARIANT_SPLITS = 4  # enough for some thousand cached tokens; the workspace of a large batch grows with it
MAX_SPLITS = 32  # more parts than this cost the merging programs more than their readers save
NARROW_HEAD = 64
"""Heads of at most so many numbers leave room for two programs a multiprocessor, whatever their blocks; wider ones do not."""
MOST_PROGRAMS = 2
"""Programs a multiprocessor, at most, and parts that a workspace has for it."""
MANY_SPLITS = 6
"""From here on one program a multiprocessor is enough; with fewer each has many blocks, and two hide each other's waiting."""


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
    is_eager: bool = True
    """Look up tiles, spans and pages, and ask the L2 cache for the first block, before the previous kernel has ended: see `attend`."""
    is_late: bool = False
    """Let the next kernel start when the columns are done instead of right at the beginning."""
    is_long: bool = False
    """Take the blocks that lie within the context as a whole in a loop of their own, without a mask."""


Changes = Mapping[str, int | bool]
"""Fields of `Config`; num_programs: a multiprocessor, at most, instead of `splits`."""
_changes: Changes = {}


def set_changes(changes: Changes) -> None:
    """For measurements: what `choose_config` returns otherwise than it would. Graphs captured before keep theirs."""
    global _changes
    _changes = dict(changes)


def choose_config(
    num_tiles: int, num_kv_heads: int, tile_rows: int, head_dim: int, dtype: torch.dtype, num_parts: int, is_long: bool = False
) -> Config:
    """The configuration for so many tiles of `tile_rows` = Q query rows; `num_parts` is what the workspace has room for.

    is_long: the contexts are so long that reading them takes most of the time.
    """
    changes = dict(_changes)
    splits = choose_splits(num_tiles, num_kv_heads, num_parts // MOST_PROGRAMS)
    is_crowdable = head_dim <= NARROW_HEAD or is_long
    num_programs = int(changes.pop("num_programs", MOST_PROGRAMS if splits < MANY_SPLITS and is_crowdable else 1))
    if num_programs > 1:
        splits = choose_splits(num_tiles, num_kv_heads, num_parts * num_programs // MOST_PROGRAMS)
    config = _chosen(splits, tile_rows, head_dim, dtype, is_long)
    return replace(config, **changes) if changes else config


def _chosen(splits: int, tile_rows: int, head_dim: int, dtype: torch.dtype, is_long: bool) -> Config:
    if dtype.itemsize > 2:  # exact float32 products take their operands through registers
        return Config(splits, columns=32, new_columns=32, num_warps=8, num_stages=2)
    num_warps = 4 if tile_rows <= 64 else 8
    new_columns = 16 if tile_rows <= 16 else 32 if splits > 1 else 64  # tiles that small are those of seats with a row or few
    columns, num_stages = 128, 2 if tile_rows <= 64 else 3
    if head_dim > NARROW_HEAD and (tile_rows > 64 or (tile_rows == 64 and (is_long or splits == 1))):
        columns, num_stages = 64, 3  # leaves room for a second program where there is one; larger tiles would fill a small card alone
    return Config(splits, columns, new_columns, num_warps, num_stages, is_long=is_long)


def invariant_config() -> Config:
    """One for all shapes: the parts of a tile then follow from the spans of its own seat alone."""
    return Config(INVARIANT_SPLITS, columns=64, new_columns=32, num_warps=8, num_stages=2)


def choose_splits(num_tiles: int, num_kv_heads: int, num_programs: int) -> int:
    """So many that there are at most `num_programs` programs; one (nothing to merge) where there are more tiles and heads."""
    return max(1, min(MAX_SPLITS, num_programs // (num_tiles * num_kv_heads)))


def padded_rows(block: int, num_groups: int) -> int:
    """Query rows Q of a tile: every row brings its group of heads; matrix units want powers of two, 16 at least."""
    return max(16, next_power_of_2(block) * next_power_of_2(num_groups))


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
