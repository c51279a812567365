"""The engine on a thread of its own, for a server: many coroutines wait for pieces of their answers, one thread runs the forwards.

The thread alone touches the engine. Coroutines leave it errands (add, abort) and are woken through their own event loop.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol

from refusion.decoding.diffusion_params import DiffusionParams
from refusion.decoding.events import Event
from refusion.decoding.params import SamplingParams, SlotParams
from refusion.engine.core import Engine
from refusion.engine.outputs import Piece, RequestOutput
from refusion.engine.requests import Answer, NewRequest, Request
from refusion.engine.stream import AnswerStream
from refusion.errors import RequestError

Prompt = str | list[int] | list[dict[str, str]]


class Front(Protocol):
    """The part of `refusion.LLM` that is needed here."""

    @property
    def engine(self) -> Engine: ...

    def new_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        slots: SlotParams | None = None,
        decoder: str = "refusion",
        *,
        diffusion: DiffusionParams | None = None,
    ) -> NewRequest: ...

    def new_stream(self, new: NewRequest) -> AnswerStream | None: ...

    def to_output(self, new: NewRequest, answer: Answer) -> RequestOutput: ...


@dataclass(eq=False, slots=True)
class _Consumer:
    """A coroutine that waits for an answer."""

    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[Piece | BaseException]" = field(default_factory=asyncio.Queue)
    request: Request | None = None
    is_gone: bool = False

    def post(self, item: Piece | BaseException) -> None:
        """Wake the coroutine, from the engine's thread; a loop that is closed has nobody left to wake."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:
            self.is_gone = True


class AsyncEngine:
    """`async for piece in engine.generate(prompt): ...` for any number of coroutines; leave it with `await engine.close()`.

    While it is open, the LLM it stands on must not be called from elsewhere.
    """

    def __init__(self, llm: Front) -> None:
        self._llm = llm
        self._errands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._is_closing = False
        self._consumers: set[_Consumer] = set()
        self._thread = threading.Thread(target=self._run, name="refusion-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        slots: SlotParams | None = None,
        decoder: str = "refusion",
        *,
        diffusion: DiffusionParams | None = None,
    ) -> AsyncIterator[Piece]:
        """Pieces of text as they become certain; the last one carries the whole answer.

        Cancelling the coroutine, or leaving the loop, aborts the request. Raises `RequestError` if the prompt cannot be served.
        """
        consumer = _Consumer(asyncio.get_running_loop())
        new = self._llm.new_request(prompt, sampling, slots, decoder, diffusion=diffusion)
        self._leave_errand(lambda: self._add(consumer, new))
        try:
            while True:
                item = await consumer.queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.output is not None:
                    return
        finally:
            consumer.is_gone = True
            if not self._is_closing:
                self._leave_errand(lambda: self._drop(consumer))

    async def close(self) -> None:
        """End the thread after the forward under way; coroutines that still wait get a `RequestError`."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def _leave_errand(self, errand: Callable[[], None]) -> None:
        """Something the engine's thread is to do before its next forward."""
        with self._wake:
            if self._is_closing:
                raise RequestError("the engine is closed; make a new AsyncEngine")
            self._errands.append(errand)
            self._wake.notify()

    # ---- on the engine's thread ----

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                while self._errands:
                    self._errands.popleft()()
                if self._engine_has_work():
                    self._llm.engine.step()
            except Exception as error:  # whatever it is, those who wait must hear of it
                self._end_all(error)
        while self._errands:  # who came too late hears of it as well
            self._errands.popleft()()
        self._end_all(RequestError("the engine was closed before the answer was finished"))

    def _engine_has_work(self) -> bool:
        return bool(self._consumers) and self._llm.engine.has_work

    def _wait_for_work(self) -> bool:
        """False: time to end."""
        with self._wake:
            while not (self._is_closing or self._errands or self._engine_has_work()):
                self._wake.wait()
            return not self._is_closing

    def _add(self, consumer: _Consumer, new: NewRequest) -> None:
        if consumer.is_gone:
            return
        stream = self._llm.new_stream(new)

        def on_event(event: Event) -> None:
            if stream is not None and (text := stream.push(event)):
                consumer.post(Piece(text))
                if consumer.is_gone:
                    self._drop(consumer)

        def on_answer(answer: Answer) -> None:
            self._consumers.discard(consumer)
            consumer.post(answer.error or Piece("", self._llm.to_output(new, answer)))

        try:
            consumer.request = self._llm.engine.add(replace(new, on_event=on_event, on_answer=on_answer))
        except Exception as error:  # it belongs to this consumer, who must hear of it
            consumer.post(error)
        else:
            self._consumers.add(consumer)

    def _drop(self, consumer: _Consumer) -> None:
        if consumer in self._consumers and consumer.request is not None:
            self._consumers.discard(consumer)
            self._llm.engine.abort(consumer.request)

    def _end_all(self, error: Exception) -> None:
        if not self._consumers:
            return
        self._llm.engine.reset()
        for consumer in self._consumers:
            consumer.post(error)
        self._consumers.clear()
