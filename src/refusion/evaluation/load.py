"""Decoders under load: the same prompts for everyone, so many at a time, and what that took.

Closed loop: `concurrency` requests run at any time, the next one starts when one ends. Alone, decoders take turns prompt by prompt, so that
a slow minute hits all of them. What is measured and how figures are made of it is here; which models and prompts, and where the figures
go, is up to the caller.

Host share: 1 - (time between the CUDA events around the device work of every forward) / (wall clock of the same run).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from refusion.evaluation.results import Figure, Run
from refusion.evaluation.statistics import Interval, pooled_ratio
from refusion.llm import LLM, Prompt, RequestOutput, SamplingParams, SlotParams

MOST_PROMPTS = 4096
"""Of a timed run: enough for every interval, whatever the machine."""


@dataclass(slots=True)
class Load:
    """What one decoder did at one concurrency."""

    outputs: list[RequestOutput] = field(default_factory=list)
    seconds: float = 0.0
    device_ms: list[float] = field(default_factory=list)
    """Device time of every forward; empty where the engine has no events."""
    num_first_runs: int = 0
    """Forwards that had to be compiled or captured."""
    prepared_lengths: list[int] = field(default_factory=list)
    """For how many accepted lengths every forward of slot decoding prepared drafts: the engine's choice, which may change on the way."""

    def add(self, other: Load) -> None:
        """Count what another load did as done here too."""
        self.outputs += other.outputs
        self.seconds += other.seconds
        self.device_ms += other.device_ms
        self.num_first_runs += other.num_first_runs
        self.prepared_lengths += other.prepared_lengths

    @property
    def prepared_figures(self) -> dict[str, Figure]:
        """Mean over forwards, and the last one; nothing without slots."""
        lengths = self.prepared_lengths
        return {"prepared_lengths": statistics.fmean(lengths), "prepared_lengths_last": lengths[-1]} if lengths else {}

    @property
    def num_tokens(self) -> int:
        return sum(out.stats.num_tokens for out in self.outputs)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Server:
    """A model with the settings that all requests share."""

    llm: LLM
    slots: SlotParams
    sampling: SamplingParams
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further settings that `LLM.generate` takes of the decoder."""

    def serve(self, load: Load, decoder: str, prompts: Sequence[Prompt], concurrency: int) -> None:
        """Answer the prompts and add what it took to `load`."""
        before = self.llm.engine.runner.num_first_runs
        with device_times(self.llm) as device_ms, prepared_lengths(self.llm) as lengths:
            started = time.perf_counter()
            load.outputs += self.llm.generate(list(prompts), self.sampling, self.slots, decoder, batch_size=concurrency, **self.options)
            self.llm.engine.runner.synchronize()  # a forward launched ahead of the last report is part of the price
            load.seconds += time.perf_counter() - started
        load.device_ms += device_ms
        load.prepared_lengths += lengths
        load.num_first_runs += self.llm.engine.runner.num_first_runs - before

    def serve_for(self, load: Load, decoder: str, prompts: Sequence[Prompt], concurrency: int, seconds: float) -> None:
        """One round of prompts, and then as many as fit into the rest of the time, all at once; the prompts are used again as needed."""
        began = time.perf_counter()
        first = Load()
        self.serve(first, decoder, cycled(prompts, concurrency), concurrency)
        taken = time.perf_counter() - began
        more = min(int((seconds - taken) / taken) * concurrency, MOST_PROMPTS)
        if more > 0:  # the first round ended with empty seats, so it does not count beside a long run
            first = Load(num_first_runs=first.num_first_runs)
            self.serve(first, decoder, cycled(prompts, more), concurrency)
        load.add(first)

    def warm_up(self, decoders: Sequence[str], longest: int, concurrency: int) -> None:
        """Make every shape ready that prompts of up to `longest` tokens can need."""
        named = dict.fromkeys(
            name for decoder in decoders for name in (("refusion", "autoregressive") if decoder == "auto" else (decoder,))
        )
        sizes = {"batch_size": concurrency, "prompt_tokens": longest}
        self.llm.warm_up(tuple(named), sampling=self.sampling, slots=self.slots, **sizes, **self.options)


def take_turns(contenders: Sequence[Callable[[Sequence[Prompt]], None]], prompts: Sequence[Prompt]) -> None:
    """One prompt after the other, answered by everyone, who begins changing each time."""
    for turn, prompt in enumerate(prompts):
        for place in range(len(contenders)):
            contenders[(turn + place) % len(contenders)]([prompt])


def cycled(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of them, from the beginning again where there are fewer."""
    return list(itertools.islice(itertools.cycle(prompts), count))


