"""What the diffusion rounds know of their requests, and what each forwards next."""

from dataclasses import dataclass

from torch import Tensor

# B = seats, N = positions of prompt and answer

SCALARS = ("prompt_length", "seed", "end", "first", "step", "num_drafts", "num_forwards", "is_done")
"""The columns of the seat table, in order; the text follows."""


@dataclass(frozen=True, slots=True)
class DiffusionState:
    """The first seats, in place. All [B] but the text."""

    prompt_length: Tensor
    seed: Tensor
    end: Tensor  # of the answer, as a position
    first: Tensor  # position of the first token of the block in work
    step: Tensor  # forwards that have read this block
    num_drafts: Tensor  # forwards that have read any, keys the noise
    num_forwards: Tensor
    is_done: Tensor
    text: Tensor  # [B, N]


@dataclass(frozen=True, slots=True)
class Stretch:
    """The positions [start, stop) that a seat forwards next, and the block [first, block_end) that may be read. All [B]."""

    start: Tensor
    stop: Tensor  # start where the seat has nothing to do
    first: Tensor
    block_end: Tensor

    @property
    def num_rows(self) -> Tensor:
        """[B] of the forward."""
        return self.stop - self.start

    @property
    def is_active(self) -> Tensor:
        """[B] bool."""
        return self.stop > self.start

    @property
    def is_read(self) -> Tensor:
        """[B] bool: whether the block in work is among the rows."""
        return self.stop > self.first
