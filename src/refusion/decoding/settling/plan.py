"""What a plan does to the slots it was made for, where it holds."""

from dataclasses import replace

import torch
from torch import Tensor

from refusion.decoding.decisions import choose_slots
from refusion.decoding.settling.picking import slots_of, with_slots
from refusion.decoding.settling.turn import Turn
from refusion.decoding.state import CHOSEN, OPEN, DecodeState

# B = requests, W = slots of a block, K = tokens per slot


def put_plan(turn: Turn, state: DecodeState, plan_holds: Tensor) -> DecodeState:
    """Draft and choose slots from the plan rows of the requests whose plan holds [B]."""
    slots = turn.placement.plan_slots
    is_planned = turn.placement.is_planned & plan_holds[:, None]
    drafts = turn.placement.fold("plan", turn.readout.token_ids)
    is_chosen = choose_slots(plan_scores(turn), is_planned, turn.slots.slot_threshold)
    is_named = (state.status.gather(1, slots) == OPEN) & (state.lengths.gather(1, slots) == 1)  # [B, W]
    is_new = is_planned[:, :, None] & ~(is_named[:, :, None] & (turn.place == 0))
    token_ids = with_slots(state.token_ids, slots, torch.where(is_new, drafts, slots_of(state.token_ids, slots)))
    if turn.slots.alternatives:
        runner_ups = torch.where(is_new[..., None], turn.placement.fold_each("plan", turn.readout.runner_ups), -1)
        runner_ups = torch.where(is_planned[:, :, None, None], runner_ups, slots_of(state.runner_ups, slots))
        state = replace(state, runner_ups=with_slots(state.runner_ups, slots, runner_ups))
    status = state.status.scatter(1, slots, torch.where(is_chosen, CHOSEN, state.status.gather(1, slots)))
    lengths = state.lengths.scatter(1, slots, torch.where(is_chosen, 0, state.lengths.gather(1, slots)))
    return replace(state, token_ids=token_ids, status=status, lengths=lengths)


def plan_scores(turn: Turn) -> Tensor:
    """[B, W] confidence of the first token of every planned slot."""
    return turn.placement.fold("plan", turn.readout.confidence)[:, :, 0]
