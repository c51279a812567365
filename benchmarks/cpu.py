"""Batch 1 on this machine: tokens per second of the default decoding against autoregressive decoding, and what a forward costs.

    python benchmarks/cpu.py --num-prompts 12
    python benchmarks/cpu.py --sweep benchmarks/sweeps/sliding_cpu.json          # several settings, each a contender

The contenders take turns prompt by prompt, so that a slow minute of the machine hits all of them; the figure is the median over
prompts of each one's tokens per second, with the pooled value beside it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch

from refusion import LLM, SamplingParams, SlotParams
from refusion.engine.costs import NUM_CACHED
from refusion.evaluation.results import Figure, Run, to_plain
from refusion.evaluation.speed import forward_times
from refusion.evaluation.statistics import Interval
from refusion.llm import RequestOutput
from refusion.synthesis.predictable import HELD_OUT_SEED, make

WIDTHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)


@dataclass(slots=True)
class Contender:
    """A model with a decoder, and what it has answered so far."""

    name: str
    llm: LLM
    decoder: str
    slots: SlotParams = field(default_factory=SlotParams)
    outputs: dict[str, list[RequestOutput]] = field(default_factory=lambda: {"chat": [], "tasks": []})


def main() -> None:
    parser = harness.parser("Tokens per second at batch 1, contenders taking turns.", output="cpu.json", max_tokens=128)
    parser.add_argument("--base", default="smollm2-135m", help="the autoregressive model to beat")
    parser.add_argument("--num-prompts", type=int, default=12, help="of the chat and of the task prompts each")
    parser.add_argument("--data", type=Path, default=None, help="chat rows with `query`; by default the shared held-out ones")
    parser.add_argument("--threads", type=int, default=None, help="by default what torch chooses")
    parser.add_argument("--repeats", type=int, default=15, help="timed forwards per width")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    llm = LLM.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    base = LLM.from_pretrained(args.base, device=args.device, dtype=args.dtype)
    settings = harness.settings(args)
    contenders = [
        *(Contender(each.label, llm, "refusion", each.slots) for each in settings),
        Contender("autoregressive_base", base, "autoregressive"),
        Contender("autoregressive_same", llm, "autoregressive"),
    ]
    data = args.data or harness.chat_prompts()
    take_turns(contenders, prompts_of(data, args.limit or args.num_prompts), args.max_tokens)

    runs = [Run(label=c.name, settings={"decoder": c.decoder, "model": c.llm.path.name}, figures=figures(c)) for c in contenders]
    runs.append(
        Run(
            label="forward",
            settings={"cached_tokens": NUM_CACHED, "statistic": "median, monotone"},
            figures=forward_times(llm, WIDTHS, args.repeats),
        )
    )
    for run in runs:
        print(json.dumps({"label": run.label} | to_plain(run.figures)), flush=True)
    slots = {each.label: asdict(llm.resolve_slots(each.slots)) for each in settings}
    described = slots if len(slots) > 1 else next(iter(slots.values()))
    harness.finish(args, "cpu", llm, runs, base=args.base, slots=described, num_prompts=args.limit or args.num_prompts)


def prompts_of(chat_data: Path, count: int) -> list[tuple[str, Any]]:
    """(kind, prompt) of `count` chat and `count` task prompts, alternating."""
    chats = harness.rows_of(chat_data, limit=count)
    tasks = make(HELD_OUT_SEED, count)
    return [pair for chat, task in zip(chats, tasks, strict=True) for pair in (("chat", chat), ("tasks", task))]


def take_turns(contenders: Sequence[Contender], prompts: Sequence[tuple[str, Any]], max_tokens: int) -> None:
    """One prompt after the other, answered by every contender, who begins changing each time."""
    for contender in contenders:
        answer(contender, prompts[0][1], 16)
    for turn, (kind, row) in enumerate(prompts):
        for place in range(len(contenders)):
            contender = contenders[(turn + place) % len(contenders)]
            contender.outputs[kind].append(answer(contender, row, max_tokens))


def answer(contender: Contender, row: dict[str, Any], max_tokens: int) -> RequestOutput:
    sampling = SamplingParams(max_tokens=max_tokens)
    return contender.llm.generate([harness.chat(row["query"])], sampling, contender.slots, decoder=contender.decoder, batch_size=1)[0]


def figures(contender: Contender) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for kind, outputs in contender.outputs.items():
        speeds = sorted(out.stats.tokens_per_second for out in outputs)
        low, _, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else (speeds[0],) * 3
        num_tokens, seconds = sum(out.stats.num_tokens for out in outputs), sum(out.stats.seconds for out in outputs)
        found[f"tokens_per_second_{kind}"] = Interval(statistics.median(speeds), low, high)  # with its quartiles
        found[f"tokens_per_second_pooled_{kind}"] = num_tokens / seconds
        found[f"tokens_per_forward_{kind}"] = num_tokens / sum(out.stats.num_forwards for out in outputs)
    return found


if __name__ == "__main__":
    harness.script(main)
