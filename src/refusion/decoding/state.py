"""Where every request of a batch stands: tensors of fixed shape, so that a round is a function from state to state."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

# B = requests, S = slots of the whole answer (a multiple of W), W = slots of a block, K = tokens per slot, R = alternatives

# phases: what a request's next forward does
PLAN, VERIFY, REMASK, INFILL, DONE = range(5)
# status of a slot
OPEN, CHOSEN, COMMITTED, CLOSED = range(4)


@dataclass(frozen=True, slots=True)
class DecodeState:
    """The answers being written. Slots that do not exist are closed."""

    prompt_lengths: Tensor  # [B]
    seeds: Tensor  # [B]
    token_ids: Tensor  # [B, S, K] committed tokens and current drafts
    status: Tensor  # [B, S]
    runner_ups: Tensor  # [B, S, K, R] of each draft that comes from a mask, -1 of others
    lengths: Tensor  # [B, S] committed tokens of a committed slot, verified tokens of a chosen one, 1 of an open one whose first is known
    phase: Tensor  # [B]
    num_drafts: Tensor  # [B] logical drafts so far, keys the noise
    num_forwards: Tensor  # [B]

    @classmethod
    def start(
        cls, prompt_lengths: Tensor, seeds: Tensor, num_slots: int, slots_per_block: int, slot_size: int, alternatives: int = 0
    ) -> "DecodeState":
        """Everything open, first forward is a plan. alternatives: R."""
        num_requests, device = len(prompt_lengths), prompt_lengths.device
        width = -(-num_slots // slots_per_block) * slots_per_block
        status = torch.where(torch.arange(width, device=device) < num_slots, OPEN, CLOSED).repeat(num_requests, 1)
        nothing = torch.zeros(num_requests, dtype=torch.long, device=device)
        return cls(
            prompt_lengths=prompt_lengths,
            seeds=seeds,
            token_ids=torch.zeros(num_requests, width, slot_size, dtype=torch.long, device=device),
            status=status,
            runner_ups=torch.full((num_requests, width, slot_size, alternatives), -1, dtype=torch.long, device=device),
            lengths=torch.zeros_like(status),
            phase=nothing,
            num_drafts=nothing,
            num_forwards=nothing,
        )

    def select(self, requests: Tensor) -> "DecodeState":
        """Only these requests [R] (indices)."""
        return replace(self, **{field.name: getattr(self, field.name)[requests] for field in fields(self)})

    def window(self, slots_per_block: int) -> Tensor:
        """[B, W] slot indices of the current block: the first with a slot to write (the last one when there is none)."""
        is_unfinished = (self.status == OPEN) | (self.status == CHOSEN)
        first = is_unfinished.long().argmax(dim=1)
        return (first // slots_per_block * slots_per_block)[:, None] + torch.arange(slots_per_block, device=first.device)
