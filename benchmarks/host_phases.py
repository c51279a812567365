"""Where the host's time goes while one request after the other is answered: milliseconds an answer by function of the engine.

    python benchmarks/host_phases.py --device cuda --kind tasks --data tasks_heldout.jsonl.gz --limit 60
    python benchmarks/host_phases.py --limit 3 --max-tokens 16       # a dry run on a CPU, where forwards count as host

Prompts are messages, so that template and tokens count, and answered one at a time: first as they are, then once more with a timer around
each function below. Times are inclusive, and much of what they count happens while the device is busy: what stands between the last report
of an answer and the first launch of the next is what an answer costs, and `host_ms_per_answer`, without timers, says how much it is in all.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import carrier
import harness
from serving import LEAST_WARM_UP, prompt_rows, shown

from refusion import LLM, SamplingParams
from refusion.engine.core import Engine
from refusion.engine.runner import Runner
from refusion.engine.scheduler import Scheduler
from refusion.evaluation.load import Load, Server, cycled
from refusion.evaluation.results import Run
from refusion.llm import DECODERS, DIFFUSION, EngineSettings, Prompt

TIMED = {
    LLM: ("generate", "new_request", "to_output"),
    Engine: ("add", "step", "_follow", "_glance", "_launch", "_launch_behind", "_book", "_tell", "_learn"),
    Scheduler: ("schedule", "add", "remove", "goes_on", "join", "rows_ahead", "rows_behind", "launched"),
    Runner: ("launch", "launch_again", "synchronize"),
}


def main() -> None:
    parser = harness.parser("Milliseconds of the host by function.", output="host-phases.json", max_tokens=128)
    parser.add_argument("--kind", default="chat", choices=["chat", "tasks"], help="what the requests are")
    parser.add_argument("--data", type=Path, default=None, help="JSONL rows with `query`; by default the held-out ones of the kind")
    parser.add_argument("--decoders", nargs="+", default=["refusion"], choices=[name for name in DECODERS if name not in DIFFUSION])
    carrier.add_flag(parser)
    args = parser.parse_args()
    llm = carrier.load(args, EngineSettings(max_num_seqs=1, prefix_caching=False))
    (setting,) = harness.settings(args)
    server = Server(llm, setting.slots, SamplingParams(max_tokens=args.max_tokens))
    prompts = [harness.chat(row["query"]) for row in prompt_rows(args.kind, args.data, args.limit)]
    runs: list[Run] = []
    write = partial(harness.finish, args, "host-phases", llm, runs, kind=args.kind, data=args.data or args.kind, num_prompts=len(prompts))
    with harness.written_at_any_end(write, runs):
        for decoder in args.decoders:
            server.warm_up([decoder], max(len(llm.encode(prompt)) for prompt in prompts), 1)
            one_by_one(server, decoder, cycled(prompts, LEAST_WARM_UP))
            runs.append(shown(measured(server, decoder, prompts)))


def measured(server: Server, decoder: str, prompts: Sequence[Prompt]) -> Run:
    """Wall clock and device without timers, and what each function took with them."""
    plain = one_by_one(server, decoder, prompts)
    with timers() as (seconds, calls):
        one_by_one(server, decoder, prompts)
    count, device = len(prompts), sum(plain.device_ms)
    figures = {
        "host_ms_per_answer": (1000 * plain.seconds - device) / count,
        "host_share": 1 - device / (1000 * plain.seconds),
        "forwards_per_answer": len(plain.device_ms) / count,
        "ms_per_answer": 1000 * plain.seconds / count,
    }
    series = {
        "ms_per_answer": {name: 1000 * seconds[name] / count for name in sorted(seconds, key=lambda name: -seconds[name])},
        "calls_per_answer": {name: number / count for name, number in calls.most_common()},
    }
    return Run(label=decoder, settings={"decoder": decoder}, figures=figures, series=series)


def one_by_one(server: Server, decoder: str, prompts: Sequence[Prompt]) -> Load:
    load = Load()
    for prompt in prompts:
        server.serve(load, decoder, [prompt], 1)
    return load


@contextmanager
def timers() -> Iterator[tuple[dict[str, float], Counter[str]]]:
    """Inside, every call of a TIMED function counts: inclusive seconds and calls by "Class.function"."""
    seconds: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()

    def timed(owner: type, name: str) -> object:
        plain = getattr(owner, name)

        def call(*args: object, **settings: object) -> object:
            began = time.perf_counter()
            try:
                return plain(*args, **settings)
            finally:
                seconds[f"{owner.__name__}.{name}"] += time.perf_counter() - began
                calls[f"{owner.__name__}.{name}"] += 1

        return call

    with ExitStack() as stack:
        for owner, names in TIMED.items():
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, timed(owner, name)))
        yield seconds, calls


if __name__ == "__main__":
    harness.script(main)
