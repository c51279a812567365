"""Tile shapes of the weight-streaming product: measured ones from tuned.json, a heuristic for the rest.

At few rows the weights dominate, so what counts is bytes in flight: every program of a launch should be resident at once, all together
holding a few megabytes of loads (memory latency times bandwidth), and every weight should be read once. From about a hundred rows on,
the tensor cores and the re-reading of x from the L2 cache (once per `block_n` weight rows) count too, so tiles grow.
"""

import functools
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["norm_linear", "norm_gated", "linear_add", "readout"]

SKINNY_ROWS = 64
"""Above so many rows an unmeasured bfloat16 product goes to cuBLAS."""

NUM_PROGRAMS = 132
"""Streaming multiprocessors of an H100; fewer programs leave bandwidth unused."""

SHARED_BYTES = 96 * 1024
"""Shared memory the heuristic spends on a program: all of a small GPU's multiprocessor, less than half of an H100's."""

WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "float8": 1}
"""Bytes of a weight."""

TUNED = Path(__file__).with_name("tuned.json")
"""What an H100 measured."""
TUNED_BY_CARD = {"H200": Path(__file__).with_name("tuned-h200.json")}
"""By a word of the card's name (a GH200 is no H200): entries that take the place of those, where memory and arithmetic are in another
balance."""


