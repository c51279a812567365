"""Runs forwards: owns the page pool, the scratch for new rows, the lanes, and on a GPU one CUDA graph per shape.

A forward is `lay out -> network -> readout -> settle -> store`, on fixed addresses and without a look at the data, so the whole of it is
one graph launch; the report of what happened comes back through pinned memory. The first forward of a shape runs operation by
operation (which compiles and loads what kernels `warm` did not), the second is captured, all later ones are replays. On a CPU every
forward runs operation by operation. Who runs, and with which pages, is the scheduler's business.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from refusion.decoding.diffusion_rounds import DiffusionRounds
from refusion.decoding.flat_readout import sampled_readout
from refusion.decoding.forward import Readout
from refusion.decoding.refusion_rounds import RefusionRounds
from refusion.decoding.sliding_rounds import SlidingRounds
from refusion.engine.lanes import Captured, Lane, LaneKey, new_lane
from refusion.engine.network import FlatNetwork, KeyValues
from refusion.engine.shapes import LONE_TILE_ROWS, LONG_CONTEXT, PROMPT_ROWS, TILE_ROWS, Shape, at_least, row_bucket, tile_rows, wide_groups
from refusion.errors import RequestError
from refusion.model.rows import PADDING, PROMPT, Rows, Spans

# B = seats, P = prompt rows, T = decode rows, R = report columns, N = tiles

OUT_OF_MEMORY = "out of memory in a forward; lower max_num_seqs, max_prompt_rows or cache_tokens of EngineSettings"
NUM_FIELDS = 10
"""Numbers of a prompt row: the eight fields of `Rows` in their order, then which row is stored in which row of the page pool."""
SEAT, SEGMENT, RANK, PARENT = 2, 3, 4, 5
MOST_LAYOUTS = 256
"""Layouts of prompt rows that are kept prepared: more than a GPU has shapes for, while a CPU has one for every number of rows."""
Array = TypeVar("Array", np.ndarray, Tensor)


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Prompt tokens that join the cache in this forward, seat by seat in seat order."""

    token_ids: np.ndarray  # [P] int32
    positions: np.ndarray  # [P] int32
    targets: np.ndarray  # [P] int32 rows of the page pool
    spans: list[tuple[int, int, int]]  # (seat, start, end) in rows


NO_PROMPT = PromptRows(*np.zeros((3, 0), dtype=np.int32), spans=[])


