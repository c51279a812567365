"""What reports say of all seats at once: which tokens became final, how far slots advanced, whose drafts are judged next."""

from dataclasses import dataclass

import numpy as np

from refusion.decoding.refusion_report import AGENDA
from refusion.decoding.refusion_rounds import RefusionRounds
from refusion.decoding.rounds import NUM_COMMON, NUM_FORWARDS, AutoregressiveRounds, Rounds
from refusion.decoding.state import INFILL, VERIFY

# B = seats, R = report columns, N = committed tokens, W = slots of a block, K = tokens per slot


@dataclass(frozen=True, slots=True)
class Commits:
    """Tokens that became final. All [N]."""

    seat: np.ndarray
    place: np.ndarray  # in the answer
    token: np.ndarray


def commits(rounds: Rounds, report: np.ndarray, took_part: np.ndarray) -> Commits:
    """Final tokens of a report [B, R]; took_part [B] bool."""
    if isinstance(rounds, RefusionRounds):
        return _slot_commits(rounds, report, took_part)
    if isinstance(rounds, AutoregressiveRounds):
        is_written, token = report[:, NUM_COMMON], report[:, NUM_COMMON + 1]
        seat = ((is_written != 0) & took_part).nonzero()[0]
        return Commits(seat, report[seat, NUM_FORWARDS] - 1, token[seat])
    found = [
        (seat, news.offset + place, token)
        for seat in np.flatnonzero(took_part).tolist()
        for news in rounds.read(report[seat]).committed
        for place, token in enumerate(news.token_ids)
    ]
    return Commits(*np.array(found, dtype=np.int64).reshape(-1, 3).T)


def advances(rounds: Rounds, before: np.ndarray, report: np.ndarray, took_part: np.ndarray) -> np.ndarray:
    """counts[n]: judged slots that advanced by n tokens and go on; completed ones count as 0. before: the reports [B, R] of last time."""
    if not isinstance(rounds, RefusionRounds):
        return np.zeros(1, dtype=np.int64)
    columns, width = rounds.columns, rounds.width
    first = columns.agenda + AGENDA
    verified = before[:, first : first + width]  # [B, W]
    accepted = report[:, columns.accepted : columns.accepted + width]
    is_judged = (accepted >= 0) & (verified >= 0) & took_part[:, None]
    is_over = report[:, columns.committed : columns.committed + width] > 0
    advance = np.where(is_over, 0, accepted - verified)[is_judged]
    return np.bincount(np.clip(advance, 0, rounds.slot_size), minlength=rounds.slot_size + 1)


def is_judged_next(rounds: Rounds, report: np.ndarray) -> np.ndarray:
    """[B] bool: the next forward judges drafts."""
    if not isinstance(rounds, RefusionRounds):
        return np.zeros(len(report), dtype=bool)
    phase = report[:, rounds.columns.agenda]
    return (phase == VERIFY) | (phase == INFILL)


def _slot_commits(rounds: RefusionRounds, report: np.ndarray, took_part: np.ndarray) -> Commits:
    """The same without a look at every seat."""
    columns, width, slot_size = rounds.columns, rounds.width, rounds.slot_size
    count = report[:, columns.committed : columns.committed + width]  # [B, W]
    drafts = report[:, columns.drafts : columns.drafts + width * slot_size].reshape(-1, width, slot_size)
    is_final = (np.arange(slot_size) < count[:, :, None]) & took_part[:, None, None]  # [B, W, K]
    seat, slot, place = is_final.nonzero()
    return Commits(seat, (report[seat, columns.window] + slot) * slot_size + place, drafts[seat, slot, place])
