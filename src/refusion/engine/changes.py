"""Changes to the state of seats, collected on the host and applied before the next forward: one upload whoever comes, moves or goes."""

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.seats import SeatTable

# B = seats, X = columns of the table, N = seats that change

TARGET, SOURCE, LENGTH, LINE = range(4)
"""Columns of an upload: the seat that changes, the seat whose line it gets, how many columns are written anew, and those."""


class QueuedTable(SeatTable):
    """The same table, whose changes wait for `apply`."""

    def __init__(self, table: SeatTable) -> None:
        """Takes the place of `table` and shares its memory."""
        self.columns, self.device, self.first, self.values = table.columns, table.device, table.first, table.values
        num_seats, num_columns = self.values.shape
        self._queue: dict[int, tuple[int, list[int]]] = {}  # seat -> (seat whose line it gets, its first columns)
        self._staging = torch.zeros(num_seats, LINE + num_columns, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self._lines = self._staging.numpy()
        self._uploaded = torch.zeros_like(self._staging, device=self.device)
        self._place = torch.arange(num_columns, device=self.device)

    def write(self, seat: int, values: dict[str, int | list[int]]) -> None:
        assert list(values) == list(self.columns)[: len(values)], f"{list(values)} are not the leading groups of {list(self.columns)}"
        line: list[int] = []
        for name, value in values.items():
            line += value if isinstance(value, list) else [value] * self.columns[name]
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
        count = len(self._queue)
        for index, (seat, (source, line)) in enumerate(self._queue.items()):
            self._lines[index, :LINE] = seat, source, len(line)
            self._lines[index, LINE : LINE + len(line)] = np.array(line, dtype=np.int64)
        self._queue.clear()
        changes = self._uploaded[:count]
        changes.copy_(self._staging[:count], non_blocking=True)
        lines = self.values.index_select(0, changes[:, SOURCE])  # [N, X], read before any line is written
        is_new = self._place < changes[:, LENGTH : LENGTH + 1]
        self.values.index_copy_(0, changes[:, TARGET], torch.where(is_new, changes[:, LINE:], lines))
