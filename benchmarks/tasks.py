"""Verifiable tasks: right answers and tokens per forward, by default on the 2,100 held-out predictable rows.

    python benchmarks/tasks.py --device cuda --batch-size 256
    python benchmarks/tasks.py --decoder autoregressive --model runs/autoregressive --output benchmarks/results/tasks-autoregressive.json
    python benchmarks/tasks.py --data rg_heldout.jsonl.gz --output rg.json
    python benchmarks/tasks.py --data gsm8k/test.jsonl.gz --max-tokens 512 --output gsm8k.json

Rows say how they are judged. `check`: the predictable tasks' own rule (Python is run in the sandbox). `answer`: the final answer of the
text (`refusion.evaluation.final_answer`), as `reasoning_data.py` writes them. GSM8K's own columns: the number behind `####`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness

from refusion import LLM
from refusion.errors import DataError
from refusion.evaluation import final_answer
from refusion.evaluation.results import Figure, Run
from refusion.evaluation.sandbox import run_many
from refusion.evaluation.statistics import forward_stats, wilson
from refusion.synthesis.predictable import HELD_OUT_SEED, check, code_block, make

NUM_HELD_OUT = 2100


def main() -> None:
    parser = harness.parser("Right answers and tokens per forward on predictable tasks.", output="tasks.json", max_tokens=320)
    parser.add_argument("--data", type=Path, default=None, help="JSONL rows; by default the 2,100 of the held-out seed")
    parser.add_argument("--rows", default=None, help="rows FIRST:LAST of the file")
    args = parser.parse_args()
    rows = (
        harness.select(make(HELD_OUT_SEED, NUM_HELD_OUT), args.rows, args.limit)
        if args.data is None
        else problems(args.data, args.rows, args.limit)
    )

    llm = LLM.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    runs: list[Run] = []
    data = args.data or f"predictable.make({HELD_OUT_SEED}, {NUM_HELD_OUT})"
    finish = partial(harness.finish, args, "tasks", llm, runs, data=data, rows=args.rows, num_prompts=len(rows))
    with harness.written_at_any_end(finish, runs):
        for outcome in harness.outcomes(llm, [harness.chat(row["query"]) for row in rows], args):
            runs.append(harness.run_of(llm, outcome.setting, figures(llm, rows, outcome)))
            harness.save_texts(args, outcome.setting, rows, outcome.outputs)


def problems(path: Path, rows: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows with `query`, `family` and how they are judged. Raises DataError for rows of another kind."""
    return [problem(row, path) for row in harness.rows_of(path, rows, limit)]


def problem(row: dict[str, Any], path: Path) -> dict[str, Any]:
    if {"question", "answer"} <= row.keys():  # GSM8K as the hub has it
        return {"family": "gsm8k", "query": row["question"].strip(), "answer": row["answer"].rpartition("####")[2].strip()}
    if not {"query", "family"} <= row.keys() or not {"check", "answer"} & row.keys():
        raise DataError(f"{path} has a row with {', '.join(row)}; it needs query, family and check or answer, or question and answer")
    return row


def figures(llm: LLM, rows: Sequence[dict[str, Any]], outcome: harness.Outcome) -> dict[str, Figure]:
    outputs = outcome.outputs
    is_right = judge(rows, [out.text for out in outputs])
    found: dict[str, Figure] = {}
    for family in ["", *dict.fromkeys(row["family"] for row in rows)]:
        chosen = [i for i, row in enumerate(rows) if family in ("", row["family"])]
        tokens = [outputs[i].token_ids for i in chosen]
        forwards = forward_stats(tokens, [outputs[i].stats.num_forwards for i in chosen], llm.eos_ids())
        suffix = f"_{family}" if family else ""
        found[f"accuracy{suffix}"] = wilson(sum(is_right[i] for i in chosen), len(chosen))
        found[f"tokens_per_forward{suffix}"] = forwards.interval
        found[f"mean_tokens{suffix}"] = forwards.num_tokens / len(chosen)
    num_tokens = sum(out.stats.num_tokens for out in outputs)
    stopped_share = sum(out.finish_reason == "stop" for out in outputs) / len(outputs)
    return found | {"stopped_share": stopped_share, "seconds": outcome.seconds, "tokens_per_second": num_tokens / outcome.seconds}


def judge(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[bool]:
    """Whether each text answers its row; the tests of python rows run in the sandbox."""
    is_right = [is_answer(row, text) for row, text in zip(rows, texts, strict=True)]
    programs = [i for i, row in enumerate(rows) if is_right[i] and row.get("check", {}).get("type") == "python"]
    results = run_many([(code_block(texts[i]) or "", rows[i]["check"]["tests"]) for i in programs])
    for i, result in zip(programs, results, strict=True):
        is_right[i] = result.passed
    return is_right


def is_answer(row: dict[str, Any], text: str) -> bool:
    """Right by the row's own rule; a python row is only known to hold a program."""
    return bool(check(row, text)) if "check" in row else final_answer.is_right(text, row["answer"])  # type: ignore[arg-type]  # from JSON


if __name__ == "__main__":
    harness.script(main)
