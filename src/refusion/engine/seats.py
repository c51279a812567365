"""The host's view of a lane: who sits where, how far each is, and what is written. Requests on seats are always 0 .. n-1.

Some of them may have ended: they leave when the next forward is scheduled, or let a newcomer have their seat while one is under way.

Everything the host needs at every forward is an array over seats, so that a forward in which nobody comes or goes costs a few array
operations whatever the number of seats. Of a report, only what the next forward needs is read at once (`glance`); the rest is booked
while the device computes (`book`).
"""

import heapq
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from refusion.decoding.diffusion_params import MaskedDiffusionParams
from refusion.decoding.diffusion_report import CACHED, NEXT_ROWS
from refusion.decoding.diffusion_rounds import DiffusionRounds
from refusion.decoding.rounds import IS_DONE
from refusion.decoding.sliding_rounds import SlidingRounds
from refusion.engine.commits import commits, num_committed
from refusion.engine.experience import LAST_WEIGHT
from refusion.engine.lanes import Lane, LaneKey
from refusion.engine.requests import GAP, Request, Saved, State, cache_room, diffusion_rows, first_room
from refusion.engine.runner import Runner
from refusion.engine.sliding import AnyExperience, demand_of

# B = seats, R = report columns, N = answer tokens


@dataclass(frozen=True, slots=True)
class Glance:
    """A forward that has ended, as its seats were then; they may change before it is booked."""

    seats: "Seats"
    at: float
    requests: list[Request]
    lines: np.ndarray  # [B] where the answers are written
    took_part: np.ndarray  # [B] bool
    is_done: np.ndarray  # [B] bool
    before: np.ndarray  # [B, R] the reports of last time
    report: np.ndarray  # [B, R]
    num_tokens: int  # became final, all seats together


