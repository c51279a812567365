"""Runs a batch of requests from start to end: steps the decoder, takes out who is finished, watches stop strings and reports events."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refusion.decoding.autoregressive import AutoregressiveDecoder
from refusion.decoding.events import Event, step_events
from refusion.decoding.refusion import ReFusionDecoder, StepReport

# B = requests of the batch, P = longest prompt

Decoder = ReFusionDecoder | AutoregressiveDecoder
OnEvent = Callable[[Event], None]


class FindStop(Protocol):
    """Number of answer tokens to keep if a stop string has appeared, else None."""

    def __call__(self, token_ids: list[int], /) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished request of a batch."""

    request: int  # index in the whole call
    token_ids: list[int]
    is_stopped: bool  # by EOS, a stop id or a stop string; otherwise the length ran out
    num_generated: int  # tokens through the first EOS, before a stop string was cut off
    num_forwards: int
    seconds: float


def run_batch(
    decoder: Decoder,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    device: torch.device,
    first_request: int = 0,
    find_stop: FindStop | None = None,
    on_event: OnEvent | None = None,
) -> Iterator[Answer]:
    """Decode prompts together; answers come as they finish. Requests are numbered from `first_request`."""
    started = time.perf_counter()
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    decoder.start(_padded(prompts, device), lengths, torch.tensor(seeds, device=device))
    requests = list(range(len(prompts)))  # row of the batch -> prompt
    while requests:
        report = decoder.step()
        if on_event is not None:
            _emit(decoder, report, requests, first_request, on_event)
        is_done = decoder.is_done.tolist()  # one host synchronisation a forward: somebody has to notice the end
        finished = {row: None for row, done in enumerate(is_done) if done}
        if find_stop is not None:
            stops = {row: find_stop(decoder.answer(row)) for row in range(len(requests))}
            finished |= {row: stop for row, stop in stops.items() if stop is not None}
        for row, stop in finished.items():
            if requests[row] >= 0:
                answer = _answer(decoder, row, first_request + requests[row], stop, time.perf_counter() - started)
                requests[row] = -1  # delivered, still a row of the batch
                if on_event is not None:
                    event = Event("finished", answer.request, answer.num_forwards, -1, 0, (), finish_reason=_reason(answer))
                    on_event(event)
                yield answer
        requests = _compact(decoder, requests, device)


def _padded(prompts: list[list[int]], device: torch.device) -> Tensor:
    longest = max(len(prompt) for prompt in prompts)
    return torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)


def _answer(decoder: Decoder, row: int, request: int, stop: int | None, seconds: float) -> Answer:
    token_ids = decoder.answer(row)
    ends_in_eos = bool(token_ids) and token_ids[-1] in decoder.eos_ids.tolist()
    kept = token_ids if stop is None else token_ids[:stop]
    return Answer(request, kept, ends_in_eos or stop is not None, len(token_ids), int(decoder.num_forwards[row]), seconds)


def _reason(answer: Answer) -> str:
    return "stop" if answer.is_stopped else "length"


def _compact(decoder: Decoder, requests: list[int], device: torch.device) -> list[int]:
    """Drop delivered rows once they are half of the batch: moving the cache costs more than carrying a few idle rows."""
    going_on = [row for row, request in enumerate(requests) if request >= 0]
    if not going_on or len(going_on) > len(requests) // 2:
        return [] if not going_on else requests
    decoder.compact(torch.tensor(going_on, device=device))
    return [requests[row] for row in going_on]


def _emit(decoder: Decoder, report: StepReport | None, requests: list[int], first_request: int, on_event: OnEvent) -> None:
    if report is None:
        _emit_last_tokens(decoder, requests, first_request, on_event)
        return
    drafts = decoder.state.token_ids.tolist()
    forwards = decoder.num_forwards.tolist()
    for row, request in enumerate(requests):
        if request >= 0:
            for event in step_events(report, drafts[row], row, first_request + request, forwards[row]):
                on_event(event)


def _emit_last_tokens(decoder: Decoder, requests: list[int], first_request: int, on_event: OnEvent) -> None:
    """Autoregressive decoding in the same words: every token is a slot of one that is committed at once."""
    for row, request in enumerate(requests):
        if request >= 0:
            token_ids = decoder.answer(row)
            place = len(token_ids) - 1
            on_event(Event("committed", first_request + request, place + 1, place, place, (token_ids[place],)))
