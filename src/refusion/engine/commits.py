"""What reports say of all seats at once: which tokens became final, how far slots advanced, how many rows come next."""

from dataclasses import dataclass

import numpy as np

from refusion.decoding.autoregressive_rounds import AutoregressiveRounds
from refusion.decoding.diffusion_report import PLACE, TOKENS
from refusion.decoding.diffusion_rounds import DiffusionRounds
from refusion.decoding.params import SlotSettings
from refusion.decoding.refusion_report import AGENDA, ReportColumns, group_rows, most_rows
from refusion.decoding.refusion_rounds import RefusionRounds
from refusion.decoding.rounds import NUM_COMMON, NUM_FORWARDS, OVERFLOW
from refusion.decoding.sliding_report import PLACE as SLIDING_PLACE
from refusion.decoding.sliding_report import final_columns
from refusion.decoding.sliding_rounds import SlidingRounds
from refusion.decoding.state import DONE, INFILL, PLAN, REMASK, VERIFY

# B = seats, R = report columns, N = committed tokens, W = slots of a block, K = tokens per slot, C = candidate lengths

NUM_PHASES = 5


@dataclass(frozen=True, slots=True)
class Commits:
    """Tokens that became final. All [N]."""

    seat: np.ndarray
    place: np.ndarray  # in the answer
    token: np.ndarray


AnyRounds = RefusionRounds | SlidingRounds | AutoregressiveRounds | DiffusionRounds


def num_committed(rounds: AnyRounds, report: np.ndarray) -> np.ndarray:
    """[B] tokens that became final by a report [B, R]; 0 for seats that took no part."""
    if isinstance(rounds, AutoregressiveRounds):
        return report[:, NUM_COMMON]
    if isinstance(rounds, DiffusionRounds):
        return (report[:, TOKENS:] >= 0).sum(axis=1)
    if isinstance(rounds, SlidingRounds):
        return (report[:, final_columns(rounds.slot_size)] >= 0).sum(axis=1)
    first = rounds.columns.committed
    if rounds.width == 1:
        return report[:, first]
    return report[:, first : first + rounds.width].sum(axis=1)


def commits(rounds: AnyRounds, report: np.ndarray, took_part: np.ndarray) -> Commits:
    """Final tokens of a report [B, R]; took_part [B] bool."""
    overflow = report[took_part, OVERFLOW]
    assert not np.count_nonzero(overflow), f"{overflow.max()} rows of a seat did not fit into its forward"
    if isinstance(rounds, AutoregressiveRounds):
        seat = ((report[:, NUM_COMMON] != 0) & took_part).nonzero()[0]
        return Commits(seat, report[seat, NUM_FORWARDS] - 1, report[seat, NUM_COMMON + 1])
    if isinstance(rounds, DiffusionRounds | SlidingRounds):
        is_diffusion = isinstance(rounds, DiffusionRounds)
        tokens = report[:, TOKENS:] if is_diffusion else report[:, final_columns(rounds.slot_size)]
        seat, place = ((tokens >= 0) & took_part[:, None]).nonzero()
        return Commits(seat, report[seat, PLACE if is_diffusion else SLIDING_PLACE] + place, tokens[seat, place])
    columns, width, slot_size = rounds.columns, rounds.width, rounds.slot_size
    count = report[:, columns.committed : columns.committed + width]  # [B, W]
    drafts = report[:, columns.drafts : columns.drafts + width * slot_size].reshape(-1, width, slot_size)
    is_final = (np.arange(slot_size) < count[:, :, None]) & took_part[:, None, None]  # [B, W, K]
    seat, slot, place = is_final.nonzero()
    return Commits(seat, (report[seat, columns.window] + slot) * slot_size + place, drafts[seat, slot, place])


def advances(columns: ReportColumns, before: np.ndarray, report: np.ndarray, took_part: np.ndarray) -> np.ndarray:
    """[requests whose drafts were judged] tokens by which the slot that goes on and came furthest advanced; 0 where all were completed.

    before: the reports [B, R] of last time.
    """
    width = columns.width
    first = columns.agenda + AGENDA
    verified = before[:, first : first + width]  # [B, W]
    accepted = report[:, columns.accepted : columns.accepted + width]
    is_judged = (accepted >= 0) & (verified >= 0) & took_part[:, None]
    goes_on = is_judged & (report[:, columns.committed : columns.committed + width] == 0)
    advance = np.where(goes_on, accepted - verified, 0).max(axis=1)
    return np.clip(advance[is_judged.any(axis=1)], 0, columns.slot_size)


