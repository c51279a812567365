"""Which slots suit this machine: rows and tokens of every forward are counted, what a forward costs is measured, speed follows.

    python benchmarks/cpu_slots.py --num-prompts 6
    python benchmarks/cpu_slots.py --sizes 4:4 --choices runs/choices.json         # lengths alone: they change no token

What a setting is expected to bring and take (`settings.expected` of a run) is what the `choices` of a checkpoint's slots say, from which
`refusion.engine.slot_choice` picks at load. The counts depend on model and settings alone, so a busy machine spoils nothing but the cost
table, which `--costs` can read from the `forward` run of an earlier result of `cpu.py`. Two things are not in the table: what the
decisions of a round cost, and the prompt.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cpu
import harness
import numpy as np

from refusion import LLM, SamplingParams, SlotParams
from refusion.engine.costs import CPU_WIDTHS, CostTable, measure
from refusion.engine.runner import Pending, Runner
from refusion.engine.slot_choice import Expected
from refusion.errors import ConfigError
from refusion.evaluation.results import Figure, Run, read_result, to_plain

SIZES = ((2, 2), (3, 3), (4, 4), (4, 8), (6, 6), (8, 8))  # slot size, block size
CANDIDATES = (0, 1, 2, 3, 4)


@dataclass(slots=True)
class Count:
    """What a setting took for one kind of prompt."""

    num_tokens: int = 0
    num_rows: list[int] = field(default_factory=list)
    """Decode rows of every forward."""

    def expected(self) -> Expected:
        """As a checkpoint says it."""
        shares = Counter(self.num_rows)
        rows = {str(number): round(shares[number] / len(self.num_rows), 4) for number in sorted(shares)}
        return Expected(round(self.num_tokens / len(self.num_rows), 4), rows)

    def seconds(self, costs: CostTable, each: float) -> float:
        """Predicted seconds, with `each` for the host's part of a forward."""
        return float(np.sum(costs.cost(np.array(self.num_rows)))) + each * len(self.num_rows)


def main() -> None:
    parser = harness.parser("Predicted speed of slot settings at batch 1.", output="cpu_slots.json", max_tokens=96)
    parser.add_argument("--num-prompts", type=int, default=6, help="of the chat and of the task prompts each")
    parser.add_argument("--data", type=Path, default=None, help="chat rows with `query`; by default the shared held-out ones")
    parser.add_argument("--costs", type=Path, default=None, help="result file of cpu.py to take the cost table from")
    parser.add_argument("--sizes", nargs="+", default=None, metavar="SLOT:BLOCK", help="slot and block sizes; by default several")
    parser.add_argument(
        "--choices", type=Path, default=None, help="JSON file for the `choices` of a checkpoint's slots, the recommended first"
    )
    parser.add_argument("--host-ms", type=float, default=2.0, help="milliseconds of a slot forward outside the network")
    parser.add_argument("--host-ms-ar", type=float, default=0.7, help="the same of an autoregressive forward")
    args = parser.parse_args()
    llm = LLM.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    costs = measure(llm.engine.runner.network, CPU_WIDTHS, 15) if args.costs is None else table_of(args.costs)
    prompts = cpu.prompts_of(args.data or harness.chat_prompts(), args.limit or args.num_prompts)
    seconds_per_token = float(costs.cost(1)) + args.host_ms_ar / 1000  # autoregressive
    runs = []
    for slots in choices(SIZES if args.sizes is None else [sizes_from(text) for text in args.sizes]):
        counts = counted(llm, prompts, slots, args.max_tokens)
        figures = predicted(counts, costs, args.host_ms / 1000, seconds_per_token)
        label = f"slots of {slots.slot_size}, blocks of {slots.block_size}, {slots.max_candidates} candidates"
        expected = [asdict(count.expected()) for count in counts.values()]
        runs.append(Run(label=label, settings={"slots": size_of(slots), "expected": expected}, figures=figures))
        print(json.dumps({"label": label} | to_plain(figures)), flush=True)
    best = max(runs, key=lambda run: run.figures["speedup_mean"])  # pyright: ignore[reportArgumentType]  (a float, see `predicted`)
    print(f"fastest: {best.label}", flush=True)
    if args.choices is not None:
        first = {name: llm.recommended.get(name) for name in size_of(SlotParams())}
        found = [run.settings["slots"] | {"expected": run.settings["expected"]} for run in runs]
        found.sort(key=lambda choice: any(choice[name] != value for name, value in first.items()))
        args.choices.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    harness.finish(args, "cpu_slots", llm, runs, costs={"widths": costs.widths, "seconds": costs.seconds}, **host_settings(args))


