"""Slots that slide, as the engine sees them: which rows come next, and what they bring and take on the whole.

The settings alone say for how many lengths a forward prepares, so nothing is chosen here and no forward only makes up for another one.
"""

import numpy as np

from refusion.decoding import refusion_report, sliding_report
from refusion.decoding.autoregressive_rounds import AutoregressiveRounds
from refusion.decoding.diffusion_rounds import DiffusionRounds
from refusion.decoding.params import SlotSettings
from refusion.decoding.refusion_rounds import RefusionRounds
from refusion.decoding.rounds import IS_DONE
from refusion.decoding.sliding_report import HAS_END, IS_WHOLE, NUM_DRAFTED, NUM_KNOWN, most_next, most_rows, rows_needed
from refusion.decoding.sliding_rounds import SlidingRounds
from refusion.engine.commits import Demand
from refusion.engine.experience import FIRST_WEIGHT, LAST_WEIGHT, TOKENS_PER_FORWARD, Experience

# B = seats, R = report columns


class SlidingDemand:
    """See `refusion.engine.commits.Demand`."""

    def __init__(self, slots: SlotSettings) -> None:
        self.slots = slots

    def open(self, line: np.ndarray, max_tokens: int) -> None:
        line[[IS_DONE, NUM_KNOWN, NUM_DRAFTED, IS_WHOLE, HAS_END]] = 0, 0, 0, 1, 0

    def close(self, line: np.ndarray) -> None:
        line[IS_DONE] = 1

    def will_end(self, reports: np.ndarray, eos_ids: np.ndarray) -> bool:
        return bool(reports[:, HAS_END].all())

    def total(self, reports: np.ndarray, candidates: int) -> int:
        rows = rows_needed(reports[:, NUM_KNOWN], reports[:, NUM_DRAFTED], reports[:, IS_WHOLE], self.slots)
        return int((rows * (1 - reports[:, IS_DONE])).sum())

    def most_next(self, reports: np.ndarray, candidates: int) -> int:
        return int(most_next(reports[:, NUM_DRAFTED], reports[:, IS_WHOLE], self.slots).sum())


class SlidingExperience:
    """See `refusion.engine.experience.Experience`; there is one number of lengths."""

    def __init__(self, slots: SlotSettings, tokens_per_forward: float | None = None) -> None:
        self.slots, self.width, self.ladder = slots, 1, (slots.candidates(),)
        self.tokens = tokens_per_forward or TOKENS_PER_FORWARD
        self.most_rows = np.array([most_rows(slots)])
        self.rows = rows_needed(np.array([1]), np.array([slots.most_masks - 1]), np.array([0]), slots).astype(float)
        self.rows_ahead = self.most_rows.astype(float)
        self.uncovered, self.remask_rows = np.zeros(1), 0.0
        self.weight, self.version = FIRST_WEIGHT, 0
        self._seen, self._next = 0, 2 * FIRST_WEIGHT

    @property
    def tokens_per_forward(self) -> np.ndarray:
        return np.array([self.tokens])

    @property
    def rows_per_forward(self) -> np.ndarray:
        return self.rows

    def learn(self, demand: Demand | SlidingDemand, before: np.ndarray, report: np.ndarray, took_part: np.ndarray, num_tokens: int) -> None:
        """Take in one forward: its report [B, R], those before it, who took part [B], and how many tokens became final."""
        count = int(took_part.sum())
        if count == 0:
            return
        self.weight = min(self.weight + count, LAST_WEIGHT)
        share = count / self.weight
        self.tokens += share * (num_tokens / count - self.tokens)
        self.rows += share * (demand.total(before[took_part], 0) / count - self.rows)
        self.rows_ahead += share * (demand.most_next(before[took_part], 0) / count - self.rows_ahead)
        self._seen += count
        if self._seen >= self._next:
            self.version, self._next = self.version + 1, 2 * self._next


AnyExperience = Experience | SlidingExperience


def demand_of(rounds: RefusionRounds | SlidingRounds | AutoregressiveRounds | DiffusionRounds) -> Demand | SlidingDemand | None:
    """How rows of slot rounds are counted; None for other rounds."""
    if isinstance(rounds, SlidingRounds):
        return SlidingDemand(rounds.slots)
    return Demand(rounds.columns, rounds.slots) if isinstance(rounds, RefusionRounds) else None


def seat_rows(slots: SlotSettings, width: int, candidates: int) -> int:
    """Rows of any forward of a seat at most, with so many lengths where that can be chosen."""
    return sliding_report.most_rows(slots) if slots.sliding else refusion_report.most_rows(slots, width, candidates)


def seat_least_rows(slots: SlotSettings) -> int:
    """Rows of a forward of a seat at least: a slot that is planned, or what stands and the masks behind it."""
    return 1 + slots.most_masks if slots.sliding else slots.slot_size
