"""Runs forwards: owns the page pool, the scratch for new rows, the lanes, and on a GPU one CUDA graph per shape.

A forward is `lay out -> network -> readout -> settle -> store`, on fixed addresses and without a look at the data, so the whole of it is
one graph launch; the report of what happened comes back through pinned memory. The first forward of a shape runs operation by
operation (which compiles and loads its kernels), the second is captured, all later ones are replays. On a CPU every forward runs
operation by operation. Who runs, and with which pages, is the scheduler's business.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.forward import Readout
from refusion.decoding.rounds import sampled_readout
from refusion.engine.lanes import Lane, LaneKey, new_lane
from refusion.engine.network import FlatNetwork, KeyValues
from refusion.engine.shapes import PROMPT_ROWS, Shape, at_least, row_bucket
from refusion.errors import RequestError
from refusion.model.rows import PADDING, PROMPT, Rows

# B = seats, P = prompt rows, T = decode rows, R = report columns

OUT_OF_MEMORY = "out of memory in a forward; lower max_num_seqs, max_prompt_rows or cache_tokens of EngineSettings"


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Prompt tokens that join the cache in this forward, seat by seat in seat order."""

    token_ids: np.ndarray  # [P] int32
    positions: np.ndarray  # [P] int32
    targets: np.ndarray  # [P] int32 rows of the page pool
    spans: list[tuple[int, int, int]]  # (seat, start, end) in rows


@dataclass(frozen=True, slots=True)
class Pending:
    """A forward under way."""

    report: Tensor  # [B, R] int32, pinned on a GPU
    event: "torch.cuda.Event | None"

    def wait(self) -> np.ndarray:
        """The report [B, R]; the one moment at which the host waits for the device."""
        if self.event is not None:
            self.event.synchronize()
        return self.report.numpy().copy()


@dataclass(frozen=True, slots=True)
class HostPages:
    """Pages of a preempted request in host memory [L, rows, H, D]."""

    keys: Tensor
    values: Tensor


