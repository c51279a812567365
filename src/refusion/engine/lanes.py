"""A lane: requests that can share a forward, and their state on the device."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.params import SlotSettings
from refusion.decoding.refusion_rounds import RefusionRounds
from refusion.decoding.rounds import AutoregressiveRounds, Rounds
from refusion.engine.shapes import Shape
from refusion.model.rows import PADDING, Spans, Tiles

# B = seats, M = pages of a seat, R = report columns, N = tiles

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneKey:
    """Requests with the same key can share a forward."""

    decoder: str
    slots: SlotSettings | None
    """None for autoregressive decoding."""
    width: int
    """Slots of a block; 1 for autoregressive decoding."""
    max_tokens: int
    """Capacity of an answer; requests of the lane may want fewer."""
    eos_ids: tuple[int, ...]
    is_greedy: bool
    has_top_p: bool


class Lane:
    """Device state of the seats of one lane, and the host's copy of their page table."""

    def __init__(self, key: LaneKey, rounds: Rounds, num_seats: int, pages_per_seat: int, page_size: int, device: torch.device) -> None:
        self.key, self.rounds, self.number = key, rounds, next(_numbers)
        is_cuda = device.type == "cuda"
        cached, prompt_start, prompt_end, row_start, row_end = torch.zeros(5, num_seats, dtype=torch.int32, device=device)
        page_table = torch.zeros(num_seats, pages_per_seat, dtype=torch.int32, device=device)
        self.spans = Spans(cached, prompt_start, prompt_end, row_start, row_end, page_table, page_size)
        self.temperature = torch.ones(num_seats, device=device)
        self.top_p = torch.ones(num_seats, device=device)
        self.report_host = torch.zeros(num_seats, rounds.report_width, dtype=torch.int32, pin_memory=is_cuda)
        self.page_table_host = torch.zeros(num_seats, pages_per_seat, dtype=torch.int32, pin_memory=is_cuda)
        self.has_new_pages = False
        self.tile_buffers: dict[int, Tensor] = {}  # number of tiles -> [3, N]

    def set_pages(self, seat: int, pages: list[int], first: int = 0) -> None:
        """Entries of a seat's page table from `first` on; they reach the device with the next forward."""
        self.page_table_host[seat, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self.has_new_pages = True

    def set_cached(self, seat: int, cached: int) -> None:
        """Number of committed tokens of a seat."""
        self.spans.cached[seat] = cached

    def set_sampling(self, seat: int, temperature: float, top_p: float) -> None:
        """How a seat's tokens are drawn, in a lane that is not greedy."""
        self.temperature[seat] = temperature
        self.top_p[seat] = top_p

    def move(self, source: int, target: int) -> None:
        """Put the request of one seat on another."""
        self.rounds.move(source, target)
        self.page_table_host[target] = self.page_table_host[source]
        self.has_new_pages = True
        for tensor in (self.spans.cached, self.temperature, self.top_p):
            tensor[target] = tensor[source]

    def upload_pages(self) -> None:
        """Bring the page table to the device if it has changed."""
        if self.has_new_pages:
            self.spans.page_table.copy_(self.page_table_host, non_blocking=True)
            self.has_new_pages = False

    def spans_of(self, num_seats: int) -> Spans:
        """Views of the first seats."""
        spans = self.spans
        return Spans(
            spans.cached[:num_seats],
            spans.prompt_start[:num_seats],
            spans.prompt_end[:num_seats],
            spans.row_start[:num_seats],
            spans.row_end[:num_seats],
            spans.page_table[:num_seats],
            spans.page_size,
        )

    def tiles_of(self, shape: Shape) -> Tiles:
        """The tile buffers of a shape, at fixed addresses."""
        if shape.num_tiles not in self.tile_buffers:
            buffer = torch.zeros(3, shape.num_tiles, dtype=torch.int32, device=self.spans.cached.device)
            buffer[0] = PADDING
            self.tile_buffers[shape.num_tiles] = buffer
        return Tiles(*self.tile_buffers[shape.num_tiles], block=shape.block)

    def write_prompt_tiles(self, shape: Shape, spans: list[tuple[int, int, int]]) -> None:
        """Cut the prompt rows of each (seat, start, end) into query tiles, in front of the decode tiles."""
        tiles = np.zeros((3, shape.num_prompt_tiles), dtype=np.int32)
        tiles[0] = PADDING
        cut = [(seat, first, min(first + shape.block, end)) for seat, start, end in spans for first in range(start, end, shape.block)]
        tiles[:, : len(cut)] = np.array(cut, dtype=np.int32).T
        buffers = self.tiles_of(shape)
        for target, source in zip((buffers.seat, buffers.first, buffers.end), torch.from_numpy(tiles).to(buffers.seat.device), strict=True):
            target[: shape.num_prompt_tiles] = source


def new_lane(
    key: LaneKey,
    num_seats: int,
    pages_per_seat: int,
    page_size: int,
    *,
    mask_id: int | None,
    device: torch.device,
    use_kernels: bool,
    max_rows: int,
) -> Lane:
    """Device state for requests that share `key`; max_rows: most decode rows of a forward."""
    eos_ids = torch.tensor(key.eos_ids, dtype=torch.long, device=device)
    rounds: Rounds
    if key.slots is None:
        rounds = AutoregressiveRounds(num_seats, eos_ids=eos_ids, device=device, use_kernels=use_kernels, max_rows=max_rows)
    else:
        assert mask_id is not None, "a slot lane needs a mask token; the door refuses checkpoints without one"
        num_slots = -(-key.slots.num_slots(key.max_tokens) // key.width) * key.width
        rounds = RefusionRounds(
            key.slots,
            key.width,
            num_slots,
            num_seats,
            mask_id=mask_id,
            eos_ids=eos_ids,
            device=device,
            use_kernels=use_kernels,
            max_rows=max_rows,
        )
    return Lane(key, rounds, num_seats, pages_per_seat, page_size, device)
