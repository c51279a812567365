"""The next drafts of slots in infill: the candidates of the accepted length, or the masks that a remask forward filled.

What becomes of a rejected draft with runner-ups is in `refusion.decoding.kernels.runner_ups`.
"""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from typing import NamedTuple

import triton
import triton.language as tl

from refusion.decoding.kernels.agenda import group_rows
from refusion.decoding.kernels.constants import REMASK

# W = slots of a block, K = tokens per slot, both padded; C = candidate lengths, R = alternatives


class Infill(NamedTuple):
    """Where the slots in infill stand after this forward."""

    stands: tl.tensor  # [W] tokens that stand
    step: tl.tensor  # [W] how many of them were accepted just now
    goes_on: tl.tensor  # [W] slots whose infill goes on
    remasks: tl.tensor  # [W] slots whose masks were filled in this forward
    is_covered: tl.tensor  # whether every accepted length had its candidates in this forward
    is_rejected: tl.tensor  # [W, K] the first token of a slot that does not stand


class Fresh(NamedTuple):
    """Cells that are drafted anew. [W, K]"""

    is_new: tl.tensor
    is_drafted: tl.tensor  # those of them that a row drafted; the others stay masks
    row: tl.tensor  # that row


@triton.jit
def follow_infill(turn, verdict, grid, C):
    """The `Infill` after a verdict."""
    is_remask = turn.phase == REMASK
    stands = tl.where(is_remask, turn.verified, verdict.stands)
    step = tl.where(is_remask, 0, stands - turn.verified)
    is_covered = tl.sum((verdict.is_unfinished & (step > C)).to(tl.int32), 0) == 0
    goes_on = verdict.goes_on & verdict.is_unfinished
    is_rejected = grid.is_cell & (grid.place == stands[:, None])
    return Infill(stands, step, goes_on, is_remask & turn.is_chosen, is_covered, is_rejected)


@triton.jit
def fresh_cells(infill, grid, left, first_row, num_rows, MOST_MASKS: tl.constexpr):
    """What is `Fresh` behind the tokens that stand; the candidates of a slot begin at `first_row` [W]."""
    takes = (infill.goes_on & infill.is_covered) | infill.remasks
    is_new = takes[:, None] & grid.is_cell & (grid.place >= infill.stands[:, None])
    is_drafted = is_new & (grid.place < infill.stands[:, None] + MOST_MASKS)
    group = first_row + tl.where(infill.step > 0, group_rows(left, infill.step - 1, MOST_MASKS), 0)
    return Fresh(is_new, is_drafted, tl.minimum(group[:, None] + grid.place - infill.stands[:, None], num_rows - 1))


@triton.jit
def draft_anew(drafts, fresh, drawn, mask_id):
    """[W, K] `drafts` with the fresh ones."""
    proposed = tl.load(drawn.token_ids + fresh.row, mask=fresh.is_drafted, other=0).to(tl.int32)
    return tl.where(fresh.is_new, tl.where(fresh.is_drafted, proposed, mask_id), drafts)


@triton.jit
def replace_rejected(next_drafts, drafts, infill, drawn, judge):
    """The row that rejected a token of a slot predicts a better one; it replaces the mask's, also through a remask forward."""
    is_first = infill.is_rejected & infill.goes_on[:, None]
    next_drafts = tl.where(infill.is_rejected & infill.remasks[:, None], drafts, next_drafts)
    return tl.where(is_first, tl.load(drawn.token_ids + judge, mask=is_first, other=0).to(tl.int32), next_drafts)
