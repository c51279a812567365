"""Picking slots out of tensors of slots, and places out of slots."""

from torch import Tensor

# B = requests, S = slots, W = slots of a block, K = tokens per slot


def slots_of(values: Tensor, slots: Tensor) -> Tensor:
    """values [B, S, K, ...] of slots [B, W]."""
    index = slots.view(*slots.shape, *[1] * (values.dim() - 2))
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def with_slots(values: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """values [B, S, K, ...] with slots [B, W] replaced by new [B, W, K, ...]."""
    return values.scatter(1, slots.view(*slots.shape, *[1] * (new.dim() - 2)).expand_as(new), new)


def at_place(values: Tensor, place: Tensor) -> Tensor:
    """values [B, W, K, ...] at a place [B, W] of each slot: [B, W, ...]."""
    index = place.view(*place.shape, *[1] * (values.dim() - 2))
    return values.gather(2, index.expand(-1, -1, 1, *values.shape[3:]))[:, :, 0]
