"""What becomes of the drafts and of the plan of a forward."""

from dataclasses import dataclass

import torch
from torch import Tensor

from refusion.decoding.decisions import InfillVerdict, infill_prefix, passing, verify_prefix
from refusion.decoding.settling.turn import Turn
from refusion.decoding.state import INFILL, PLAN, VERIFY

# B = requests, W = slots of a block, K = tokens per slot


@dataclass(frozen=True, slots=True)
class TurnVerdict:
    """What counts in the phase of each request."""

    infill: InfillVerdict  # every slot by itself
    is_committed: Tensor  # [B, W, K] tokens that are final
    ends: Tensor  # [B, W] slots that end the answer with what is final
    goes_on: Tensor  # [B] the infill of the chosen slots begins or goes on
    is_infilled: Tensor  # [B] or it is done
    plan_holds: Tensor  # [B] there was something to plan, and what the plan took for granted is so


def reach_verdict(turn: Turn) -> TurnVerdict:
    """Judge the drafts of a turn by the rows before them."""
    passes = _passes(turn)
    chain = verify_prefix(passes, turn.is_chosen, turn.is_eos)
    infill = infill_prefix(passes, turn.is_chosen, turn.is_eos)
    is_verify, is_infill = turn.phase == VERIFY, turn.phase == INFILL
    is_infilled = is_infill & (infill.is_complete == (turn.is_chosen & ~infill.is_dropped)).all(dim=1)
    goes_on = torch.where(is_verify, chain.needs_infill, is_infill) & ~is_infilled
    by_chain = chain.is_committed & is_verify[:, None, None]
    is_committed = by_chain | (infill.is_accepted & is_infilled[:, None, None])
    ends = (is_committed & turn.is_eos).any(dim=2)
    plan_holds = turn.phase == PLAN
    if turn.slots.fuse_plan:
        is_whole = is_committed.any(dim=2).any(dim=1) & ~ends.any(dim=1)
        plan_holds = plan_holds | (is_verify & chain.is_full) | (is_infilled & is_whole)
    plan_holds = plan_holds & turn.placement.is_planned.any(dim=1)
    return TurnVerdict(infill, is_committed, ends, goes_on, is_infilled, plan_holds)


def _passes(turn: Turn) -> Tensor:
    """[B, W, K] drafts that pass."""
    probability, is_argmax = turn.judging(turn.readout.given_probability), turn.judging(turn.readout.given_is_argmax)
    accept_argmax = turn.slots.acceptance == "argmax"
    passes = passing(probability, is_argmax, turn.num_verified, threshold=turn.slots.token_threshold, accept_argmax=accept_argmax)
    most_drafted = turn.slots.most_drafted(turn.phase == INFILL)[:, None, None]
    return passes & (turn.place < turn.num_verified[:, :, None] + most_drafted)
