"""Where the device's time of a decoding forward goes: microseconds by kernel while real requests are decoded one at a time.

    python benchmarks/decode_profile.py --device cuda --data heldout.jsonl.gz
    python benchmarks/decode_profile.py --model TINY --num-prompts 1 --max-tokens 8            # a dry run on a CPU, by operator

The static forward alone is profiled by `forward.py --profile`; what slots add to it (layout, readout with runner-ups, verdicts, storing)
shows here. Programmatic dependent launch is switched off: a kernel that already waits for the one before would be charged for waiting.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import harness
import serving
from torch.profiler import ProfilerActivity, profile

from refusion import LLM, SamplingParams
from refusion.evaluation.load import Load, Server
from refusion.evaluation.results import Run
from refusion.llm import EngineSettings

DECODERS = ("autoregressive", "refusion")
MOST_KERNELS = 40


def main() -> None:
    args = flags()
    is_cuda = args.device.startswith("cuda")
    if is_cuda:
        from refusion.model.kernels import launch

        launch.set_pdl(False)
    llm = LLM.from_pretrained(args.model, device=args.device, dtype=args.dtype, engine=EngineSettings(max_num_seqs=1, prefix_caching=False))
    (setting,) = harness.settings(args)
    server = Server(llm, setting.slots, SamplingParams(max_tokens=args.max_tokens))
    rows = serving.prompt_rows(args.kind, args.data, args.num_prompts)
    prompts = [llm.encode(harness.chat(row["query"])) for row in rows]
    runs: list[Run] = []
    finish = partial(harness.finish, args, "decode-profile", llm, runs, kind=args.kind, num_prompts=len(prompts))
    with harness.written_at_any_end(finish, runs):
        for decoder in DECODERS:
            server.warm_up([decoder], max(map(len, prompts)), 1)
            for _ in range(2):  # the first time captures what was not ready, and experience may change what is wanted
                server.serve(Load(), decoder, prompts, 1)
            runs.append(profiled(server, decoder, prompts, is_cuda=is_cuda))
            print(json.dumps({"label": decoder} | dict(runs[-1].figures)), flush=True)


def flags() -> argparse.Namespace:
    parser = harness.parser("Microseconds by kernel of a decoding forward.", output="decode-profile.json", max_tokens=128)
    parser.add_argument("--kind", default="chat", choices=["chat", "tasks"], help="what the requests are")
    parser.add_argument("--data", type=Path, default=None, help="JSONL rows with `query`; by default the held-out ones of the kind")
    parser.add_argument("--num-prompts", type=int, default=8)
    return parser.parse_args()


def profiled(server: Server, decoder: str, prompts: list[list[int]], *, is_cuda: bool) -> Run:
    """All prompts one after the other under the profiler; figures and kernels are per forward, the costliest kernels first."""
    load = Load()
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as recorded:
        server.serve(load, decoder, prompts, 1)
    num_forwards = sum(output.stats.num_forwards for output in load.outputs)
    found = sorted(recorded.key_averages(), key=lambda item: -_microseconds(item, is_cuda))
    kernels = {item.key: _microseconds(item, is_cuda) / num_forwards for item in found if _microseconds(item, is_cuda) > 0}
    counts = {item.key: item.count / num_forwards for item in found if item.key in kernels}
    figures = {
        "us_per_forward": sum(kernels.values()),
        "kernels_per_forward": sum(counts.values()),
        "tokens_per_forward": load.num_tokens / num_forwards,
        "num_forwards": num_forwards,
        "num_first_runs": load.num_first_runs,
    }
    names = list(kernels)[:MOST_KERNELS]
    series = {"us": {name: kernels[name] for name in names}, "count": {name: counts[name] for name in names}}
    return Run(label=decoder, settings={"decoder": decoder}, figures=dict(figures), series=series)


def _microseconds(item: Any, is_cuda: bool) -> float:
    return item.self_device_time_total if is_cuda else item.self_cpu_time_total


if __name__ == "__main__":
    harness.script(main)
