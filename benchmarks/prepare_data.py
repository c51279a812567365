"""Write the training mixture of the default model: one .jsonl.gz file per source, and the held-out files beside it.

    python benchmarks/prepare_data.py --output runs/data

Rows whose query is held out (chat or tasks) are dropped everywhere.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import harness

from refusion import hub
from refusion.synthesis import corpora, predictable
from refusion.synthesis.filters import normalised
from refusion.synthesis.jsonl import read_queries, read_rows, write_rows
from refusion.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the training mixture.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the files")
    parser.add_argument("--shared", type=Path, default=harness.shared(), help="folder with data/ and tasks/")
    parser.add_argument("--predictable", type=int, default=60000, help="predictable rows, before repeated ones are dropped")
    parser.add_argument("--functions", type=int, default=20000, help="docstring -> function pairs at most")
    parser.add_argument("--max-function-tokens", type=int, default=300, help="tokens of such an answer at most")
    parser.add_argument("--seed", type=int, default=1, help="of the predictable rows and of the choice of functions")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="model whose tokens are counted")
    args = parser.parse_args()

    data, selfwritten = args.shared / "data", args.shared / "data" / "smollm2_selfwritten"
    held_out_tasks = [row for _, row in read_rows(args.shared / "tasks" / "heldout.jsonl")]
    held_out_chat = [row for _, row in read_rows(selfwritten / "heldout.jsonl.gz")]
    write_rows(args.output / "heldout.jsonl.gz", held_out_chat)
    write_rows(args.output / "tasks_heldout.jsonl.gz", held_out_tasks)
    task_queries = [row["query"] for row in held_out_tasks]
    held_out = {normalised(query) for query in task_queries + read_queries(selfwritten / "heldout.jsonl.gz")}

    for path in sorted(selfwritten.glob("train-*.jsonl.gz")):
        save(args.output / f"selfwritten_{path.name}", (row for _, row in read_rows(path)), held_out)
    save(args.output / "predictable.jsonl.gz", plain(predictable.make_training_rows(args.seed, args.predictable, task_queries)), held_out)
    save(args.output / "gsm8k.jsonl.gz", corpora.gsm8k(data / "gsm8k" / "train.jsonl.gz"), held_out)
    save(args.output / "arc.jsonl.gz", corpora.arc(data / "arc_challenge" / "train.jsonl.gz"), held_out)
    save(args.output / "mbpp.jsonl.gz", corpora.mbpp(data / "mbpp" / "train.jsonl.gz"), held_out)

    tokenizer = Tokenizer.from_pretrained(hub.resolve(args.tokenizer))
    pairs = list(corpora.functions(corpora.python_files(), lambda text: len(tokenizer.encode(text)), args.max_function_tokens))
    random.Random(args.seed).shuffle(pairs)
    save(args.output / "functions.jsonl.gz", pairs[: args.functions], held_out)


def plain(rows: Iterable[predictable.Row]) -> Iterator[dict[str, Any]]:
    """Query and response alone; the family is the source."""
    return ({"query": row["query"], "response": row["response"], "source": row["family"]} for row in rows)


def save(path: Path, rows: Iterable[Any], held_out: set[str]) -> None:
    """Write the rows whose query is not held out."""
    kept = [row for row in rows if normalised(row["query"]) not in held_out]
    write_rows(path, kept)
    print(f"{path.name}: {len(kept)} rows, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    harness.script(main)
