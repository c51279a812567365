"""Where the correction of a rejected draft is its runner-up, it stands at once, and what was made behind it are the next drafts."""

from dataclasses import replace

import torch
from torch import Tensor

from refusion.decoding.params import ALTERNATIVE_LENGTHS
from refusion.decoding.settling.next_drafts import Infill, NextDrafts, redraft
from refusion.decoding.settling.picking import at_place
from refusion.decoding.settling.turn import Turn

# B = requests, W = slots of a block, K = tokens per slot, A = candidate lengths with alternatives, R = alternatives


def take_runner_ups(turn: Turn, infill: Infill, drafts: NextDrafts) -> NextDrafts:
    """The next drafts, corrections among them, where runner-ups were tried ahead."""
    at = drafts.lengths.clamp(max=turn.slots.slot_size - 1)
    correction, tried = at_place(drafts.token_ids, at), at_place(turn.runner_ups, at)  # [B, W], [B, W, R]
    matches = tried == correction[..., None]
    is_tried = infill.goes_on & (infill.step <= ALTERNATIVE_LENGTHS) & (drafts.lengths < turn.slots.slot_size - 1)
    is_hit = is_tried & matches.any(dim=2) & (correction[..., None] != turn.eos_ids).all(dim=2)
    is_kept = is_hit[:, :, None] & (turn.place == drafts.lengths[:, :, None])
    # The runner-ups say later that the token stands through one.
    drafts = replace(drafts, runner_ups=torch.where(is_kept[..., None], turn.runner_ups, drafts.runner_ups))
    if "alternatives" in turn.placement.rows:
        drafts = _draft_behind(turn, infill, drafts, is_hit, matches)
    return replace(drafts, lengths=drafts.lengths + is_hit)


def _draft_behind(turn: Turn, infill: Infill, drafts: NextDrafts, is_hit: Tensor, matches: Tensor) -> NextDrafts:
    """Drafts behind the runner-up [B, W, R] that `matches`, for slots with a hit [B, W]."""
    takes = is_hit & infill.is_covered[:, None]
    is_next = turn.place == drafts.lengths[:, :, None] + 1
    behind = _behind_alternative(turn, turn.readout.token_ids, matches, infill.step)
    runner_ups = [_behind_alternative(turn, each, matches, infill.step) for each in turn.readout.runner_ups.unbind(-1)]
    # The runner-up's own row names the token behind it, the masks from there on name themselves.
    behind = torch.where(is_next, behind.roll(1, dims=2), behind)
    runner_ups = [torch.where(is_next, -1, each) for each in runner_ups]
    return redraft(turn, drafts, takes, drafts.lengths + 1, behind, runner_ups)


def _behind_alternative(turn: Turn, values: Tensor, matches: Tensor, step: Tensor) -> Tensor:
    """[B, W, K] what the rows of the alternative that `matches` [B, W, R] at `step` [B, W] say."""
    tried = turn.placement.fold("alternatives", values)  # [B, W, A, R, K]
    index = (step - 1).clamp(0, tried.shape[2] - 1)[:, :, None, None, None]
    tried = tried.gather(2, index.expand(-1, -1, 1, *tried.shape[3:]))[:, :, 0]  # [B, W, R, K]
    which = matches.long().argmax(dim=2)[:, :, None, None]
    return tried.gather(2, which.expand(-1, -1, 1, tried.shape[3]))[:, :, 0]
