"""For how many accepted lengths a forward prepares the next drafts. More rows, fewer forwards, the same tokens.

One number for a lane and a number of seats, so that on a GPU few graphs are needed; it is reconsidered as experience grows.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from refusion.decoding.params import SlotSettings
from refusion.engine.costs import CostTable
from refusion.engine.experience import Experience
from refusion.engine.shapes import seat_bucket
from refusion.engine.sliding import AnyExperience, SlidingExperience

PADDING = 1.15
"""Rows of a forward of several seats over those that are needed: shapes are few."""
HOST_SECONDS = 1.5e-4
"""Between the report of a forward and the start of the next, which one that is launched ahead does not wait for (docs/engine.md)."""
GAIN = 1.05
"""Another number than the one in use must make decoding so much faster."""


class Choice(NamedTuple):
    """How forwards of a lane are made."""

    candidates: int
    """Lengths they prepare for."""
    leads: bool
    """Whether the next forward should be launched before the report of this one is there, with rows for whatever that may bring."""


class Candidates:
    """Chooses by the cost table of the machine and by experience."""

    def __init__(
        self,
        measure: Callable[[], CostTable] | None,
        most_rows: int,
        *,
        runs_ahead: bool = False,
        spares_rows: bool = False,
        tokens_per_forward: float | None = None,
    ) -> None:
        """measure: called at the first choice; None: always as many lengths as the slot settings allow. most_rows: of a forward.

        runs_ahead: whether forwards can be launched ahead at all. spares_rows: of what is about as good, take what has the fewest rows.
        """
        self._measure, self._most_rows, self._tokens_per_forward = measure, most_rows, tokens_per_forward
        self.runs_ahead, self.spares_rows = runs_ahead, spares_rows
        self._experience: dict[tuple[SlotSettings, int], AnyExperience] = {}
        self._chosen: dict[tuple[int, int], tuple[int, Choice]] = {}  # (id of the experience, seats) -> (its version, the choice)

    def experience(self, slots: SlotSettings, width: int) -> AnyExperience:
        """What was seen with these settings, in all lanes."""
        key = (slots, width)
        if key not in self._experience:
            known = self._tokens_per_forward
            self._experience[key] = SlidingExperience(slots, known) if slots.sliding else Experience(slots, width, known)
        return self._experience[key]

    def choose(self, experience: AnyExperience, num_seats: int) -> Choice:
        """What forwards of up to `num_seats` seats are to be like."""
        bucket = seat_bucket(num_seats)
        version, choice = self._chosen.get((id(experience), bucket), (-1, None))
        if choice is None or version != experience.version:
            choice = self._reconsider(experience, bucket, choice)
            self._chosen[id(experience), bucket] = experience.version, choice
        return choice

    def seconds_of_turn(self, costs: CostTable, experience: AnyExperience, num_seats: int) -> np.ndarray:
        """[C] seconds of a forward with the remask forwards that come with it, by number of lengths."""
        waiting, ahead = self._seconds(costs, experience, num_seats)
        return np.minimum(waiting, ahead)

    def _reconsider(self, experience: AnyExperience, num_seats: int, now: Choice | None) -> Choice:
        """`now` unless another choice is clearly better; None: there is none yet."""
        ladder, num_choices = experience.ladder, experience.num_choices
        fits = padded_rows(experience, num_seats) <= self._most_rows
        if not fits[:num_choices].any():
            return Choice(ladder[int(fits.argmax()) if fits.any() else -1], False)
        fits = fits[:num_choices]
        if self._measure is None:
            return Choice(ladder[int(fits.argmax())], self.runs_ahead)
        seconds = np.stack(self._seconds(self._measure(), experience, num_seats))[:, :num_choices]  # [2, C]
        seconds = np.where(fits, seconds, np.inf) / experience.tokens_per_turn[:num_choices]
        best = self._best(seconds, experience.rows[:num_choices])
        if now is not None and now.candidates in ladder[:num_choices]:
            place = int(now.leads), ladder.index(now.candidates)
            if seconds[place] <= GAIN * seconds[best]:
                return now
        return Choice(ladder[best[1]], bool(best[0]))

    def _best(self, seconds: np.ndarray, rows: np.ndarray) -> tuple[int, int]:
        """Place in `seconds` [2, C] of what is best; with `spares_rows` of what has the fewest rows [C] among what is about as good."""
        if self.spares_rows:
            fewest = np.where(seconds <= GAIN * seconds.min(), rows.round(), np.inf)
            seconds = np.where(fewest == fewest.min(), seconds, np.inf)
        where = np.unravel_index(int(seconds.argmin()), seconds.shape)
        return int(where[0]), int(where[1])

    def _seconds(self, costs: CostTable, experience: AnyExperience, num_seats: int) -> tuple[np.ndarray, np.ndarray]:
        """[C] seconds of `seconds_of_turn` where each forward waits for the report before it, and where it is launched ahead."""
        waiting = _seconds_waiting(costs, experience, num_seats)
        if not self.runs_ahead:
            return waiting, np.full_like(waiting, np.inf)
        ahead = np.maximum(costs.cost(num_seats * experience.rows_ahead), HOST_SECONDS) * (1.0 + experience.uncovered)
        return waiting, np.where(num_seats * experience.most_rows <= self._most_rows, ahead, np.inf)


def padded_rows(experience: AnyExperience, num_seats: int) -> np.ndarray:
    """[C] rows of a forward of `num_seats`, by number of lengths."""
    return experience.rows_per_forward * num_seats * (PADDING if num_seats > 1 else 1.0)


def _seconds_waiting(costs: CostTable, experience: AnyExperience, num_seats: int) -> np.ndarray:
    if num_seats == 1:  # forwards of both kinds, instead of forwards in which some seats do the one and some the other
        by_kind = np.asarray(costs.cost(experience.rows)) + HOST_SECONDS, float(costs.cost(experience.remask_rows)) + HOST_SECONDS
        return by_kind[0] + experience.uncovered * by_kind[1]
    seconds = np.asarray(costs.cost(padded_rows(experience, num_seats))) + HOST_SECONDS
    return seconds * (1.0 + experience.uncovered)
