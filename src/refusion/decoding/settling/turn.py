"""What a forward is judged by: the state it started from, where its rows went, and what they said."""

from dataclasses import dataclass

import torch
from torch import Tensor

from refusion.decoding.forward import Readout
from refusion.decoding.packing import Placement
from refusion.decoding.params import SlotSettings
from refusion.decoding.settling.picking import slots_of
from refusion.decoding.state import CHOSEN, DecodeState

# B = requests, W = slots of a block, K = tokens per slot, R = alternatives


@dataclass(frozen=True, slots=True)
class Turn:
    """One forward of every request."""

    state: DecodeState  # before
    slots: SlotSettings
    num_candidates: int
    mask_id: int
    eos_ids: Tensor  # [E] end an answer
    placement: Placement
    readout: Readout
    is_chosen: Tensor  # [B, W] slots of the window with drafts
    num_verified: Tensor  # [B, W] tokens of them that stood before
    drafts: Tensor  # [B, W, K]
    runner_ups: Tensor  # [B, W, K, R] of the drafts
    is_eos: Tensor  # [B, W, K] of the drafts
    place: Tensor  # [K]

    @property
    def phase(self) -> Tensor:
        """[B] what the forward was."""
        return self.state.phase

    def judging(self, values: Tensor) -> Tensor:
        """[B, W, K] any values of the rows by which drafts are judged; the first of a slot has none, and gets the last row's."""
        return self.placement.fold("drafts", values).roll(1, dims=2)


def read_turn(
    state: DecodeState, slots: SlotSettings, num_candidates: int, mask_id: int, eos_ids: Tensor, placement: Placement, readout: Readout
) -> Turn:
    """The `Turn` of a forward that `placement` laid out for `state`."""
    window = placement.window
    is_chosen = state.status.gather(1, window) == CHOSEN
    drafts = slots_of(state.token_ids, window)
    return Turn(
        state=state,
        slots=slots,
        num_candidates=num_candidates,
        mask_id=mask_id,
        eos_ids=eos_ids,
        placement=placement,
        readout=readout,
        is_chosen=is_chosen,
        num_verified=torch.where(is_chosen, state.lengths.gather(1, window), 0),
        drafts=drafts,
        runner_ups=slots_of(state.runner_ups, window),
        is_eos=(drafts[..., None] == eos_ids).any(dim=3),
        place=torch.arange(slots.slot_size, device=drafts.device),
    )