def sizes_from(text: str) -> tuple[int, int]:
    """SLOT:BLOCK. Raises ConfigError."""
    try:
        slot_size, block_size = map(int, text.split(":"))
    except ValueError as error:
        raise ConfigError(f"--sizes has {text!r}; write sizes as SLOT:BLOCK") from error
    return slot_size, block_size


def choices(sizes: Sequence[tuple[int, int]] = SIZES) -> Iterator[SlotParams]:
    """All combinations; of candidates no more than there are lengths short of a whole slot."""
    for slot_size, block_size in sizes:
        for candidates in CANDIDATES:
            if candidates < slot_size:
                yield SlotParams(slot_size=slot_size, block_size=block_size, max_candidates=candidates)


def counted(llm: LLM, prompts: Sequence[tuple[str, Any]], slots: SlotParams, max_tokens: int) -> dict[str, Count]:
    """Tokens and rows by kind of prompt."""
    counts = {kind: Count() for kind, _ in prompts}
    for kind, row in prompts:
        with watched_rows() as num_rows:
            output = llm.generate([harness.chat(row["query"])], SamplingParams(max_tokens=max_tokens), slots)[0]
        counts[kind].num_tokens += output.stats.num_tokens
        counts[kind].num_rows += num_rows
    return counts


def predicted(counts: dict[str, Count], costs: CostTable, host_seconds: float, seconds_per_token: float) -> dict[str, Figure]:
    """Tokens per forward, rows, and speed against autoregressive decoding by kind; `speedup_mean` is the geometric mean of the kinds."""
    figures: dict[str, Figure] = {}
    speedups = []
    for kind, count in counts.items():
        speedups.append(count.num_tokens * seconds_per_token / count.seconds(costs, host_seconds))
        figures[f"tokens_per_forward_{kind}"] = count.num_tokens / len(count.num_rows)
        figures[f"rows_{kind}"] = float(np.mean(count.num_rows))
        figures[f"speedup_{kind}"] = speedups[-1]
    figures["speedup_mean"] = float(np.exp(np.mean(np.log(speedups))))
    return figures


@contextmanager
def watched_rows() -> Iterator[list[int]]:
    """Collects the decode rows of every forward that is launched in the block."""
    seen: list[int] = []
    launch = Runner.launch

    def watching(self: Runner, *args: Any, num_rows: int, **kwargs: Any) -> Pending:
        if num_rows:
            seen.append(num_rows)
        return launch(self, *args, num_rows=num_rows, **kwargs)

    Runner.launch = watching
    try:
        yield seen
    finally:
        Runner.launch = launch


def table_of(path: Path) -> CostTable:
    """The cost table in a result of cpu.py."""
    (forward,) = (run["figures"] for run in read_result(path)["runs"] if run["label"] == "forward")
    found = {int(match[1]): value / 1000 for name, value in forward.items() if (match := re.fullmatch(r"forward_ms_(\d+)", name))}
    widths = tuple(sorted(found))
    return CostTable(widths, tuple(found[width] for width in widths))


def size_of(slots: SlotParams) -> dict[str, int | None]:
    return {"slot_size": slots.slot_size, "block_size": slots.block_size, "max_candidates": slots.max_candidates}


def host_settings(args: argparse.Namespace) -> dict[str, float]:
    return {"host_ms": args.host_ms, "host_ms_autoregressive": args.host_ms_ar}


if __name__ == "__main__":
    harness.script(main)
