"""Which shapes a forward may have. Few enough that each is captured once and replayed often, close enough that little is padded."""

from bisect import bisect_left
from dataclasses import dataclass

SEATS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PROMPT_ROWS = (0, 32, 128, 512, 2048, 8192)
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Decode rows; beyond the last one, multiples of a quarter of the next power of two."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a CUDA graph is captured for."""

    num_seats: int
    num_prompt_rows: int
    num_rows: int
    candidates: int
    block: int
    """Rows of a query tile."""

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


def seat_bucket(num_seats: int) -> int:
    """Seats a forward for `num_seats` running requests is captured for."""
    return at_least(SEATS, num_seats)


def row_bucket(num_rows: int) -> int:
    """Decode rows a forward for `num_rows` needed ones is captured for."""
    if num_rows <= ROWS[-1]:
        return at_least(ROWS, num_rows)
    step = 1 << max((num_rows - 1).bit_length() - 3, 0)
    return -(-num_rows // step) * step
