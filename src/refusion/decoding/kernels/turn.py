"""What the settle kernel knows of a seat before it judges: its cells, what its agenda asked for, and where the rows of that are."""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from typing import NamedTuple

import triton
import triton.language as tl

from refusion.decoding.kernels.agenda import group_rows, num_drafted, num_tried, read_agenda
from refusion.decoding.kernels.constants import AGENDA_VERIFIED, DONE, INFILL, REMASK, VERIFY

# W = slots of a block, K = tokens per slot, both padded; C = candidate lengths, A = those with alternatives, R = alternatives


class Grid(NamedTuple):
    """A block of slots."""

    slot: tl.tensor  # [W]
    is_slot: tl.tensor  # [W]
    place: tl.tensor  # [1, K]
    is_cell: tl.tensor  # [W, K]
    cell: tl.tensor  # [W, K] number of the token


class Turn(NamedTuple):
    """What this forward was for."""

    phase: tl.tensor
    window: tl.tensor  # first slot of the block in work
    plan: tl.tensor  # first slot of the block to plan
    runs: tl.tensor
    is_judging: tl.tensor
    verified: tl.tensor  # [W] tokens that stand, -1: the slot is not being verified
    is_chosen: tl.tensor  # [W] slots with drafts in this forward
    is_planned: tl.tensor  # [W] slots of the plan with masks in this forward
    left: tl.tensor  # [W] tokens of the chosen slots that do not stand
    drafts: tl.tensor  # [W, K]


class Answer(NamedTuple):
    """Pointers to what a seat has of its answer so far."""

    status: tl.tensor  # [S]
    lengths: tl.tensor  # [S]
    token_ids: tl.tensor  # [S * K]
    runner_ups: tl.tensor  # [S * K * R]


class Drawn(NamedTuple):
    """Pointers to the `refusion.decoding.forward.Readout` of the decode rows."""

    token_ids: tl.tensor
    confidence: tl.tensor
    given_probability: tl.tensor
    given_is_argmax: tl.tensor
    runner_ups: tl.tensor  # R to a row
    num_rows: tl.tensor


class RowPlaces(NamedTuple):
    """The first decode row of every slot in each group, as `refusion.decoding.kernels.row_groups` put them. [W]"""

    drafts: tl.tensor
    plan: tl.tensor
    candidates: tl.tensor
    alternatives: tl.tensor
    num_needed: tl.tensor  # rows of the seat in all, whether or not there was room


@triton.jit
def block_grid(W: tl.constexpr, K: tl.constexpr, W_PADDED: tl.constexpr, K_PADDED: tl.constexpr):
    """The `Grid` of W slots of K tokens."""
    slot = tl.arange(0, W_PADDED)
    place = tl.arange(0, K_PADDED)[None, :]
    is_slot = slot < W
    return Grid(slot, is_slot, place, is_slot[:, None] & (place < K), slot[:, None] * K + place)


@triton.jit
def read_turn(agenda, token_ids, grid, W: tl.constexpr, K: tl.constexpr):
    """The `Turn` that an agenda asked for."""
    phase, window, plan = read_agenda(agenda)  # pyright: ignore[reportGeneralTypeIssues]: to a type checker `tl.load` never returns
    runs = phase != DONE
    is_judging = (phase == VERIFY) | (phase == INFILL)
    verified = tl.load(agenda + AGENDA_VERIFIED + grid.slot, mask=grid.is_slot, other=-1).to(tl.int32)
    is_chosen = (verified >= 0) & (is_judging | (phase == REMASK))
    is_planned = (tl.load(agenda + AGENDA_VERIFIED + W + grid.slot, mask=grid.is_slot, other=0) != 0) & runs
    drafts = tl.load(token_ids + window * K + grid.cell, mask=grid.is_cell, other=0).to(tl.int32)
    left = tl.where(is_chosen, K - verified, 0)
    return Turn(phase, window, plan, runs, is_judging, verified, is_chosen, is_planned, left, drafts)


@triton.jit
def find_rows(turn, begin, K: tl.constexpr, C, R: tl.constexpr, A, MOST_MASKS: tl.constexpr):
    """The `RowPlaces` of a seat whose rows begin at `begin`."""
    is_remask = turn.phase == REMASK
    chosen, planned = turn.is_chosen.to(tl.int32), turn.is_planned.to(tl.int32)
    drafted = num_drafted(turn.phase, K, MOST_MASKS)
    num_drafts = tl.where(is_remask, turn.verified, tl.minimum(turn.verified + drafted, K)) * chosen
    num_masks = tl.minimum(turn.left, MOST_MASKS)
    num_lengths = tl.minimum(tl.minimum(C, turn.left), drafted)
    num_candidates = tl.where(is_remask, num_masks, group_rows(turn.left, num_lengths, MOST_MASKS))
    num_alternatives = tl.where(turn.is_judging, R * group_rows(turn.left, num_tried(turn.left, A), MOST_MASKS + 1), 0)
    num_copies = tl.where(turn.phase == VERIFY, tl.maximum(tl.sum(chosen, 0) - 1, 0) * C, 0)
    plan = begin + tl.sum(num_drafts, 0)
    candidates = plan + tl.sum(planned, 0) * K + num_copies
    alternatives = candidates + tl.sum(num_candidates, 0)
    return RowPlaces(
        begin + tl.cumsum(num_drafts, 0) - num_drafts,
        plan + (tl.cumsum(planned, 0) - planned) * K,
        candidates + tl.cumsum(num_candidates, 0) - num_candidates,
        alternatives + tl.cumsum(num_alternatives, 0) - num_alternatives,
        alternatives + tl.sum(num_alternatives, 0) - begin,
    )
