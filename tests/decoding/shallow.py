"""Networks without weights for decoders with bidirectional attention, and the simplest way to serve `DiffusionRounds`.

A row is a hash of its own token and of all it sees: of committed rows and of new ones that do not see it back as they are, of the others
the token alone, since rows that see one another have no order in which they could be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from flat import PAGE_SIZE, FlatForward
from scripted import Row, Script, ScriptedCache, ScriptedForward
from torch import Tensor

from refusion.decoding.diffusion_report import NEXT_ROWS
from refusion.decoding.diffusion_rounds import DiffusionRounds
from refusion.decoding.flat_readout import sampled_readout
from refusion.decoding.forward import ForwardBatch, Readout, readout_logits
from refusion.decoding.forward import Rows as ReadRows
from refusion.decoding.rounds import NUM_ROWS
from refusion.decoding.sampling import Draw, cut_answer
from refusion.model.rows import Rows, Spans, Tiles, may_see, plain_tiles


def shallow(tokens: list[int], positions: list[int], visible: Tensor, committed: list[list[Row]]) -> list[Row]:
    """Rows of new tokens; committed [T]: what each sees of the cache."""
    bare = [Row.of(token, position, []) for token, position in zip(tokens, positions, strict=True)]
    seen = visible.tolist()
    rows: list[Row | None] = [None] * len(tokens)

    def run(place: int) -> Row:
        row = rows[place]
        if row is None:
            others = [other for other in range(len(tokens)) if seen[place][other] and other != place]
            new = [bare[other] if seen[other][place] else run(other) for other in others]
            row = rows[place] = Row.of(tokens[place], positions[place], [*committed[place], *new])
        return row

    return [run(place) for place in range(len(tokens))]


class ShallowForward(ScriptedForward):
    """A `ForwardFn` for batches of one, whose predictions come from a script."""

    def __call__(self, batch: ForwardBatch, cache: ScriptedCache) -> Readout:
        num_tokens = batch.token_ids.shape[1]
        committed = [list(cache.rows[0])] * num_tokens
        rows = shallow(batch.token_ids[0].tolist(), batch.positions[0].tolist(), batch.segments.attn_mask()[0], committed)
        cache.new = [list(rows)]
        self.forwards.append([rows])
        parts = (torch.zeros(1, num_tokens, dtype=kind) for kind in (torch.long, torch.float, torch.float, torch.bool))
        readout = Readout(*parts, torch.zeros(1, num_tokens, 0, dtype=torch.long))
        for place in batch.is_read[0].nonzero()[:, 0].tolist():
            keys = ReadRows(batch.draw.seeds, batch.draw.attempts, batch.positions[:, place], batch.given_ids[:, place])
            one = readout_logits(self.script(rows[place]).clone()[None], self.banned, batch.draw, keys)
            for name in ("token_ids", "confidence", "given_probability", "given_is_argmax"):
                getattr(readout, name)[0, place] = getattr(one, name)[0]
        return readout


class ShallowRows:
    """The flat twin of `ShallowForward`."""

    def __init__(self, script: Script, num_cache_rows: int) -> None:
        self.script = script
        self.pool: list[Row | None] = [None] * num_cache_rows

    def run(self, rows: Rows, spans: Spans, start: int) -> Tensor:
        seats = rows.seat.tolist()
        cached = {seat: self._committed(spans, seat) for seat in set(seats) if seat >= 0}
        committed = [cached.get(seat, []) for seat in seats]
        self.new = shallow(rows.token_ids.tolist(), rows.positions.tolist(), may_see(rows), committed)
        return torch.stack([self.script(row) for row in self.new])

    def store(self, source: Tensor, target: Tensor) -> None:
        for row, place in zip(source.tolist(), target.tolist(), strict=True):
            assert (row < 0) == (place < 0)
            if row >= 0:
                self.pool[place] = self.new[row]

    def _committed(self, spans: Spans, seat: int) -> list[Row]:
        rows = [self.pool[int(spans.cache_rows(torch.tensor(seat), torch.tensor(place)))] for place in range(int(spans.cached[seat]))]
        assert None not in rows, "a committed token was never stored"
        return [row for row in rows if row is not None]


@dataclass
class Request:
    """One prompt, and what came of it."""

    prompt: list[int]
    max_tokens: int
    seed: int = 0
    arrival: int = 0  # forward of the loop from which on it may sit down
    answer: dict[int, int] = field(default_factory=dict)
    commits: list[dict[int, int]] = field(default_factory=list)  # by forward, those that only prefill left out
    num_forwards: int = 0

    def text(self, eos_ids: list[int]) -> list[int]:
        token_ids: list[int] = []
        while len(token_ids) in self.answer:
            token_ids.append(self.answer[len(token_ids)])
        return cut_answer(token_ids, eos_ids, self.max_tokens)


class DiffusionServer:
    """Runs requests to their end, `num_seats` at a time; `padding` more decode rows than are needed in every forward."""

    def __init__(
        self,
        rounds: DiffusionRounds,
        forward: FlatForward,
        *,
        num_seats: int,
        banned: Sequence[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        padding: int = 2,
        tile: int | None = None,
    ) -> None:
        """tile: also lay out query tiles of so many rows, and check them."""
        self.rounds, self.forward, self.padding, self.tile = rounds, forward, padding, tile
        self.banned, self.temperature, self.top_p = torch.tensor(list(banned)), temperature, top_p
        pages_per_seat = -(-rounds.num_positions // PAGE_SIZE)
        pages = torch.randperm(num_seats * pages_per_seat, generator=torch.Generator().manual_seed(1)).int()
        self.spans = Spans(*(torch.zeros(num_seats, dtype=torch.int32) for _ in range(5)), pages.view(num_seats, -1), PAGE_SIZE)
        self.seats: list[Request | None] = [None] * num_seats
        self.next_rows = [0] * num_seats
        self.num_forwards = 0
        self.logits: list[Tensor] = []  # [B * K, V] of every forward

    def serve(self, requests: Sequence[Request]) -> None:
        waiting = list(requests)
        while waiting or any(self.seats):
            for seat, sitting in enumerate(self.seats):
                if sitting is None and waiting and waiting[0].arrival <= self.num_forwards:
                    self._admit(seat, waiting.pop(0))
            self.step()
            assert self.num_forwards < 2000, "decoding does not end"

    def step(self) -> None:
        num_seats, device = len(self.seats), torch.device("cpu")
        num_rows = sum(self.next_rows) + self.padding
        rows = Rows.empty(num_rows, device)
        tiles = self._tiles(num_rows)
        self.rounds.lay_out(rows, self.spans, start=0, num_seats=num_seats, candidates=0, tiles=tiles)
        self._check_tiles(tiles, rows)
        logits = self.forward.run(rows, self.spans, 0).float()
        reads = self.rounds.reads[: num_seats * self.rounds.block_size].long()
        self.logits.append(logits[reads].clone())
        self.rounds.settle(self._readout(logits[reads], rows.positions[reads]), self.spans, num_seats=num_seats, candidates=0)
        if self.rounds.has_cache:
            self.forward.store(self.rounds.source[:num_rows], self.rounds.target[:num_rows])
        self.num_forwards += 1
        report = self.rounds.report[:num_seats].numpy().copy()
        for seat, request in enumerate(self.seats):
            if request is not None:
                assert report[seat, NUM_ROWS] == self.next_rows[seat] == int((rows.seat == seat).sum())
                self._take(seat, request, report[seat])
            self.next_rows[seat] = int(report[seat, NEXT_ROWS]) if self.seats[seat] is not None else 0

    def move(self, source: int, target: int) -> None:
        """As the engine compacts seats."""
        assert self.seats[target] is None
        self.rounds.move(source, target)
        self.spans.cached[target] = self.spans.cached[source]
        lines = self.spans.page_table[[target, source]]
        self.spans.page_table[source], self.spans.page_table[target] = lines[0], lines[1]
        self.seats[target], self.seats[source] = self.seats[source], None
        self.next_rows[target], self.next_rows[source] = self.next_rows[source], 0
        self.rounds.retire(source)

    def _admit(self, seat: int, request: Request) -> None:
        self.seats[seat] = request
        self.spans.cached[seat] = 0
        given = {"prompt_length": len(request.prompt), "seed": request.seed, "max_tokens": request.max_tokens}
        self.rounds.admit(seat, **given, prompt_ids=request.prompt)
        self.next_rows[seat] = self.rounds.first_rows(len(request.prompt), request.max_tokens)

    def _take(self, seat: int, request: Request, line: object) -> None:
        report = self.rounds.read(line)  # type: ignore[arg-type]  # a line of numbers
        new = {news.offset + place: token for news in report.committed for place, token in enumerate(news.token_ids)}
        assert not new.keys() & request.answer.keys(), "a token was committed twice"
        request.answer |= new
        if report.num_forwards > request.num_forwards:
            request.commits.append(new)
        request.num_forwards = report.num_forwards
        if report.is_done:
            self.seats[seat] = None

    def _readout(self, logits: Tensor, positions: Tensor) -> Readout:
        count = len(logits)
        given_ids, seeds, attempts = self.rounds.given_ids[:count], self.rounds.seeds[:count], self.rounds.attempts[:count]
        if self.temperature == 0.0:
            keys = ReadRows(seeds, attempts, positions, given_ids.long())
            return readout_logits(logits, self.banned, Draw(0.0, 1.0, seeds, attempts), keys)
        temperature = torch.full((count,), self.temperature)
        top_p = None if self.top_p == 1.0 else torch.full((count,), self.top_p)
        return sampled_readout(logits, self.banned, given_ids, temperature, top_p, seeds, positions, attempts)

    def _tiles(self, num_rows: int) -> Tiles | None:
        if self.tile is None:
            return None
        return Tiles(*torch.full((3, num_rows + len(self.seats)), 99, dtype=torch.int32), block=self.tile)

    def _check_tiles(self, tiles: Tiles | None, rows: Rows) -> None:
        if tiles is not None:
            expected = plain_tiles(self.spans, tiles.block, len(tiles.seat))
            for name in ("seat", "first", "end"):
                assert torch.equal(getattr(tiles, name), getattr(expected, name)), name
