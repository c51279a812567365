"""The engine: takes requests, runs forwards, hands out events and answers.

One forward is under way at any time. Its report is waited for, what follows is decided and launched, and only then is told what happened:
the host's slower work falls into the time in which the device computes.
"""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from refusion.decoding.events import Event
from refusion.decoding.rounds import NUM_FORWARDS, NUM_ROWS
from refusion.engine.auto import Auto
from refusion.engine.candidates import ChooseCandidates
from refusion.engine.requests import Answer, NewRequest, Request, State, final_tokens
from refusion.engine.runner import Pending, Runner
from refusion.engine.scheduler import Forward, Limits, Scheduler
from refusion.engine.seat_events import seat_events
from refusion.engine.seats import Seats
from refusion.errors import RequestError


@dataclass(frozen=True, slots=True)
class News:
    """What one forward did for one request, to be told."""

    request: Request
    seats: Seats
    report: np.ndarray | None  # [R], where somebody listens
    written: np.ndarray | None  # [N], where somebody listens or the request is done
    is_done: bool


class Engine:
    """Continuous batching of requests over one runner. Not thread-safe: one thread calls it."""

    def __init__(self, runner: Runner, limits: Limits, *, prefix_caching: bool, auto: Auto, choose_candidates: ChooseCandidates) -> None:
        self.runner, self.auto = runner, auto
        self.scheduler = Scheduler(runner, limits, prefix_caching=prefix_caching, choose_decoder=auto, choose_candidates=choose_candidates)
        self._under_way: tuple[Forward, Pending] | None = None
        self._news: deque[News] = deque()
        self._num_arrived = 0

    @property
    def has_work(self) -> bool:
        """Requests are open, or something is still to be told."""
        return self.scheduler.num_open > 0 or self._under_way is not None or bool(self._news)

    def check(self, new: NewRequest) -> None:
        """Raises `RequestError` if the request could never run, however empty the engine."""
        self.scheduler.check(new)

    def add(self, new: NewRequest) -> Request:
        """Take a request; its answer comes through `on_answer` in one of the next steps. Raises `RequestError` like `check`."""
        self.check(new)
        self._num_arrived += 1
        request = Request(new, self._num_arrived, np.array(new.prompt_ids, dtype=np.int32), asked_at=time.perf_counter())
        self.scheduler.add(request)
        return request

    def abort(self, request: Request) -> None:
        """Forget a request, wherever it is; nothing more is heard of it."""
        self.scheduler.remove(request)
        self._news = deque(news for news in self._news if news.request is not request)

    def step(self) -> None:
        """One forward further. What a callback raises comes out of here, and the engine can go on."""
        self._settle()
        self._launch()
        self._tell()

    def reset(self, error: RequestError | None = None) -> None:
        """Forget everything, as after an interruption that may have come at any place; open requests end with `error` if there is one."""
        self._under_way = None
        self._news.clear()
        for request in self.scheduler.reset():
            if error is not None:
                request.new.on_answer(_answer(request, [], error))

    # ---- the three parts of a step ----

    def _settle(self) -> None:
        """Wait for the forward under way and book what it did."""
        if self._under_way is None:
            return
        forward, pending = self._under_way
        report = pending.wait()
        self._under_way = None
        seats = forward.seats
        took_part = seats.is_decoding[: len(seats)].copy()
        settled = seats.settle(report)
        self._learn(forward, report, settled.num_tokens, took_part)
        for seat in np.flatnonzero(took_part).tolist():
            request, is_done = seats.requests[seat], bool(settled.is_done[seat])
            if request.state is State.FINISHED or not (is_done or request.has_listeners):
                continue
            request.num_forwards = int(report[seat, NUM_FORWARDS])
            report_row = report[seat] if request.has_listeners else None
            self._news.append(News(request, seats, report_row, seats.written[seat].copy(), is_done))
            if is_done:
                self.scheduler.remove(request)

    def _launch(self) -> None:
        """Launch the next forward, a smaller one if memory does not suffice."""
        while (forward := self.scheduler.schedule()) is not None:
            try:
                pending = self.runner.launch(
                    forward.seats.lane,
                    num_seats=forward.num_seats,
                    num_rows=forward.num_rows,
                    prompt=forward.prompt,
                    candidates=forward.candidates,
                )
            except RequestError as error:
                if not self.scheduler.failed(forward):
                    self._give_up(forward, error)
                continue
            self.scheduler.launched(forward)
            self._under_way = forward, pending
            return

    def _tell(self) -> None:
        """Hand out events and answers. Each piece of news is taken out first: a callback that raises is not called again for it."""
        while self._news:
            news = self._news.popleft()
            request = news.request
            assert news.written is not None, "news comes with what is written"
            if news.report is not None and request.new.on_event is not None:
                for event in seat_events(news.seats.lane.rounds.read(news.report), request.new.index):
                    request.new.on_event(event)
            find_stop = request.new.find_stop
            if not news.is_done and (find_stop is None or request.state is State.FINISHED):
                continue
            token_ids = final_tokens(news.written, request.new)
            kept = find_stop(token_ids) if find_stop is not None else None
            if news.is_done or kept is not None:
                self.scheduler.remove(request)
                self._finish(_answer(request, token_ids, kept=kept), request)

    def _finish(self, answer: Answer, request: Request) -> None:
        if request.new.on_event is not None:
            request.new.on_event(Event("finished", answer.request, answer.num_forwards, -1, 0, (), finish_reason=answer.finish_reason))
        request.new.on_answer(answer)

    def _give_up(self, forward: Forward, error: RequestError) -> None:
        """Nothing smaller is left to try: those in the forward end with the error."""
        for request in list(forward.seats.requests):
            written = forward.seats.written[request.seat].copy()
            self.scheduler.remove(request)
            request.new.on_answer(_answer(request, final_tokens(written, request.new), error))

    def _learn(self, forward: Forward, report: np.ndarray, num_tokens: int, took_part: np.ndarray) -> None:
        slots = forward.seats.key.slots
        if slots is not None and took_part.any():
            self.auto.learn(
                slots.slot_size,
                forward.candidates,
                num_requests=int(took_part.sum()),
                num_tokens=num_tokens,
                num_rows=int(report[: len(took_part), NUM_ROWS][took_part].sum()),
            )


def _answer(request: Request, token_ids: list[int], error: RequestError | None = None, *, kept: int | None = None) -> Answer:
    now = time.perf_counter()
    ends_in_eos = bool(token_ids) and token_ids[-1] in request.new.eos_ids
    return Answer(
        request=request.new.index,
        token_ids=token_ids if kept is None else token_ids[:kept],
        decoder=request.key.decoder if request.key is not None else request.new.decoder,
        is_stopped=ends_in_eos or kept is not None,
        num_generated=len(token_ids),
        num_forwards=request.num_forwards,
        seconds=now - (request.seated_at or now),
        first_token_seconds=(request.first_token_at or now) - request.asked_at,
        error=error,
    )
