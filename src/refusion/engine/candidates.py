"""For how many accepted lengths a forward prepares the next drafts. More rows, fewer forwards, the same tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refusion.engine.costs import CostTable, choose_candidates

LADDER = (8, 4, 2, 1)
"""Few values besides the most there can be: on a GPU each is a graph of its own."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the forward to come looks like."""

    most: int
    """Lengths the slot settings allow."""
    num_rows: Callable[[int], int]
    """Rows of the forward by the number of lengths prepared."""
    accepted: np.ndarray
    """accepted[n]: how often so far a slot that goes on advanced by n tokens; those that were completed count as 0."""
    share_judged: float
    """Share of the requests whose drafts the forward judges."""


ChooseCandidates = Callable[[Load], int]


@dataclass(frozen=True, slots=True)
class ByBudget:
    """As many lengths as leave the forward within a budget of rows: right where rows are free up to a point."""

    row_budget: int
    most_rows: int

    def __call__(self, load: Load) -> int:
        """The most lengths within the budget, else the fewest that save forwards, else none."""
        ladder = _ladder(load.most)
        fitting = (candidates for candidates in ladder if load.num_rows(candidates) <= self.row_budget)
        fewest = ladder[-1] if load.num_rows(ladder[-1]) <= self.most_rows else 0
        return next(fitting, fewest)


class ByCost:
    """The number of lengths that makes decoding fastest by the cost table: right where every row costs."""

    def __init__(self, measure: Callable[[], CostTable], most_rows: int) -> None:
        """measure: called once, at the first choice."""
        self._measure, self._most_rows = measure, most_rows
        self._costs: CostTable | None = None

    def __call__(self, load: Load) -> int:
        if load.share_judged == 0.0:
            return 0  # nothing to prepare for
        self._costs = self._costs or self._measure()
        rows = [load.num_rows(candidates) for candidates in range(load.most + 1)]
        rows = rows[: max(sum(count <= self._most_rows for count in rows), 1)]
        return choose_candidates(self._costs, rows, load.accepted, load.share_judged)


def _ladder(most: int) -> list[int]:
    return [most, *(step for step in LADDER if step < most)]
