"""What one forward did, for events and statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor

from refusion.decoding.settling.plan import plan_scores
from refusion.decoding.settling.turn import Turn
from refusion.decoding.settling.verdicts import TurnVerdict
from refusion.decoding.state import INFILL, VERIFY

# B = requests, W = slots of a block, K = tokens per slot


@dataclass(frozen=True, slots=True)
class StepReport:
    """Window-shaped tensors [B, W] and [B, W, K]."""

    phase: Tensor  # [B] what the forward was
    window: Tensor  # [B, W]
    drafts: Tensor  # [B, W, K] what was verified
    is_chosen: Tensor  # [B, W] slots that were verified or infilled
    num_accepted: Tensor  # [B, W] tokens of them that stand now
    is_committed: Tensor  # [B, W, K]
    plan_slots: Tensor  # [B, W]
    is_planned: Tensor  # [B, W] slots planned by this forward (speculative plans that hold included)
    plan_scores: Tensor  # [B, W]
    num_rows: Tensor  # [B] tokens the forward ran


def report_step(turn: Turn, verdict: TurnVerdict) -> StepReport:
    """The `StepReport` of a turn."""
    is_judging = (turn.phase == VERIFY) | (turn.phase == INFILL)
    is_judged = turn.is_chosen & is_judging[:, None]
    is_infill = verdict.goes_on | verdict.is_infilled
    accepted = torch.where(is_infill[:, None], verdict.infill.lengths, verdict.is_committed.sum(dim=2))
    return StepReport(
        phase=turn.phase,
        window=turn.placement.window,
        drafts=turn.drafts,
        is_chosen=is_judged,
        num_accepted=torch.where(is_judged, accepted, 0),
        is_committed=verdict.is_committed,
        plan_slots=turn.placement.plan_slots,
        is_planned=turn.placement.is_planned & verdict.plan_holds[:, None],
        plan_scores=plan_scores(turn),
        num_rows=turn.placement.num_rows,
    )
