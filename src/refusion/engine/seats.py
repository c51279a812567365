"""The host's view of a lane: who sits where, how far each is, and what is written. Requests on seats are always 0 .. n-1.

Everything the host needs at every forward is an array over seats, so that a forward in which nobody comes or goes costs a few array
operations whatever the number of seats.
"""

import heapq
import time
from dataclasses import dataclass

import numpy as np

from refusion.decoding.rounds import IS_DONE
from refusion.engine.candidates import Load
from refusion.engine.commits import advances, commits, is_judged_next
from refusion.engine.lanes import Lane, LaneKey
from refusion.engine.requests import GAP, Request, Saved, State, answer_room
from refusion.engine.runner import Runner

# B = seats, R = report columns, N = answer tokens


@dataclass(frozen=True, slots=True)
class Settled:
    """What a forward came to."""

    is_done: np.ndarray  # [B] bool
    num_tokens: int  # became final, all seats together


class Seats:
    """Requests of one lane: those on seats and those that wait for one."""

    def __init__(self, key: LaneKey, lane: Lane, num_seats: int) -> None:
        """num_seats: most requests that may run together."""
        self.key, self.lane, self.num_seats = key, lane, num_seats
        size = 1 if key.slots is None else key.slots.slot_size
        self.most_committed = key.width * size
        """Tokens one forward can commit for one request."""
        room = -(-key.max_tokens // self.most_committed) * self.most_committed
        self.accepted = np.zeros(size + 1, dtype=np.int64)  # how often a slot advanced by so many tokens, see `Load`
        self.requests: list[Request] = []
        self.waiting: list[tuple[int, Request]] = []  # a heap by arrival
        self.reports = np.zeros((num_seats, lane.rounds.report_width), dtype=np.int32)  # [B, R] of the last forward
        self.written = np.full((num_seats, room), GAP, dtype=np.int32)  # [B, N]
        self.cached = np.zeros(num_seats, dtype=np.int64)
        self.most_cached = np.zeros(num_seats, dtype=np.int64)  # prompt and all of the answer
        self.num_pages = np.zeros(num_seats, dtype=np.int64)
        self.is_decoding = np.zeros(num_seats, dtype=bool)  # not before the last prompt token is on its way
        self.is_fresh = np.zeros(num_seats, dtype=bool)  # decoding, but not yet part of a forward

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def has_work(self) -> bool:
        return bool(self.requests) or self.next_waiting() is not None

    @property
    def is_full(self) -> bool:
        return len(self.requests) >= self.num_seats

    def wait(self, request: Request) -> None:
        """Queue up; who came first is first, wherever it has been in between."""
        heapq.heappush(self.waiting, (request.arrival, request))

    def next_waiting(self) -> Request | None:
        """The first in the queue; aborted requests drop out here."""
        while self.waiting and self.waiting[0][1].state is State.FINISHED:
            heapq.heappop(self.waiting)
        return self.waiting[0][1] if self.waiting else None

    def seat_next(self, runner: Runner, pages: list[int]) -> Request:
        """Give the first in the queue a seat with these pages, and all it had if it was preempted."""
        _, request = heapq.heappop(self.waiting)
        seat = request.seat = len(self.requests)
        self.requests.append(request)
        request.pages = pages
        request.seated_at = request.seated_at or time.perf_counter()
        self.num_pages[seat] = len(pages)
        self.most_cached[seat] = len(request.prefill_ids) + answer_room(request.new, self.key)
        self.is_fresh[seat] = False
        self.reports[seat] = 0
        self.lane.set_pages(seat, pages)
        if request.saved is not None:
            self._restore(seat, request.saved, runner)
            request.saved, request.state = None, State.RUNNING
        else:
            self.written[seat] = GAP
            self.is_decoding[seat] = False
            self._set_cached(seat, request.num_prefilled)
            request.state = State.PREFILLING
        if not self.key.is_greedy:
            self.lane.set_sampling(seat, request.new.sampling.temperature, request.new.sampling.top_p)
        return request

    def begin(self, request: Request) -> None:
        """Its whole prompt is in the cache, or will be after the forward to come: it takes part from that one on."""
        sampling, seat = request.new.sampling, request.seat
        self.lane.rounds.admit(
            seat,
            prompt_length=len(request.prompt_ids),
            seed=sampling.seed,
            max_tokens=sampling.max_tokens,
            last_token=int(request.prompt_ids[-1]),
        )
        self.is_decoding[seat] = self.is_fresh[seat] = True
        request.state = State.RUNNING

    def unbegin(self, request: Request) -> None:
        """Take `begin` back: the forward did not happen."""
        self.lane.rounds.retire(request.seat)
        self.is_decoding[request.seat] = self.is_fresh[request.seat] = False
        request.state = State.PREFILLING

    def add_pages(self, request: Request, pages: list[int]) -> None:
        """More room for its tokens."""
        self.lane.set_pages(request.seat, pages, first=len(request.pages))
        request.pages += pages
        self.num_pages[request.seat] = len(request.pages)

    def num_rows(self, candidates: int) -> int:
        """Decode rows of the forward to come."""
        count = len(self)
        rounds = self.lane.rounds
        rows = np.where(self.is_fresh[:count], rounds.fresh_rows, rounds.num_rows(self.reports[:count], candidates))
        return int(rows[self.is_decoding[:count]].sum())

    def load(self, most: int) -> Load:
        """What the forward to come looks like to those who choose its candidates, `most` at most."""
        count = len(self)
        is_judged = is_judged_next(self.lane.rounds, self.reports[:count]) & self.is_decoding[:count] & ~self.is_fresh[:count]
        return Load(most, self.num_rows, self.accepted, float(is_judged.mean()))

    def short_of_pages(self, page_size: int) -> list[Request]:
        """Requests whose pages may not hold what the forward to come commits, oldest first."""
        count = len(self)
        room = self.num_pages[:count] * page_size
        is_short = self.is_decoding[:count] & (self.wanted(slice(0, count)) > room)
        return sorted((self.requests[seat] for seat in np.flatnonzero(is_short)), key=lambda request: request.arrival)

    def wanted(self, seat: "int | slice") -> np.ndarray:
        """Tokens the cache of a seat must hold after the forward to come."""
        return np.minimum(self.cached[seat] + self.most_committed, self.most_cached[seat])

    def settle(self, report: np.ndarray) -> Settled:
        """Book the report [B, R] of a forward."""
        count = len(self)
        took_part = self.is_decoding[:count]
        goes_on = took_part & ~self.is_fresh[:count]
        if self.key.slots is not None:
            self.accepted += advances(self.lane.rounds, self.reports[:count], report[:count], goes_on)
        self.reports[:count][took_part] = report[:count][took_part]
        self.is_fresh[:count] = False
        had_none = self.written[:count, 0] == GAP
        new = commits(self.lane.rounds, report[:count], took_part)
        self.written[new.seat, new.place] = new.token
        self.cached[:count] += np.bincount(new.seat, minlength=count)
        now = time.perf_counter()
        for index in np.flatnonzero(had_none & (self.written[:count, 0] != GAP)):
            self.requests[index].first_token_at = now
        return Settled(is_done=took_part & (report[:count, IS_DONE] != 0), num_tokens=len(new.seat))

    def leave(self, request: Request) -> list[int]:
        """Take a request from its seat; the last one moves to it. Returns its pages, which it no longer has."""
        seat, last = request.seat, len(self.requests) - 1
        if seat != last:
            self.lane.move(last, seat)
            for array in (
                self.reports,
                self.written,
                self.cached,
                self.most_cached,
                self.num_pages,
                self.is_decoding,
                self.is_fresh,
            ):
                array[seat] = array[last]
            self.requests[seat] = self.requests[last]
            self.requests[seat].seat = seat
        self.lane.rounds.retire(last)
        self.requests.pop()
        pages, request.pages, request.seat = request.pages, [], -1
        return pages

    def save(self, request: Request, runner: Runner) -> None:
        """Keep all there is of a decoding request in host memory."""
        seat, page_size = request.seat, runner.page_size
        num_cached = int(self.cached[seat])
        request.saved = Saved(
            pages=runner.swap_out(request.pages[: -(-num_cached // page_size)]),
            rounds=self.lane.rounds.snapshot(seat),
            report=self.reports[seat].copy(),
            written=self.written[seat].copy(),
            num_cached=num_cached,
        )

    def prefilled(self, request: Request, num_tokens: int) -> None:
        """The forward under way puts so many more prompt tokens into the cache."""
        request.num_prefilled += num_tokens
        self.cached[request.seat] += num_tokens

    def refresh_cached(self) -> None:
        """Tell the device again how much each seat has cached, after a forward that failed."""
        for seat in range(len(self)):
            self.lane.set_cached(seat, int(self.cached[seat]))

    def _restore(self, seat: int, saved: Saved, runner: Runner) -> None:
        request = self.requests[seat]
        runner.swap_in(saved.pages, request.pages[: -(-saved.num_cached // runner.page_size)])
        self.lane.rounds.restore(seat, saved.rounds)
        self.reports[seat], self.written[seat] = saved.report, saved.written
        self.is_decoding[seat] = True
        self._set_cached(seat, saved.num_cached)

    def _set_cached(self, seat: int, cached: int) -> None:
        self.cached[seat] = cached
        self.lane.set_cached(seat, cached)
