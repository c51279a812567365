"""Which decoder is faster at a load: tokens of a forward against what its rows cost.

Slot decoding wins several tokens with one forward of many rows, autoregressive decoding one token with one row. While few requests run,
rows are free and forwards count; with many, rows cost. Both sides are computed from the cost table of this machine; how many tokens and
rows slot decoding takes is what the checkpoint says until this engine has seen enough of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

from refusion.decoding.params import SlotSettings
from refusion.engine.candidates import Candidates
from refusion.engine.costs import CostTable
from refusion.engine.requests import NewRequest, lane_key
from refusion.engine.shapes import seat_bucket
from refusion.engine.sliding import AnyExperience, seat_rows

MARGIN = 1.03
"""The decoder in use is kept while the other is no faster than this: requests of two decoders cannot share forwards."""

MOST_KNOWN = 4096
"""Answers that are kept."""

ChooseDecoder = Callable[[NewRequest, int], str]


class Auto:
    """Chooses a decoder by load; requests that run already stay with theirs."""

    def __init__(self, measure: Callable[[], CostTable], candidates: Candidates, most_rows: int) -> None:
        """measure: called when a choice is first wanted: measuring takes a moment. most_rows: of a forward."""
        self._measure, self._candidates, self._most_rows = measure, candidates, most_rows
        self._last = ""
        self._known: dict[tuple[SlotSettings, int, int], _Speeds] = {}

    def __call__(self, new: NewRequest, load: int) -> str:
        """ "refusion" or "autoregressive" for a request that runs beside others, `load` in all."""
        by_slots, one_by_one = self.speeds(new, load)
        margin = {"refusion": 1 / MARGIN, "autoregressive": MARGIN}.get(self._last, 1.0)
        self._last = "refusion" if by_slots >= margin * one_by_one else "autoregressive"
        return self._last

    def speeds(self, new: NewRequest, load: int) -> tuple[float, float]:
        """Tokens per second by slot decoding and one by one, `load` requests together; reckoned again when experience has grown.

        It is asked before every forward while somebody waits for a seat, so it must cost next to nothing.
        """
        assert new.slots is not None, "a choice needs slot settings"
        asked = new.slots, new.sampling.max_tokens, load
        known = self._known.get(asked)
        if known is None or known.version != known.experience.version:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            known = self._known[asked] = self._reckon(new, load)
        return known.by_slots, known.one_by_one

    def _reckon(self, new: NewRequest, load: int) -> "_Speeds":
        costs, key = self._measure(), lane_key(new, "refusion")
        assert key.slots is not None, "slots are cut in slot lanes"
        experience = self._candidates.experience(key.slots, key.width)
        together = max(min(load, self._most_rows // seat_rows(key.slots, key.width, 0)), 1)  # as many seats as such a lane has
        place = experience.ladder.index(self._candidates.choose(experience, together).candidates)
        by_slots = (
            together
            * float(experience.tokens_per_turn[place])
            / float(self._candidates.seconds_of_turn(costs, experience, together)[place])
        )
        return _Speeds(experience, experience.version, by_slots, load / float(costs.cost(seat_bucket(load))))


class _Speeds(NamedTuple):
    """What was reckoned from `experience` when it had this version."""

    experience: AnyExperience
    version: int
    by_slots: float
    one_by_one: float
