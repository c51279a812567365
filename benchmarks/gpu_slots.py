"""Which slots suit a GPU at batch 1: rows of every forward are counted on any machine, what they cost is read from a result of the GPU.

    python benchmarks/gpu_slots.py --sweep benchmarks/sweeps/gpu_slots.json --costs benchmarks/results/bench-h200.json
    python benchmarks/gpu_slots.py --alternatives 1 --infill-length 5 --candidates 15 8 --num-prompts 8

Each setting is decoded with each of the `--candidates` (lengths prepared). Two ways of running are priced: every forward waits for the
report of the one before it (`waiting`), or is launched ahead with room for whatever that may bring (`ahead`), the forward launched behind
the end of an answer included. `--costs` is a result of `refusion bench`, whose `forward` run has a table of milliseconds by rows. Not in
the prediction: prompts, and text that differs between devices.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cpu
import harness
import numpy as np

from refusion import LLM, SamplingParams
from refusion.engine.candidates import HOST_SECONDS
from refusion.engine.costs import CostTable
from refusion.engine.scheduler import Forward, Scheduler
from refusion.engine.shapes import row_bucket
from refusion.errors import DataError
from refusion.evaluation.results import Figure, Run, read_result, to_plain


@dataclass(slots=True)
class Count:
    """What a setting took for one kind of prompt, forward by forward, answers one behind the other."""

    num_tokens: int = 0
    num_rows: list[int] = field(default_factory=list)
    most_next: list[int] = field(default_factory=list)
    """Rows that the forward after it may need."""
    is_first: list[bool] = field(default_factory=list)
    """Of an answer."""

    def figures(self, costs: CostTable, round_seconds: float) -> dict[str, Figure]:
        """round_seconds: of a slot forward on the device, outside the network."""
        rows, most, is_first = np.array(self.num_rows), np.array(self.most_next), np.array(self.is_first)
        # A forward launched ahead is priced with its predecessor, which says how many rows it may need.
        own, following = (_cost(costs, each) + round_seconds for each in (rows, most))
        waiting = float((own + HOST_SECONDS).sum())
        ahead = float((own[is_first] + HOST_SECONDS).sum() + np.maximum(following, HOST_SECONDS).sum())
        one_by_one = self.num_tokens * float(costs.cost(1))
        return {
            "tokens_per_forward": self.num_tokens / len(rows),
            "rows": float(rows.mean()),
            "rows_ahead": float(most.mean()),
            "waiting": one_by_one / waiting,
            "ahead": one_by_one / ahead,
        }


def main() -> None:
    args = flags()
    costs = table_of(args.costs)
    llm = LLM.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    prompts = list(cpu.prompts_of(args.data or harness.chat_prompts(), args.num_prompts))
    runs: list[Run] = []
    more = {"costs": args.costs.name, "round_ms": args.round_ms, "candidates": args.candidates, "num_prompts": args.num_prompts}
    with harness.written_at_any_end(lambda **extra: harness.finish(args, "gpu-slots", llm, runs, **more, **extra), runs):
        for setting in harness.settings(args):
            for candidates in args.candidates:
                slots = replace(setting.slots, max_candidates=candidates)
                resolved = llm.resolve_slots(slots)
                figures: dict[str, Figure] = {}
                for kind, count in counted(llm, prompts, slots, args.max_tokens).items():
                    figures |= {f"{name}_{kind}": value for name, value in count.figures(costs, args.round_ms / 1000).items()}
                what = f"{'sliding ' * resolved.sliding}slots of {resolved.slot_size}, {resolved.alternatives} alternatives"
                label = f"{what}, {resolved.most_masks} behind a failed draft, {resolved.candidates()} lengths"
                runs.append(Run(label=label, settings={"slots": to_plain(resolved)}, figures=figures))
                print(json.dumps({"label": label} | to_plain(figures)), flush=True)


def flags() -> argparse.Namespace:
    parser = harness.parser("Predicted speed of slot settings at batch 1 on a GPU.", output="gpu-slots.json", max_tokens=160)
    parser.add_argument("--num-prompts", type=int, default=7, help="of the chat and of the task prompts each")
    parser.add_argument("--data", type=Path, default=None, help="chat rows with `query`; by default the shared held-out ones")
    parser.add_argument("--costs", type=Path, default=harness.RESULTS / "bench-h200.json", help="result of `refusion bench` on the GPU")
    parser.add_argument("--candidates", type=int, nargs="+", default=[15, 8, 4], help="numbers of lengths prepared")
    parser.add_argument("--round-ms", type=float, default=0.08, help="milliseconds of a slot forward on the device outside the network")
    return parser.parse_args()


def counted(llm: LLM, prompts: Sequence[tuple[str, Any]], slots: Any, max_tokens: int) -> dict[str, Count]:
    """Tokens and rows by kind of prompt."""
    counts = {kind: Count() for kind, _ in prompts}
    for kind, row in prompts:
        with watched(counts[kind]):
            output = llm.generate([harness.chat(row["query"])], SamplingParams(max_tokens=max_tokens), slots)[0]
        counts[kind].num_tokens += output.stats.num_tokens
    return counts


@contextmanager
def watched(count: Count) -> Iterator[None]:
    """Adds every forward with decode rows that is launched in the block."""
    launched = Scheduler.launched
    is_first = True

    def watching(self: Scheduler, forward: Forward) -> None:
        nonlocal is_first
        seats = forward.seats
        if forward.num_rows and seats.demand is not None:
            count.num_rows.append(forward.num_rows)
            count.most_next.append(max(seats.demand.most_next(seats.reports[: len(seats)], forward.candidates), 1))
            count.is_first.append(is_first)
            is_first = False
        launched(self, forward)

    Scheduler.launched = watching
    try:
        yield
    finally:
        Scheduler.launched = launched


def table_of(path: Path) -> CostTable:
    """The cost table in a result of `refusion bench`. Raises DataError if there is none."""
    figures = [run["figures"] for run in read_result(path)["runs"] if run["label"] == "forward"]
    figures = {name: value for each in figures for name, value in each.items()}
    found = {int(match[1]): value / 1000 for name, value in figures.items() if (match := re.fullmatch(r"forward_ms_(\d+)", name))}
    if len(found) < 2:
        raise DataError(f"{path} has no milliseconds by rows; give a result of `refusion bench`")
    widths = tuple(sorted(found))
    return CostTable(widths, tuple(found[width] for width in widths))


def _cost(costs: CostTable, num_rows: np.ndarray) -> np.ndarray:
    """Seconds of forwards of the shapes that so many rows run as."""
    return np.asarray(costs.cost(np.array([row_bucket(int(number), 1) for number in num_rows])))


if __name__ == "__main__":
    harness.script(main)
