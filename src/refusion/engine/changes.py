"""Changes to the state of seats, collected on the host and brought to the device before the next forward, whoever comes, moves or goes.

Only the seats that change are written: what the device knows of the others may be ahead of the host.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.seats import SeatTable

# B = seats, X = columns of a table, N = seats that change

TARGET, SOURCE, LENGTH, LINE = range(4)
"""Columns of a change of the table: the seat that changes, the seat whose line it gets, how many columns are written anew, and those."""
SIZES = (2, 8, 32, 128, 512)
"""Numbers of changes that a graph is captured for."""


class Upload:
    """Lines of numbers for the device, staged on the host. On a GPU all that is done with them there is one graph launch.

    What is done is `put`, always the same: it is called with the changes on the device, the last one of which may be there repeatedly.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, pool: Any = None) -> None:
        """shape: most changes, and numbers of each. pool: memory of graphs, which those of one lane share."""
        self._pool, self._is_cuda = pool, device.type == "cuda"
        self._staging = torch.zeros(shape, dtype=dtype, pin_memory=self._is_cuda)
        self._sent = torch.zeros_like(self._staging, device=device)
        self.lines = self._staging.numpy()
        """Where changes are written, from the first line on."""
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # by number of changes; None: has run once

    def send(self, count: int, put: Callable[[Tensor], None]) -> None:
        """Bring the first lines to the device. What was sent before must have arrived, or have been the same."""
        place, most = bisect_left(SIZES, count), len(self.lines)
        size = min(SIZES[place], most) if place < len(SIZES) else most
        self.lines[count:size] = self.lines[count - 1]
        graph = self._graphs.get(size)
        if graph is not None:
            graph.replay()
        elif self._is_cuda and size in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._run(size, put)
            self._graphs[size] = graph
            graph.replay()
        else:
            self._run(size, put)
            self._graphs[size] = None

    def warm(self, unchanged: np.ndarray, put: Callable[[Tensor], None]) -> None:
        """Make all sizes ready, with a change that changes nothing."""
        for size in (*(size for size in SIZES if size < len(self.lines)), len(self.lines)):
            for _ in range(2):
                self.lines[:size] = unchanged
                self.send(size, put)

    def _run(self, size: int, put: Callable[[Tensor], None]) -> None:
        changes = self._sent[:size]
        changes.copy_(self._staging[:size], non_blocking=True)
        put(changes)


class QueuedTable(SeatTable):
    """The same table, whose changes wait for `apply`."""

    def __init__(self, table: SeatTable, pool: Any = None) -> None:
        """Takes the place of `table` and shares its memory. pool: see `Upload`."""
        self.columns, self.device, self.first, self.values = table.columns, table.device, table.first, table.values
        num_seats, num_columns = self.values.shape
        self._queue: dict[int, tuple[int, list[int]]] = {}  # seat -> (seat whose line it gets, its first columns)
        self._upload = Upload((num_seats, LINE + num_columns), torch.int64, self.device, pool)
        self._place = torch.arange(num_columns, device=self.device)

    def write(self, seat: int, values: dict[str, int | list[int]]) -> None:
        assert len(values) <= len(self.columns), f"{list(values)} are more groups than {list(self.columns)}"
        line: list[int] = []
        for (name, value), (expected, width) in zip(values.items(), self.columns.items(), strict=False):
            assert name == expected, f"{list(values)} are not the leading groups of {list(self.columns)}"
            line += value if isinstance(value, list) else [value] * width
        source, before = self._queue.get(seat, (seat, []))
        self._queue[seat] = source, line + before[len(line) :]

    def move(self, source: int, target: int) -> None:
        self._queue[target] = self._queue.get(source, (source, []))

    def snapshot(self, seat: int) -> dict[str, Tensor]:
        self.apply()
        return super().snapshot(seat)

    def restore(self, seat: int, snapshot: dict[str, Tensor]) -> None:
        line: list[int] = snapshot["line"].tolist()  # in host memory already
        self._queue[seat] = seat, line

    def forget(self) -> None:
        """Drop what has not been applied."""
        self._queue.clear()

    def apply(self) -> None:
        """Bring all changes to the device. What was uploaded before must have arrived."""
        if not self._queue:
            return
        for change, (seat, (source, line)) in zip(self._upload.lines, self._queue.items(), strict=False):
            change[: LINE + len(line)] = [seat, source, len(line), *line]
        self._upload.send(len(self._queue), self._put)
        self._queue.clear()

    def warm(self) -> None:
        """Make changes of any size ready; there must be none, and nothing under way."""
        assert not self._queue, "changes wait to be applied"
        self._upload.warm(np.zeros(LINE + len(self._place), dtype=np.int64), self._put)  # for seat 0 its own line

    def _put(self, changes: Tensor) -> None:
        lines = self.values.index_select(0, changes[:, SOURCE])  # [N, X], read before any line is written
        is_new = self._place < changes[:, LENGTH : LENGTH + 1]
        self.values.index_copy_(0, changes[:, TARGET], torch.where(is_new, changes[:, LINE:], lines))


class SeatNumbers:
    """Per seat, how many tokens are committed and which pages hold them: the host's copy, changes of which wait for `apply`."""

    def __init__(self, cached: Tensor, page_table: Tensor, pool: Any = None) -> None:
        """cached [B] and page_table [B, M] on the device. pool: see `Upload`."""
        num_seats, num_pages = page_table.shape
        self._cached, self._page_table = cached, page_table
        self.cached = np.zeros(num_seats, dtype=np.int32)
        """[B] Who changes it otherwise than the device does says so with `changed`."""
        self.page_table = np.zeros((num_seats, num_pages), dtype=np.int32)
        """[B, M]"""
        self.changed: set[int] = set()
        """Seats of which the device is to be told."""
        self._upload = Upload((num_seats, 2 + num_pages), torch.int32, cached.device, pool)

    def apply(self) -> None:
        """Bring all changes to the device. What was uploaded before must have arrived."""
        if not self.changed:
            return
        for line, seat in zip(self._upload.lines, self.changed, strict=False):
            line[0], line[1], line[2:] = seat, self.cached[seat], self.page_table[seat]
        self._upload.send(len(self.changed), self._put)
        self.changed.clear()

    def warm(self) -> None:
        """Make changes of any size ready; there must be none, and nothing under way."""
        assert not self.changed, "changes wait to be applied"
        self._upload.warm(np.array([0, self.cached[0], *self.page_table[0]], dtype=np.int32), self._put)

    def _put(self, changes: Tensor) -> None:
        seats = changes[:, 0].long()
        self._cached.index_copy_(0, seats, changes[:, 1])
        self._page_table.index_copy_(0, seats, changes[:, 2:])
