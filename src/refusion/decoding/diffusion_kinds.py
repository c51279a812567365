"""How masked and block diffusion differ over flat rows: what a forward runs, what its rows see, and what is kept of it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refusion.decoding.diffusion_params import BlockDiffusionParams, DiffusionParams, MaskedDiffusionParams
from refusion.decoding.diffusion_state import DiffusionState, Stretch

# B = seats, T = decode rows of a forward


@dataclass(frozen=True, slots=True)
class Kept:
    """The rows that join the cache. [T]"""

    is_kept: Tensor
    place: Tensor  # of the token in the cache


class DiffusionKind(Protocol):
    """One way of writing block after block."""

    @property
    def name(self) -> str:
        """As `refusion.decoding.kernels.diffusion_stretch.KINDS` lists it."""
        ...

    @property
    def has_cache(self) -> bool:
        """Whether any row is ever kept."""
        ...

    @property
    def stops_early(self) -> bool:
        """Whether an answer is done once an EOS has everything before it written."""
        ...

    def num_answer(self, max_tokens: int) -> int:
        """Masks of an answer."""
        ...

    def first_rows(self, prompt_length: int, max_tokens: int) -> int:
        """Decode rows of a request's first forward."""
        ...

    def visible(self, state: DiffusionState, cached: Tensor) -> Tensor:
        """[B] cached tokens that the next forward sees."""
        ...

    def reach(self, state: DiffusionState, cached: Tensor, block_end: Tensor) -> tuple[Tensor, Tensor]:
        """[B] start and stop of what a seat with work forwards next."""
        ...

    def rank(self, position: Tensor, prompt_length: Tensor) -> Tensor:
        """[T] of each row: it sees those with no higher one."""
        ...

    def kept(self, state: DiffusionState, stretch: Stretch, seat: Tensor, position: Tensor) -> Kept:
        """Of the rows [T] with these seats and positions."""
        ...

    def cached_after(self, state: DiffusionState, stretch: Stretch, cached: Tensor) -> Tensor:
        """[B] tokens in the cache once the forward is settled, from the state before."""
        ...

    def counts(self, state: DiffusionState, stretch: Stretch, cached: Tensor) -> Tensor:
        """[B] bool: whether this was a forward of the answer, from the state before."""
        ...


def kind_of(params: DiffusionParams, block_size: int, prefill_rows: int) -> DiffusionKind:
    """prefill_rows: prompt tokens of a forward of block diffusion, in whole blocks."""
    if isinstance(params, BlockDiffusionParams):
        return BlockDiffusion(block_size, prefill_rows, fuse_commit=params.fuse_commit)
    return MaskedDiffusion(params)


@dataclass(frozen=True, slots=True)
class MaskedDiffusion:
    """Every forward sees the whole answer, whose length is fixed; a cache, where there is one, is made anew with every block."""

    params: MaskedDiffusionParams

    @property
    def name(self) -> str:
        return self.params.cache

    @property
    def has_cache(self) -> bool:
        return self.params.cache != "none"

    @property
    def keeps_behind(self) -> bool:
        """Whether the cache also holds the masks behind the block."""
        return self.params.cache == "dual"

    @property
    def stops_early(self) -> bool:
        return self.params.early_stop

    def num_answer(self, max_tokens: int) -> int:
        return max_tokens

    def first_rows(self, prompt_length: int, max_tokens: int) -> int:
        return prompt_length + max_tokens

    def visible(self, state: DiffusionState, cached: Tensor) -> Tensor:
        return torch.where(state.step == 0, 0, cached)

    def reach(self, state: DiffusionState, cached: Tensor, block_end: Tensor) -> tuple[Tensor, Tensor]:
        is_first = state.step == 0
        start = torch.where(is_first, 0, state.first) if self.has_cache else torch.zeros_like(state.first)
        return start, torch.where(is_first, state.end, block_end) if self.keeps_behind else state.end

    def rank(self, position: Tensor, prompt_length: Tensor) -> Tensor:
        return torch.zeros_like(position)

    def kept(self, state: DiffusionState, stretch: Stretch, seat: Tensor, position: Tensor) -> Kept:
        first, block_end = stretch.first[seat], stretch.block_end[seat]
        is_kept, place = position < first, position
        if self.keeps_behind:
            is_behind = position >= block_end
            is_kept, place = is_kept | is_behind, torch.where(is_behind, position - (block_end - first), position)
        return Kept(is_kept & (state.step[seat] == 0), place)

    def cached_after(self, state: DiffusionState, stretch: Stretch, cached: Tensor) -> Tensor:
        if not self.has_cache:
            return cached
        everything = state.end - (stretch.block_end - stretch.first) if self.keeps_behind else stretch.first
        return torch.where(stretch.is_active & (state.step == 0), everything, cached)

    def counts(self, state: DiffusionState, stretch: Stretch, cached: Tensor) -> Tensor:
        return stretch.is_active


@dataclass(frozen=True, slots=True)
class BlockDiffusion:
    """Blocks see what is before them, which is cached for good; an answer is as many whole blocks as it turns out to need."""

    block_size: int
    prefill_rows: int
    fuse_commit: bool

    has_cache = True
    stops_early = True

    @property
    def name(self) -> str:
        return "blocks" if self.fuse_commit else "blocks unfused"

    def num_answer(self, max_tokens: int) -> int:
        return -(-max_tokens // self.block_size) * self.block_size

    def first_rows(self, prompt_length: int, max_tokens: int) -> int:
        if prompt_length > self.prefill_rows or not self.fuse_commit:
            return min(prompt_length, self.prefill_rows)
        return prompt_length + self.block_size

    def visible(self, state: DiffusionState, cached: Tensor) -> Tensor:
        return cached

    def reach(self, state: DiffusionState, cached: Tensor, block_end: Tensor) -> tuple[Tensor, Tensor]:
        limit = cached + self.prefill_rows
        if self.fuse_commit:
            return cached, torch.where(state.first > limit, limit, block_end)
        return cached, torch.where(cached < state.first, torch.minimum(state.first, limit), block_end)

    def rank(self, position: Tensor, prompt_length: Tensor) -> Tensor:
        """The number of the block; prompt and answer are cut into blocks of their own, as in training."""
        size = self.block_size
        behind = (position - prompt_length).clamp(min=0)
        num_before = torch.div(prompt_length + size - 1, size, rounding_mode="floor")
        in_answer = num_before + torch.div(behind, size, rounding_mode="floor")
        return torch.where(position < prompt_length, torch.div(position, size, rounding_mode="floor"), in_answer)

    def kept(self, state: DiffusionState, stretch: Stretch, seat: Tensor, position: Tensor) -> Kept:
        return Kept(position < stretch.first[seat], position)

    def cached_after(self, state: DiffusionState, stretch: Stretch, cached: Tensor) -> Tensor:
        return torch.where(stretch.is_active, torch.minimum(stretch.stop, stretch.first), cached)

    def counts(self, state: DiffusionState, stretch: Stretch, cached: Tensor) -> Tensor:
        """A forward that only prefills the prompt is none."""
        return stretch.is_active & (stretch.is_read | (cached >= state.prompt_length))
