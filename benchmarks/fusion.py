"""What fused rounds and fused infill save: forwards against the plain two-pass algorithm, token for token the same.

    python benchmarks/fusion.py --limit 32
    python benchmarks/fusion.py --device cuda --batch-size 64

The golden traces are decoded with their own settings in float32, the chat prompts with one setting for all in float32 (or --dtype).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import harness

from refusion import LLM, SamplingParams, SlotParams
from refusion.evaluation.results import Run
from refusion.llm import RequestOutput

GOLDEN = harness.ROOT / "tests" / "golden"
TWO_PASS = {"fuse_plan": False, "max_candidates": 0}


def main() -> None:
    parser = harness.parser("Forwards of fused and of two-pass decoding.", output="fusion.json")
    parser.add_argument("--data", type=Path, default=None, help="chat rows with `query`; by default the shared held-out ones")
    parser.add_argument("--rows", default="0:256", help="rows FIRST:LAST of the held-out chat prompts")
    parser.add_argument("--golden-only", action="store_true", help="leave the model and the chat prompts out")
    args = parser.parse_args()

    tiny = LLM.from_pretrained(GOLDEN / "tiny-refusion", device=args.device, dtype="float32")
    runs = [golden_run(tiny, name, args.limit) for name in ("decode", "decode_infill")]
    if args.golden_only:
        harness.finish(args, "fusion", tiny, runs)
        return
    llm = LLM.from_pretrained(args.model, device=args.device, dtype=args.dtype or "float32")
    rows = harness.rows_of(args.data or harness.chat_prompts(), args.rows, args.limit)
    prompts = [harness.chat(row["query"]) for row in rows]
    for setting in harness.settings(args):
        runs.append(chat_run(llm, setting, prompts, args.max_tokens, args.batch_size))
    harness.finish(args, "fusion", llm, runs, rows=args.rows, num_prompts=len(rows))


def golden_run(llm: LLM, name: str, limit: int | None) -> Run:
    """All clean traces of one golden file, each with the settings it was recorded with."""
    traces = [trace for trace in json.loads((GOLDEN / f"{name}.json").read_text()) if trace.get("clean", True)][:limit]
    fused: list[RequestOutput] = []
    plain: list[RequestOutput] = []
    for (gen_length, slots), group in grouped(traces):
        prompts = [trace["prompt_ids"] for trace in group]
        sampling = SamplingParams(max_tokens=gen_length)
        fused += llm.generate(prompts, sampling, slots, batch_size=len(prompts))
        plain += llm.generate(prompts, sampling, replace(slots, **TWO_PASS), batch_size=len(prompts))
    return run_of(name, {"traces": len(traces), "slots": "those of each trace"}, fused, plain)


def grouped(traces: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[int, SlotParams], list[dict[str, Any]]]]:
    """Traces with the same settings together."""
    groups: dict[tuple[int, SlotParams], list[dict[str, Any]]] = defaultdict(list)
    for trace in traces:
        slots = SlotParams(
            slot_size=trace["slot_size"],
            serial_blocks=trace["serial_blocks"],
            slot_threshold=trace["slot_threshold"],
            token_threshold=trace["token_threshold"],
            acceptance="paper",
            correction="paper",
            max_candidates=512,  # every length there is, as in the figures of the traces
        )
        groups[trace["gen_length"], slots].append(trace)
    yield from groups.items()


def chat_run(llm: LLM, setting: harness.Setting, prompts: Sequence[Any], max_tokens: int, batch_size: int | None) -> Run:
    sampling = SamplingParams(max_tokens=max_tokens)
    fused = llm.generate(list(prompts), sampling, setting.slots, batch_size=batch_size, progress=True)
    plain = llm.generate(list(prompts), sampling, replace(setting.slots, **TWO_PASS), batch_size=batch_size, progress=True)
    return run_of(f"chat {setting.label}", {"slots": asdict(llm.resolve_slots(setting.slots))}, fused, plain)


def run_of(label: str, settings: dict[str, Any], fused: list[RequestOutput], plain: list[RequestOutput]) -> Run:
    num_fused, num_plain = (sum(out.stats.num_forwards for out in outputs) for outputs in (fused, plain))
    num_same = sum(a.token_ids == b.token_ids for a, b in zip(fused, plain, strict=True))
    num_tokens = sum(out.stats.num_tokens for out in fused)
    figures = {
        "num_answers": len(fused),
        "same_tokens": num_same,
        "forwards_fused": num_fused,
        "forwards_two_pass": num_plain,
        "saved_share": 1 - num_fused / num_plain,
        "tokens_per_forward_fused": num_tokens / num_fused,
        "tokens_per_forward_two_pass": sum(out.stats.num_tokens for out in plain) / num_plain,
    }
    print(json.dumps({"label": label} | figures), flush=True)
    return Run(label=label, settings=settings, figures=figures)


if __name__ == "__main__":
    harness.script(main)
