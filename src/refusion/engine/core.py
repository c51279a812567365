"""The engine: takes requests, runs forwards, hands out events and answers.

A forward is under way at any time. Its report is waited for and glanced at, what follows is decided and launched, and only then is booked
and told what happened: the host's slower work falls into the time in which the device computes. Where its rows suffice whatever the
report says, the next forward is launched before the report is there.
"""

import time
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from refusion.decoding.events import Event, seat_events
from refusion.decoding.rounds import NUM_FORWARDS
from refusion.engine.auto import Auto
from refusion.engine.candidates import Candidates
from refusion.engine.requests import Answer, NewRequest, Request, State, final_tokens, lane_key
from refusion.engine.runner import Pending, Runner
from refusion.engine.scheduler import Forward, Limits, Scheduler
from refusion.engine.seats import Glance, Seats
from refusion.engine.warm_up import wanted_shapes
from refusion.errors import RequestError


@dataclass(frozen=True, slots=True)
class News:
    """What one forward did for one request, to be told."""

    request: Request
    seats: Seats
    report: np.ndarray | None  # [R], where somebody listens
    written: np.ndarray  # [N]
    is_done: bool


class Engine:
    """Continuous batching of requests over one runner. Not thread-safe: one thread calls it."""

    def __init__(
        self, runner: Runner, limits: Limits, *, prefix_caching: bool, auto: Auto, candidates: Candidates, batch_invariant: bool = False
    ) -> None:
        self.runner, self.auto = runner, auto
        self.scheduler = Scheduler(
            runner, limits, prefix_caching=prefix_caching, choose_decoder=auto, candidates=candidates, batch_invariant=batch_invariant
        )
        self._under_way: tuple[Forward, Pending] | None = None
        self._unbooked: tuple[Glance, list[int]] | None = None  # and the seats of which something is to be told
        self._unlearned: Glance | None = None  # booked, but experience does not know of it yet
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
        """One forward further. What a callback raises comes out of here, and the engine can go on; after anything else, `reset` it."""
        if self._under_way is not None:
            forward, pending = self._under_way
            following, report = self._follow(forward, pending)
            self._under_way = following
            self._glance(forward, report)
        if self._under_way is None:
            self._launch()
        self._book()
        self._tell()
        if self._under_way is not None:
            self._learn()

    def warm_up(self, new: NewRequest, *, num_requests: int, prompt_tokens: int) -> int:
        """Make ready what up to `num_requests` requests like this one need; returns how many forwards it took, 0 on a CPU.

        Raises `RequestError` while requests are open.
        """
        if self.scheduler.num_open:
            raise RequestError("the engine has requests to finish; warm it up before they come")
        while self.has_work:  # a forward without anybody in it may be under way, launched ahead of the report that ended the last request
            self.step()
        if not self.runner.is_cuda:
            return 0
        before = self.runner.num_first_runs
        for decoder in ("refusion", "autoregressive") if new.decoder == "auto" else (new.decoder,):
            seats, load = self.scheduler.expected(lane_key(new, decoder), num_requests, prompt_tokens, new.sampling.max_tokens)
            shapes = (
                self.runner.shape(seats.lane, wanted.num_seats, wanted.num_rows, wanted.num_prompt_rows, wanted.candidates, num_cached)
                for num_cached in (0, load.prompt_tokens + load.answer_tokens)
                for wanted in wanted_shapes(seats.key, self.scheduler.candidates, load)
            )
            self.runner.warm(seats.lane, shapes)
        return self.runner.num_first_runs - before

    def reset(self, error: RequestError | None = None) -> None:
        """Forget everything, as after an interruption that may have come at any place; open requests end with `error` if there is one."""
        self.runner.synchronize()
        self._under_way = None
        if error is not None:
            self._book()
            for news in self._news:
                if news.is_done:
                    self.scheduler.remove(news.request)
                    news.request.new.on_answer(_answer(news.request, final_tokens(news.written, news.request.new)))
        self._unbooked = self._unlearned = None
        self._news.clear()
        for request in self.scheduler.reset():
            if error is not None:
                request.new.on_answer(_answer(request, [], error))

    # ---- the parts of a step ----

    def _follow(self, forward: Forward, pending: Pending) -> tuple[tuple[Forward, Pending] | None, np.ndarray]:
        """The report of the forward under way, and the one launched behind it, before or after the report, if all that takes is known."""
        scheduler = self.scheduler
        if not self.runner.runs_ahead:
            return None, pending.wait()
        after = _without_prompt(forward) if scheduler.goes_on(forward) else scheduler.join(forward)
        if after is None:
            return None, pending.wait()
        num_rows = scheduler.rows_ahead(after)
        following = None if num_rows is None else self._launch_behind(after, num_rows, after.candidates, after.leads)
        report = pending.wait()
        if following is None and (rows := scheduler.rows_behind(after, report)) is not None:
            candidates, num_rows, leads = rows
            following = self._launch_behind(after, num_rows, candidates, leads)
        if following is None and after.brings:
            scheduler.unjoin(after)
        return following, report

    def _launch_behind(self, after: Forward, num_rows: int, candidates: int, leads: bool) -> tuple[Forward, Pending] | None:
        """Launch `after`, with rows of its own, while or right after another one is under way; None if its shape is not ready."""
        pending = self.runner.launch_again(
            after.seats.lane,
            num_seats=after.num_seats,
            num_rows=num_rows,
            prompt=after.prompt,
            candidates=candidates,
            uploads=after.brings,
        )
        if pending is None:
            return None
        forward = replace(after, num_rows=num_rows, candidates=candidates, leads=leads)
        self.scheduler.launched(forward)
        return forward, pending

    def _glance(self, forward: Forward, report: np.ndarray) -> None:
        """Take from a report what the next forward depends on."""
        glance = forward.seats.glance(report)
        is_told = glance.is_done | (forward.seats.has_listeners[: len(glance.requests)] & glance.took_part)
        told = [seat for seat in is_told.nonzero()[0].tolist() if glance.requests[seat].state is not State.FINISHED]
        self._unbooked = glance, told  # before anybody is removed: what is interrupted from here on is still told by `reset`
        for seat in told:
            if glance.is_done[seat]:
                self.scheduler.remove(glance.requests[seat])

    def _book(self) -> None:
        """Write down what the last forward brought, and what there is to tell of it."""
        if self._unbooked is None:
            return
        glance, told = self._unbooked
        seats = glance.seats
        seats.book()
        news: list[News] = []
        for seat in told:
            request = glance.requests[seat]
            request.num_forwards = int(glance.report[seat, NUM_FORWARDS])
            report = glance.report[seat] if request.has_listeners else None
            news.append(News(request, seats, report, seats.written[glance.lines[seat]].copy(), bool(glance.is_done[seat])))
        self._unbooked = None
        self._news.extend(news)
        self._learn()
        self._unlearned = glance

    def _learn(self) -> None:
        """Remember what the last forward took and brought: when the device is busy, not between an answer and the next question."""
        glance, self._unlearned = self._unlearned, None
        if glance is not None:
            glance.seats.learn(glance)

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
                self._book()
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
            written = forward.seats.written[forward.seats.line[request.seat]].copy()
            self.scheduler.remove(request)
            request.new.on_answer(_answer(request, final_tokens(written, request.new), error))


def _without_prompt(forward: Forward) -> Forward:
    """The same requests once more."""
    return replace(forward, prompt=None, pieces=[], brings=False)


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
