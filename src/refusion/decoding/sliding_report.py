"""The line of numbers in which a sliding forward tells the host what it did to a seat, and how many rows the next one takes."""

# torch and numpy leave the types of tolist open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any

import numpy as np

from refusion.decoding.params import ALTERNATIVE_LENGTHS, SlotSettings
from refusion.decoding.rounds import IS_DONE, NUM_COMMON, NUM_FORWARDS, NUM_ROWS, OVERFLOW, SeatReport, SlotNews

# B = seats, K = tokens per slot, R = report columns

CACHED, NUM_KNOWN, NUM_DRAFTED, PLANS, HAS_END, SCORE, NUM_PASSED, FROM_PLAN, PLACE, TOKENS = range(NUM_COMMON, NUM_COMMON + 10)
"""Columns of a report behind the common ones: tokens in the cache now; of the next forward the tokens it knows, those it judges, whether
how it plans (below), whether an EOS is among what it judges, and the confidence of the first of that, float32 bits; how many drafts of
this forward passed, -1 where there were none, and whether a plan had made them; then the place of the first final token and all of them,
[K + 1], and the chain of the next forward, [K + 1], both -1 for none; of that only the drafts."""

SHORT, WHOLE, WHOLE_BEHIND_FAILURE = range(3)
"""How a forward plans: as many masks as stand behind a failed draft; a slot, since all drafts passed, so that a plan made the next ones; a
slot, since as many passed as such masks draft before one failed."""


def report_width(slot_size: int) -> int:
    """R."""
    return TOKENS + 2 * (slot_size + 1)


def final_columns(slot_size: int) -> slice:
    """The final tokens."""
    return slice(TOKENS, TOKENS + slot_size + 1)


def rows_needed(
    num_known: np.ndarray, num_drafted: np.ndarray, plans: np.ndarray, slots: SlotSettings, candidates: int | np.ndarray
) -> np.ndarray:
    """[B] rows of a forward: the chain, masks behind every prepared length, a plan behind all drafts, alternatives.

    candidates: lengths that forwards are to prepare for, see `num_lengths`; [C, 1] of them give [C, B] rows.
    """
    lengths = np.minimum(num_drafted, num_lengths(slots, candidates))
    tried = np.minimum(lengths, num_tried(slots))
    plan = np.where(plans != SHORT, slots.slot_size, slots.most_masks)
    return num_known + num_drafted + lengths * slots.most_masks + plan + tried * slots.alternatives * (1 + slots.most_masks)


def most_next(num_drafted: np.ndarray, plans: np.ndarray, slots: SlotSettings, candidates: int | np.ndarray) -> np.ndarray:
    """[B] rows at most of the forward after one of so many drafts and such a plan, whatever that brings."""
    planned = np.where(plans != SHORT, slots.slot_size, slots.most_masks) - 1  # drafts of its plan, should all pass
    one = np.ones_like(num_drafted)
    passed = rows_needed(one, planned, np.where((num_drafted > 0) | (plans != SHORT), WHOLE, SHORT), slots, candidates)
    behind = np.where(num_drafted > slots.most_masks, WHOLE_BEHIND_FAILURE, SHORT)
    failed = rows_needed(2 * one, np.full_like(num_drafted, slots.most_masks - 1), behind, slots, candidates)
    return np.maximum(passed, np.where(num_drafted > 0, failed, 0))


def num_lengths(slots: SlotSettings, candidates: Any) -> Any:
    """Accepted lengths a forward prepares for if `candidates` are wanted; where the drafts change the text, always all of the settings.

    candidates: a number or an array; the result is of the same kind.
    """
    most = slots.candidates()
    if slots.acceptance != "exact":
        return candidates * 0 + most
    return min(candidates, most) if isinstance(candidates, int) else np.minimum(candidates, most)


def num_tried(slots: SlotSettings) -> int:
    """Accepted lengths with alternatives, at most."""
    return min(ALTERNATIVE_LENGTHS, slots.candidates()) if slots.alternatives else 0


def most_rows(slots: SlotSettings, candidates: int | None = None) -> int:
    """Rows of any forward of a seat at most, with so many lengths prepared or, left out, with all of the settings."""
    most = slots.candidates() if candidates is None else candidates
    return int(rows_needed(np.array(2), np.array(slots.slot_size - 1), np.array(WHOLE), slots, most))


def seat_report(line: np.ndarray, slot_size: int) -> SeatReport:
    """Read one line [R].

    The slots of its news are named by where they begin. Drafts of a plan are verified, those of masks behind a draft that failed are
    infilled; what passed of them is final. Drafts of a next forward are news only if there is one.
    """
    assert line[OVERFLOW] == 0, f"{line[OVERFLOW]} rows of a seat did not fit into its forward"
    final = final_columns(slot_size)
    tokens, drafts = (tuple(token for token in part.tolist() if token >= 0) for part in (line[final], line[final.stop :]))
    is_done, place, passed = bool(line[IS_DONE]), int(line[PLACE]), int(line[NUM_PASSED])
    judged = [SlotNews(place, place, tokens[:passed])] if passed >= 0 else []
    end, score = place + len(tokens), float(line[SCORE : SCORE + 1].view(np.float32)[0])
    planned = [SlotNews(end, end, drafts, score, is_infill=bool(line[PLANS] != WHOLE))] if drafts and not is_done else []
    return SeatReport(
        is_done=is_done,
        num_forwards=int(line[NUM_FORWARDS]),
        num_rows=int(line[NUM_ROWS]),
        committed=[SlotNews(place, place, tokens)] if tokens else [],
        verified=judged if line[FROM_PLAN] else [],
        infilled=[] if line[FROM_PLAN] else judged,
        planned=planned,
    )
