"""Which decoder is faster at a load: tokens of a forward against what its rows cost.

Slot decoding wins several tokens with one forward of many rows, autoregressive decoding one token with one row. While few requests run,
rows are free and forwards count; with many, rows cost. Both sides are computed from the cost table of this machine; how many tokens and
rows slot decoding takes is what the checkpoint says until this engine has seen enough of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refusion.engine.candidates import ChooseCandidates, Load
from refusion.engine.costs import CostTable
from refusion.engine.requests import NewRequest

TOKENS_PER_FORWARD = 2.0
"""What slot decoding is taken for if neither the checkpoint nor experience says more."""
FIRST_WEIGHT = 100.0
"""What is said before any experience weighs as much as so many forwards of one request: the first ones only plan."""
LAST_WEIGHT = 2000.0
"""Experience older than about so many forwards of one request fades."""
MARGIN = 1.03
"""The decoder in use is kept while the other is no faster than this: requests of two decoders cannot share forwards."""

ChooseDecoder = Callable[[NewRequest, int], str]


@dataclass(slots=True)
class Experience:
    """Running means, by request and forward, of slot decoding with one number of candidates."""

    tokens: float
    rows: float
    weight: float = FIRST_WEIGHT

    def learn(self, num_requests: int, num_tokens: int, num_rows: int) -> None:
        """Take in one forward of `num_requests`."""
        self.weight = min(self.weight + num_requests, LAST_WEIGHT)
        share = num_requests / self.weight
        self.tokens += share * (num_tokens / num_requests - self.tokens)
        self.rows += share * (num_rows / num_requests - self.rows)


class Auto:
    """Chooses a decoder by load and learns from every forward of slot decoding."""

    def __init__(
        self, costs: Callable[[], CostTable], choose_candidates: ChooseCandidates, *, tokens_per_forward: float = TOKENS_PER_FORWARD
    ) -> None:
        """costs: called once, when a choice is first wanted: measuring takes a moment."""
        self._measure, self._choose_candidates, self._tokens_per_forward = costs, choose_candidates, tokens_per_forward
        self._costs: CostTable | None = None
        self._last = ""
        self._experience: dict[tuple[int, int], Experience] = {}  # (slot size, candidates)

    def __call__(self, new: NewRequest, load: int) -> str:
        """ "refusion" or "autoregressive" for a request that runs beside others, `load` in all."""
        assert new.slots is not None, "a choice needs slot settings"
        slot_size, most = new.slots.slot_size, new.slots.candidates()
        shape = Load(most, lambda candidates: round(load * self._seen(slot_size, candidates).rows), np.zeros(slot_size + 1), 1.0)
        candidates = self._choose_candidates(shape)
        seen = self._seen(slot_size, candidates)
        costs = self._costs = self._costs or self._measure()
        by_slots = load * seen.tokens / float(costs.cost(load * seen.rows))
        one_by_one = load / float(costs.cost(load))
        margin = {"refusion": 1 / MARGIN, "autoregressive": MARGIN}.get(self._last, 1.0)
        self._last = "refusion" if by_slots >= margin * one_by_one else "autoregressive"
        return self._last

    def learn(self, slot_size: int, candidates: int, *, num_requests: int, num_tokens: int, num_rows: int) -> None:
        """What one forward of slot decoding brought."""
        self._seen(slot_size, candidates).learn(num_requests, num_tokens, num_rows)

    def _seen(self, slot_size: int, candidates: int) -> Experience:
        """Experience, to begin with: one slot of drafts, the next one's masks, and half of the prepared lengths in use."""
        groups = sum(slot_size - length for length in range(1, candidates + 1))
        start = Experience(self._tokens_per_forward, 2 * slot_size + groups / 2)
        return self._experience.setdefault((slot_size, candidates), start)
