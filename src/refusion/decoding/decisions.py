"""The decisions of plan-and-infill decoding as batched tensor functions: which slots are planned, which drafts pass, where an answer ends.

Pure and of fixed shape: a host loop and a loop on the device call the same functions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# B = requests, W = slots of the current block, K = tokens per slot


SlotScore = Literal["first", "mean"]


def slot_scores(certainty: Tensor, kind: SlotScore = "first") -> Tensor:
    """[B, W] how sure a plan is of its slots, from how sure it is of their tokens [B, W, K].

    first: of the first token, as published; mean: of all of them. Certainty is the probability of the draft, or, for scores by entropy,
    exp(-entropy) of its distribution.
    """
    return certainty[:, :, 0] if kind == "first" else certainty.mean(dim=2)


def choose_slots(scores: Tensor, is_candidate: Tensor, threshold: float) -> Tensor:
    """[B, W] bool: candidates whose score exceeds the threshold; if there are none, the single best (the first of equals)."""
    is_chosen = is_candidate & (scores > threshold)
    best = scores.masked_fill(~is_candidate, -1.0).argmax(dim=1, keepdim=True)
    is_best = torch.zeros_like(is_candidate).scatter(1, best, True) & is_candidate
    return torch.where(is_chosen.any(dim=1, keepdim=True), is_chosen, is_best)


def passing(probability: Tensor, is_argmax: Tensor, num_verified: Tensor, *, threshold: float, accept_argmax: bool) -> Tensor:
    """[B, W, K] bool: which drafts pass. The verified prefix stands and the first unverified token passes unconditionally.

    probability, is_argmax [B, W, K] judge token j by the logits of token j - 1 of its slot; num_verified [B, W].
    """
    place = torch.arange(probability.shape[2], device=probability.device)
    passes = probability > threshold
    if accept_argmax:
        passes = passes | is_argmax
    return passes | (place <= num_verified[:, :, None])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verify forward decides for the concatenation of all chosen slots."""

    is_committed: Tensor  # [B, W, K] tokens to commit now
    has_eos: Tensor  # [B] the longest passing prefix holds an EOS
    is_full: Tensor  # [B] every chosen slot is committed whole
    needs_infill: Tensor  # [B] not even one slot passed


def verify_prefix(passes: Tensor, is_chosen: Tensor, is_eos: Tensor) -> Verdict:
    """Judge the concatenation of the chosen slots by its longest all-passing prefix of n tokens (arXiv 2512.13586, section 4).

    passes, is_eos [B, W, K]; is_chosen [B, W]. With an EOS in the prefix everything through the first one is committed; otherwise
    the first floor(n / K) chosen slots; otherwise nothing and the chosen slots are infilled.
    """
    slot_size = passes.shape[2]
    in_chain = is_chosen[:, :, None].expand_as(passes)
    has_failed = (in_chain & ~passes).flatten(1).cumsum(dim=1).view_as(passes) > 0
    in_prefix = in_chain & ~has_failed
    num_passed = in_prefix.flatten(1).sum(dim=1)  # [B]
    eos_in_prefix = in_prefix & is_eos
    has_eos = eos_in_prefix.flatten(1).any(dim=1)
    num_full = num_passed // slot_size
    nth = is_chosen.cumsum(dim=1) - 1  # [B, W] place among the chosen
    whole_slots = (is_chosen & (nth < num_full[:, None]))[:, :, None].expand_as(passes)
    is_committed = torch.where(has_eos[:, None, None], in_prefix & _through_first(eos_in_prefix.flatten(1)).view_as(passes), whole_slots)
    return Verdict(
        is_committed=is_committed,
        has_eos=has_eos,
        is_full=~has_eos & (num_full == is_chosen.sum(dim=1)),
        needs_infill=~has_eos & (num_full == 0),
    )


@dataclass(frozen=True, slots=True)
class InfillVerdict:
    """What one infill turn decides, slot by slot."""

    lengths: Tensor  # [B, W] tokens that stand, through the EOS where there is one
    is_accepted: Tensor  # [B, W, K] the same as a mask
    is_complete: Tensor  # [B, W] nothing left to do in this slot
    is_dropped: Tensor  # [B, W] chosen, but behind an EOS of an earlier slot
    has_eos: Tensor  # [B, W] the slot ends the answer; dropped slots excepted


def infill_prefix(passes: Tensor, is_chosen: Tensor, is_eos: Tensor) -> InfillVerdict:
    """Judge every chosen slot by its own longest passing prefix (arXiv 2512.13586, section 4)."""
    in_prefix = passes.long().cumprod(dim=2).bool() & is_chosen[:, :, None]
    eos_in_prefix = in_prefix & is_eos
    slot_has_eos = eos_in_prefix.any(dim=2)
    is_dropped = is_chosen & ((slot_has_eos.cumsum(dim=1) - slot_has_eos.long()) > 0)
    is_accepted = in_prefix & _through_first(eos_in_prefix) & ~is_dropped[:, :, None]
    lengths = is_accepted.sum(dim=2)
    has_eos = slot_has_eos & ~is_dropped
    is_complete = is_chosen & ~is_dropped & (has_eos | (lengths == passes.shape[2]))
    return InfillVerdict(lengths, is_accepted, is_complete, is_dropped, has_eos)


def _through_first(is_hit: Tensor) -> Tensor:
    """True up to and including the first True along the last axis; all True where there is none."""
    hits = is_hit.long()
    return (hits.cumsum(dim=-1) - hits) == 0
