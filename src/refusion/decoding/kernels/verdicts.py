"""The verdict on a seat's drafts: `verify_prefix` and `infill_prefix` of `refusion.decoding.decisions`, on lengths instead of masks.

Per slot [W]: `prefix` tokens pass from its start on, `end` is the place of its first EOS (K without one).
"""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from typing import NamedTuple

import triton
import triton.language as tl

from refusion.decoding.kernels.agenda import num_drafted
from refusion.decoding.kernels.constants import INFILL, PLAN, VERIFY

# W = slots of a block, K = tokens per slot, both padded


class Verdict(NamedTuple):
    """What becomes of the drafts and of the plan of a forward."""

    stands: tl.tensor  # [W] tokens of a slot that stand by themselves
    is_unfinished: tl.tensor  # [W] slots that have more to do by themselves
    ends_slot: tl.tensor  # [W] slots that by themselves end the answer
    num_committed: tl.tensor  # [W] tokens that are final
    is_ended: tl.tensor  # [W] slots that end the answer with what is final
    goes_on: tl.tensor  # the infill of the chosen slots begins or goes on
    is_infilled: tl.tensor  # or it is done
    plan_holds: tl.tensor


@triton.jit
def reach_verdict(turn, prefix, end, slot, K: tl.constexpr, W_PADDED: tl.constexpr, FUSES_PLAN: tl.constexpr):
    """The `Verdict` on slots by their passing prefixes and ends."""
    num_chosen = tl.sum(turn.is_chosen.to(tl.int32), 0)
    chain_lengths, chain_is_full, needs_infill = judge_chain(turn.is_chosen, prefix, end, slot, num_chosen, K, W_PADDED)
    stands, is_unfinished, ends_slot = judge_slots(turn.is_chosen, prefix, end, slot, K, W_PADDED)
    is_verify, is_infill = turn.phase == VERIFY, turn.phase == INFILL
    is_infilled = is_infill & (tl.sum(is_unfinished.to(tl.int32), 0) == 0)
    goes_on = (is_verify & needs_infill) | (is_infill & ~is_infilled)
    num_committed = tl.where(is_verify, chain_lengths, tl.where(is_infilled, stands, 0))  # [W]
    is_ended = end < num_committed
    is_whole = (tl.sum(num_committed, 0) > 0) & (tl.sum(is_ended.to(tl.int32), 0) == 0)
    plan_holds = turn.phase == PLAN
    if FUSES_PLAN:
        plan_holds |= (is_verify & chain_is_full) | (is_infilled & is_whole)
    plan_holds &= tl.sum(turn.is_planned.to(tl.int32), 0) > 0
    return Verdict(stands, is_unfinished, ends_slot, num_committed, is_ended, goes_on, is_infilled, plan_holds)


@triton.jit
def passing_prefix(turn, grid, drawn, judge, token_threshold, K: tl.constexpr, MOST_MASKS: tl.constexpr, ACCEPTS_ARGMAX: tl.constexpr):
    """[W] tokens of the longest passing prefix of each slot; row `judge` [W, K] judges a draft.

    What is verified stands, and the first token behind it passes unconditionally.
    """
    is_drafted = grid.place < (turn.verified + num_drafted(turn.phase, K, MOST_MASKS))[:, None]  # behind those there are no rows
    is_judged = grid.is_cell & (turn.is_chosen & turn.is_judging)[:, None] & (grid.place >= 1) & is_drafted
    passes = tl.load(drawn.given_probability + judge, mask=is_judged, other=0.0) > token_threshold
    if ACCEPTS_ARGMAX:
        passes |= tl.load(drawn.given_is_argmax + judge, mask=is_judged, other=0) != 0
    passes |= grid.place <= turn.verified[:, None]
    return tl.min(tl.where(grid.is_cell & ~passes, grid.place, K), 1)


@triton.jit
def first_eos(tokens, grid, eos_ids, K: tl.constexpr, NUM_EOS: tl.constexpr):
    """[W] place of the first EOS of each slot, K without."""
    return tl.min(tl.where(grid.is_cell & is_eos(tokens, eos_ids, NUM_EOS), grid.place, K), 1)


@triton.jit
def is_eos(tokens, eos_ids, NUM_EOS: tl.constexpr):
    """Which tokens end an answer."""
    found = tokens == -1  # no token
    for index in tl.static_range(NUM_EOS):  # pyright: ignore[reportGeneralTypeIssues]: Triton unrolls it
        found |= tokens == tl.load(eos_ids + index).to(tl.int32)
    return found


@triton.jit
def judge_chain(is_chosen, prefix, end, slot, num_chosen, K: tl.constexpr, W_PADDED: tl.constexpr):
    """The concatenation of the chosen slots. Returns tokens to commit per slot, whether all are, and whether not even one slot passed."""
    failing = tl.min(tl.where(is_chosen & (prefix < K), slot, W_PADDED), 0)  # the slot in which the passing prefix ends
    passed = tl.where(slot < failing, K, tl.where(slot == failing, prefix, 0)) * is_chosen.to(tl.int32)
    num_full = tl.sum((is_chosen & (slot < failing)).to(tl.int32), 0)
    ending = tl.min(tl.where(is_chosen & (end < passed), slot, W_PADDED), 0)  # the slot with the first EOS of the prefix
    has_eos = ending < W_PADDED
    through_eos = tl.where(slot < ending, passed, tl.where(slot == ending, end + 1, 0))
    whole = tl.where(is_chosen & (slot < failing), K, 0)
    return tl.where(has_eos, through_eos, whole), ~has_eos & (num_full == num_chosen), ~has_eos & (num_full == 0)


@triton.jit
def judge_slots(is_chosen, prefix, end, slot, K: tl.constexpr, W_PADDED: tl.constexpr):
    """Every chosen slot by itself. Returns tokens that stand, which slots have more to do, and which end the answer.

    Slots behind one that ends it are dropped: nothing of them stands, and they have nothing to do.
    """
    has_eos = is_chosen & (end < prefix)
    ending = tl.min(tl.where(has_eos, slot, W_PADDED), 0)
    counts = is_chosen & (slot <= ending)
    stands = tl.where(counts, tl.where(has_eos, end + 1, prefix), 0)
    ends_slot = has_eos & counts
    return stands, counts & ~ends_slot & (stands < K), ends_slot
