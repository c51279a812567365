"""Who takes part in the next forward, and with which pages. Which tokens win is the decoder's business.

Requests get seats in the order of their arrival while seats and pages last. Their prompts join the cache in pieces, in the same forwards
in which the others decode. When pages run out, the youngest request is put aside, whole, and goes on later where it stopped: the oldest
always finds room, so everybody finishes. Lanes take turns and share the pages.

Batch-invariant scheduling lets nothing that others do show in the rows of a request: prompts are cut at the same places whoever shares a
forward, and every forward has rows for all candidate lengths of all its seats.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refusion.engine.auto import ChooseDecoder
from refusion.engine.candidates import Candidates
from refusion.engine.lanes import LaneKey
from refusion.engine.paging import Paging
from refusion.engine.prefill import Piece, pieces_of, prompt_rows
from refusion.engine.requests import NewRequest, Request, State, cache_room, diffusion_rows, lane_key
from refusion.engine.runner import PromptRows, Runner
from refusion.engine.seats import Seats
from refusion.engine.shapes import seat_bucket
from refusion.engine.sliding import seat_rows
from refusion.engine.warm_up import Expected
from refusion.errors import RequestError

# P = prompt rows of a forward

MOST_LANES = 8
"""Lanes kept ready though nobody is in them."""
IDLE_SHARE = 1 / 32
"""While fewer, as a share of those who decode, have left or wait beside an empty seat, no forward is held up for them."""
MOST_PASSED = 4
"""So many forwards, one after the other."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one forward may hold."""

    num_seats: int
    prompt_rows: int
    decode_rows: int


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward, as the runner wants it, and the prompts it prefills."""

    seats: Seats
    num_seats: int
    num_rows: int
    candidates: int
    prompt: PromptRows | None
    pieces: list[Piece]
    leads: bool = True
    """Whether the next forward should be launched before the report of this one is there, if it can be."""
    brings: bool = True
    """Whether something may have been uploaded for it. While it is under way, nothing more may be."""


class Scheduler:
    """Requests that wait, requests on seats, and the pages they hold."""

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        *,
        prefix_caching: bool,
        choose_decoder: ChooseDecoder,
        candidates: Candidates,
        batch_invariant: bool = False,
    ) -> None:
        self.runner, self.limits, self.batch_invariant = runner, limits, batch_invariant
        self.choose_decoder, self.candidates = choose_decoder, candidates
        self._full_limits = limits
        self.paging = Paging(runner.num_pages, runner.page_size, shares_prefixes=prefix_caching)
        self.lanes: OrderedDict[LaneKey, Seats] = OrderedDict()  # the one served longest ago comes first
        self.undecided: OrderedDict[int, Request] = OrderedDict()  # decoder "auto", not yet in a lane, by arrival
        self.idle_share = IDLE_SHARE
        self._open: dict[Request, None] = {}  # all that are not over, wherever they are
        self.num_preempted = 0  # so far
        self._blocked: Request | None = None  # the oldest that waits for pages: nobody younger gets a seat before it
        self._leaving: list[Request] = []  # to be taken from their seats before the next forward that is scheduled
        self._num_passed = 0  # forwards since then that empty seats were no reason to hold up

    @property
    def num_open(self) -> int:
        """Requests that are not over."""
        return len(self._open)

    def check(self, new: NewRequest) -> None:
        """Raises `RequestError` if the request could never run, however empty the engine."""
        if self.batch_invariant and new.decoder == "auto":
            raise RequestError("decoder 'auto' goes by the load, which batch_invariant forbids; name the decoder")
        for decoder in ("refusion", "autoregressive") if new.decoder == "auto" else (new.decoder,):
            key = lane_key(new, decoder)
            if cache_room(new, key) > self.paging.num_tokens:
                raise RequestError(
                    f"prompt {new.index} has {len(new.prompt_ids)} tokens and max_tokens is {new.sampling.max_tokens}, together more than "
                    f"the KV cache of {self.paging.num_tokens} tokens holds; lower max_tokens or raise cache_tokens"
                )
            if key.diffusion is not None:
                self._check_rows(new, key)
            elif self._seats_that_fit(key) < 1:
                raise RequestError(
                    f"blocks of {_block(key)} tokens need {self._rows_each(key)} rows in a forward of at most {self.limits.decode_rows}; "
                    f"lower {'block_size or max_candidates' if self.batch_invariant else 'block_size'} or raise max_decode_rows"
                )

    def _check_rows(self, new: NewRequest, key: LaneKey) -> None:
        num_rows = diffusion_rows(new, key, key.width)
        if num_rows > self.limits.decode_rows:
            raise RequestError(
                f"prompt {new.index} has {len(new.prompt_ids)} tokens and max_tokens is {new.sampling.max_tokens}; {new.decoder} needs "
                f"{num_rows} rows in a forward of at most {self.limits.decode_rows}; lower max_tokens or raise max_decode_rows"
            )

    def add(self, request: Request) -> None:
        """Queue up."""
        self._open[request] = None
        if request.new.decoder == "auto":
            self.undecided[request.arrival] = request
        else:
            self._enter_lane(request, request.new.decoder)

    def remove(self, request: Request) -> None:
        """The request is over, finished or not; its pages are free at the next `schedule` or `join`."""
        if request.state is not State.FINISHED:
            self._open.pop(request, None)
            request.state, request.saved = State.FINISHED, None
            self.undecided.pop(request.arrival, None)
            if request.is_seated:
                self._leaving.append(request)

    def schedule(self) -> Forward | None:
        """The next forward; None if there is nothing to do. Those before it must have ended."""
        self._clear_seats()
        self._num_passed = 0
        if self.num_open == 0:
            return None
        self._decide()
        for seats in list(self.lanes.values()):
            if seats.has_work:
                self._grow(seats)
                self._admit(seats)
                forward = self._forward(seats)
                if forward is not None:
                    return forward
        raise AssertionError(f"{self.num_open} requests are open and none can run; {self.paging.pool.num_free} pages are free")

    def launched(self, forward: Forward) -> None:
        """The forward is under way: its prompt rows will be in the cache."""
        forward.seats.launched()
        for piece in forward.pieces:
            forward.seats.prefilled(piece.request, piece.end - piece.first)
            self.paging.remember(piece.request)
        self.lanes.move_to_end(forward.seats.key)

    def goes_on(self, forward: Forward) -> bool:
        """Whether another forward may follow the one under way with the same requests: nobody leaves, joins or needs pages.

        A forward that waits for the host costs all who decode the host's time, an empty seat costs a share of a forward. So a few of
        either kind are passed over, a few times.
        """
        seats = forward.seats
        if self._is_shared(seats):
            return False
        num_left = sum(request.is_seated for request in self._leaving)
        num_seated = len(seats) - num_left
        num_places = (self.limits.num_seats if self.undecided else seats.num_seats) - num_seated
        num_idle = max(min(self.num_open - num_seated, num_places), num_left)
        if num_idle > 0 and (num_idle >= self.idle_share * num_seated or self._num_passed >= MOST_PASSED):
            return False
        self._num_passed += num_idle > 0
        return seats.can_go_on()

    def _is_shared(self, seats: Seats) -> bool:
        """Other lanes want their turn too."""
        return any(lane is not seats and lane.has_work for lane in self.lanes.values())

    def join(self, forward: Forward) -> Forward | None:
        """Seats for those who wait, while a forward is under way: the one that brings their prompts, beside those who go on.

        Those who have left let them have their seats. None if nobody joins. How many rows it has, `rows_ahead` or `rows_behind` says; if
        it is not launched, `unjoin` takes it back.
        """
        seats = forward.seats
        is_waiting = bool(self.undecided) or seats.next_waiting() is not None
        if not is_waiting or forward.brings or seats.key.diffusion is not None or self._is_shared(seats) or not seats.can_go_on():
            return None
        for request in self._leaving:
            if request not in seats.left:
                self.paging.pool.release(seats.give_up(request))
        self._admit(seats, is_under_way=True)
        self._leaving = [request for request in self._leaving if request.is_seated]
        if not seats.prefilling():
            return None
        self._num_passed = 0
        return self._forward(seats)

    def unjoin(self, forward: Forward) -> None:
        """A forward that `join` made was not launched; those who were to join keep their seats."""
        _unbegin_fresh(forward.seats)

    def rows_ahead(self, forward: Forward) -> int | None:
        """Decode rows of a forward that can follow whatever the one under way brings; None if there are not as many, or nobody for it.

        The forward is one that `goes_on`, or that `join` made.
        """
        num_rows = forward.seats.rows_ahead(forward.num_rows, forward.candidates) if forward.leads else None
        return num_rows if num_rows is not None and num_rows <= self.limits.decode_rows else None

    def rows_behind(self, forward: Forward, report: np.ndarray) -> tuple[int, int, bool] | None:
        """Lengths, decode rows and `leads` of what follows a report [B, R]; None if nobody is left, or rows do not suffice.

        The forward is one that `goes_on`, or that `join` made.
        """
        reports = forward.seats.reports_behind(report)
        rows = None if reports is None else self._rows(forward.seats, reports)
        return rows if rows is not None and rows[1] <= self.limits.decode_rows else None

    def failed(self, forward: Forward) -> bool:
        """Memory did not suffice for the forward, which changed nothing: make the next one smaller. False if it cannot be."""
        seats = forward.seats
        _unbegin_fresh(seats)
        seats.refresh_cached()
        if len(seats) == 1 and (forward.prompt is None or self.limits.prompt_rows == 1):
            self.limits = self._full_limits  # smaller ones were of no use
            seats.num_seats = max(self._seats_that_fit(seats.key), 1)
            return False
        if forward.prompt is not None and self.limits.prompt_rows > 1:
            self.limits = _with_fewer_prompt_rows(self.limits, len(forward.prompt.token_ids))
        if len(seats) > 1:
            seats.num_seats = len(seats) // 2
            for request in _youngest_first(seats.requests)[: len(seats) - seats.num_seats]:
                self._put_aside(seats, request)
        return True

    def reset(self) -> list[Request]:
        """Forget all requests and pages; returns the requests that were open."""
        open_requests = list(self._open)
        for request in open_requests:
            request.state, request.seat, request.pages = State.FINISHED, -1, []
        for seats in self.lanes.values():
            seats.clear()
        self.paging.reset()
        self.undecided.clear()
        self._leaving.clear()
        self._open.clear()
        self._blocked = None
        return open_requests

    def expected(self, key: LaneKey, num_requests: int, prompt_tokens: int, answer_tokens: int) -> tuple[Seats, Expected]:
        """The lane of such requests, and how much of a load of them it takes at once."""
        seats = self._lane(key)
        return seats, Expected(
            num_requests=min(num_requests, seats.num_seats),
            prompt_tokens=prompt_tokens,
            answer_tokens=answer_tokens,
            most_seats=self.limits.num_seats,
            prompt_rows=self.limits.prompt_rows,
            decode_rows=self.limits.decode_rows,
        )

    # ---- lanes ----

    def _enter_lane(self, request: Request, decoder: str) -> None:
        request.key = lane_key(request.new, decoder)
        self._lane(request.key).wait(request)

    def _lane(self, key: LaneKey) -> Seats:
        seats = self.lanes.get(key)
        if seats is None:
            self._drop_idle_lanes()
            experience = None if key.slots is None else self.candidates.experience(key.slots, key.width)
            seats = self.lanes[key] = Seats(key, self.runner.new_lane(key), max(self._seats_that_fit(key), 1), experience)
        return seats

    def _drop_idle_lanes(self) -> None:
        idle = [seats for seats in self.lanes.values() if not seats.has_work]
        for seats in idle[: max(len(self.lanes) + 1 - MOST_LANES, 0)]:
            self.runner.drop_lane(seats.lane)
            del self.lanes[seats.key]

    def _seats_that_fit(self, key: LaneKey) -> int:
        """Seats of a lane: rows of a forward suffice even if every seat verifies and plans a whole block.

        How many rows a request of a diffusion lane takes depends on its prompt; they are counted when it is to be seated.
        """
        if key.diffusion is not None:
            return self.limits.num_seats
        return min(self.limits.num_seats, self.limits.decode_rows // self._rows_each(key))

    def _rows_each(self, key: LaneKey) -> int:
        """Most rows of a seat that cannot do with fewer candidate lengths."""
        if key.slots is None:
            return 1
        return seat_rows(key.slots, key.width, key.slots.candidates() if self.batch_invariant else 0)

    def _decide(self) -> bool:
        """The first undecided request goes where it would be decoded fastest, once a seat there is free. False if nobody went.

        Asked before every forward while somebody waits, so what is cheap comes first.
        """
        if not self.undecided or sum(seats.num_present for seats in self.lanes.values()) >= self.limits.num_seats:
            return False
        request = next(iter(self.undecided.values()))
        key = lane_key(request.new, self.choose_decoder(request.new, min(self.num_open, self.limits.num_seats)))
        seats = self._lane(key)
        if seats.is_full or seats.next_waiting() is not None:
            return False
        del self.undecided[request.arrival]
        request.key = key
        seats.wait(request)
        return True

    # ---- seats and pages ----

    def _clear_seats(self) -> None:
        for request in self._leaving:
            if request.is_seated:
                assert request.key is not None, "who sits is in a lane"
                self.paging.pool.release(self.lanes[request.key].leave(request))
        self._leaving.clear()

    def _grow(self, seats: Seats) -> None:
        """Pages for all that the next forward may commit; the youngest requests make room if they must."""
        for request in seats.short_of_pages():
            while request.is_seated and not self.paging.extend(seats, request):
                victim = _youngest_first(each for lane in self.lanes.values() for each in lane.requests if each.pages)[0]
                assert victim.key is not None, "who sits is in a lane"
                self._put_aside(self.lanes[victim.key], victim)

    def _put_aside(self, seats: Seats, request: Request) -> None:
        """Preempt: a decoding request is saved, one that still waits for its prompt begins anew."""
        self.num_preempted += 1
        if seats.is_decoding[request.seat]:
            seats.save(request, self.runner)
            request.state = State.PREEMPTED
        else:
            request.state = State.WAITING
            request.num_prefilled = 0
        self.paging.pool.release(seats.leave(request))
        seats.wait(request)

    def _admit(self, seats: Seats, *, is_under_way: bool = False) -> None:
        """Seats for those who came first, while seats, pages and prompt rows last; while a forward is under way, not for the preempted."""
        if seats.is_full or (seats.next_waiting() is None and not self.undecided):
            return
        rows_left = self.limits.prompt_rows - sum(len(request.prefill_ids) - request.num_prefilled for request in seats.prefilling())
        while not seats.is_full and rows_left > 0:
            request = seats.next_waiting()
            if request is None:
                if not self._decide():
                    return
                continue
            if is_under_way and request.saved is not None:
                return
            has_rows = seats.has_rows_for(request, self.limits.decode_rows)
            if self._waits_behind(request) or not has_rows or not self._seat(seats, request):
                return
            if request.state is State.PREFILLING:
                rows_left -= len(request.prefill_ids) - request.num_prefilled

    def _waits_behind(self, request: Request) -> bool:
        """An older request of any lane waits for pages."""
        blocked = self._blocked
        if blocked is not None and (blocked.is_seated or blocked.state is State.FINISHED):
            blocked = self._blocked = None
        return blocked is not None and blocked.arrival < request.arrival

    def _seat(self, seats: Seats, request: Request) -> bool:
        """A seat and its pages; False if there are too few."""
        num_seated = sum(len(lane) for lane in self.lanes.values())  # a page is left to each of them, or they are soon put aside
        pages = self.paging.take(request, seats.key, seats.most_committed, num_seated)
        if pages is None:
            self._blocked = request
            return False
        seats.seat_next(self.runner, pages)
        return True

    # ---- the forward ----

    def _forward(self, seats: Seats) -> Forward | None:
        """Everybody who decodes, and prompt rows up to the limit; None if there is nobody."""
        if not seats.requests:
            return None
        pieces = self._prefill(seats) if seats.num_prefilling else []
        candidates, num_rows, leads = self._rows(seats, seats.reports[: len(seats)])
        return Forward(
            seats=seats,
            num_seats=min(seat_bucket(len(seats)), self.limits.num_seats),
            num_rows=num_rows,
            candidates=candidates,
            prompt=prompt_rows(pieces, self.runner.page_size) if pieces else None,
            pieces=pieces,
            leads=leads,
        )

    def _rows(self, seats: Seats, reports: np.ndarray) -> tuple[int, int, bool]:
        """For how many accepted lengths drafts are prepared, the decode rows, `Forward.leads`; fewer lengths if they do not fit."""
        if seats.experience is None:
            return 0, seats.num_rows(reports, 0), True
        chosen, leads = self.candidates.choose(seats.experience, len(seats))
        num_rows = seats.num_rows(reports, chosen)
        if num_rows <= self.limits.decode_rows:
            return chosen, num_rows, leads
        for candidates in seats.experience.ladder:
            if candidates < chosen and (num_rows := seats.num_rows(reports, candidates)) <= self.limits.decode_rows:
                return candidates, num_rows, False
        return 0, seats.num_rows(reports, 0), False

    def _prefill(self, seats: Seats) -> list[Piece]:
        """The prompt tokens of the forward; those whose prompt is whole by then take part."""
        most, prefilling = self.limits.prompt_rows, seats.prefilling()
        pieces = list(pieces_of(prefilling, most, whole_rows=most if self.batch_invariant else 1))
        to_come = {piece.request: piece.end for piece in pieces}
        for request in prefilling:
            if to_come.get(request, request.num_prefilled) == len(request.prefill_ids):
                seats.begin(request)
        return pieces


def _block(key: LaneKey) -> int:
    """Tokens of a block."""
    return key.width * (1 if key.slots is None else key.slots.slot_size)


def _unbegin_fresh(seats: Seats) -> None:
    for request in [request for request in seats.requests if seats.is_fresh[request.seat]]:
        seats.unbegin(request)


def _youngest_first(requests: "Iterator[Request] | list[Request]") -> list[Request]:
    return sorted(requests, key=lambda request: -request.arrival)


def _with_fewer_prompt_rows(limits: Limits, failed: int) -> Limits:
    return Limits(limits.num_seats, max(min(limits.prompt_rows, failed) // 2, 1), limits.decode_rows)
