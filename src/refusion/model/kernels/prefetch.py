"""Weights brought to the L2 cache before the kernel that reads them has started.

Every launch loses microseconds to its first and last programs, while the memory idles. Programs that are done spend them asking for what
the next product reads first: the first columns of its rows, for all its programs start there. The cache is asked and nothing is
loaded, so nobody waits, and no result depends on it.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from refusion.model.kernels.launch import overlap
from refusion.model.quantize import QuantizedWeight

LINE = 128  # bytes
MOST_ROWS = 32768  # weight rows of the programs that start together; of a head, only those are worth bringing

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
_LINE = tl.constexpr(LINE)


class Slab(NamedTuple):
    """The first lines of the first rows of a weight, as kernels take it."""

    weight: Tensor
    num_rows: int
    num_lines: int  # of each row; 0 = nothing to bring
    row_bytes: int


def slab_of(weight: Tensor | QuantizedWeight | None, stand_in: Tensor) -> Slab:
    """About `overlap().prefetch_bytes` of the weight, all of it if it is no larger; nothing, with some tensor in its place, for None."""
    size = overlap().prefetch_bytes
    if weight is None or size == 0:
        return Slab(stand_in, 0, 0, 0)
    data = weight.data if isinstance(weight, QuantizedWeight) else weight
    num_rows, row_bytes = min(data.shape[0], MOST_ROWS), data.shape[1] * data.element_size()
    assert data.is_contiguous(), "weights are read as rows of K"
    num_lines = max(1, min(row_bytes, size // num_rows) // LINE)
    is_whole = num_rows * row_bytes <= size
    return Slab(data, num_rows, -(-row_bytes // LINE) if is_whole else num_lines, row_bytes)


@triton.jit
def prefetch_share(weight, num_rows, num_lines, row_bytes, program, num_programs, BLOCK: tl.constexpr):
    """Ask for the part of a `Slab` that falls to this program of `num_programs`, `BLOCK` lines at a time."""
    if not _INTERPRETED:
        share = tl.cdiv(num_rows * num_lines, num_programs)
        begin = program * share
        end = tl.minimum(begin + share, num_rows * num_lines)
        for first in tl.range(begin, end, BLOCK, num_stages=1):
            line = tl.minimum(first + tl.arange(0, BLOCK), end - 1)
            # The first byte of a line's part of a row lies in the row: 1 <= num_lines <= lines that a row touches.
            offset = (line // num_lines).to(tl.int64) * row_bytes + line % num_lines * _LINE
            ask(weight.to(tl.int64) + offset)


@triton.jit
def ask(addresses):
    """Ask the L2 cache for the lines at these addresses."""
    if not _INTERPRETED:
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1)