@dataclass(frozen=True, slots=True)
class Pending:
    """A forward under way."""

    report: np.ndarray  # [B, R] int32, in pinned memory on a GPU
    event: "torch.cuda.Event | None"

    def wait(self) -> np.ndarray:
        """The report [B, R]; the one moment at which the host waits for the device."""
        if self.event is not None:
            self.event.synchronize()
        return self.report.copy()


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
        has_fixed_tiles: bool = False,
        prefill_rows: int = 512,
    ) -> None:
        """max_rows: most rows of one forward, prompt rows included. use_kernels: Triton for the decisions too (needs a GPU).

        has_fixed_tiles: query tiles of TILE_ROWS rows in all forwards. prefill_rows: prompt tokens of one forward in lanes whose
        decoder itself runs the prompt.
        """
        self.network, self.page_size, self.num_pages = network, page_size, num_pages
        self.max_seats, self.pages_per_seat, self.max_rows = max_seats, pages_per_seat, max_rows
        self.has_fixed_tiles, self.prefill_rows = has_fixed_tiles, prefill_rows
        self.mask_id, self.banned_ids, self.use_kernels = mask_id, banned_ids, use_kernels
        self.device, self.is_cuda = network.device, network.device.type == "cuda"
        config = network.config
        self.wide_groups = wide_groups(config)
        try:
            self.pool = KeyValues.empty(config, num_pages * page_size, self.device, network.dtype)
            self.scratch = KeyValues.empty(config, max_rows, self.device, network.dtype)
        except torch.OutOfMemoryError as error:
            raise RequestError("out of memory for the KV cache; lower cache_tokens or max_num_seqs of EngineSettings") from error
        # [10, rows] with the rows of a forward and what is stored of its prompt; the numbers of prompt rows come in one piece.
        self.row_fields = torch.zeros(NUM_FIELDS, max_rows, dtype=torch.int32, device=self.device)
        self.row_fields[SEAT] = PADDING
        self.row_fields[8:] = -1
        *fields, self.prompt_sources, self.prompt_targets = self.row_fields
        self.rows = Rows(*fields)
        self.bias_banned = torch.zeros(config.vocab_size, device=self.device).index_fill_(0, banned_ids, -torch.inf)
        num_staged = (NUM_FIELDS + 3) * max_rows + 2 * max_seats  # every row may be a tile of its own
        self._prompt_staging = torch.zeros(num_staged, dtype=torch.int32, pin_memory=self.is_cuda)
        self._prompt_host = self._prompt_staging.numpy()
        # By prompt rows, seats and prompt tiles: `_blank_prompt`, and `_parts` of what is staged.
        self._prompt_parts: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}
        self._places = np.arange(max_rows, dtype=np.int32)
        self._prompt_staged = torch.zeros(num_staged, dtype=torch.int32, device=self.device)
        self.runs_ahead = self.is_cuda
        """Whether a forward may be launched before the report of the last one is read, or before all that follows from it is done."""
        self.num_first_runs = 0
        """Forwards so far that were no replays of a graph; beside a replay, the others are slow."""
        self.graph_memory = None
        self._num_graphs = 0
        self.timings: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None
        """Set it to a list to collect a pair of CUDA events around the device work of every forward."""
        self.prepared_lengths: list[int] | None = None
        """Set it to a list to collect for how many accepted lengths each forward of slot decoding prepares drafts."""

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
            prefill_rows=self.prefill_rows,
        )

    def drop_lane(self, lane: Lane) -> None:
        """Forget a lane and its graphs."""
        self.synchronize()  # the last one may still run
        self._num_graphs -= sum(captured.graph is not None for captured in lane.captured.values())
        lane.captured.clear()
        if self._num_graphs == 0:
            self.graph_memory = None  # a pool without graphs is gone

    def launch(self, lane: Lane, *, num_seats: int, num_rows: int, prompt: PromptRows | None, candidates: int) -> Pending:
        """One forward of the first `num_seats` seats, with room for `num_rows` decode rows; returns at once on a GPU.

        Whatever was launched before must have ended. Raises `RequestError` if memory does not suffice.
        """
        num_prompt_rows = 0 if prompt is None else len(prompt.token_ids)
        shape = self.shape(lane, num_seats, num_rows, num_prompt_rows, candidates, _longest(lane, num_seats))
        assert shape.num_prompt_rows + shape.num_rows <= self.max_rows, f"{shape} needs more than {self.max_rows} rows"
        try:
            lane.upload()
            if prompt is not None:
                self._write_prompt(shape, prompt)
            return self._launch(lane, shape)
        except torch.OutOfMemoryError as error:
            self.synchronize()
            raise RequestError(OUT_OF_MEMORY) from error

    def launch_again(
        self, lane: Lane, *, num_seats: int, num_rows: int, prompt: PromptRows | None, candidates: int, uploads: bool
    ) -> Pending | None:
        """One forward more behind the one under way; None if its shape is not ready, or memory does not suffice for what is uploaded.

        `num_rows` must suffice, whatever a report says that is not there yet. uploads: changes of seats first; what was uploaded before
        must have arrived.
        """
        num_prompt_rows = 0 if prompt is None else len(prompt.token_ids)
        shape = self.shape(lane, num_seats, num_rows, num_prompt_rows, candidates, _longest(lane, num_seats))
        captured = lane.captured.get(shape)
        if shape.num_prompt_rows + shape.num_rows > self.max_rows or (self.is_cuda and (captured is None or captured.graph is None)):
            return None
        try:
            if uploads:
                lane.upload()
            if prompt is not None:
                self._write_prompt(shape, prompt)
            return self._launch(lane, shape)
        except torch.OutOfMemoryError:
            self.synchronize()
            return None

    def warm(self, lane: Lane, shapes: Iterable[Shape]) -> None:
        """Make shapes ready: compile them together, then run each twice and so capture it. All seats must be retired: nothing changes.

        Raises `RequestError` if memory does not suffice.
        """
        new = [shape for shape in dict.fromkeys(shapes) if shape not in lane.captured or lane.captured[shape].graph is None]
        try:
            if self.is_cuda:
                self._compile(lane, new)
            if new:
                lane.upload()
                self.synchronize()
                lane.warm_up()
            for shape in new:
                for _ in range(2):
                    if shape.num_prompt_rows:
                        self._write_prompt(shape, NO_PROMPT)
                    self._launch(lane, shape).wait()
        except torch.OutOfMemoryError as error:
            raise RequestError(OUT_OF_MEMORY) from error

    def _compile(self, lane: Lane, shapes: Iterable[Shape]) -> None:
        """One layer of each shape with its kernels compiled instead of run: a new machine is ready in seconds instead of minutes."""
        from refusion.model.kernels.launch import compile_together  # triton is there only where there are kernels

        network = self.network.shallow()
        with compile_together():
            for shape in shapes:
                if shape.num_prompt_rows:
                    self._write_prompt(shape, NO_PROMPT)
                self._forward(lane, shape, network)

    def synchronize(self) -> None:
        """Wait for everything that was launched: all of it on the stream in use, and waiting for the whole device takes longer."""
        if self.is_cuda:
            torch.cuda.current_stream(self.device.index).synchronize()

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
        first = torch.tensor(pages, dtype=torch.long, device=self.device)[:, None] * self.page_size
        return (first + torch.arange(self.page_size, device=self.device)).flatten()

    def shape(self, lane: Lane, num_seats: int, num_rows: int, num_prompt_rows: int, candidates: int, num_cached: int) -> Shape:
        """What a forward of so many seats and rows runs as; num_cached: committed tokens of the longest context."""
        if not self.is_cuda:
            return Shape(num_seats, num_prompt_rows, max(num_rows, 1), candidates, TILE_ROWS)
        num_prompt_rows = at_least(PROMPT_ROWS, num_prompt_rows)
        if lane.key.decoder == "autoregressive":
            tile = self._tile_rows(num_prompt_rows + num_seats, num_cached) if num_prompt_rows else LONE_TILE_ROWS
            return Shape(num_seats, num_prompt_rows, num_seats, candidates, TILE_ROWS if self.has_fixed_tiles else tile)
        rows = max(num_rows, 1)
        if num_prompt_rows:
            rows = max(rows, fewest_rows(lane.key, num_seats))
        rows = row_bucket(rows, num_seats, has_prompt=num_prompt_rows > 0)
        if self.has_fixed_tiles:
            return Shape(num_seats, num_prompt_rows, rows, candidates, TILE_ROWS)
        tile = self._tile_rows(num_prompt_rows + rows, num_cached)
        return Shape(num_seats, num_prompt_rows, rows, candidates, tile, self.wide_groups > 0 and num_cached > LONG_CONTEXT)

    def _tile_rows(self, num_rows: int, num_cached: int) -> int:
        return tile_rows(num_rows, num_cached, wide_groups=self.wide_groups)

    def _write_prompt(self, shape: Shape, prompt: PromptRows) -> None:
        """Leave the numbers of all prompt rows, the spans of the seats and the query tiles where the forward fetches them."""
        count, total = len(prompt.token_ids), shape.num_prompt_rows
        layout = total, shape.num_seats, shape.num_prompt_tiles
        if layout not in self._prompt_parts:
            if len(self._prompt_parts) >= MOST_LAYOUTS:
                self._prompt_parts.clear()
            self._prompt_parts[layout] = _blank_prompt(shape), *_parts(self._prompt_host, shape)
        blank, fields, bounds, tiles = self._prompt_parts[layout]
        self._prompt_host[: len(blank)] = blank
        fields[0, :count], fields[1, :count], fields[9, :count] = prompt.token_ids, prompt.positions, prompt.targets
        fields[8, :count] = self._places[:count]
        num_tiles = 0
        for seat, start, end in prompt.spans:
            fields[SEAT, start:end] = seat
            fields[RANK, start:end] = self._places[: end - start]
            bounds[0, seat], bounds[1, seat] = start, end
            first = np.arange(start, end, shape.block)
            mine = slice(num_tiles, num_tiles + len(first))
            tiles[0, mine], tiles[1, mine], tiles[2, mine] = seat, first, first + shape.block
            num_tiles += len(first)
            tiles[2, num_tiles - 1] = end
        assert num_tiles <= shape.num_prompt_tiles <= total, f"{num_tiles} prompt tiles, but room for {shape.num_prompt_tiles}"

    def _fetch_prompt(self, lane: Lane, shape: Shape) -> None:
        """What `_write_prompt` left, to the device and to its places there."""
        size = NUM_FIELDS * shape.num_prompt_rows + 2 * shape.num_seats + 3 * shape.num_prompt_tiles
        self._prompt_staged[:size].copy_(self._prompt_staging[:size], non_blocking=True)
        fields, bounds, tiles = _parts(self._prompt_staged, shape)
        self.row_fields[:, : shape.num_prompt_rows].copy_(fields)
        lane.bounds[1:3, : shape.num_seats].copy_(bounds)
        lane.tile_buffer(shape)[:, : shape.num_prompt_tiles].copy_(tiles)

    def _launch(self, lane: Lane, shape: Shape) -> Pending:
        if self.prepared_lengths is not None and lane.key.slots is not None:
            self.prepared_lengths.append(shape.candidates)
        if not self.is_cuda:
            self._forward(lane, shape)
            return Pending(lane.copy_report(shape.num_seats), None)
        stream = torch.cuda.current_stream(self.device.index)  # left to themselves, events ask for the device first, each time
        started = self._mark(stream)
        captured = lane.captured.get(shape)
        if captured is not None and captured.graph is not None:
            captured.graph.replay()
        else:
            self._run_first(lane, shape, captured)
        report = lane.copy_report(shape.num_seats)
        done = torch.cuda.Event(enable_timing=self.timings is not None)
        done.record(stream)
        if self.timings is not None and started is not None:
            self.timings.append((started, done))
        return Pending(report, done)

    def _mark(self, stream: "torch.cuda.Stream") -> "torch.cuda.Event | None":
        if self.timings is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def _run_first(self, lane: Lane, shape: Shape, captured: Captured | None) -> None:
        """The first forward of a shape, or the second, which is captured."""
        self.num_first_runs += 1
        if captured is None:
            self._forward(lane, shape)
            lane.captured[shape] = Captured()
        else:
            captured.graph = self._capture(lane, shape)
            captured.graph.replay()

    def _capture(self, lane: Lane, shape: Shape) -> "torch.cuda.CUDAGraph":
        """Capturing runs nothing: the state stays as it is until the graph is replayed."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.graph_memory, capture_error_mode="thread_local"):
            self._forward(lane, shape)
        self.graph_memory = self.graph_memory or graph.pool()
        self._num_graphs += 1
        return graph

    @torch.no_grad()
    def _forward(self, lane: Lane, shape: Shape, network: FlatNetwork | None = None) -> None:
        """Everything one forward does on the device, in the order in which it does it."""
        num_prompt, num_seats, network = shape.num_prompt_rows, shape.num_seats, network or self.network
        rows = self.rows.narrow(0, num_prompt + shape.num_rows)
        decode_rows = rows.narrow(num_prompt, shape.num_rows)
        spans, tiles = lane.spans_of(num_seats), lane.tiles_of(shape)
        if num_prompt:
            self._fetch_prompt(lane, shape)
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
        readout = self._readout(lane, hidden[num_prompt:], decode_rows, num_seats)
        if num_prompt:
            self._store(new, self.prompt_sources[:num_prompt], self.prompt_targets[:num_prompt])
            spans.cached.add_(spans.prompt_end - spans.prompt_start)
            self._name_firsts(lane, hidden, spans)
        lane.rounds.settle(readout, spans, num_seats=num_seats, candidates=shape.candidates)
        if num_kept := _num_kept(lane, shape):
            self._store(new, lane.rounds.source[:num_kept], lane.rounds.target[:num_kept])
        if num_prompt:
            spans.prompt_start.zero_()
            spans.prompt_end.zero_()
            if isinstance(lane.rounds, RefusionRounds | SlidingRounds):
                lane.rounds.first_ids.fill_(-1)

    def _readout(self, lane: Lane, hidden: Tensor, rows: Rows, num_seats: int) -> Readout:
        """Of all decode rows; of a diffusion lane only of those it reads."""
        seat, positions = rows.seat, rows.positions
        if isinstance(lane.rounds, DiffusionRounds):
            reads = lane.rounds.reads[: num_seats * lane.rounds.block_size]
            hidden, seat, positions = hidden.index_select(0, reads), seat.index_select(0, reads), positions.index_select(0, reads)
        num_rows = hidden.shape[0]
        given_ids = lane.rounds.given_ids[:num_rows]
        num_runner_ups = 0 if lane.key.slots is None else lane.key.slots.alternatives
        if lane.key.is_greedy:
            return self.network.readout(hidden, self.bias_banned, given_ids, num_runner_ups)
        seat = seat.clamp(min=0).long()
        positions = lane.rounds.drawn_at(rows) if isinstance(lane.rounds, SlidingRounds) else positions
        return sampled_readout(
            self.network.logits(hidden),
            self.banned_ids,
            given_ids,
            lane.temperature[seat],
            lane.top_p[seat] if lane.key.has_top_p else None,
            lane.rounds.seeds[:num_rows],
            positions,
            lane.rounds.attempts[:num_rows],
            num_runner_ups,
        )

    def _name_firsts(self, lane: Lane, hidden: Tensor, spans: Spans) -> None:
        """Where slots want it, what the last prompt row of every seat says; a second small readout, since few forwards have prompt rows."""
        rounds = lane.rounds
        if not isinstance(rounds, RefusionRounds | SlidingRounds) or not rounds.slots.names_first:
            return
        num_seats = len(spans.prompt_end)
        last = hidden.index_select(0, (spans.prompt_end - 1).clamp(min=0))
        given_ids = torch.zeros_like(spans.prompt_end)
        if lane.key.is_greedy:
            token_ids = self.network.readout(last, self.bias_banned, given_ids).token_ids
        else:
            seeds, positions, attempts = rounds.first_draw(num_seats)
            token_ids = sampled_readout(
                self.network.logits(last),
                self.banned_ids,
                given_ids,
                lane.temperature[:num_seats],
                lane.top_p[:num_seats] if lane.key.has_top_p else None,
                seeds,
                positions,
                attempts,
                0,
            ).token_ids
        rounds.first_ids[:num_seats].copy_(torch.where(spans.prompt_end > spans.prompt_start, token_ids, -1))

    def _store(self, new: KeyValues, source: Tensor, target: Tensor) -> None:
        self.network.ops.store_rows(new.keys, new.values, self.pool.keys, self.pool.values, source, target)


def _longest(lane: Lane, num_seats: int) -> int:
    """Committed tokens of the longest context."""
    return max(lane.cached_host[:num_seats].tolist())


def _num_kept(lane: Lane, shape: Shape) -> int:
    """Entries of `source` and `target` that a forward of this shape fills."""
    if isinstance(lane.rounds, DiffusionRounds):
        return shape.num_rows if lane.rounds.has_cache else 0
    return shape.num_seats * lane.rounds.num_kept


def fewest_rows(key: LaneKey, num_seats: int) -> int:
    """Decode rows of a forward with prompt rows, at least: fewer would only make more shapes."""
    assert key.slots is not None, "other lanes have a row for every seat"
    return max(num_seats // 4, 1) * key.slots.slot_size


def _blank_prompt(shape: Shape) -> np.ndarray:
    """What is staged of a forward's prompt rows if there are none."""
    blank = np.zeros(NUM_FIELDS * shape.num_prompt_rows + 2 * shape.num_seats + 3 * shape.num_prompt_tiles, dtype=np.int32)
    fields, _, tiles = _parts(blank, shape)
    fields[SEAT], fields[SEGMENT], fields[PARENT], fields[8:] = PADDING, PROMPT, -1, -1
    tiles[0] = PADDING
    return blank


def _parts(staging: Array, shape: Shape) -> tuple[Array, Array, Array]:
    """Fields [10, P], bounds [2, B] and tiles [3, N] of a forward's prompt rows, one behind the other."""
    first = NUM_FIELDS * shape.num_prompt_rows
    second = first + 2 * shape.num_seats
    third = second + 3 * shape.num_prompt_tiles
    return (
        staging[:first].reshape(NUM_FIELDS, -1),
        staging[first:second].reshape(2, -1),
        staging[second:third].reshape(3, -1),
    )
