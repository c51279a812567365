"""Where the correction of a rejected draft is one of its runner-ups, it stands, and what was made behind it are the next drafts."""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

import triton
import triton.language as tl

from refusion.decoding.kernels.agenda import group_rows
from refusion.decoding.kernels.next_drafts import Fresh, draft_anew
from refusion.decoding.kernels.verdicts import is_eos

# W = slots of a block, K = tokens per slot, R = alternatives, all padded; A = candidate lengths with alternatives


@triton.jit
def take_runner_ups(
    next_drafts, runner_ups, turn, infill, fresh, grid, drawn, judge, first_row, eos_ids, mask_id,
    K: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, A,
    MOST_TRIED: tl.constexpr, MOST_MASKS: tl.constexpr, NUM_EOS: tl.constexpr,
):  # fmt: skip
    """Next drafts [W, K], next runner-ups [W, K, R], and the slots [W] in which one more token stands: a runner-up.

    runner_ups: [W, K, R] those of the drafts; -1 is none. first_row: [W] where the alternatives of a slot begin.
    """
    starts = infill.is_rejected & (infill.goes_on | infill.remasks)[:, None]
    judged = tl.load(drawn.token_ids + judge, mask=starts, other=-2).to(tl.int32)  # [W, K], at the place of the correction alone
    hit = _number_of_hit(runner_ups, judged, starts, R_PADDED)
    can_hit = infill.goes_on & (infill.step <= MOST_TRIED) & (infill.stands < K - 1)
    is_hit = can_hit & (hit > 0) & ~is_eos(tl.max(judged, 1), eos_ids, NUM_EOS)

    next_runner_ups = rank_anew(runner_ups, fresh, drawn, R, R_PADDED)
    next_runner_ups = tl.where(starts[:, :, None], -1, next_runner_ups)
    next_runner_ups = tl.where((infill.is_rejected & is_hit[:, None])[:, :, None], runner_ups, next_runner_ups)
    behind = _behind_hit(infill, is_hit & (A > 0), hit, grid, turn.left, first_row, drawn.num_rows, K, R, MOST_MASKS)
    next_drafts = draft_anew(next_drafts, behind, drawn, mask_id)
    # The token right behind a runner-up is named by the runner-up's own row, which has no runner-ups to offer.
    is_ranked = behind.is_drafted & (grid.place != infill.stands[:, None] + 1)
    next_runner_ups = rank_anew(next_runner_ups, Fresh(behind.is_new, is_ranked, behind.row), drawn, R, R_PADDED)
    # What stands through a runner-up that was not tried ahead has its next token from this remask forward.
    is_last = grid.is_cell & (grid.place == infill.stands[:, None] - 1)
    was_runner_up = (runner_ups == turn.drafts[:, :, None]) & is_last[:, :, None]
    was_hit = tl.max(tl.max(was_runner_up.to(tl.int32), 2), 1) > 0
    next_drafts = tl.where(infill.is_rejected & (was_hit & infill.remasks)[:, None], judged, next_drafts)
    return next_drafts, next_runner_ups, is_hit


@triton.jit
def load_runner_ups(pointer, cell, is_cell, missing, R: tl.constexpr, R_PADDED: tl.constexpr):
    """[W, K, R] runner-ups of the cells or rows `cell` [W, K]; `missing` where there are none."""
    which = tl.arange(0, R_PADDED)[None, None, :]
    return tl.load(pointer + cell[:, :, None] * R + which, mask=is_cell[:, :, None] & (which < R), other=missing)


@triton.jit
def store_runner_ups(pointer, cell, runner_ups, is_cell, R: tl.constexpr, R_PADDED: tl.constexpr):
    """Write `runner_ups` [W, K, R] of the cells where `is_cell`."""
    which = tl.arange(0, R_PADDED)[None, None, :]
    tl.store(pointer + cell[:, :, None] * R + which, runner_ups, mask=is_cell[:, :, None] & (which < R))


@triton.jit
def rank_anew(runner_ups, fresh, drawn, R: tl.constexpr, R_PADDED: tl.constexpr):
    """[W, K, R] `runner_ups` with those of the fresh drafts; masks have none."""
    proposed = load_runner_ups(drawn.runner_ups, fresh.row, fresh.is_drafted, -1, R, R_PADDED).to(tl.int32)
    return tl.where(fresh.is_new[:, :, None], proposed, runner_ups)


@triton.jit
def _number_of_hit(runner_ups, judged, starts, R_PADDED: tl.constexpr):
    """[W] which runner-up of the rejected draft, counted from 1, is its correction; 0: none."""
    which = tl.arange(0, R_PADDED)[None, None, :]
    is_same = (runner_ups == judged[:, :, None]) & starts[:, :, None]
    return tl.sum(tl.sum(tl.where(is_same, which + 1, 0), 2), 1)


@triton.jit
def _behind_hit(infill, is_hit, hit, grid, left, first_row, num_rows, K: tl.constexpr, R: tl.constexpr, MOST_MASKS: tl.constexpr):
    """What is `Fresh` behind runner-ups that stand: the token behind one from its own row, the later ones from their masks."""
    stands = infill.stands[:, None]
    is_new = grid.is_cell & (is_hit & infill.is_covered)[:, None] & (grid.place > stands)
    is_drafted = is_new & (grid.place < stands + 1 + MOST_MASKS)
    size = tl.minimum(MOST_MASKS + 1, K - infill.stands)
    first = first_row + R * group_rows(left, infill.step - 1, MOST_MASKS + 1) + (hit - 1) * size
    offset = tl.where(grid.place == stands + 1, 0, grid.place - stands)
    return Fresh(is_new, is_drafted, tl.minimum(first[:, None] + offset, num_rows - 1))
