"""The verdict on the chain of a sliding seat, and what follows from it: the next chain, what is final, and the report."""

# The kernels are Python that Triton reads; a type checker cannot.
# pyright: basic

from typing import NamedTuple

import triton
import triton.language as tl

from refusion.decoding import sliding_report

# K = tokens per slot, N = K + 1 most tokens of a chain, R = alternatives; tensors of [N] and [N, R] are padded
# C = lengths prepared at most, A = those with alternatives, M = masks of a group

TOKENS = tl.constexpr(sliding_report.TOKENS)
SHORT, WHOLE, WHOLE_BEHIND_FAILURE = (
    tl.constexpr(how) for how in (sliding_report.SHORT, sliding_report.WHOLE, sliding_report.WHOLE_BEHIND_FAILURE)
)


class Verdict(NamedTuple):
    """What passes, and what stands behind it."""

    stands: tl.tensor  # tokens of the chain
    named: tl.tensor  # the token behind them
    is_all: tl.tensor
    is_hit: tl.tensor  # it is a runner-up of the draft that failed
    second: tl.tensor  # then the token behind that one
    behind: tl.tensor  # and the row which names it


class Next(NamedTuple):
    """The chain of the next forward."""

    known: tl.tensor
    drafted: tl.tensor
    chain: tl.tensor  # [N]
    runner_ups: tl.tensor  # [N, R] -1: none
    is_draft: tl.tensor  # [N]
    has_end: tl.tensor  # an EOS is among the drafts
    score: tl.tensor  # confidence of the first draft, 0 where there is none


class Report(NamedTuple):
    """A line of `refusion.decoding.sliding_report` without tokens and drafts, as its columns are ordered."""

    is_done: tl.tensor
    num_forwards: tl.tensor
    overflow: tl.tensor
    num_rows: tl.tensor
    cached: tl.tensor
    num_known: tl.tensor
    num_drafted: tl.tensor
    plans: tl.tensor
    has_end: tl.tensor
    score: tl.tensor
    num_passed: tl.tensor
    from_plan: tl.tensor
    place: tl.tensor


