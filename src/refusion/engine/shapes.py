"""Which shapes a forward may have. Few enough that each is captured once and replayed often, close enough that little is padded."""

from bisect import bisect_left
from typing import NamedTuple

from refusion.model.config import ModelConfig
from refusion.model.kernels.attention_config import NARROW_HEAD

TILE_ROWS = 16
"""Rows of a query tile, where one number must do for all shapes."""
WIDE_QUERY_ROWS = 64
"""Query rows of a tile of wide heads, of a short context: more fill the registers of their program."""
LONE_TILE_ROWS = 4
"""The same where every request has one row: the matrix units want no more."""
LONG_CONTEXT = 2048
"""Committed tokens from which on reading them again for every tile costs more than few programs do."""
SEATS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PROMPT_ROWS = (0, 32, 128, 512, 2048, 8192)
ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Decode rows of more than one seat; beyond the last one, powers of two."""
ROWS_ALONE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Decode rows of a single seat, where few shapes occur; beyond the last one, as for many."""


class Shape(NamedTuple):
    """What a CUDA graph is captured for. A tuple, because it is looked up before every forward."""

    num_seats: int
    num_prompt_rows: int
    num_rows: int
    candidates: int
    block: int
    """Rows of a query tile."""
    is_long: bool = False
    """Some context is longer than LONG_CONTEXT, more than one row of a request reads it, and heads are wide: attention is cut for that."""

    @property
    def num_prompt_tiles(self) -> int:
        """Enough for any division of the prompt rows among the seats."""
        return min(self.num_prompt_rows, self.num_prompt_rows // self.block + self.num_seats)

    @property
    def num_tiles(self) -> int:
        return self.num_prompt_tiles + min(self.num_rows, self.num_rows // self.block + self.num_seats)


def at_least(sizes: tuple[int, ...], size: int) -> int:
    """The smallest of the sizes that holds `size`; `size` itself if none does."""
    place = bisect_left(sizes, size)
    return sizes[place] if place < len(sizes) else size


def tile_rows(num_rows: int, num_cached: int = 0, *, wide_groups: int = 0) -> int:
    """Rows of a query tile in a forward of so many, the longest context being `num_cached`: what an H200 was fastest with.

    Small tiles make more programs, large ones read the context less often, which costs more where heads are wide
    (`results/attention-in-place-*-h200.json`). wide_groups: see `wide_groups`; with more than four a tile of as many query rows has fewer.
    """
    if num_cached > LONG_CONTEXT:
        return 16 if num_rows <= 192 else 32
    if num_rows <= 16:
        return 4
    if wide_groups:
        return min(16, max(4, WIDE_QUERY_ROWS // power_of_two(wide_groups)))
    return 8 if num_rows <= 48 else 16


def wide_groups(config: ModelConfig) -> int:
    """Query heads for each key/value head, where heads are wide; 0 where they are not."""
    return config.num_attention_heads // config.num_key_value_heads if config.head_dim > NARROW_HEAD else 0


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`."""
    return 1 << max(size - 1, 0).bit_length()


def seat_bucket(num_seats: int) -> int:
    """Seats a forward for `num_seats` running requests is captured for."""
    return at_least(SEATS, num_seats)


def row_bucket(num_rows: int, num_seats: int = 2, *, has_prompt: bool = False) -> int:
    """Decode rows a forward for `num_rows` needed ones is captured for. With prompt rows, which cost more, padding is cheap."""
    if has_prompt:
        return power_of_two(num_rows)
    sizes = ROWS_ALONE if num_seats == 1 and num_rows <= ROWS_ALONE[-1] else ROWS
    return at_least(sizes, num_rows) if num_rows <= sizes[-1] else power_of_two(num_rows)