@dataclass(frozen=True, slots=True)
class Config:
    """How one product is cut into programs. All sizes are powers of two, at least 16, but for split_k and num_stages."""

    block_n: int  # weight rows of a tile; a gated product has half gate, half up rows
    block_k: int
    split_k: int  # programs that share a tile, each with a part of K; the last to arrive adds up
    num_stages: int  # of the software pipeline; the loads in flight
    num_warps: int
    block_t: int  # rows of x of a tile
    extra_t: int = 0  # rows of a second accumulator, 0 = none: 192 rows are 128 + 64, where one power of two would waste a quarter
    lanes: int = 1  # parts of a block of K multiplied side by side, one a warp; for small tiles, up to num_warps
    prenorm: bool = False  # normalise x in a kernel of its own first, instead of inside the loop of every program
    turned: bool = False  # x as the left operand: 8-bit weights then reach the tensor cores through shared memory, not registers
    extra_n: int = 0  # weight rows of a second piece of the tile, 0 = none: 192 make 128 tiles of 24,576, one for a multiprocessor each
    owes_sum: bool = False  # the parts of K are not added up: the norm that follows does it on its way (`owed.Owed`)

    @property
    def rows(self) -> int:
        return self.block_t + self.extra_t

    @property
    def weight_rows(self) -> int:
        return self.block_n + self.extra_n

    @property
    def is_wide(self) -> bool:
        """Whether `wide_kernel` runs it."""
        return self.extra_n > 0 or self.owes_sum

    def tiles(self, num_rows: int, num_out: int) -> tuple[int, int]:
        """Row tiles and weight tiles of a product."""
        return -(-num_rows // self.rows), -(-num_out // self.weight_rows)

    def shared_bytes(self, width: int) -> int:
        """Shared memory of a program, at most: weights have `width` bytes, x has 2."""
        stage = self.block_k * (width * self.weight_rows + 2 * self.rows)
        return self.num_stages * stage + (2 * self.block_k * self.block_n if self.turned and width == 1 else 0)  # a tile lies converted

    def constants(self) -> dict[str, int | bool]:
        """What every kernel for products is compiled with."""
        return {
            "BLOCK_T": self.block_t,
            "EXTRA_T": self.extra_t,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "TURNED": self.turned,
            "NUM_STAGES": self.num_stages,
            "num_stages": self.num_stages,
            "num_warps": self.num_warps,
        }

    def to_dict(self) -> dict[str, int | bool]:
        return asdict(self)


def choose_config(num_out: int, num_in: int, num_rows: int, kind: Kind, dtype: str) -> Config | None:
    """Tiles for `num_rows` rows of x times a weight [num_out, num_in] stored as `dtype`; None: the library's product is faster."""
    for most_rows, config in tuned(card()).get((kind, num_out, num_in, dtype), ()):
        if num_rows <= most_rows:
            if config is None or config.shared_bytes(WIDTHS[dtype]) <= shared_limit():
                return config
            break  # a smaller card than the one that measured
    if dtype == "float32" and kind != "readout":
        return None
    if dtype in ("bfloat16", "float16") and kind != "readout" and num_rows > SKINNY_ROWS:
        return None
    return heuristic(num_out, num_in, num_rows, kind, dtype)


def heuristic(num_out: int, num_in: int, num_rows: int, kind: Kind, dtype: str) -> Config:
    """A sound choice for any shape, without measurements."""
    block_t, extra_t = cover(num_rows)
    rows = block_t + extra_t
    is_quantized = WIDTHS[dtype] == 1
    most = 32 if is_quantized and rows <= 32 else 64 if rows <= 64 else 128  # narrow ones for lanes: see `Config.turned` for why not wgmma
    block_n = next((size for size in (128, 64, 32) if size <= most and num_out // size >= NUM_PROGRAMS - 4), 16)
    if rows > 64:
        block_n = max(block_n, 64)  # below, the tensor cores of Hopper cannot be used through wgmma
    is_whole = num_in <= 1024 and rows <= 32 and block_n <= 32 and WIDTHS[dtype] <= 2
    if is_whole:
        block_k = next_power(num_in)  # no loop at all: one latency, and the norm is exact
    else:
        block_k = min(256 if block_n <= 32 and rows <= 32 else 128 if rows <= 64 else 64, next_power(num_in))
    tiles, blocks = -(-num_out // block_n), -(-num_in // block_k)
    # At least 4 blocks a part, or the pipeline never fills and adding up the parts costs more than it wins.
    split_k = max(1, min(2 * NUM_PROGRAMS // tiles, blocks // 4)) if tiles < NUM_PROGRAMS // 2 and kind != "readout" else 1
    stage = block_k * (block_n * WIDTHS[dtype] + rows * (4 if dtype == "float32" else 2))
    num_stages = max(2, min(5, SHARED_BYTES // stage))
    num_warps = 8 if is_whole or block_n * rows >= 128 * 128 else 4
    lanes = num_warps if block_n <= 32 and rows <= 32 and block_k >= 32 * num_warps else 1
    return Config(
        block_n, block_k, split_k, num_stages, num_warps, block_t, extra_t, lanes, prenorm=rows > 64, turned=is_quantized and rows > 64
    )


def invariant_config(num_out: int, num_in: int, num_rows: int, kind: Kind) -> Config:
    """Tiles with which a row of the result does not depend, bit for bit, on `num_rows`; for weights of at most 16 bits.

    What decides how a sum over K is rounded is the same for all numbers of rows: split_k, the blocks that the parts take in turn, one
    lane, and the tensor core instruction (warp groups from 64 weight rows on, single warps below). block_t only says how many columns an
    instruction has. Norms are taken before, by a program a row. A readout also sums over its tile of the vocabulary, in an order that
    hangs on the layout of the tile, so its tiles are all alike.
    """
    is_small = num_out < 64 * 48  # there would be too few tiles of 64
    block_n, block_k = 16 if is_small else 64, min(64, next_power(num_in))
    tiles, blocks = -(-num_out // block_n), -(-num_in // block_k)
    split_k = 1 if kind == "readout" else max(1, min(8, 2 * NUM_PROGRAMS // tiles, blocks // 4))
    block_t = 64 if kind == "readout" else min(64 if is_small else 128, next_power(num_rows))
    return Config(block_n, block_k, split_k, 4 if block_t > 64 else 5, 4, block_t, prenorm=True)


def cover(num_rows: int) -> tuple[int, int]:
    """block_t and extra_t that hold `num_rows` rows with little waste; past 256 rows, tiles of 128 in the grid."""
    if num_rows > 256:
        return 128, 0
    power = next_power(num_rows)
    extra = next_power(num_rows - power // 2)  # 192 -> 128 + 64
    return (power // 2, extra) if extra < power // 2 else (power, 0)


def next_power(size: int) -> int:
    """The smallest power of two that is at least `size` and 16."""
    return max(16, 1 << (size - 1).bit_length())


def key(kind: Kind, num_out: int, num_in: int, num_rows: int, dtype: str) -> str:
    """Name of an entry in tuned.json."""
    return f"{kind}:{num_out}:{num_in}:{num_rows}:{dtype}"


def tuned_entries(known: str | None) -> dict[str, dict[str, Any] | None]:
    """Measured choices by `key` for a card of TUNED_BY_CARD; None = any other."""
    entries = json.loads(TUNED.read_text())
    return entries if known is None else entries | json.loads(TUNED_BY_CARD[known].read_text())


@functools.cache
def card() -> str | None:
    """Which card of TUNED_BY_CARD this one is, once for the process: on a machine with several kinds the current device decides.

    REFUSION_CARD names it where kernels are compiled by processes that must not touch it.
    """
    name = os.environ.get("REFUSION_CARD") or (torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    return next((known for known in TUNED_BY_CARD if known in name.split()), None)


@functools.cache
def shared_limit() -> int:
    """Bytes of shared memory that a program may have, once for the process like `card`; no limit where nothing is run."""
    if os.environ.get("REFUSION_CARD") or not torch.cuda.is_available():
        return sys.maxsize
    return getattr(torch.cuda.get_device_properties(), "shared_memory_per_block_optin", sys.maxsize)  # NVIDIA's cards have it


@functools.cache
def tuned(known: str | None) -> dict[tuple[str, int, int, str], list[tuple[int, Config | None]]]:
    """Measured choices by product, in order of rows; an entry serves every number of rows down to the next smaller one."""
    table: dict[tuple[str, int, int, str], list[tuple[int, Config | None]]] = {}
    for name, entry in tuned_entries(known).items():
        kind, num_out, num_in, num_rows, dtype = name.split(":")
        config = None if entry is None else Config(**entry)
        table.setdefault((kind, int(num_out), int(num_in), dtype), []).append((int(num_rows), config))
    return {product: sorted(entries, key=lambda entry: entry[0]) for product, entries in table.items()}
