"""The device side of a decoder over flat rows: all state of the running requests in tensors, two calls around each forward.

`lay_out` writes the rows of the next forward, `settle` turns its readout into the next state. Nothing in them looks at data from the
host, so a whole forward can be captured in a CUDA graph; the host learns what happened from a report of numbers, whenever it likes. A
request sits on a *seat*; who sits where, and the pages of the cache, are the engine's business.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from refusion.decoding.forward import Readout
from refusion.model.rows import Rows, Spans, Tiles

# B = seats, T = decode rows of a forward, M = rows a seat may keep of one forward, R = report columns

IS_DONE, NUM_FORWARDS, OVERFLOW, NUM_ROWS = range(4)
"""The first columns of every report: nothing left to write; forwards so far; rows that did not fit (must be 0); rows of this forward."""
NUM_COMMON = 4


@dataclass(frozen=True, slots=True)
class SlotNews:
    """What happened to one slot in one forward."""

    slot: int
    offset: int  # place of its first token in the answer
    token_ids: tuple[int, ...]
    score: float = 0.0  # planned: confidence of the first token
    is_infill: bool = False  # planned: drafts of masks behind a draft that failed, not of a plan


@dataclass(frozen=True, slots=True)
class SeatReport:
    """What one forward did for one request, on the host."""

    is_done: bool
    num_forwards: int
    num_rows: int
    committed: list[SlotNews]  # tokens that became final
    verified: list[SlotNews]  # tokens of verified slots that stand now
    infilled: list[SlotNews]  # the same of slots in infill
    planned: list[SlotNews]  # new drafts


class Rounds(Protocol):
    """A decoder whose state lives on the device. The methods up to `restore` are called between forwards."""

    report_width: int
    num_kept: int
    """M: rows a seat may keep of one forward."""
    fresh_rows: int
    """Decode rows that hold the first forward of a seat just admitted."""
    given_ids: Tensor
    """[at least T] int32: by decode row, the token whose probability is wanted."""
    seeds: Tensor
    """[at least T] int64: noise keys by decode row."""
    attempts: Tensor
    """[at least T] int32: noise keys by decode row."""
    source: Tensor
    """[B * M] int32: flat rows to keep, -1 for none; seat b has entries b * M to (b + 1) * M."""
    target: Tensor
    """[B * M] int32: the cache rows they go to."""
    report: Tensor
    """[B, R] int32, for `read` and `num_rows`."""

    def admit(self, seat: int, *, prompt_length: int, seed: int, max_tokens: int, last_token: int = -1) -> None:
        """Start a request. last_token: of the prompt; rounds that run it as a decode row do so in their first forward."""
        ...

    def retire(self, seat: int) -> None:
        """The seat takes no more rows."""
        ...

    def move(self, source: int, target: int) -> None:
        """Put the request of one seat on another as well."""
        ...

    def snapshot(self, seat: int) -> dict[str, Tensor]:
        """The whole state of a seat in host memory."""
        ...

    def restore(self, seat: int, snapshot: dict[str, Tensor]) -> None:
        """Go on from a snapshot, on any seat."""
        ...

    def lay_out(
        self,
        rows: Rows,
        spans: Spans,
        *,
        start: int,
        num_seats: int,
        candidates: int,
        tiles: Tiles | None = None,
        tile_start: int = 0,
    ) -> None:
        """Fill all T decode rows, whose first is flat row `start`, for the first seats; also `spans`, and `tiles` from `tile_start` on."""
        ...

    def settle(self, readout: Readout, spans: Spans, *, num_seats: int, candidates: int) -> None:
        """Judge the forward laid out last by the readout [T] of its decode rows: next state, rows to keep, report."""
        ...

    def num_rows(self, report: np.ndarray, candidates: int) -> np.ndarray:
        """[B] decode rows each seat needs in its next forward, from the reports [B, R] of its last one."""
        ...

    def read(self, report_row: np.ndarray) -> SeatReport:
        """What a report [R] says."""
        ...
