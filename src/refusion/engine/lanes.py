"""A lane: requests that can share a forward, and their state on the device."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.autoregressive_rounds import AutoregressiveRounds
from refusion.decoding.diffusion_params import DiffusionParams
from refusion.decoding.diffusion_rounds import DiffusionRounds
from refusion.decoding.params import SlotSettings
from refusion.decoding.refusion_report import AGENDA
from refusion.decoding.refusion_rounds import RefusionRounds
from refusion.decoding.sliding_rounds import SlidingRounds
from refusion.decoding.state import DONE
from refusion.engine.changes import QueuedTable, SeatNumbers
from refusion.engine.shapes import Shape
from refusion.model.rows import PADDING, Spans, Tiles

# B = seats, M = pages of a seat, R = report columns, N = tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneKey:
    """Requests with the same key can share a forward."""

    decoder: str
    slots: SlotSettings | None
    """None but for slot decoding."""
    diffusion: DiffusionParams | None = None
    """None but for the diffusion baselines."""
    width: int
    """Slots of a block; its tokens for the diffusion baselines, 1 for autoregressive decoding."""
    max_tokens: int
    """Capacity of an answer; requests of the lane may want fewer."""
    max_prompt: int = 0
    """The same of a prompt, for decoders whose state holds it."""
    eos_ids: tuple[int, ...]
    is_greedy: bool
    has_top_p: bool


@dataclass(slots=True)
class Captured:
    """What the runner keeps of a shape: None has run once and is captured next time."""

    graph: "torch.cuda.CUDAGraph | None" = None


class Lane:
    """Device state of the seats of one lane, and what the host knows of it. Changes reach the device with `upload`, all together."""

    def __init__(
        self,
        key: LaneKey,
        rounds: RefusionRounds | SlidingRounds | AutoregressiveRounds | DiffusionRounds,
        num_seats: int,
        pages_per_seat: int,
        page_size: int,
        device: torch.device,
    ) -> None:
        self.key, self.rounds = key, rounds
        is_cuda = device.type == "cuda"
        pool = torch.cuda.graph_pool_handle() if is_cuda else None
        self.table = rounds.table = QueuedTable(rounds.table, pool)
        self.bounds = torch.zeros(5, num_seats, dtype=torch.int32, device=device)
        page_table = torch.zeros(num_seats, pages_per_seat, dtype=torch.int32, device=device)
        cached, prompt_start, prompt_end, row_start, row_end = self.bounds
        self.spans = Spans(cached, prompt_start, prompt_end, row_start, row_end, page_table, page_size)
        self.sampling = torch.ones(2, num_seats, device=device)
        self.temperature, self.top_p = self.sampling
        self._sampling_staging = torch.ones(2, num_seats, pin_memory=is_cuda)
        self.sampling_host = self._sampling_staging.numpy()
        self.has_new_sampling = False
        self._numbers = SeatNumbers(cached, page_table, pool)
        self.cached_host, self.page_table_host = self._numbers.cached, self._numbers.page_table
        # Two, since a forward may be launched before the report of the last one is read.
        self._reports = torch.zeros(2, num_seats, rounds.report_width, dtype=torch.int32, pin_memory=is_cuda)
        self._report_views: dict[tuple[int, int], tuple[Tensor, Tensor, np.ndarray]] = {}
        self._turn = 0
        self.tile_buffers: dict[int, Tensor] = {}  # number of tiles -> [3, N]
        self.captured: dict[Shape, Captured] = {}

    def set_pages(self, seat: int, pages: list[int], first: int = 0) -> None:
        """Entries of a seat's page table from `first` on."""
        self.page_table_host[seat, first : first + len(pages)] = pages
        self._numbers.changed.add(seat)

    def set_cached(self, seat: int, cached: int) -> None:
        """Number of committed tokens of a seat."""
        self.cached_host[seat] = cached
        self._numbers.changed.add(seat)

    def refresh(self, num_seats: int) -> None:
        """Tell the device again what the host knows of the first seats, after a forward that failed."""
        self._numbers.changed.update(range(num_seats))

    def set_sampling(self, seat: int, temperature: float, top_p: float) -> None:
        """How a seat's tokens are drawn, in a lane that is not greedy."""
        self.sampling_host[:, seat] = temperature, top_p
        self.has_new_sampling = True

    def move(self, source: int, target: int) -> None:
        """Put the request of one seat on another."""
        self.table.move(source, target)
        self.page_table_host[target] = self.page_table_host[source]
        self.cached_host[target] = self.cached_host[source]
        self.sampling_host[:, target] = self.sampling_host[:, source]
        self._numbers.changed.add(target)
        self.has_new_sampling = not self.key.is_greedy

    def retire(self, seat: int) -> None:
        """The seat takes no more rows."""
        if isinstance(self.rounds, AutoregressiveRounds | SlidingRounds):
            self.table.write(seat, {"prompt_length": 0, "seed": 0, "max_tokens": 0, "is_done": 1})
        elif isinstance(self.rounds, DiffusionRounds):
            self.rounds.retire(seat)
        else:
            nothing = {"prompt_length": 0, "seed": 0, "phase": DONE, "num_drafts": 0, "num_forwards": 0}
            width = self.rounds.width
            self.table.write(seat, nothing | {"agenda": [DONE, *[0] * (AGENDA - 1), *[-1] * width, *[0] * width]})

    def clear(self) -> None:
        """Retire all seats, whatever was to change."""
        self.table.forget()
        for seat in range(len(self.cached_host)):
            self.retire(seat)

    def upload(self) -> None:
        """Bring what has changed to the device. What was uploaded before must have arrived."""
        self.table.apply()
        self._numbers.apply()
        if self.has_new_sampling:
            self.sampling.copy_(self._sampling_staging, non_blocking=True)
            self.has_new_sampling = False

    def warm_up(self) -> None:
        """Make uploads ready, so that none is slow later. All there was to upload has arrived."""
        self.table.warm()
        self._numbers.warm()

    def copy_report(self, num_seats: int) -> np.ndarray:
        """Send the report of the forward just launched to the host; the array [B, R] it arrives in is used again after the next one."""
        self._turn ^= 1
        views = self._report_views.get((num_seats, self._turn))
        if views is None:
            host = self._reports[self._turn, :num_seats]
            views = self._report_views[num_seats, self._turn] = self.rounds.report[:num_seats], host, host.numpy()
        views[1].copy_(views[0], non_blocking=True)
        return views[2]

    def spans_of(self, num_seats: int) -> Spans:
        """Views of the first seats."""
        cached, prompt_start, prompt_end, row_start, row_end = self.bounds[:, :num_seats]
        return Spans(cached, prompt_start, prompt_end, row_start, row_end, self.spans.page_table[:num_seats], self.spans.page_size)

    def tile_buffer(self, shape: Shape) -> Tensor:
        """[3, N] tiles of a shape, at fixed addresses."""
        if shape.num_tiles not in self.tile_buffers:
            buffer = torch.zeros(3, shape.num_tiles, dtype=torch.int32, device=self.spans.cached.device)
            buffer[0] = PADDING
            self.tile_buffers[shape.num_tiles] = buffer
        return self.tile_buffers[shape.num_tiles]

    def tiles_of(self, shape: Shape) -> Tiles:
        """The same as tiles."""
        return Tiles(*self.tile_buffer(shape), block=shape.block, is_long=shape.is_long)


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
    prefill_rows: int,
) -> Lane:
    """Device state for requests that share `key`.

    max_rows: most decode rows of a forward. prefill_rows: prompt tokens of one, where the decoder itself runs the prompt.
    """
    eos_ids = torch.tensor(key.eos_ids, dtype=torch.long, device=device)
    if key.diffusion is not None:
        assert mask_id is not None, "a diffusion lane needs a mask token; the door refuses checkpoints without one"
        rounds = DiffusionRounds(
            key.diffusion,
            key.max_prompt + -(-key.max_tokens // key.width) * key.width,
            num_seats,
            block_size=key.width,
            prefill_rows=prefill_rows,
            mask_id=mask_id,
            eos_ids=eos_ids,
            device=device,
            use_kernels=use_kernels,
            max_rows=max_rows,
        )
    elif key.slots is None:
        rounds = AutoregressiveRounds(num_seats, eos_ids=eos_ids, device=device, use_kernels=use_kernels, max_rows=max_rows)
    elif key.slots.sliding:
        assert mask_id is not None, "a slot lane needs a mask token; the door refuses checkpoints without one"
        rounds = SlidingRounds(
            key.slots, num_seats, mask_id=mask_id, eos_ids=eos_ids, device=device, use_kernels=use_kernels, max_rows=max_rows
        )
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
