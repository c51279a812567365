"""Which new token may see which: attention over segments.

The new tokens of a forward come in segments. Inside a segment attention is causal by rank, and tokens of equal rank see one another: one
rank for all is bidirectional attention, the number of a block as rank is bidirectional inside blocks. A segment may also see the first
`visible` tokens of one parent segment, or the whole *trunk* (all tokens marked so). Every token sees the committed cache of its request.
That is enough for plans, verification, infill and their fused forms, and no K/V of the prefix is ever copied per slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# B = requests, T = new tokens of one forward

NO_PARENT = -1
TRUNK = -2  # as a parent: the segment sees every token of the trunk


@dataclass(frozen=True, slots=True)
class Segments:
    """Per new token: its segment, its rank inside it, and what it sees outside it. All [B, T]; padding has segment -1."""

    segment: Tensor
    rank: Tensor
    parent: Tensor
    visible: Tensor
    is_trunk: Tensor

    @classmethod
    def causal(cls, is_token: Tensor) -> "Segments":
        """One causal segment per request. is_token [B, T] bool: False is padding at the end."""
        rank = torch.arange(is_token.shape[1], device=is_token.device).expand(is_token.shape)
        nothing = torch.full_like(rank, NO_PARENT)
        return cls(torch.where(is_token, 0, -1), rank, nothing, torch.zeros_like(rank), is_token)

    def attn_mask(self) -> Tensor:
        """[B, T, T] bool: row i may see column j among the new tokens. Padding sees itself, so that no softmax is empty."""
        query, key = self.segment[:, :, None], self.segment[:, None, :]
        is_token = key >= 0
        own = (query == key) & (self.rank[:, None, :] <= self.rank[:, :, None])
        parent = (self.parent[:, :, None] == key) & is_token & (self.rank[:, None, :] < self.visible[:, :, None])
        trunk = (self.parent[:, :, None] == TRUNK) & self.is_trunk[:, None, :] & is_token
        return (own & is_token) | parent | trunk | torch.eye(query.shape[1], dtype=torch.bool, device=query.device)
