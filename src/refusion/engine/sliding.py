"""Slots that slide, as the engine sees them: which rows come next, and what they bring and take on the whole.

Where acceptance is exact, the lengths that a forward prepares for change no token, and the engine chooses them by cost and experience as it
does for other slots. Elsewhere the settings alone say how many there are.
"""

from functools import lru_cache

import numpy as np

from refusion.decoding import refusion_report, sliding_report
from refusion.decoding.autoregressive_rounds import AutoregressiveRounds
from refusion.decoding.diffusion_rounds import DiffusionRounds
from refusion.decoding.params import ALTERNATIVE_LENGTHS, SlotSettings
from refusion.decoding.refusion_rounds import RefusionRounds
from refusion.decoding.rounds import IS_DONE, NUM_ROWS
from refusion.decoding.sliding_report import (
    HAS_END,
    NUM_DRAFTED,
    NUM_KNOWN,
    NUM_PASSED,
    PLANS,
    SHORT,
    WHOLE,
    WHOLE_BEHIND_FAILURE,
    final_columns,
    most_next,
    most_rows,
    rows_needed,
)
from refusion.decoding.sliding_rounds import SlidingRounds
from refusion.engine.commits import Demand
from refusion.engine.experience import FIRST_WEIGHT, LAST_WEIGHT, TOKENS_PER_FORWARD, Experience

# B = seats, R = report columns, K = tokens per slot, C = numbers of lengths to choose from

SHARE_FAILED = 0.9
"""Share of the forwards with drafts of which one is expected to fail at first."""
SHARE_MORE = 0.5
"""Share of the failures behind one accepted length that are expected to come behind a longer one; and so on."""
SHARE_HIT = 0.4
"""Share of the failures where a runner-up is expected to be right, if it is tried."""
FEW = 16
"""Rows of up to so many seats are looked up one by one, which is then faster than operations on arrays."""
MOST_KNOWN = 2
"""Tokens of a chain that are final already, at most: what stood in for a draft, and what is known behind a runner-up."""


class SlidingDemand:
    """See `refusion.engine.commits.Demand`."""

    def __init__(self, slots: SlotSettings) -> None:
        self.slots = slots
        self._tables: dict[int, list[list[list[int]]]] = {}  # candidates -> rows by known, drafted and plan

    def open(self, line: np.ndarray, max_tokens: int) -> None:
        line[IS_DONE] = line[NUM_KNOWN] = line[NUM_DRAFTED] = line[HAS_END] = 0
        line[PLANS] = WHOLE

    def close(self, line: np.ndarray) -> None:
        line[IS_DONE] = 1

    def will_end(self, reports: np.ndarray, eos_ids: np.ndarray) -> bool:
        return bool(reports[:, HAS_END].all())

    def rows(self, reports: np.ndarray, candidates: int | np.ndarray) -> np.ndarray:
        """[B] rows of each seat of reports [B, R]; [C, B] for candidates [C, 1]."""
        rows = rows_needed(reports[:, NUM_KNOWN], reports[:, NUM_DRAFTED], reports[:, PLANS], self.slots, candidates)
        return rows * (1 - reports[:, IS_DONE])

    def total(self, reports: np.ndarray, candidates: int) -> int:
        if len(reports) > FEW:
            return int(self.rows(reports, candidates).sum())
        rows = self._tables.get(candidates)
        if rows is None:
            rows = self._tables[candidates] = self._table(candidates)
        lines: list[list[int]] = reports[:, : PLANS + 1].tolist()  # numbers on the host
        return sum(rows[line[NUM_KNOWN]][line[NUM_DRAFTED]][line[PLANS]] for line in lines if not line[IS_DONE])

    def _table(self, candidates: int) -> list[list[list[int]]]:
        """`rows` of all that a seat can be asked for."""
        known, drafted, plans = np.ogrid[: MOST_KNOWN + 1, : self.slots.slot_size + 1, : WHOLE_BEHIND_FAILURE + 1]
        return rows_needed(known, drafted, plans, self.slots, candidates).tolist()

    def most_next(self, reports: np.ndarray, candidates: int) -> int:
        return int(most_next(reports[:, NUM_DRAFTED], reports[:, PLANS], self.slots, candidates).sum())