@triton.jit
def passing_prefix(
    forward, drawn, begin, chain, place, token_threshold, N: tl.constexpr, ACCEPTS_ARGMAX: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """How many tokens of the chain stand: those known, and drafts up to the first that the row before it does not let pass."""
    is_judged = (place >= forward.known) & (place < forward.known + forward.drafted)
    judge = there(begin + place - 1, drawn.num_rows)
    if IS_EXACT:
        passes = tl.load(drawn.token_ids + judge, mask=is_judged, other=0) == tl.load(chain + place, mask=is_judged, other=-1)
    else:
        passes = tl.load(drawn.given_probability + judge, mask=is_judged, other=0.0) > token_threshold
        if ACCEPTS_ARGMAX:
            passes |= tl.load(drawn.given_is_argmax + judge, mask=is_judged, other=0) != 0
    stays = (passes & is_judged) | (place < forward.known)
    return tl.min(tl.where(stays, N, place), 0)


@triton.jit
def reach_verdict(
    forward, drawn, begin, stands, first_id, runner_ups, eos_ids,
    K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, A: tl.constexpr, R_PADDED: tl.constexpr, NUM_EOS: tl.constexpr,
):  # fmt: skip
    """The `Verdict` where `stands` tokens of the chain do."""
    named = tl.load(drawn.token_ids + there(begin + stands - 1, drawn.num_rows)).to(tl.int32)
    named = tl.where(stands > 0, named, first_id)
    is_all = stands == forward.known + forward.drafted
    is_hit = stands < 0
    second = named
    behind = begin
    if A > 0:
        which = tl.arange(0, R_PADDED)
        failed = runner_ups + tl.minimum(stands, K) * R
        is_same = tl.load(failed + which, mask=which < R, other=-1) == named
        hit = tl.min(tl.where(is_same & (which < R), which, R), 0)
        can_hit = ~is_all & (stands - forward.known < forward.tried)
        is_hit = can_hit & (hit < R) & ~ends_text(named, eos_ids, NUM_EOS)
        alternatives = begin + forward.known + forward.drafted + forward.lengths * M + forward.planned
        behind = alternatives + ((stands - forward.known) * R + hit) * (1 + M)
        second = tl.load(drawn.token_ids + there(behind, drawn.num_rows), mask=is_hit, other=0).to(tl.int32)
    return Verdict(stands, named, is_all, is_hit, second, behind)


@triton.jit
def find_drafts(forward, verdict, begin, M: tl.constexpr):
    """The first row that drafts what comes behind all that is known then, and how many do.

    They are masks behind the first of their group, whose place the last known token has.
    """
    groups = begin + forward.known + forward.drafted
    accepted = verdict.stands - forward.known
    has_group = verdict.is_hit | (accepted < forward.lengths)
    group = tl.where(verdict.is_hit, verdict.behind + 1, groups + accepted * M)
    row = tl.where(verdict.is_all, groups + forward.lengths * M, group)
    count = tl.where(verdict.is_all, forward.planned, tl.where(has_group, M, 1))
    return row + 1, count - 1


@triton.jit
def plan_next(forward, verdict, M: tl.constexpr):
    """How the next forward plans. One without drafts says nothing of how predictable the text is."""
    is_long = verdict.stands - forward.known >= M
    goes_on = verdict.is_all & ((forward.drafted > 0) | (forward.plans != SHORT))
    return tl.where(goes_on, WHOLE, tl.where(~verdict.is_all & is_long, WHOLE_BEHIND_FAILURE, SHORT))


@triton.jit
def draft_next(
    forward, verdict, drawn, begin, place, runner_ups_stride, eos_ids,
    M: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, N_PADDED: tl.constexpr, NUM_EOS: tl.constexpr,
):  # fmt: skip
    """The `Next` chain: what is known, and drafts from the masks behind it but the first, whose place the last known token has."""
    known = 1 + verdict.is_hit.to(tl.int32)
    first_row, drafted = find_drafts(forward, verdict, begin, M)  # pyright: ignore[reportGeneralTypeIssues]: `tl.where` returns
    is_draft = (place >= known) & (place < known + drafted)
    row = there(first_row + place - known, drawn.num_rows)
    chain = tl.load(drawn.token_ids + row, mask=is_draft, other=0).to(tl.int32)
    has_end = tl.max((is_draft & ends_text(chain, eos_ids, NUM_EOS)).to(tl.int32), 0)
    chain = tl.where(place == 0, verdict.named, chain)
    chain = tl.where(verdict.is_hit & (place == 1), verdict.second, chain)
    runner_ups = tl.full([N_PADDED, R_PADDED], -1, tl.int32)
    if R > 0:
        which = tl.arange(0, R_PADDED)[None, :]
        is_ranked = is_draft[:, None] & (which < R)
        runner_ups = tl.load(drawn.runner_ups + row[:, None] * runner_ups_stride + which, mask=is_ranked, other=-1).to(tl.int32)
    score = tl.load(drawn.confidence + there(first_row, drawn.num_rows), mask=drafted > 0, other=0.0)
    return Next(known, drafted, chain, runner_ups, is_draft, has_end, score)


@triton.jit
def write_final(forward, verdict, chain, most, place, eos_ids, N: tl.constexpr, N_PADDED: tl.constexpr, NUM_EOS: tl.constexpr):
    """What is final now [N], how much of it, and whether it ends the answer with an EOS.

    That is the accepted drafts and what is known, through the first EOS and no more than `most`.
    """
    accepted = verdict.stands - forward.known
    final = tl.load(chain + tl.minimum(forward.known + place, N - 1), mask=place < accepted, other=0).to(tl.int32)
    final = tl.where(place < accepted, final, tl.where(place == accepted, verdict.named, verdict.second))
    num_final = tl.minimum(accepted + 1 + verdict.is_hit.to(tl.int32), most)
    end = tl.min(tl.where(ends_text(final, eos_ids, NUM_EOS) & (place < num_final), place, N_PADDED), 0)
    return final, tl.where(end < N_PADDED, end + 1, num_final), end < N_PADDED


@triton.jit
def there(row, num_rows):
    """Row numbers that are safe to read: rows that did not fit, or are nobody's, are read somewhere."""
    return tl.minimum(tl.maximum(row, 0), num_rows - 1)


@triton.jit
def ends_text(tokens, eos_ids, NUM_EOS: tl.constexpr):
    """Which tokens end an answer."""
    found = tokens != tokens  # none does
    for index in tl.static_range(NUM_EOS):  # pyright: ignore[reportGeneralTypeIssues]: Triton unrolls it
        found |= tokens == tl.load(eos_ids + index).to(tl.int32)
    return found


@triton.jit
def put_report(out, report):
    """Write all columns before the tokens."""
    for index in tl.static_range(TOKENS):  # pyright: ignore[reportGeneralTypeIssues]: Triton unrolls it
        tl.store(out + index, report[index])
