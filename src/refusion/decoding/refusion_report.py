"""The line of numbers in which a plan-and-infill forward tells the host what it did to a seat, and what its next forward will be."""

# torch and numpy leave the types of tolist open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import numpy as np

from refusion.decoding.params import ALTERNATIVE_LENGTHS, SlotSettings
from refusion.decoding.rounds import IS_DONE, NUM_COMMON, NUM_FORWARDS, NUM_ROWS, OVERFLOW, SeatReport, SlotNews
from refusion.decoding.state import DONE, INFILL, REMASK, VERIFY

# B = seats, W = slots of a block, K = tokens per slot, R = report columns

AGENDA = 3
"""The agenda of the next forward: phase, first slot of the window, first slot of the plan, then [W] verified tokens of chosen slots
(-1: not chosen) and [W] which slots of the plan are planned."""


class ReportColumns:
    """Where each group of numbers begins in a report line."""

    def __init__(self, width: int, slot_size: int) -> None:
        self.width, self.slot_size = width, slot_size
        self.agenda = NUM_COMMON  # of the next forward
        self.phase = self.agenda + AGENDA + 2 * width  # of this forward, as are all columns from here on
        self.window = self.phase + 1  # first slot
        self.plan = self.window + 1  # first slot
        self.accepted = self.plan + 1  # [W] tokens of a judged slot that stand; -1: not judged
        self.committed = self.accepted + width  # [W] tokens that became final
        self.planned = self.committed + width  # [W] bool
        self.scores = self.planned + width  # [W] float32 bits
        self.drafts = self.scores + width  # [W, K] what was judged
        self.plans = self.drafts + width * slot_size  # [W, K] tokens of the slots of the plan
        self.total = self.plans + width * slot_size


def seat_report(line: np.ndarray, columns: ReportColumns) -> SeatReport:
    """Read one line [R]."""
    width, slot_size = columns.width, columns.slot_size
    overflow = int(line[OVERFLOW])
    assert overflow == 0, f"{overflow} rows of a seat did not fit into its forward"

    def part(first: int) -> list[int]:
        return line[first : first + width].tolist()

    def news(first: int, place: int, tokens: int, count: int, score: float = 0.0) -> SlotNews:
        begin, slot = tokens + place * slot_size, int(line[first]) + place
        return SlotNews(slot, slot * slot_size, tuple(line[begin : begin + count].tolist()), score)

    accepted, committed, planned = part(columns.accepted), part(columns.committed), part(columns.planned)
    scores = line[columns.scores : columns.scores + width].view(np.float32).tolist()
    judged = [news(columns.window, place, columns.drafts, count) for place, count in enumerate(accepted) if count >= 0]
    is_verify = int(line[columns.phase]) == VERIFY
    return SeatReport(
        is_done=bool(line[IS_DONE]),
        num_forwards=int(line[NUM_FORWARDS]),
        num_rows=int(line[NUM_ROWS]),
        committed=[news(columns.window, place, columns.drafts, count) for place, count in enumerate(committed) if count],
        verified=judged if is_verify else [],
        infilled=[] if is_verify else judged,
        planned=[news(columns.plan, place, columns.plans, slot_size, scores[place]) for place, is_new in enumerate(planned) if is_new],
    )


def rows_needed(agenda: np.ndarray, slots: SlotSettings, num_candidates: int) -> np.ndarray:
    """[B] rows of a forward with this agenda [B, 3 + 2W]; `refusion.decoding.layout` lays out as many."""
    slot_size = slots.slot_size
    width = (agenda.shape[1] - AGENDA) // 2
    phase = agenda[:, 0]
    verified, planned = agenda[:, AGENDA : AGENDA + width], agenda[:, AGENDA + width :]
    is_chosen = verified >= 0
    num_chosen = is_chosen.sum(axis=1)
    left = np.where(is_chosen, slot_size - verified, 0)  # [B, W] masks up to the end of the slot
    drafted = slots.most_drafted(phase == INFILL)[:, None]
    drafts = np.where(is_chosen, np.minimum(verified + drafted, slot_size), 0).sum(axis=1)
    groups = group_rows(left, slots, num_candidates, drafted).sum(axis=1)
    solo = np.maximum(num_chosen - 1, 0) * min(num_candidates, slot_size)
    plan = planned.sum(axis=1) * slot_size
    by_phase = {
        VERIFY: drafts + solo + groups + plan,
        INFILL: drafts + groups + plan,
        REMASK: np.where(is_chosen, verified + np.minimum(left, slots.most_masks), 0).sum(axis=1),
        DONE: np.zeros_like(plan),
    }
    rows = plan
    for which, count in by_phase.items():
        rows = np.where(phase == which, count, rows)
    return rows


def most_rows(slots: SlotSettings, width: int, num_candidates: int) -> int:
    """Rows of any forward of a seat at most: one that verifies and plans a whole block of `width` slots."""
    groups = int(group_rows(np.array(slots.slot_size), slots, num_candidates, slots.slot_size))
    return width * (2 * slots.slot_size + groups) + (width - 1) * num_candidates


def group_rows(left: np.ndarray, slots: SlotSettings, num_candidates: int, num_drafted: "int | np.ndarray") -> np.ndarray:
    """Rows of the groups of a slot with `left` tokens to go, `num_drafted` of them drafted; those of alternatives included. By element."""
    candidates = np.minimum(np.minimum(num_candidates, left), num_drafted)
    tried = np.minimum(min(ALTERNATIVE_LENGTHS, num_candidates), np.maximum(left - 2, 0))
    return _falling(left, candidates, slots.most_masks) + slots.alternatives * _falling(left, tried, 1 + slots.most_masks)


def _falling(left: np.ndarray, terms: np.ndarray, most: int) -> np.ndarray:
    """(left - 1) + (left - 2) + ..., so many terms, none above `most`: what lies behind the accepted lengths 1, 2, ..."""
    cut = np.clip(left - most, 0, terms)  # so many of them are above it
    return cut * most + (terms - cut) * left - (terms * (terms + 1) - cut * (cut + 1)) // 2
