"""What unfinished slots are tried with next: drafts from the fused group of the accepted length, or from a remask forward."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refusion.decoding.settling.picking import at_place
from refusion.decoding.settling.turn import Turn
from refusion.decoding.settling.verdicts import TurnVerdict
from refusion.decoding.state import REMASK

# B = requests, W = slots of a block, K = tokens per slot, C = candidate lengths, R = alternatives


@dataclass(frozen=True, slots=True)
class Infill:
    """Where the slots in infill stand after a forward."""

    stands: Tensor  # [B, W] tokens that stand
    step: Tensor  # [B, W] how many of them were accepted just now
    goes_on: Tensor  # [B, W] slots whose infill goes on
    remasks: Tensor  # [B, W] slots whose masks were filled in this forward
    is_covered: Tensor  # [B] whether every accepted length had its candidates in this forward


@dataclass(frozen=True, slots=True)
class NextDrafts:
    """What the slots of the window are tried with next."""

    token_ids: Tensor  # [B, W, K]
    runner_ups: Tensor  # [B, W, K, R]
    lengths: Tensor  # [B, W] tokens that stand


def follow_infill(turn: Turn, verdict: TurnVerdict) -> Infill:
    """The `Infill` after a verdict."""
    is_remask = (turn.phase == REMASK)[:, None]
    stands = torch.where(is_remask, turn.num_verified, verdict.infill.lengths)
    step = stands - turn.num_verified
    is_unfinished = turn.is_chosen & ~verdict.infill.is_complete & ~verdict.infill.is_dropped
    is_covered = ((step <= turn.num_candidates) | ~is_unfinished).all(dim=1)
    return Infill(stands, step, verdict.goes_on[:, None] & is_unfinished, is_remask & turn.is_chosen, is_covered)


def draft_anew(turn: Turn, infill: Infill) -> NextDrafts:
    """The drafts of this turn, and new ones behind the tokens that stand."""
    takes = (infill.goes_on & infill.is_covered[:, None]) | infill.remasks
    group = infill.step.clamp(0, turn.num_candidates)  # a remask forward has group 0 alone
    proposed = _of_group(turn, turn.readout.token_ids, group)
    runner_ups = [_of_group(turn, each, group) for each in turn.readout.runner_ups.unbind(-1)]
    before = NextDrafts(turn.drafts, turn.runner_ups, infill.stands)
    return redraft(turn, before, takes, infill.stands, proposed, runner_ups)


def redraft(turn: Turn, drafts: NextDrafts, which: Tensor, first: Tensor, proposed: Tensor, runner_ups: list[Tensor]) -> NextDrafts:
    """New drafts from place `first` [B, W] on for the slots `which` [B, W]: as many as a group has masks, and masks behind them.

    proposed and each of `runner_ups`: [B, W, K].
    """
    is_new = which[:, :, None] & (turn.place >= first[:, :, None])
    is_drafted = turn.place < first[:, :, None] + turn.slots.most_masks
    # A mask in the place of a draft never passes: it is banned, so its probability is 0.
    token_ids = torch.where(is_new, torch.where(is_drafted, proposed, turn.mask_id), drafts.token_ids)
    if not runner_ups:
        return replace(drafts, token_ids=token_ids)
    found = torch.where(is_drafted[..., None], torch.stack(runner_ups, dim=-1), -1)
    return replace(drafts, token_ids=token_ids, runner_ups=torch.where(is_new[..., None], found, drafts.runner_ups))


def replace_rejected(turn: Turn, infill: Infill, drafts: NextDrafts) -> NextDrafts:
    """The row that rejected a token of a slot predicts a better one; it replaces the mask's, also through a remask forward."""
    judged = turn.judging(turn.readout.token_ids)
    is_first = turn.place == drafts.lengths[:, :, None]
    is_kept, is_replaced = is_first & infill.remasks[:, :, None], is_first & infill.goes_on[:, :, None]
    kept, runner_ups = turn.drafts, drafts.runner_ups
    if turn.slots.alternatives:
        # What stands through a runner-up that was not tried ahead has its next token from this remask forward.
        last = (drafts.lengths - 1).clamp(min=0)
        is_ahead = (at_place(turn.runner_ups, last) == at_place(turn.drafts, last)[..., None]).any(dim=2) & (drafts.lengths > 0)
        kept = torch.where(is_ahead[:, :, None], judged, kept)
        runner_ups = torch.where((is_kept | is_replaced)[..., None], -1, runner_ups)
    token_ids = torch.where(is_replaced, judged, torch.where(is_kept, kept, drafts.token_ids))
    return replace(drafts, token_ids=token_ids, runner_ups=runner_ups)


def _of_group(turn: Turn, values: Tensor, group: Tensor) -> Tensor:
    """[B, W, K] what the masks of one group [B, W] of every slot say."""
    groups = turn.placement.fold("groups", values)  # [B, W, C + 1, K]
    return groups.gather(2, group[:, :, None, None].expand(-1, -1, 1, groups.shape[3]))[:, :, 0]
