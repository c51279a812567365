"""Which masks of a block become final in a forward: the most confident ones, by threshold or in even shares."""

from dataclasses import dataclass

import torch
from torch import Tensor

from refusion.decoding.diffusion_params import DiffusionParams
from refusion.decoding.diffusion_state import DiffusionState, Stretch
from refusion.decoding.forward import Readout

# B = seats, K = tokens of a block


@dataclass(frozen=True, slots=True)
class BlockVerdict:
    """What became of the block of every seat."""

    position: Tensor  # [B, K] in the text, of each token; some other where it has no room for them
    after: Tensor  # [B, K] tokens now
    is_final: Tensor  # [B, K] it was a mask until now
    is_whole: Tensor  # [B] it was read, and nothing is masked any more
    has_ended: Tensor  # [B] an EOS has everything before it written


def judge_blocks(
    state: DiffusionState, stretch: Stretch, readout: Readout, params: DiffusionParams, block_size: int, mask_id: int, eos_ids: Tensor
) -> BlockVerdict:
    """Judge the blocks that were read by a readout with a row [B * K] for every token. eos_ids [E] end an answer."""
    place = torch.arange(block_size, device=state.text.device)
    position = state.first[:, None] + place  # [B, K]
    is_read = stretch.is_read[:, None] & (position < stretch.block_end[:, None])
    position = position.clamp(max=state.text.shape[1] - 1)
    before = state.text.gather(1, position)
    is_masked = is_read & (before == mask_id)
    confidence = readout.confidence[: position.numel()].view_as(position)
    is_final = is_masked & _chosen(confidence, is_masked, state.step, params)
    drawn = readout.token_ids[: position.numel()].view_as(position).long()
    after = torch.where(is_final, drawn, before)
    is_open = is_masked & ~is_final
    is_certain = is_read & (is_open.long().cumsum(dim=1) == 0)  # nothing before it is masked
    has_ended = (is_certain[:, :, None] & (after[:, :, None] == eos_ids)).any(dim=2).any(dim=1)
    return BlockVerdict(position, after, is_final, stretch.is_read & ~is_open.any(dim=1), has_ended)


def _chosen(confidence: Tensor, is_masked: Tensor, step: Tensor, params: DiffusionParams) -> Tensor:
    """[B, K] bool: the most confident masks of each block, by threshold or as many as this step has to commit."""
    order = torch.where(is_masked, confidence, -1.0).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    if params.threshold is not None:
        return (confidence > params.threshold) | (rank == 0)
    steps_left = (params.steps_per_block - step).clamp(min=1)
    count = torch.div(is_masked.sum(dim=1) + steps_left - 1, steps_left, rounding_mode="floor")
    return rank < count[:, None]
