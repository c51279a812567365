"""For how many accepted lengths a forward prepares the next drafts. More rows, fewer forwards, the same tokens.

One number for a lane and a number of seats, so that on a GPU few graphs are needed; it is reconsidered as experience grows.
"""

from collections.abc import Callable

import numpy as np

from refusion.decoding.params import SlotSettings
from refusion.engine.costs import CostTable
from refusion.engine.experience import Experience
from refusion.engine.shapes import seat_bucket

PADDING = 1.15
"""Rows of a forward of several seats over those that are needed: shapes are few."""
HOST_SECONDS = 1e-4
"""Between the report of a forward and the launch of the next; a forward whose rows do not depend on the report does not wait for it."""
GAIN = 1.05
"""Another number than the one in use must make decoding so much faster."""


class Candidates:
    """Chooses by the cost table of the machine and by experience."""

    def __init__(self, measure: Callable[[], CostTable] | None, most_rows: int, *, tokens_per_forward: float | None = None) -> None:
        """measure: called at the first choice; None: always as many lengths as the slot settings allow. most_rows: of a forward."""
        self._measure, self._most_rows, self._tokens_per_forward = measure, most_rows, tokens_per_forward
        self._experience: dict[tuple[SlotSettings, int], Experience] = {}
        self._chosen: dict[tuple[int, int], tuple[int, int]] = {}  # (id of the experience, seats) -> (its version, candidates)

    def experience(self, slots: SlotSettings, width: int) -> Experience:
        """What was seen with these settings, in all lanes."""
        key = (slots, width)
        if key not in self._experience:
            self._experience[key] = Experience(slots, width, self._tokens_per_forward)
        return self._experience[key]

    def choose(self, experience: Experience, num_seats: int) -> int:
        """The number of lengths for forwards of up to `num_seats` seats."""
        bucket = seat_bucket(num_seats)
        version, candidates = self._chosen.get((id(experience), bucket), (-1, -1))
        if version != experience.version:
            candidates = self._reconsider(experience, bucket, candidates)
            self._chosen[id(experience), bucket] = experience.version, candidates
        return candidates

    def _reconsider(self, experience: Experience, num_seats: int, now: int) -> int:
        """`now` unless another number is clearly better; -1: there is none yet."""
        ladder, num_choices = experience.ladder, max(len(experience.ladder) - 1, 1)  # 0 only where nothing else fits
        fits = padded_rows(experience, num_seats)[:num_choices] <= self._most_rows
        if not fits.any():
            return ladder[-1]
        if self._measure is None or num_choices == 1:
            return ladder[int(fits.argmax())]
        seconds = seconds_of_turn(self._measure(), experience, num_seats)[:num_choices]
        seconds = np.where(fits, seconds, np.inf)
        best = int(seconds.argmin())
        if now in ladder[:num_choices] and seconds[ladder.index(now)] <= GAIN * seconds[best]:
            return now
        return ladder[best]


def padded_rows(experience: Experience, num_seats: int) -> np.ndarray:
    """[C] rows of a forward of `num_seats`, by number of lengths."""
    return experience.rows_per_forward * num_seats * (PADDING if num_seats > 1 else 1.0)


def seconds_of_turn(costs: CostTable, experience: Experience, num_seats: int) -> np.ndarray:
    """[C] seconds of a forward with the remask forwards that come with it, by number of lengths."""
    if num_seats == 1:  # forwards of both kinds, instead of forwards in which some seats do the one and some the other
        by_kind = np.asarray(costs.cost(experience.rows)) + HOST_SECONDS, float(costs.cost(experience.remask_rows)) + HOST_SECONDS
        return by_kind[0] + experience.uncovered * by_kind[1]
    seconds = np.asarray(costs.cost(padded_rows(experience, num_seats))) + HOST_SECONDS
    return seconds * (1.0 + experience.uncovered)