class Demand:
    """Rows of the next forward by table: what `refusion.decoding.refusion_report.rows_needed` computes, summed and fast.

    It is asked between the report of one forward and the launch of the next, when the device stands still.
    """

    def __init__(self, columns: ReportColumns, slots: SlotSettings) -> None:
        self.columns, self.width, self.slot_size, self.slots = columns, columns.width, columns.slot_size, slots
        self._tables: dict[int, np.ndarray] = {}  # candidates -> [phases * (K + 2) * 2] rows of a block of one slot
        self._bounds: dict[int, np.ndarray] = {}  # the same of the most rows that the forward after it can need
        self._weights = np.array([2 * (self.slot_size + 2), 0, 0, 2, 1], dtype=np.int32)  # of phase, two slots, verified, planned

    def open(self, line: np.ndarray, max_tokens: int) -> None:
        """A report line [R] that asks for the first forward of a request."""
        agenda = fresh_agenda(self.columns, self.slots.num_slots(max_tokens))
        line[self.columns.agenda : self.columns.agenda + len(agenda)] = agenda

    def close(self, line: np.ndarray) -> None:
        """A report line [R] that asks for nothing."""
        line[self.columns.agenda] = DONE

    def will_end(self, reports: np.ndarray, eos_ids: np.ndarray) -> bool:
        """Every seat has a planned EOS among what the forward under way verifies: behind it one would most likely run for nobody."""
        columns = self.columns
        planned = reports[:, columns.plans : columns.plans + self.width * self.slot_size, None]
        return bool(((reports[:, columns.agenda] == VERIFY) & (planned == eos_ids).any(axis=(1, 2))).all())

    def total(self, reports: np.ndarray, candidates: int) -> int:
        """Rows of all seats of reports [B, R]."""
        candidates = min(candidates, self.slot_size - 1)
        table = self._tables.get(candidates)
        if table is None:
            table = self._tables[candidates] = self._table(candidates)
        first, width = self.columns.agenda, self.width
        if width == 1:
            return int(table[reports[:, first : first + AGENDA + 2] @ self._weights + 2].sum())
        phase = reports[:, first : first + 1]
        verified = reports[:, first + AGENDA : first + AGENDA + width]
        planned = reports[:, first + AGENDA + width : first + AGENDA + 2 * width]
        rows = table[(phase * (self.slot_size + 2) + verified + 1) * 2 + planned].sum()
        num_chosen = ((verified >= 0) & (phase == VERIFY)).sum(axis=1)
        return int(rows) + candidates * int(np.maximum(num_chosen - 1, 0).sum())  # all but the first slot judge alone as well

    def most_next(self, reports: np.ndarray, candidates: int) -> int:
        """Rows at most of the forward after the one that the reports [B, R] speak of, whatever that brings.

        An infill that cannot end its slot is followed by another one, and that is much less than a whole slot with the next one's plan.
        """
        if self.width > 1:
            return len(reports) * most_rows(self.slots, self.width, candidates)
        candidates = min(candidates, self.slot_size - 1)
        bounds = self._bounds.get(candidates)
        if bounds is None:
            bounds = self._bounds[candidates] = self._next_bounds(candidates)
        first = self.columns.agenda
        return int(bounds[reports[:, first : first + AGENDA + 2] @ self._weights + 2].sum())

    def _next_bounds(self, candidates: int) -> np.ndarray:
        """By phase, verified tokens and whether a slot is planned, as `_table`: the most rows of what can follow."""
        size, most = self.slot_size, self.slots.most_drafted(True)
        rows = self._table(candidates).reshape(NUM_PHASES, size + 2, 2)
        judged = [rows[INFILL, verified + 1, int(self.slots.fuse_plan and verified + most >= size)] for verified in range(size + 1)]
        masked = [rows[REMASK, verified + 1, 0] for verified in range(size + 1)]
        bounds = np.zeros_like(rows)
        bounds[[PLAN, VERIFY]] = most_rows(self.slots, 1, candidates)
        for verified in range(size + 1):
            onward = slice(min(verified + 1, size), verified + most + 2)  # a runner-up may stand behind what was accepted
            bounds[INFILL, verified + 1] = max(*judged[onward], *masked[onward], size)  # its slot may end, and be planned for
            bounds[INFILL, verified + 1, 1] = most_rows(self.slots, 1, candidates)
            bounds[REMASK, verified + 1] = judged[verified]
        return bounds.ravel()

    def _table(self, candidates: int) -> np.ndarray:
        """By phase, verified tokens (first place: not chosen) and whether a slot is planned in the same column."""
        size, most = self.slot_size, self.slots.most_masks
        rows = np.zeros((NUM_PHASES, size + 2, 2), dtype=np.int64)
        for verified in range(size + 1):
            left = size - verified
            for phase in (VERIFY, INFILL):
                drafted = self.slots.most_drafted(phase == INFILL)
                groups = int(group_rows(np.array(left), self.slots, candidates, drafted))
                rows[phase, verified + 1] = min(verified + drafted, size) + groups
            rows[REMASK, verified + 1] = verified + min(left, most)
        rows[[PLAN, VERIFY, INFILL], :, 1] += size
        rows[PLAN, 1:, 0] = 0
        rows[DONE] = 0
        return rows.ravel()


def fresh_agenda(columns: ReportColumns, num_slots: int) -> list[int]:
    """The agenda of a request of so many slots that has just been admitted: a plan."""
    width = columns.width
    return [PLAN, 0, 0, *[-1] * width, *[int(slot < num_slots) for slot in range(width)]]