@contextmanager
def device_times(llm: LLM) -> Iterator[list[float]]:
    """Collects the milliseconds of device work of every forward inside; nothing where the engine runs on a CPU."""
    found: list[float] = []
    runner = llm.engine.runner
    if llm.model.device.type != "cuda":
        yield found
        return
    runner.timings = []
    try:
        yield found
        torch.cuda.synchronize()
        found += [before.elapsed_time(after) for before, after in runner.timings]
    finally:
        runner.timings = None


@contextmanager
def prepared_lengths(llm: LLM) -> Iterator[list[int]]:
    """Collects for how many accepted lengths every forward of slot decoding inside prepares drafts."""
    found: list[int] = []
    llm.engine.runner.prepared_lengths = found
    try:
        yield found
    finally:
        llm.engine.runner.prepared_lengths = None


def run_of(decoder: str, load: Load, concurrency: int) -> Run:
    """Speeds, waits and costs of a load. An interval of `tokens_per_second_request` is median and quartiles over requests."""
    speeds = sorted(out.stats.tokens_per_second for out in load.outputs)
    latencies = sorted(out.stats.seconds for out in load.outputs)
    waits = sorted(out.stats.first_token_seconds for out in load.outputs)
    num_forwards = [out.stats.num_forwards for out in load.outputs]
    figures: dict[str, Figure] = {
        "tokens_per_second": load.tokens_per_second,
        "tokens_per_second_request": Interval(statistics.median(speeds), quantile(speeds, 0.25), quantile(speeds, 0.75)),
        "tokens_per_forward": pooled_ratio([out.stats.num_tokens for out in load.outputs], num_forwards),
        "first_token_ms_p50": 1000 * quantile(waits, 0.5),
        "first_token_ms_p99": 1000 * quantile(waits, 0.99),
        "latency_seconds_p50": quantile(latencies, 0.5),
        "latency_seconds_p99": quantile(latencies, 0.99),
        "num_requests": len(load.outputs),
        "num_tokens": load.num_tokens,
        "seconds": load.seconds,
        **load.prepared_figures,
    }
    if load.device_ms:
        figures["ms_per_forward"] = 1000 * load.seconds / len(load.device_ms)
        figures["device_ms_per_forward"] = sum(load.device_ms) / len(load.device_ms)
        figures["num_first_runs"] = load.num_first_runs
        figures["host_share"] = 1 - sum(load.device_ms) / (1000 * load.seconds)
    elif concurrency == 1:
        figures["ms_per_forward"] = 1000 * load.seconds / sum(num_forwards)
    return Run(label=f"{decoder} at {concurrency}", settings={"decoder": decoder, "concurrency": concurrency}, figures=figures)


def comparison(loads: dict[str, Load], concurrency: int) -> Run:
    """Speeds over one another: every decoder over one token at a time, `auto` over the better of the others."""
    speed = {decoder: load.tokens_per_second for decoder, load in loads.items()}
    figures: dict[str, Figure] = {}
    if "autoregressive" in loads:
        of_requests = {name: statistics.median(out.stats.tokens_per_second for out in load.outputs) for name, load in loads.items()}
        for name in loads.keys() - {"autoregressive", "auto"}:
            figures[f"{name}_over_autoregressive"] = speed[name] / speed["autoregressive"]
            figures[f"{name}_over_autoregressive_median"] = of_requests[name] / of_requests["autoregressive"]
    others = [value for decoder, value in speed.items() if decoder != "auto"]
    if "auto" in speed and others:
        figures["auto_over_better"] = speed["auto"] / max(others)
    return Run(label=f"compared at {concurrency}", settings={"concurrency": concurrency}, figures=dict(sorted(figures.items())))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -(-int(1e6 * share) * len(ordered) // 10**6) - 1))]