class Seats:
    """Requests of one lane: those on seats and those that wait for one."""

    def __init__(self, key: LaneKey, lane: Lane, num_seats: int, experience: AnyExperience | None) -> None:
        """num_seats: most requests that may run together. experience: of slot lanes."""
        self.key, self.lane, self.num_seats, self.experience = key, lane, num_seats, experience
        self.most_committed = key.width if key.slots is None else key.width * key.slots.slot_size + key.slots.sliding
        """Tokens one forward can commit for one request."""
        room = -(-key.max_tokens // self.most_committed) * self.most_committed
        self.demand = demand_of(lane.rounds)
        self._eos_ids = np.array(key.eos_ids, dtype=np.int32)
        self.requests: list[Request] = []
        self.waiting: list[tuple[int, Request]] = []  # a heap by arrival
        self.reports = np.zeros((num_seats, lane.rounds.report_width), dtype=np.int32)  # [B, R] of the last forward
        self.written = np.full((2 * num_seats, room), GAP, dtype=np.int32)  # [lines, N]
        self.line = np.zeros(num_seats, dtype=np.int64)  # of each seat
        # Twice as many lines as seats, the one left longest ago first: an answer can still be booked when its seat is taken again.
        self._free_lines = deque(range(2 * num_seats))
        self.cached = lane.cached_host
        """[B] committed tokens, as far as reports have said; the device is ahead by the forwards under way."""
        self.first_room = np.zeros(num_seats, dtype=np.int32)  # tokens that there is room for from the start
        self.most_cached = np.zeros(num_seats, dtype=np.int32)  # prompt and all of the answer
        self.room = np.zeros(num_seats, dtype=np.int32)  # tokens that fit the pages
        self.is_decoding = np.zeros(num_seats, dtype=bool)  # not before the last prompt token is on its way, not behind the last token
        self.is_fresh = np.zeros(num_seats, dtype=bool)  # decoding, but not yet part of a forward
        self.has_listeners = np.zeros(num_seats, dtype=bool)
        self.num_missing = np.zeros(num_seats, dtype=np.int32)  # tokens of the answer that are not final yet
        self.num_forwards = 0  # so far
        self.left: list[Request] = []  # have ended and hold nothing; their seats can be taken
        self._took_part: deque[np.ndarray] = deque()  # [seats then] bool, of every forward under way
        self._by_seat = (
            self.reports, self.line, self.first_room, self.most_cached, self.room, self.is_decoding, self.is_fresh, self.has_listeners,
            self.num_missing,
        )  # fmt: skip
        self._unbooked: Glance | None = None

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def has_work(self) -> bool:
        return bool(self.requests) or self.next_waiting() is not None

    @property
    def num_present(self) -> int:
        """Seats that cannot be taken."""
        return len(self.requests) - len(self.left)

    @property
    def is_full(self) -> bool:
        return self.num_present >= self.num_seats

    @property
    def num_prefilling(self) -> int:
        """Requests on seats whose prompt is not whole yet, at most: those who have just ended count too."""
        return self.num_present - int(np.count_nonzero(self.is_decoding[: len(self.requests)]))

    def prefilling(self) -> list[Request]:
        """Requests on seats whose prompt is not whole yet, by seat."""
        seats = (~self.is_decoding[: len(self.requests)]).nonzero()[0].tolist()
        return [request for seat in seats if (request := self.requests[seat]).state is State.PREFILLING]

    def has_rows_for(self, request: Request, most: int) -> bool:
        """Whether a forward of `most` decode rows holds all who sit here and this request; only diffusion lanes can run short."""
        rounds = self.lane.rounds
        if not isinstance(rounds, DiffusionRounds):
            return True
        return sum(diffusion_rows(each.new, self.key, rounds.prefill_rows) for each in (*self.requests, request)) <= most

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
        if self.left:
            gone = self.left.pop()
            seat, gone.seat = gone.seat, -1
            self._free_lines.append(int(self.line[seat]))
            self.requests[seat] = request
        else:
            seat = len(self.requests)
            self.requests.append(request)
        request.seat = seat
        request.pages = pages
        request.seated_at = request.seated_at or time.perf_counter()
        self.room[seat] = len(pages) * runner.page_size
        self.line[seat] = self._free_lines.popleft()
        self.first_room[seat] = first_room(request.new, self.key)
        self.most_cached[seat] = cache_room(request.new, self.key)
        self.num_missing[seat] = request.new.sampling.max_tokens
        self.is_fresh[seat] = False
        self.has_listeners[seat] = request.has_listeners
        self.reports[seat] = 0
        self._set_phase_done(seat)
        self.lane.set_pages(seat, pages)
        if request.saved is not None:
            self._restore(seat, request.saved, runner)
            request.saved, request.state = None, State.RUNNING
        else:
            self.written[self.line[seat]] = GAP
            self.is_decoding[seat] = False
            self.lane.set_cached(seat, request.num_prefilled)
            request.state = State.PREFILLING
        if not self.key.is_greedy:
            self.lane.set_sampling(seat, request.new.sampling.temperature, request.new.sampling.top_p)
        return request

    def begin(self, request: Request) -> None:
        """Its whole prompt is in the cache, or will be after the forward to come: it takes part from that one on."""
        sampling, seat, num_prompt = request.new.sampling, request.seat, len(request.prompt_ids)
        given = {"prompt_length": num_prompt, "seed": sampling.seed, "max_tokens": sampling.max_tokens}
        if isinstance(self.lane.rounds, DiffusionRounds):
            self.lane.rounds.admit(seat, **given, prompt_ids=request.prompt_ids.tolist())
            self.reports[seat, NEXT_ROWS] = self.lane.rounds.first_rows(num_prompt, sampling.max_tokens)
        else:
            self.lane.rounds.admit(seat, **given, last_token=int(request.prompt_ids[-1]))
        if self.demand is not None:
            self.demand.open(self.reports[seat], sampling.max_tokens)
        self.is_decoding[seat] = self.is_fresh[seat] = True
        request.state = State.RUNNING

    def unbegin(self, request: Request) -> None:
        """Take `begin` back: the forward did not happen."""
        self.lane.retire(request.seat)
        self._set_phase_done(request.seat)
        self.is_decoding[request.seat] = self.is_fresh[request.seat] = False
        request.state = State.PREFILLING

    def launched(self) -> None:
        """All that decode take part in the forward just launched."""
        self.num_forwards += 1
        self.is_fresh[: len(self.requests)] = False
        self._took_part.append(self.is_decoding[: len(self.requests)].copy())

    def add_pages(self, request: Request, pages: list[int], page_size: int) -> None:
        """More room for its tokens."""
        self.lane.set_pages(request.seat, pages, first=len(request.pages))
        request.pages += pages
        self.room[request.seat] = len(request.pages) * page_size

    def num_rows(self, reports: np.ndarray, candidates: int) -> int:
        """Decode rows of the forward that follows these reports [B, R]."""
        if isinstance(self.lane.rounds, DiffusionRounds):
            return int(reports[:, NEXT_ROWS].sum())
        if self.demand is None:
            return int(np.count_nonzero(self.is_decoding[: len(reports)]))
        return self.demand.total(reports, candidates)

    def short_of_pages(self) -> list[Request]:
        """Requests whose pages may not hold what the forward to come commits, oldest first."""
        if not self.requests:
            return []
        seats = self._is_short(self.most_committed).nonzero()[0].tolist()
        return sorted((self.requests[seat] for seat in seats), key=lambda request: request.arrival)

    def wanted(self, seat: int) -> int:
        """Tokens the cache of a seat must hold after the forward to come."""
        held = max(int(self.cached[seat]), int(self.first_room[seat]))
        return min(held + self.most_committed, int(self.most_cached[seat]))

    def can_go_on(self) -> bool:
        """The forward after the one under way needs nothing but rows: no prompt, and no pages whatever both of them write."""
        return not self.prefilling() and not np.count_nonzero(self._is_short(2 * self.most_committed))

    def rows_ahead(self, num_rows: int, candidates: int) -> int | None:
        """Rows that hold the forward after the one under way, which has `num_rows`, whatever that brings; None if nobody may be left.

        Those who sit `can_go_on`.
        """
        count = len(self.requests)
        is_fresh, is_decoding = self.is_fresh[:count], self.is_decoding[:count]
        if self.key.diffusion is not None:
            repeats = isinstance(self.key.diffusion, MaskedDiffusionParams) and self._can_repeat_masked(count)
            return num_rows if repeats else None
        if self.demand is not None:
            old = is_decoding & ~is_fresh
            reports = self.reports[:count] if old.all() else self.reports[:count][old]
            new_rows = self.demand.total(self.reports[:count][is_fresh], candidates) if is_fresh.any() else 0
            will_end = new_rows == 0 and self.demand.will_end(reports, self._eos_ids)
            return None if will_end else max(self.demand.most_next(reports, candidates) + new_rows, 1)
        goes_on = is_fresh | (is_decoding & (self.most_cached[:count] > self.cached[:count] + 1))
        return num_rows if goes_on.any() else None

    def reports_behind(self, report: np.ndarray) -> np.ndarray | None:
        """The reports [B, R] of all who sit once this one of the forward under way is taken in; None if nobody is left.

        Those who sit `can_go_on`.
        """
        count, took_part = len(self._took_part[0]), self._took_part[0]
        if not np.count_nonzero(self.is_fresh[: len(self.requests)]):  # several times as fast as `any`, as long as seats are few
            goes_on = took_part & self.is_decoding[:count] & (report[:count, IS_DONE] == 0)
            return report[:count] if np.count_nonzero(goes_on) else None
        reports = self.reports[: len(self.requests)].copy()
        reports[:count][took_part] = report[:count][took_part]
        return reports

    def _can_repeat_masked(self, count: int) -> bool:
        """Without a cache, a forward of masked diffusion runs prompt and answer whatever the one before it brought."""
        rounds = self.lane.rounds
        return (
            isinstance(rounds, DiffusionRounds) and not rounds.has_cache and bool((self.num_missing[:count] > rounds.most_committed).any())
        )

    def _is_short(self, num_tokens: int) -> np.ndarray:
        count = len(self.requests)
        held = np.maximum(self.cached[:count], self.first_room[:count])
        wanted = np.minimum(held + num_tokens, self.most_cached[:count])
        return self.is_decoding[:count] & (wanted > self.room[:count])

    def glance(self, report: np.ndarray) -> Glance:
        """What the next forward depends on, from the report [B, R] of the last one; `book` does the rest."""
        took_part = self._took_part.popleft()
        count = len(took_part)  # others may have joined since
        took_part &= self.is_decoding[:count]  # who ended in the forward before has been told
        report = report[:count]
        before = self.reports[:count].copy()
        new = num_committed(self.lane.rounds, report)
        is_done = took_part & (report[:, IS_DONE] != 0)
        if np.count_nonzero(took_part) == count:
            self.reports[:count] = report
        else:
            self.reports[:count][took_part] = report[took_part]
            new = new * took_part
        if isinstance(self.lane.rounds, DiffusionRounds | SlidingRounds):  # both say it in the same column
            np.copyto(self.cached[:count], report[:, CACHED], where=took_part)
        else:
            self.cached[:count] += new
        self.num_missing[:count] -= new
        self.is_decoding[:count] &= ~is_done
        num_tokens = sum(new.tolist())
        self._unbooked = Glance(
            self, time.perf_counter(), self.requests[:count], self.line[:count].copy(), took_part, is_done, before, report, num_tokens
        )
        return self._unbooked

    def book(self) -> None:
        """Write down what the last forward brought; to be done before its lines are read. Interrupted, it can be done again."""
        glance = self._unbooked
        if glance is None:
            return
        new = commits(self.lane.rounds, glance.report, glance.took_part)
        assert len(new.seat) == glance.num_tokens, f"{len(new.seat)} tokens were committed, {glance.num_tokens} cached"
        self.written[glance.lines[new.seat], new.place] = new.token
        for seat in new.seat[new.place == 0].tolist():
            request = glance.requests[seat]
            request.first_token_at = request.first_token_at or glance.at
        self._unbooked = None

    def learn(self, glance: Glance) -> None:
        """Remember what slots took and brought; once much is known, every fourth forward says enough."""
        if self.experience is None:
            return
        if self.experience.weight < LAST_WEIGHT or self.num_forwards % 4 == 0:
            assert self.demand is not None, "slots have both"
            self.experience.learn(self.demand, glance.before, glance.report, glance.took_part, glance.num_tokens)

    def give_up(self, request: Request) -> list[int]:
        """Whoever has ended writes no more and lets its seat to the next, while forwards are under way. Returns its pages."""
        seat = request.seat
        self.left.append(request)
        self.lane.retire(seat)
        self._set_phase_done(seat)
        self.lane.set_cached(seat, 0)
        self.is_decoding[seat] = False
        self.room[seat] = 0
        for took_part in self._took_part:
            took_part[seat] = False
        pages, request.pages = request.pages, []
        return pages

    def leave(self, request: Request) -> list[int]:
        """Take a request from its seat; the last one moves to it. Returns its pages, which it no longer has."""
        if request in self.left:
            self.left.remove(request)
        seat, last = request.seat, len(self.requests) - 1
        self._free_lines.append(int(self.line[seat]))
        if seat != last:
            self.lane.move(last, seat)
            for array in self._by_seat:
                array[seat] = array[last]
            self.requests[seat] = self.requests[last]
            self.requests[seat].seat = seat
        self.lane.retire(last)
        self.requests.pop()
        pages, request.pages, request.seat = request.pages, [], -1
        return pages

    def clear(self) -> None:
        """Nobody sits or waits here any more."""
        self.lane.clear()
        self._free_lines = deque(range(len(self.written)))
        self.requests.clear()
        self.left.clear()
        self._took_part.clear()
        self.waiting.clear()
        self.is_decoding[:] = self.is_fresh[:] = False
        self._unbooked = None

    def save(self, request: Request, runner: Runner) -> None:
        """Keep all there is of a decoding request in host memory."""
        self.book()
        seat, page_size = request.seat, runner.page_size
        num_cached = int(self.cached[seat])
        request.saved = Saved(
            pages=runner.swap_out(request.pages[: -(-num_cached // page_size)]),
            rounds=self.lane.rounds.snapshot(seat),
            report=self.reports[seat].copy(),
            written=self.written[self.line[seat]].copy(),
            num_cached=num_cached,
        )

    def prefilled(self, request: Request, num_tokens: int) -> None:
        """The forward under way puts so many more prompt tokens into the cache."""
        request.num_prefilled += num_tokens
        self.cached[request.seat] += num_tokens

    def refresh_cached(self) -> None:
        """Tell the device again how much each seat has cached, after a forward that failed."""
        self.lane.refresh(len(self.requests))

    def _restore(self, seat: int, saved: Saved, runner: Runner) -> None:
        request = self.requests[seat]
        runner.swap_in(saved.pages, request.pages[: -(-saved.num_cached // runner.page_size)])
        self.lane.rounds.restore(seat, saved.rounds)
        self.reports[seat], self.written[self.line[seat]] = saved.report, saved.written
        self.num_missing[seat] -= np.count_nonzero(saved.written != GAP)
        self.is_decoding[seat] = True
        self.lane.set_cached(seat, saved.num_cached)

    def _set_phase_done(self, seat: int) -> None:
        """It needs no rows."""
        if self.demand is not None:
            self.demand.close(self.reports[seat])
        elif isinstance(self.lane.rounds, DiffusionRounds):
            self.reports[seat, NEXT_ROWS] = 0
