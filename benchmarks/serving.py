"""The engine under load: tokens per second, latency and time to the first token at growing concurrency, every decoder in one table.

    python benchmarks/serving.py --device cuda --data heldout.jsonl.gz
    python benchmarks/serving.py --device cuda --carrier --concurrency 1 --decoders autoregressive refusion --kind tasks --data tasks.jsonl

Closed loop: as many requests as the concurrency says run at any time, the next one starts when one ends. Latency counts from the moment a
request starts to run. At concurrency 1 the decoders take turns request by request, so that a slow minute hits all of them. Before it is
timed, every decoder is warmed up and serves some requests that do not count: what has to be compiled, captured or measured is by then.
`num_first_runs` says how many timed forwards nevertheless were of a shape that was not ready; on a GPU it should be 0, or the speed is too
low. Prefixes are not cached, so nobody finds a prompt that another decoder has prefilled. `refusion.evaluation.load` does the measuring.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import carrier
import harness

from refusion import SamplingParams
from refusion.evaluation.load import Load, Server, comparison, cycled, run_of, take_turns
from refusion.evaluation.results import Run, to_plain
from refusion.llm import DECODERS, DIFFUSION, EngineSettings
from refusion.synthesis.predictable import HELD_OUT_SEED, make

LEAST_WARM_UP = 12
"""Requests, so that also at concurrency 1 every shape of a forward has been met."""


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
    settings = {"carrier": args.carrier, "kind": args.kind, "slots": asdict(llm.resolve_slots(setting.slots))}
    settings |= {"data": args.data or args.kind, "requests": args.requests, "num_prompts": len(rows)}
    with harness.written_at_any_end(partial(harness.finish, args, "serving", llm, runs, **settings), runs):
        for concurrency in args.concurrency:
            count = min(args.requests, args.requests_per_concurrency * concurrency)
            warm_up = args.warm_up or max(2 * concurrency, LEAST_WARM_UP)
            loads = loads_at(server, args.decoders, cycled(prompts, count), concurrency, warm_up)
            runs += [shown(run_of(decoder, load, concurrency)) for decoder, load in loads.items()]
            if len(loads) > 1:
                runs.append(shown(comparison(loads, concurrency)))


def prompt_rows(kind: str, data: Path | None, limit: int | None) -> list[Any]:
    if data is None and kind == "tasks":
        return harness.select(make(HELD_OUT_SEED, limit or 512), None, limit)
    return harness.rows_of(data or harness.chat_prompts(), limit=limit)


def loads_at(server: Server, decoders: Sequence[str], prompts: Sequence[Any], concurrency: int, warm_up: int) -> dict[str, Load]:
    """Every decoder on the same prompts; alone in turns, else one after the other."""
    loads, longest = {decoder: Load() for decoder in decoders}, max(map(len, prompts))
    server.warm_up(decoders, longest, concurrency)
    for decoder in decoders:
        server.serve(Load(), decoder, cycled(prompts, warm_up), concurrency)
    server.warm_up(decoders, longest, concurrency)  # by now experience may have changed what is prepared
    if concurrency > 1:
        for decoder, load in loads.items():
            server.serve(load, decoder, prompts, concurrency)
        return loads
    take_turns([partial(server.serve, load, decoder, concurrency=1) for decoder, load in loads.items()], prompts)
    return loads


def shown(run: Run) -> Run:
    print(json.dumps({"label": run.label} | to_plain(run.figures)), file=sys.stdout, flush=True)
    return run


if __name__ == "__main__":
    harness.script(main)
