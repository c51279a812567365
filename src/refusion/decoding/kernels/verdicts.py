"""`verify_prefix` and `infill_prefix` of `refusion.decoding.decisions` for one seat, on lengths instead of masks.

Per slot [W]: `prefix` tokens pass from its start on, `end` is the place of its first EOS (K without one).
"""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

import triton
import triton.language as tl


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