class Runner:
    """The device side of the engine."""

    def __init__(
        self,
        network: FlatNetwork,
        *,
        page_size: int,
        num_pages: int,
        max_seats: int,
        pages_per_seat: int,
        max_rows: int,
        banned_ids: Tensor,
        mask_id: int | None,
        use_kernels: bool,
    ) -> None:
        """max_rows: most rows of one forward, prompt rows included. use_kernels: Triton for the decisions too (needs a GPU)."""
        self.network, self.page_size, self.num_pages = network, page_size, num_pages
        self.max_seats, self.pages_per_seat, self.max_rows = max_seats, pages_per_seat, max_rows
        self.mask_id, self.banned_ids, self.use_kernels = mask_id, banned_ids, use_kernels
        self.device, self.is_cuda = network.device, network.device.type == "cuda"
        config = network.config
        try:
            self.pool = KeyValues.empty(config, num_pages * page_size, self.device, network.dtype)
            self.scratch = KeyValues.empty(config, max_rows, self.device, network.dtype)
        except torch.OutOfMemoryError as error:
            raise RequestError("out of memory for the KV cache; lower cache_tokens or max_num_seqs of EngineSettings") from error
        self.rows = Rows.empty(max_rows, self.device)
        self.bias_banned = torch.zeros(config.vocab_size, device=self.device).index_fill_(0, banned_ids, -torch.inf)
        self.prompt_sources = torch.arange(max_rows, dtype=torch.int32, device=self.device)
        self.prompt_targets = torch.full((max_rows,), -1, dtype=torch.int32, device=self.device)
        self.graphs: dict[tuple[int, Shape], torch.cuda.CUDAGraph | None] = {}  # None: has run once, captured next time
        self.graph_memory = None
        self.timings: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None
        """Set it to a list to collect a pair of CUDA events around the device work of every forward."""

    def new_lane(self, key: LaneKey) -> Lane:
        """Device state for requests that share `key`."""
        return new_lane(
            key,
            self.max_seats,
            self.pages_per_seat,
            self.page_size,
            mask_id=self.mask_id,
            device=self.device,
            use_kernels=self.use_kernels,
            max_rows=self.max_rows,
        )

    def drop_lane(self, lane: Lane) -> None:
        """Forget a lane and its graphs."""
        self.graphs = {key: graph for key, graph in self.graphs.items() if key[0] != lane.number}
        if not any(self.graphs.values()):
            self.graph_memory = None  # a pool without graphs is gone

    def launch(self, lane: Lane, *, num_seats: int, num_rows: int, prompt: PromptRows | None, candidates: int) -> Pending:
        """One forward of the first `num_seats` seats, with room for `num_rows` decode rows; returns at once on a GPU.

        Raises `RequestError` if memory does not suffice.
        """
        shape = self._shape(lane, num_seats, num_rows, 0 if prompt is None else len(prompt.token_ids), candidates)
        assert shape.num_prompt_rows + shape.num_rows <= self.max_rows, f"{shape} needs more than {self.max_rows} rows"
        try:
            lane.upload_pages()
            if prompt is not None:
                self._write_prompt(lane, shape, prompt)
            if not self.is_cuda:
                self._forward(lane, shape)
                return Pending(lane.report_host[:num_seats], None)
            return self._launch_on_gpu(lane, shape)
        except torch.OutOfMemoryError as error:
            raise RequestError(OUT_OF_MEMORY) from error

    def swap_out(self, pages: list[int]) -> HostPages:
        """Copies of pages in host memory."""
        rows = self._page_rows(pages)
        return HostPages(self.pool.keys[:, rows].cpu(), self.pool.values[:, rows].cpu())

    def swap_in(self, host: HostPages, pages: list[int]) -> None:
        """Fill pages with what `swap_out` saved."""
        rows = self._page_rows(pages)
        self.pool.keys[:, rows] = host.keys.to(self.device)
        self.pool.values[:, rows] = host.values.to(self.device)

    def _page_rows(self, pages: list[int]) -> Tensor:
        first = torch.tensor(pages, device=self.device)[:, None] * self.page_size
        return (first + torch.arange(self.page_size, device=self.device)).flatten()

    def _shape(self, lane: Lane, num_seats: int, num_rows: int, num_prompt_rows: int, candidates: int) -> Shape:
        if not self.is_cuda:
            return Shape(num_seats, num_prompt_rows, max(num_rows, 1), candidates, block=16)
        num_prompt_rows = at_least(PROMPT_ROWS, num_prompt_rows)
        is_one_row_each = lane.key.decoder == "autoregressive"
        rows = num_seats if is_one_row_each else row_bucket(max(num_rows, 1))
        return Shape(num_seats, num_prompt_rows, rows, candidates, block=4 if is_one_row_each and num_prompt_rows == 0 else 16)

    def _write_prompt(self, lane: Lane, shape: Shape, prompt: PromptRows) -> None:
        """Fill the prompt rows of the static buffers; rows beyond the prompt are padding."""
        count, total = len(prompt.token_ids), shape.num_prompt_rows
        fields = np.zeros((9, total), dtype=np.int32)  # the eight fields of Rows in their order, then the targets
        fields[2] = PADDING
        fields[8] = -1
        fields[0, :count], fields[1, :count], fields[8, :count] = prompt.token_ids, prompt.positions, prompt.targets
        fields[3], fields[5] = PROMPT, -1
        bounds = np.zeros((2, shape.num_seats), dtype=np.int32)
        for seat, start, end in prompt.spans:
            fields[2, start:end] = seat
            fields[4, start:end] = np.arange(end - start)
            bounds[:, seat] = start, end
        device_fields = torch.from_numpy(fields).to(self.device)
        rows = self.rows.narrow(0, total)
        names = (rows.token_ids, rows.positions, rows.seat, rows.segment, rows.rank, rows.parent, rows.visible, rows.is_trunk)
        for target, source in zip((*names, self.prompt_targets[:total]), device_fields, strict=True):
            target.copy_(source)
        device_bounds = torch.from_numpy(bounds).to(self.device)
        lane.spans.prompt_start[: shape.num_seats] = device_bounds[0]
        lane.spans.prompt_end[: shape.num_seats] = device_bounds[1]
        lane.write_prompt_tiles(shape, prompt.spans)

    def _launch_on_gpu(self, lane: Lane, shape: Shape) -> Pending:
        started = self._mark()
        key = (lane.number, shape)
        if key not in self.graphs:
            self._forward(lane, shape)
            self.graphs[key] = None
        else:
            graph = self.graphs[key] or self._capture(lane, shape)
            graph.replay()
        done = torch.cuda.Event(enable_timing=self.timings is not None)
        done.record()
        if self.timings is not None and started is not None:
            self.timings.append((started, done))
        return Pending(lane.report_host[: shape.num_seats], done)

    def _mark(self) -> "torch.cuda.Event | None":
        if self.timings is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _capture(self, lane: Lane, shape: Shape) -> "torch.cuda.CUDAGraph":
        """Capturing runs nothing: the state stays as it is until the graph is replayed."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.graph_memory, capture_error_mode="thread_local"):
            self._forward(lane, shape)
        self.graph_memory = self.graph_memory or graph.pool()
        self.graphs[lane.number, shape] = graph
        return graph

    @torch.no_grad()
    def _forward(self, lane: Lane, shape: Shape) -> None:
        """Everything one forward does on the device, in the order in which it does it."""
        num_prompt, num_seats, network = shape.num_prompt_rows, shape.num_seats, self.network
        rows = self.rows.narrow(0, num_prompt + shape.num_rows)
        decode_rows = rows.narrow(num_prompt, shape.num_rows)
        spans, tiles = lane.spans_of(num_seats), lane.tiles_of(shape)
        lane.rounds.lay_out(
            decode_rows,
            spans,
            start=num_prompt,
            num_seats=num_seats,
            candidates=shape.candidates,
            tiles=tiles if self.is_cuda else None,
            tile_start=shape.num_prompt_tiles,
        )
        new = self.scratch.first(rows.num_rows)
        hidden = network.forward(rows, spans, tiles, self.pool, new)
        readout = self._readout(lane, hidden[num_prompt:], decode_rows)
        if num_prompt:
            self._store(new, self.prompt_sources[:num_prompt], self.prompt_targets[:num_prompt])
            spans.cached.add_(spans.prompt_end - spans.prompt_start)
        lane.rounds.settle(readout, spans, num_seats=num_seats, candidates=shape.candidates)
        num_kept = num_seats * lane.rounds.num_kept
        self._store(new, lane.rounds.source[:num_kept], lane.rounds.target[:num_kept])
        if num_prompt:
            spans.prompt_start.zero_()
            spans.prompt_end.zero_()
        lane.report_host[:num_seats].copy_(lane.rounds.report[:num_seats], non_blocking=True)

    def _readout(self, lane: Lane, hidden: Tensor, rows: Rows) -> Readout:
        num_rows = hidden.shape[0]
        given_ids = lane.rounds.given_ids[:num_rows]
        if lane.key.is_greedy:
            return self.network.readout(hidden, self.bias_banned, given_ids)
        seat = rows.seat.clamp(min=0).long()
        return sampled_readout(
            self.network.logits(hidden),
            self.banned_ids,
            given_ids,
            lane.temperature[seat],
            lane.top_p[seat] if lane.key.has_top_p else None,
            lane.rounds.seeds[:num_rows],
            rows.positions,
            lane.rounds.attempts[:num_rows],
        )

    def _store(self, new: KeyValues, source: Tensor, target: Tensor) -> None:
        self.network.ops.store_rows(new.keys, new.values, self.pool.keys, self.pool.values, source, target)
