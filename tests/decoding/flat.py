"""Serving requests over flat rows in the simplest way, for tests of rounds: one page pool, and a network that sees rows by `may_see`.

Requests are admitted when the test says so, sit on seats, and have their prompts prefilled in one piece or in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from scripted import Row, Script
from torch import Tensor

from refusion.decoding.flat_readout import sampled_readout
from refusion.decoding.forward import Readout, readout_logits
from refusion.decoding.forward import Rows as ReadRows
from refusion.decoding.refusion_rounds import RefusionRounds
from refusion.decoding.rounds import Rounds, SeatReport
from refusion.decoding.sampling import Draw, cut_answer
from refusion.decoding.sliding_rounds import SlidingRounds
from refusion.engine.network import FlatNetwork, KeyValues
from refusion.engine.ops import PlainOps
from refusion.model.rows import PROMPT, Rows, Spans, may_see, plain_tiles
from refusion.model.transformer import Transformer

PAGE_SIZE = 4


class FlatForward(Protocol):
    """Runs flat rows over a page pool; `logits` of the decode rows [T, V]."""

    def run(self, rows: Rows, spans: Spans, start: int) -> Tensor: ...

    def store(self, source: Tensor, target: Tensor) -> None: ...


class ScriptedRows:
    """The flat twin of `scripted.ScriptedForward`: a row is a hash of exactly what it may see."""

    def __init__(self, script: Script, num_cache_rows: int) -> None:
        self.script = script
        self.pool: list[Row | None] = [None] * num_cache_rows
        self.new: list[Row | None] = []

    def run(self, rows: Rows, spans: Spans, start: int) -> Tensor:
        visible, seats = may_see(rows), rows.seat.tolist()
        tokens, positions = rows.token_ids.tolist(), rows.positions.tolist()
        committed = {seat: self._committed(spans, seat) for seat in set(seats) if seat >= 0}
        self.new = [None] * len(seats)

        def run(place: int) -> Row:
            row = self.new[place]
            if row is None:
                others = [run(other) for other in visible[place].nonzero()[:, 0].tolist() if other != place]
                row = self.new[place] = Row.of(tokens[place], positions[place], [*committed[seats[place]], *others])
            return row

        logits = [self.script(run(place)) if seat >= 0 else None for place, seat in enumerate(seats)][start:]
        like = next((one for one in logits if one is not None), torch.zeros(6))
        return torch.stack([torch.zeros_like(like) if one is None else one for one in logits])

    def _committed(self, spans: Spans, seat: int) -> list[Row]:
        rows: list[Row] = []
        for place in range(int(spans.cached[seat])):
            row = self.pool[int(spans.cache_rows(torch.tensor(seat), torch.tensor(place)))]
            assert row is not None, "a committed token was never stored"
            rows.append(row)
        return rows

    def store(self, source: Tensor, target: Tensor) -> None:
        for row, place in zip(source.tolist(), target.tolist(), strict=True):
            assert (row < 0) == (place < 0)
            if row >= 0:
                self.pool[place] = self.new[row]


class NetworkRows:
    """A transformer over flat rows, in plain operations."""

    def __init__(self, model: Transformer, num_cache_rows: int) -> None:
        self.network = FlatNetwork(model, PlainOps(model.config, model.dtype))
        self.pool = self._rows(num_cache_rows)

    def run(self, rows: Rows, spans: Spans, start: int) -> Tensor:
        self.new = self._rows(rows.num_rows)
        hidden = self.network.forward(rows, spans, plain_tiles(spans, 16, rows.num_rows), self.pool, self.new)
        return self.network.logits(hidden[start:])

    def store(self, source: Tensor, target: Tensor) -> None:
        self.network.ops.store_rows(self.new.keys, self.new.values, self.pool.keys, self.pool.values, source, target)

    def _rows(self, count: int) -> KeyValues:
        return KeyValues.empty(self.network.config, count, self.network.device, self.network.dtype)


@dataclass
class Request:
    """One prompt, and what came of it."""

    prompt: list[int]
    max_tokens: int
    seed: int = 0
    arrival: int = 0  # forward of the loop from which on it may sit down
    chunk: int = 1000  # prompt tokens a forward
    answer: dict[int, int] = field(default_factory=dict)
    reports: list[SeatReport] = field(default_factory=list)
    num_prefilled: int = 0

    def text(self, eos_ids: list[int]) -> list[int]:
        token_ids: list[int] = []
        while len(token_ids) in self.answer:
            token_ids.append(self.answer[len(token_ids)])
        return cut_answer(token_ids, eos_ids, self.max_tokens)


class Server:
    """Runs requests to their end. `after_forward`, if given, may move, save and restore seats between forwards."""

    def __init__(
        self,
        rounds: Rounds,
        forward: FlatForward,
        *,
        num_seats: int,
        pages_per_seat: int,
        banned: Sequence[int] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        is_autoregressive: bool = False,
    ) -> None:
        self.rounds, self.forward, self.is_autoregressive = rounds, forward, is_autoregressive
        self.banned, self.temperature, self.top_p = torch.tensor(list(banned), dtype=torch.long), temperature, top_p
        nothing = [torch.zeros(num_seats, dtype=torch.int32) for _ in range(5)]
        pages = torch.randperm(num_seats * pages_per_seat, generator=torch.Generator().manual_seed(1)).int()
        self.spans = Spans(*nothing, pages.view(num_seats, pages_per_seat), PAGE_SIZE)
        self.seats: list[Request | None] = [None] * num_seats
        self.saved: list[tuple[Request, dict[str, Tensor], list[int]]] = []
        self.last: np.ndarray | None = None
        self.num_forwards = 0

    def serve(self, requests: list[Request], candidates: Any = lambda forward: 1000, after_forward: Any = None) -> None:
        waiting = list(requests)
        while waiting or any(self.seats):
            for seat, sitting in enumerate(self.seats):
                if sitting is None and waiting and waiting[0].arrival <= self.num_forwards:
                    self.seats[seat] = waiting.pop(0)
                    self.spans.cached[seat] = 0
                    self.rounds.retire(seat)
            self.step(candidates(self.num_forwards))
            if after_forward is not None:
                after_forward(self)
            assert self.num_forwards < 2000, "decoding does not end"

    def step(self, candidates: int) -> None:
        num_seats, num_prompt = len(self.seats), 0
        chunks: list[tuple[int, Request, int, int]] = []
        for seat, request in enumerate(self.seats):
            self.spans.prompt_start[seat] = self.spans.prompt_end[seat] = num_prompt
            if request is not None and request.num_prefilled < self._prompt_rows(request):
                size = min(request.chunk, self._prompt_rows(request) - request.num_prefilled)
                chunks.append((seat, request, num_prompt, size))
                num_prompt += size
                self.spans.prompt_end[seat] = num_prompt
            if request is not None and not request.reports and request.num_prefilled + request.chunk >= self._prompt_rows(request):
                sampling = {"seed": request.seed, "max_tokens": request.max_tokens, "last_token": request.prompt[-1]}
                self.rounds.admit(seat, prompt_length=len(request.prompt), **sampling)
        num_rows = self._num_rows(candidates)
        rows = Rows.empty(num_prompt + num_rows, torch.device("cpu"))
        self._write_prompts(rows, chunks)
        self.rounds.lay_out(rows.narrow(num_prompt, num_rows), self.spans, start=num_prompt, num_seats=num_seats, candidates=candidates)
        logits = self.forward.run(rows, self.spans, 0).float()
        if isinstance(self.rounds, RefusionRounds | SlidingRounds):
            self._name_firsts(logits, chunks)
        readout = self._readout(logits[num_prompt:], rows.narrow(num_prompt, num_rows))
        for seat, request, start, size in chunks:
            place = torch.arange(request.num_prefilled, request.num_prefilled + size)
            self.forward.store(torch.arange(start, start + size).int(), self.spans.cache_rows(torch.tensor(seat).expand(size), place).int())
            request.num_prefilled += size
            self.spans.cached[seat] += size
        self.rounds.settle(readout, self.spans, num_seats=num_seats, candidates=candidates)
        self.forward.store(self.rounds.source[: num_seats * self.rounds.num_kept], self.rounds.target[: num_seats * self.rounds.num_kept])
        self.num_forwards += 1
        self.last = self.rounds.report[:num_seats].numpy().copy()
        self._read(rows)

    def move(self, source: int, target: int) -> None:
        """As the engine compacts seats: the page table line moves, the target gives its own pages away."""
        assert self.seats[target] is None
        assert self.last is not None
        self.seats[target], self.seats[source] = self.seats[source], None
        self.rounds.move(source, target)
        self.rounds.retire(source)
        for tensor in (self.spans.page_table, self.spans.cached):
            tensor[[source, target]] = tensor[[target, source]]
        self.last[target] = self.last[source]

    def _prompt_rows(self, request: Request) -> int:
        return len(request.prompt) - self.is_autoregressive

    def _num_rows(self, candidates: int) -> int:
        """What the host reckons, exactly: a fresh seat has nothing but its plan."""
        if self.last is None:
            self.last = np.zeros_like(self.rounds.report.numpy())
        self.needed = needed = self.rounds.num_rows(self.last, candidates)
        total = 0
        for seat, request in enumerate(self.seats):
            if request is None:
                continue
            total += int(needed[seat]) if request.reports else self.rounds.fresh_rows
        return max(total, 1)

    def _write_prompts(self, rows: Rows, chunks: list[tuple[int, Request, int, int]]) -> None:
        for seat, request, start, size in chunks:
            part = rows.narrow(start, size)
            first = request.num_prefilled
            part.token_ids.copy_(torch.tensor(request.prompt[first : first + size]))
            part.positions.copy_(torch.arange(first, first + size))
            part.rank.copy_(torch.arange(size))
            part.seat.fill_(seat)
            part.segment.fill_(PROMPT)
            part.parent.fill_(-1)

    def _name_firsts(self, logits: Tensor, chunks: list[tuple[int, Request, int, int]]) -> None:
        """What the last prompt row of every seat says, drawn by the seed and position of the seat and as the first draft."""
        self.rounds.first_ids.fill_(-1)
        for seat, request, start, size in chunks:
            key = torch.tensor([request.seed]), torch.tensor([len(request.prompt) - 1]), torch.tensor([1])
            temperature = torch.tensor([self.temperature])
            top_p = None if self.top_p == 1.0 else torch.tensor([self.top_p])
            last = logits[start + size - 1 : start + size].clone()
            if self.temperature == 0.0:
                read = readout_logits(last, self.banned, Draw(0.0, 1.0, key[0], key[2]), ReadRows(key[0], key[2], key[1], key[2] * 0))
            else:
                read = sampled_readout(last, self.banned, key[2] * 0, temperature, top_p, *key)
            self.rounds.first_ids[seat] = int(read.token_ids)

    def _readout(self, logits: Tensor, rows: Rows) -> Readout:
        count, num_runner_ups = rows.num_rows, 0 if self.is_autoregressive else self.rounds.slots.alternatives
        given_ids, seeds, attempts = self.rounds.given_ids[:count], self.rounds.seeds[:count], self.rounds.attempts[:count]
        if self.temperature == 0.0:
            draw = Draw(0.0, 1.0, seeds, attempts)
            return readout_logits(logits, self.banned, draw, ReadRows(seeds, attempts, rows.positions, given_ids.long()), num_runner_ups)
        temperature = torch.full((count,), self.temperature)
        top_p = None if self.top_p == 1.0 else torch.full((count,), self.top_p)
        positions = self.rounds.drawn_at(rows) if isinstance(self.rounds, SlidingRounds) else rows.positions
        return sampled_readout(logits, self.banned, given_ids, temperature, top_p, seeds, positions, attempts, num_runner_ups)

    def _read(self, rows: Rows) -> None:
        assert self.last is not None
        laid_out = torch.bincount(rows.seat[rows.segment != PROMPT].clamp(min=-1).long() + 1, minlength=len(self.seats) + 1)[1:]
        for seat, request in enumerate(self.seats):
            if request is None or (not request.reports and request.num_prefilled < self._prompt_rows(request)):
                assert laid_out[seat] == 0
                continue
            report = self.rounds.read(self.last[seat])
            assert report.num_rows == laid_out[seat]
            assert laid_out[seat] == self.needed[seat] if request.reports else laid_out[seat] <= self.rounds.fresh_rows
            request.reports.append(report)
            for news in report.committed:
                request.answer |= {news.offset + place: token for place, token in enumerate(news.token_ids)}
            if report.is_done:
                self.seats[seat] = None
                self.rounds.retire(seat)