class SlidingExperience:
    """See `refusion.engine.experience.Experience`.

    A failure behind more accepted drafts than were prepared for leaves the next forward without drafts: it writes the one token that its
    chain names and plans anew. Everything is counted over the *other* forwards, and what any number of lengths would have brought follows
    from the lengths behind which drafts failed and from how often a runner-up was right where it was tried.
    """

    def __init__(self, slots: SlotSettings, tokens_per_forward: float | None = None) -> None:
        self.slots, self.width = slots, 1
        most = slots.candidates()
        self.ladder: tuple[int, ...] = tuple(range(most, -1, -1)) if slots.acceptance == "exact" else (most,)
        self.num_choices = len(self.ladder) if slots.max_candidates is None else 1  # fewer than were asked for only where no more fit
        self.failed = _first_failures(slots.slot_size)  # [K + 1] share of the other forwards by the length behind which a draft failed
        self.share_hit = SHARE_HIT if slots.alternatives else 0.0
        self.written = 0.0  # tokens of an other forward without those of runner-ups
        missing = (tokens_per_forward or TOKENS_PER_FORWARD) - float(self.tokens_per_forward[0])
        self.written += missing * (1.0 + float(self.uncovered[0]))
        self.most_rows = np.array([most_rows(slots, candidates) for candidates in self.ladder])
        drafted = np.array([slots.most_masks - 1])
        rows = [rows_needed(np.array([1]), drafted, np.array([SHORT]), slots, candidates)[0] for candidates in self.ladder]
        self.rows = np.array(rows, dtype=float)
        self.rows_ahead = self.most_rows.astype(float)
        self.remask_rows = 1.0 + slots.most_masks
        self.weight, self.version = FIRST_WEIGHT, 0
        self._seen, self._next = 0, 2 * FIRST_WEIGHT

    @property
    def uncovered(self) -> np.ndarray:
        """[C] forwards without drafts for each other forward, by number of lengths."""
        return self.failed.sum() - self._failed_within(np.array(self.ladder))

    @property
    def tokens_per_turn(self) -> np.ndarray:
        """[C] tokens of an other forward and the forwards without drafts that come with it."""
        tried = np.minimum(self.ladder, ALTERNATIVE_LENGTHS)
        return self.written + self.share_hit * self._failed_within(tried) + self.uncovered

    @property
    def tokens_per_forward(self) -> np.ndarray:
        """[C]"""
        return self.tokens_per_turn / (1.0 + self.uncovered)

    @property
    def rows_per_forward(self) -> np.ndarray:
        """[C]"""
        return (self.rows + self.uncovered * self.remask_rows) / (1.0 + self.uncovered)

    def learn(self, demand: Demand | SlidingDemand, before: np.ndarray, report: np.ndarray, took_part: np.ndarray, num_tokens: int) -> None:
        """Take in one forward: its report [B, R], those before it, who took part [B], and how many tokens became final."""
        assert isinstance(demand, SlidingDemand), "other slots have an experience of their own"
        drafted = before[:, NUM_DRAFTED]
        others = took_part & ((drafted > 0) | (before[:, NUM_KNOWN] == 0))  # a request's first forward plans as others do
        count = int(others.sum())
        if count == 0:
            return
        self.weight = min(self.weight + count, LAST_WEIGHT)
        share = count / self.weight
        before, report, drafted = before[others], report[others], drafted[others]
        is_hit = report[:, NUM_KNOWN] > 1
        written = (report[:, final_columns(self.slots.slot_size)] >= 0).sum(axis=1) - is_hit
        has_failed = (drafted > 0) & (report[:, NUM_PASSED] < drafted) & (report[:, IS_DONE] == 0)
        counts = np.bincount(written[has_failed], minlength=len(self.failed))[: len(self.failed)]
        self.written += share * (written.mean() - self.written)
        self.failed += share * (counts / count - self.failed)
        ladder = np.array(self.ladder)[:, None]
        self.rows += share * (demand.rows(before, ladder).mean(axis=1) - self.rows)
        self.rows_ahead += share * (most_next(drafted, before[:, PLANS], self.slots, ladder).mean(axis=1) - self.rows_ahead)
        # A runner-up is tried at least for the shortest length wherever there are more rows than without any.
        is_exact = self.slots.acceptance == "exact"  # others always prepare the same
        is_tried = report[:, NUM_ROWS] > demand.rows(before, 0) if is_exact else self.slots.candidates() > 0
        was_tried = has_failed & (written == 1) & is_tried
        if self.slots.alternatives and was_tried.any():
            share = was_tried.sum() / self.weight
            self.share_hit += share * (is_hit[was_tried].mean() - self.share_hit)
        self._seen += count
        if self._seen >= self._next:
            self.version, self._next = self.version + 1, 2 * self._next

    def _failed_within(self, lengths: np.ndarray) -> np.ndarray:
        """Share of the other forwards in which a draft failed behind no more than so many."""
        return np.cumsum(self.failed)[np.minimum(lengths, len(self.failed) - 1)]


AnyExperience = Experience | SlidingExperience


def demand_of(rounds: RefusionRounds | SlidingRounds | AutoregressiveRounds | DiffusionRounds) -> Demand | SlidingDemand | None:
    """How rows of slot rounds are counted; None for other rounds."""
    if isinstance(rounds, SlidingRounds):
        return SlidingDemand(rounds.slots)
    return Demand(rounds.columns, rounds.slots) if isinstance(rounds, RefusionRounds) else None


@lru_cache(maxsize=1024)  # asked several times a request
def seat_rows(slots: SlotSettings, width: int, candidates: int) -> int:
    """Rows of any forward of a seat at most, with so many lengths where that can be chosen."""
    return sliding_report.most_rows(slots, candidates) if slots.sliding else refusion_report.most_rows(slots, width, candidates)


def seat_least_rows(slots: SlotSettings) -> int:
    """Rows of a forward of a seat at least: a slot that is planned, or what stands and the masks behind it."""
    return 1 + slots.most_masks if slots.sliding else slots.slot_size


def _first_failures(slot_size: int) -> np.ndarray:
    """[K + 1]"""
    shares = SHARE_MORE ** np.arange(slot_size + 1.0)
    shares[0] = 0.0  # a length counts the token that stands for the draft that failed
    return SHARE_FAILED * shares / max(shares.sum(), 1e-9)
