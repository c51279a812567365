"""The engine under load: tokens per second, latency and time to the first token at growing concurrency, every decoder in one table.

    python benchmarks/serving.py --device cuda --data heldout.jsonl.gz
    python benchmarks/serving.py --device cuda --carrier --concurrency 1 --decoders autoregressive refusion --kind tasks --data tasks.jsonl

Closed loop: as many requests as the concurrency says run at any time, the next one starts when one ends. Latency counts from the moment a
request starts to run. At concurrency 1 the decoders take turns request by request, so that a slow minute hits all of them. Before it is
timed, every decoder is warmed up and serves some requests that do not count: what has to be compiled, captured or measured is by then.
`num_first_runs` says how many timed forwards nevertheless were of a shape that was not ready; on a GPU it should be 0, or the speed is too
low. Prefixes are not cached, so nobody finds a prompt that another decoder has prefilled.

Host share: 1 - (time between the CUDA events around the device work of every forward) / (wall clock of the same run).
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import carrier
import harness
import torch

from refusion import LLM, SamplingParams, SlotParams
from refusion.evaluation.results import Figure, Run, to_plain
from refusion.evaluation.statistics import Interval, pooled_ratio
from refusion.llm import DECODERS, DIFFUSION, EngineSettings, RequestOutput
from refusion.synthesis.predictable import HELD_OUT_SEED, make

LEAST_WARM_UP = 12
"""Requests, so that also at concurrency 1 every shape of a forward has been met."""


@dataclass(slots=True)
class Load:
    """What one decoder did at one concurrency."""

    outputs: list[RequestOutput] = field(default_factory=list)
    seconds: float = 0.0
    device_ms: list[float] = field(default_factory=list)
    """Device time of every forward; empty where the engine has no events."""
    num_first_runs: int = 0
    """Forwards that had to be compiled or captured."""

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

    def serve(self, load: Load, decoder: str, prompts: Sequence[Any], concurrency: int) -> None:
        """Answer the prompts and add what it took to `load`."""
        before = self.llm.engine.runner.num_first_runs
        with device_times(self.llm) as device_ms:
            started = time.perf_counter()
            load.outputs += self.llm.generate(list(prompts), self.sampling, self.slots, decoder, batch_size=concurrency)
            self.llm.engine.runner.synchronize()  # a forward launched ahead of the last report is part of the price
            load.seconds += time.perf_counter() - started
        load.device_ms += device_ms
        load.num_first_runs += self.llm.engine.runner.num_first_runs - before

    def warm_up(self, decoders: Sequence[str], prompts: Sequence[list[int]], concurrency: int) -> None:
        """Make every shape ready that these prompts can need."""
        named = [decoder for decoder in ("refusion", "autoregressive") if decoder in decoders or "auto" in decoders]
        longest = max(map(len, prompts))
        self.llm.warm_up(named, batch_size=concurrency, sampling=self.sampling, slots=self.slots, prompt_tokens=longest)


def main() -> None:
    parser = harness.parser("Tokens per second under load.", output="serving.json")
    parser.add_argument("--kind", default="chat", choices=["chat", "tasks"], help="what the requests are")
    parser.add_argument("--data", type=Path, default=None, help="JSONL rows with `query`; by default the held-out ones of the kind")
    parser.add_argument("--decoders", nargs="+", default=[name for name in DECODERS if name not in DIFFUSION], choices=DECODERS)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32, 128], help="requests that run together")
    parser.add_argument("--requests", type=int, default=512, help="requests at each concurrency, at most; prompts are used again if fewer")
    parser.add_argument("--requests-per-concurrency", type=int, default=64, help="the same, times the concurrency")
    parser.add_argument(
        "--warm-up", type=int, default=None, help=f"requests before anything is timed; by default two per place, at least {LEAST_WARM_UP}"
    )
    carrier.add_flag(parser)
    args = parser.parse_args()
    llm = carrier.load(args, EngineSettings(max_num_seqs=max(args.concurrency), prefix_caching=False))
    (setting,) = harness.settings(args)
    server = Server(llm, setting.slots, SamplingParams(max_tokens=args.max_tokens))
    rows = prompt_rows(args.kind, args.data, args.limit)
    prompts = [llm.encode(harness.chat(row["query"])) for row in rows]
    runs: list[Run] = []
    for concurrency in args.concurrency:
        count = min(args.requests, args.requests_per_concurrency * concurrency)
        loads = loads_at(server, args.decoders, cycled(prompts, count), concurrency, args.warm_up or max(2 * concurrency, LEAST_WARM_UP))
        runs += [run_of(decoder, load, concurrency) for decoder, load in loads.items()]
        if len(loads) > 1:
            runs.append(comparison(loads, concurrency))
    settings = {"carrier": args.carrier, "kind": args.kind, "slots": asdict(setting.slots.resolve(llm.recommended))}
    data = args.data or args.kind
    harness.finish(args, "serving", llm, runs, **settings, data=data, requests=args.requests, num_prompts=len(rows))


def prompt_rows(kind: str, data: Path | None, limit: int | None) -> list[Any]:
    if data is None and kind == "tasks":
        return harness.select(make(HELD_OUT_SEED, limit or 512), None, limit)
    return harness.rows_of(data or harness.chat_prompts(), limit=limit)


def cycled(prompts: Sequence[Any], count: int) -> list[Any]:
    return list(itertools.islice(itertools.cycle(prompts), count))


def loads_at(server: Server, decoders: Sequence[str], prompts: Sequence[Any], concurrency: int, warm_up: int) -> dict[str, Load]:
    """Every decoder on the same prompts; alone in turns, else one after the other."""
    loads = {decoder: Load() for decoder in decoders}
    server.warm_up(decoders, prompts, concurrency)
    for decoder in decoders:
        server.serve(Load(), decoder, cycled(prompts, warm_up), concurrency)
    server.warm_up(decoders, prompts, concurrency)  # by now experience may have changed what is prepared
    if concurrency > 1:
        for decoder, load in loads.items():
            server.serve(load, decoder, prompts, concurrency)
        return loads
    for turn, prompt in enumerate(prompts):
        for place in range(len(decoders)):  # who begins changes each time
            decoder = decoders[(turn + place) % len(decoders)]
            server.serve(loads[decoder], decoder, [prompt], 1)
    return loads


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


def run_of(decoder: str, load: Load, concurrency: int) -> Run:
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
    }
    if load.device_ms:
        figures["ms_per_forward"] = 1000 * load.seconds / len(load.device_ms)
        figures["device_ms_per_forward"] = sum(load.device_ms) / len(load.device_ms)
        figures["num_first_runs"] = load.num_first_runs
        figures["host_share"] = 1 - sum(load.device_ms) / (1000 * load.seconds)
    elif concurrency == 1:
        figures["ms_per_forward"] = 1000 * load.seconds / sum(num_forwards)
    return shown(Run(label=f"{decoder} at {concurrency}", settings={"decoder": decoder, "concurrency": concurrency}, figures=figures))


def comparison(loads: dict[str, Load], concurrency: int) -> Run:
    """Speeds over one another: slots over one token at a time, `auto` over the better of the two."""
    speed = {decoder: load.tokens_per_second for decoder, load in loads.items()}
    figures: dict[str, Figure] = {}
    if {"refusion", "autoregressive"} <= speed.keys():
        medians = [statistics.median(out.stats.tokens_per_second for out in loads[name].outputs) for name in ("refusion", "autoregressive")]
        figures["refusion_over_autoregressive"] = speed["refusion"] / speed["autoregressive"]
        figures["refusion_over_autoregressive_median"] = medians[0] / medians[1]
    others = [value for decoder, value in speed.items() if decoder != "auto"]
    if "auto" in speed and others:
        figures["auto_over_better"] = speed["auto"] / max(others)
    return shown(Run(label=f"compared at {concurrency}", settings={"concurrency": concurrency}, figures=figures))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -(-int(1e6 * share) * len(ordered) // 10**6) - 1))]


def shown(run: Run) -> Run:
    print(json.dumps({"label": run.label} | to_plain(run.figures)), file=sys.stdout, flush=True)
    return run


if __name__ == "__main__":
    harness.script(main)
