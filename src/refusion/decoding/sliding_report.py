"""The line of numbers in which a sliding forward tells the host what it did to a seat, and how many rows the next one takes."""

# torch and numpy leave the types of tolist open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import numpy as np

from refusion.decoding.params import ALTERNATIVE_LENGTHS, SlotSettings
from refusion.decoding.rounds import IS_DONE, NUM_COMMON, NUM_FORWARDS, NUM_ROWS, OVERFLOW, SeatReport, SlotNews

# B = seats, K = tokens per slot, R = report columns

CACHED, NUM_KNOWN, NUM_DRAFTED, IS_WHOLE, HAS_END, PLACE, TOKENS = range(NUM_COMMON, NUM_COMMON + 7)
"""Columns of a report behind the common ones: tokens in the cache now; of the next forward the tokens it knows, those it judges, whether
it plans a whole slot, and whether an EOS is among what it judges; then the place of the first final token and all of them, [K + 1], -1 for
none."""


def report_width(slot_size: int) -> int:
    """R."""
    return TOKENS + slot_size + 1


def rows_needed(num_known: np.ndarray, num_drafted: np.ndarray, is_whole: np.ndarray, slots: SlotSettings, candidates: int) -> np.ndarray:
    """[B] rows of a forward: the chain, masks behind every prepared length, a plan behind all drafts, alternatives.

    candidates: lengths that forwards are to prepare for, see `num_lengths`.
    """
    lengths = np.minimum(num_drafted, num_lengths(slots, candidates))
    tried = np.minimum(lengths, num_tried(slots))
    plan = np.where(is_whole != 0, slots.slot_size, slots.most_masks)
    return num_known + num_drafted + lengths * slots.most_masks + plan + tried * slots.alternatives * (1 + slots.most_masks)


def most_next(num_drafted: np.ndarray, is_whole: np.ndarray, slots: SlotSettings, candidates: int) -> np.ndarray:
    """[B] rows at most of the forward after one of so many drafts and such a plan, whatever that brings."""
    planned = np.where(is_whole != 0, slots.slot_size, slots.most_masks) - 1  # drafts of its plan, should all pass
    one = np.ones_like(num_drafted)
    passed = rows_needed(one, planned, one, slots, candidates)
    failed = rows_needed(2 * one, np.full_like(num_drafted, slots.most_masks - 1), 0 * one, slots, candidates)
    return np.maximum(passed, np.where(num_drafted > 0, failed, 0))


def num_lengths(slots: SlotSettings, candidates: int) -> int:
    """Accepted lengths a forward prepares for if `candidates` are wanted; where the drafts change the text, always all of the settings."""
    return min(candidates, slots.candidates()) if slots.acceptance == "exact" else slots.candidates()


def num_tried(slots: SlotSettings) -> int:
    """Accepted lengths with alternatives, at most."""
    return min(ALTERNATIVE_LENGTHS, slots.candidates()) if slots.alternatives else 0


def most_rows(slots: SlotSettings, candidates: int | None = None) -> int:
    """Rows of any forward of a seat at most, with so many lengths prepared or, left out, with all of the settings."""
    most = slots.candidates() if candidates is None else candidates
    return int(rows_needed(np.array(2), np.array(slots.slot_size - 1), np.array(1), slots, most))


def seat_report(line: np.ndarray) -> SeatReport:
    """Read one line [R]."""
    assert line[OVERFLOW] == 0, f"{line[OVERFLOW]} rows of a seat did not fit into its forward"
    tokens = tuple(token for token in line[TOKENS:].tolist() if token >= 0)
    place = int(line[PLACE])
    return SeatReport(
        is_done=bool(line[IS_DONE]),
        num_forwards=int(line[NUM_FORWARDS]),
        num_rows=int(line[NUM_ROWS]),
        committed=[SlotNews(place, place, tokens)] if tokens else [],
        verified=[],
        infilled=[],
        planned=[],
    )
