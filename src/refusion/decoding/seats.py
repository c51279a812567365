"""The state of many requests in one table: a line per seat, so that a request is admitted, moved, saved and restored in one copy.

What the columns mean is the business of the rounds that own the table.
"""

import torch
from torch import Tensor

# B = seats, X = columns


class SeatTable:
    """Named groups of int64 columns, side by side."""

    def __init__(self, num_seats: int, columns: dict[str, int], device: torch.device) -> None:
        """columns: name -> how many, in their order."""
        self.columns, self.device = columns, device
        self.first: dict[str, int] = {}
        for name, count in columns.items():
            self.first[name] = sum(columns[earlier] for earlier in self.first)
            assert count > 0, f"column group {name} of {count} columns"
        self.values = torch.zeros(num_seats, sum(columns.values()), dtype=torch.int64, device=device)  # [B, X]

    def column(self, name: str, num_seats: int) -> Tensor:
        """[B] a group of one column, of the first seats, in place."""
        return self.group(name, num_seats)[:, 0]

    def group(self, name: str, num_seats: int) -> Tensor:
        """[B, n] a column group of the first seats, in place."""
        first = self.first[name]
        return self.values[:num_seats, first : first + self.columns[name]]

    def write(self, seat: int, values: dict[str, int | list[int]]) -> None:
        """Set the leading column groups of a seat, in one copy; `values` names them in the order of the table."""
        assert list(values) == list(self.columns)[: len(values)], f"{list(values)} are not the leading groups of {list(self.columns)}"
        line: list[int] = []
        for name, value in values.items():
            line += value if isinstance(value, list) else [value] * self.columns[name]
        self.values[seat, : len(line)].copy_(torch.tensor(line, dtype=torch.int64))

    def move(self, source: int, target: int) -> None:
        """Copy one seat's line over another's."""
        self.values[target].copy_(self.values[source])

    def snapshot(self, seat: int) -> dict[str, Tensor]:
        """A seat's line in host memory; waits for the device."""
        return {"line": self.values[seat].cpu().clone()}

    def restore(self, seat: int, snapshot: dict[str, Tensor]) -> None:
        """Put a saved line on a seat."""
        self.values[seat].copy_(snapshot["line"])


class SeatedRounds:
    """Rounds whose whole state of a seat is its line of a table; see `refusion.decoding.rounds.Rounds`."""

    table: SeatTable

    def move(self, source: int, target: int) -> None:
        self.table.move(source, target)

    def snapshot(self, seat: int) -> dict[str, Tensor]:
        return self.table.snapshot(seat)

    def restore(self, seat: int, snapshot: dict[str, Tensor]) -> None:
        self.table.restore(seat, snapshot)
