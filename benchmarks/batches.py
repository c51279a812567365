"""Does the batch change the text? The same prompts one at a time and together; in float32 nothing may differ, in bfloat16 roundings may.

python benchmarks/batches.py --device cuda --limit 64 --concurrency 64 --batch-invariant
python benchmarks/batches.py --device cuda --dtype float32 --limit 16 --concurrency 16
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import harness

from refusion import LLM, SamplingParams
from refusion.evaluation.results import Figure, Run, to_plain
from refusion.llm import EngineSettings, Prompt, RequestOutput


def main() -> None:
    parser = harness.parser("The same prompts alone and in a batch.", output="batches.json", max_tokens=128)
    parser.add_argument("--data", type=Path, default=None, help="chat rows with `query`; by default the shared held-out ones")
    parser.add_argument("--concurrency", type=int, default=32, help="requests decoded together")
    parser.add_argument("--batch-invariant", action="store_true", help="the same again with EngineSettings(batch_invariant=True) (GPU)")
    args = parser.parse_args()
    (setting,) = harness.settings(args)
    prompts = [harness.chat(row["query"]) for row in harness.rows_of(args.data or harness.chat_prompts(), limit=args.limit or 64)]
    runs = []
    for engine in (EngineSettings(), EngineSettings(batch_invariant=True))[: 2 if args.batch_invariant else 1]:
        llm = LLM.from_pretrained(args.model, device=args.device, dtype=args.dtype, engine=engine)
        for decoder in ("refusion", "autoregressive"):
            run = run_of(llm, prompts, setting, decoder, args)
            print(json.dumps({"label": run.label} | to_plain(run.figures)), flush=True)
            runs.append(run)
    harness.finish(args, "batches", llm, runs, num_prompts=len(prompts))


def run_of(llm: LLM, prompts: Sequence[Prompt], setting: harness.Setting, decoder: str, args: argparse.Namespace) -> Run:
    """All prompts alone, then together, each twice: the first time may compile and capture, the second is timed."""
    sampling = SamplingParams(max_tokens=args.max_tokens)
    figures: dict[str, Figure] = {}
    outputs: dict[str, list[RequestOutput]] = {}
    for label, batch_size in (("alone", 1), ("together", args.concurrency)):
        for _ in range(2):
            started = time.perf_counter()
            outputs[label] = llm.generate(prompts, sampling, setting.slots, decoder, batch_size=batch_size)
            seconds = time.perf_counter() - started
        figures[f"tokens_per_second_{label}"] = sum(len(output.token_ids) for output in outputs[label]) / seconds
    is_invariant = llm.engine_settings.batch_invariant
    settings = {"concurrency": args.concurrency, "decoder": decoder, "batch_invariant": is_invariant}
    label = f"{decoder}, batch-invariant" if is_invariant else decoder
    return Run(label=label, settings=settings, figures=compared(outputs["alone"], outputs["together"]) | figures)


def compared(alone: Sequence[RequestOutput], together: Sequence[RequestOutput]) -> dict[str, Figure]:
    """Share of equal answers, and of tokens before the first difference."""
    pairs = [(one.token_ids, other.token_ids) for one, other in zip(alone, together, strict=True)]
    num_tokens = sum(max(len(one), len(other)) for one, other in pairs)
    return {
        "num_answers": len(pairs),
        "same_answers": sum(one == other for one, other in pairs) / len(pairs),
        "same_prefix_share": sum(same_prefix(one, other) for one, other in pairs) / num_tokens,
    }


def same_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


if __name__ == "__main__":
    harness.script(main)
