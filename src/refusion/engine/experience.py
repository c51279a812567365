"""What slot decoding with certain settings brings and takes, by request and forward, as far as this engine has seen it.

Preparing fewer lengths changes no token; it only puts remask forwards between the others. So everything is counted over the *others*,
and what any number of lengths would have brought and taken follows, whatever number was used.
"""

from typing import Any

import numpy as np

from refusion.decoding.params import SlotSettings
from refusion.decoding.refusion_report import group_rows, most_rows
from refusion.decoding.state import REMASK
from refusion.engine.commits import Demand, advances

# K = tokens per slot, C = numbers of candidate lengths to choose from

TOKENS_PER_FORWARD = 2.0
"""What slot decoding is taken for if neither the checkpoint nor experience says more."""
MEAN_ADVANCE = 2.5
"""Tokens by which a slot that goes on is expected to advance at first, geometrically distributed."""
SHARE_COMPLETED = 0.1
"""Share of the judged slots that are expected to be completed at first."""
SHARE_JUDGED = 0.95
"""Share of the forwards that are expected to judge drafts at first; the others only plan."""
FIRST_WEIGHT = 50.0
"""What is expected before any experience weighs as much as so many forwards of one request."""
LAST_WEIGHT = 2000.0
"""Experience older than about so many forwards of one request fades."""
LADDER = (8, 4, 2, 1)
"""Few values besides the most there can be: on a GPU each is a graph of its own."""


class Experience:
    """Running means by request and forward, remask forwards apart."""

    def __init__(self, slots: SlotSettings, width: int, tokens_per_forward: float | None = None) -> None:
        """tokens_per_forward: what the checkpoint is known to reach."""
        self.slots, self.slot_size, self.width = slots, slots.slot_size, width
        most = slots.candidates()
        steps = () if slots.max_candidates is not None else tuple(step for step in LADDER if step < most)
        self.ladder = (most, *steps) if most == 0 else (most, *steps, 0)
        """Numbers of candidate lengths, falling; 0 is for forwards that would otherwise not fit."""
        self.num_choices = max(len(self.ladder) - 1, 1)
        """So many of the ladder, from its beginning on, are chosen from."""
        self.tokens = tokens_per_forward or TOKENS_PER_FORWARD
        self.share_judged = SHARE_JUDGED
        self.advanced = _first_advances(self.slot_size)  # [K + 1] share of the judged requests by the tokens of `advances`
        self.rows = self._first_rows()  # [C]
        self.most_rows = np.array([most_rows(slots, width, each) for each in self.ladder])
        """[C] rows of any forward at most."""
        self.rows_ahead = self.most_rows.astype(float)
        """[C] rows of a forward that is launched before it is known what it has to do."""
        self.remask_rows = float(self.slot_size)
        self.weight = FIRST_WEIGHT
        self.version = 0
        """Changes when there is twice as much experience as at the last change: time to choose anew."""
        self._seen, self._next = 0, 2 * FIRST_WEIGHT

    @property
    def uncovered(self) -> np.ndarray:
        """[C] remask forwards for each other forward, by number of lengths."""
        covered = np.cumsum(self.advanced)[np.minimum(self.ladder, self.slot_size)]
        return self.share_judged * np.maximum(1.0 - covered, 0.0)

    @property
    def tokens_per_turn(self) -> np.ndarray:
        """[C] tokens of an other forward and the remask forwards that come with it."""
        return np.full(len(self.ladder), self.tokens)

    @property
    def tokens_per_forward(self) -> np.ndarray:
        """[C] remask forwards included."""
        return self.tokens / (1.0 + self.uncovered)

    @property
    def rows_per_forward(self) -> np.ndarray:
        """[C] the same of decode rows."""
        return (self.rows + self.uncovered * self.remask_rows) / (1.0 + self.uncovered)

    def learn(self, demand: Any, before: np.ndarray, report: np.ndarray, took_part: np.ndarray, num_tokens: int) -> None:
        """Take in one forward: its report [B, R], those before it, who took part [B], and how many tokens became final.

        demand: the `Demand` of its rounds.
        """
        assert isinstance(demand, Demand), "other slots have an experience of their own"
        is_remask = took_part & (before[:, demand.columns.agenda] == REMASK)
        others = took_part & ~is_remask
        num_others, num_remask = int(others.sum()), int(is_remask.sum())
        if num_others == 0:
            return
        self.weight = min(self.weight + num_others, LAST_WEIGHT)
        share = num_others / self.weight
        found = advances(demand.columns, before, report, others)
        self.tokens += share * (num_tokens / num_others - self.tokens)
        self.share_judged += share * (len(found) / num_others - self.share_judged)
        if len(found):
            counts = np.bincount(found, minlength=self.slot_size + 1) / len(found)
            self.advanced += min(len(found) / self.weight, 1.0) * (counts - self.advanced)
        agendas = before[others]
        self.rows += share * (np.array([demand.total(agendas, candidates) for candidates in self.ladder]) / num_others - self.rows)
        bounds = np.array([demand.most_next(before[took_part], candidates) for candidates in self.ladder])
        num_seats = int(took_part.sum())
        self.rows_ahead += min(num_seats / self.weight, 1.0) * (bounds / num_seats - self.rows_ahead)
        if num_remask:
            rows = demand.total(before[is_remask], 0) / num_remask
            self.remask_rows += min(num_remask / self.weight, 1.0) * (rows - self.remask_rows)
        self._seen += num_others
        if self._seen >= self._next:
            self.version, self._next = self.version + 1, 2 * self._next

    def _first_rows(self) -> np.ndarray:
        """[C] rows of one slot in work and the next ones' plan, by how long a slot is expected to stand at each length."""
        size = self.slot_size
        visits = np.zeros(size + 1)
        visits[0] = 1.0
        for length in range(size):
            # From `length`, a slot goes on to length + n with the share of advances by n; past its end it is complete.
            onward = self.advanced[1 : size - length]
            visits[length + 1 : length + 1 + len(onward)] += visits[length] * onward
        visits = visits[:size] / visits[:size].sum()
        length = np.arange(size)
        drafted = self.slots.most_drafted(length > 0)
        groups = np.stack([group_rows(size - length, self.slots, candidates, drafted) for candidates in self.ladder])  # [C, K]
        return ((groups + np.minimum(length + drafted, size)) * visits).sum(axis=1) + self.width * size


def _first_advances(slot_size: int) -> np.ndarray:
    """[K + 1] geometric from 1 on; completed slots stand at 0."""
    stop = 1.0 / MEAN_ADVANCE
    shares = stop * (1.0 - stop) ** np.arange(slot_size - 1)  # nobody goes on by a whole slot
    shares *= (1.0 - SHARE_COMPLETED) / max(shares.sum(), 1e-9)
    return np.concatenate(([1.0 - shares.sum()], shares, [0.0]))
