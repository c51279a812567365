"""Write the tables of README.md and docs/*.md from the result files, or check that they are current.

    python benchmarks/tables.py
    python benchmarks/tables.py --check

A table stands between `<!-- table:KIND FILE FILE="a title" -->` and `<!-- /table -->`. FILE is a result file's name without `.json`;
every run of it becomes a row (a column in side-by-side). Kinds: chat, tasks, families, cpu, forward, serving, masked-diffusion, quantized,
fusion, training, parity, side-by-side, and those of `comparison_tables`: suite, suite-cost, comparison, comparison-cost,
comparison-training, differences, ratios, ablations, recipes, published.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import comparison_tables
from table_forms import (
    Source,
    gigabytes,
    hundredth_percent,
    interval,
    lines_of,
    milliseconds,
    one,
    percent,
    plain,
    rows,
    three,
    times,
    two,
    whole,
)

from refusion.errors import DataError, RefusionError
from refusion.evaluation.results import read_result

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = re.compile(r"^<!-- table:(\S+)\s*(.*?)\s*-->$"), "<!-- /table -->"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of README.md and docs/*.md from the result files.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not what the result files say")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("files", nargs="*", type=Path, help="Markdown files; by default README.md and docs/*.md")
    args = parser.parse_args()
    stale = []
    try:
        for path in args.files or [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]:
            text = path.read_text(encoding="utf-8")
            fresh = with_tables(text, path, args.results)
            if fresh != text:
                stale.append(path)
                if not args.check:
                    path.write_text(fresh, encoding="utf-8")
    except RefusionError as error:
        print(error, file=sys.stderr)
        return 1
    for path in stale:
        print(f"{path}: {'stale; run python benchmarks/tables.py' if args.check else 'written'}", file=sys.stderr)
    return 1 if args.check and stale else 0


def with_tables(text: str, path: Path, results: Path) -> str:
    """The Markdown text with every table written anew. Raises DataError for a bad marker or a missing result file."""
    out: list[str] = []
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        out.append(lines[number])
        marker = BEGIN.match(lines[number])
        if marker:
            place = f"{path}:{number + 1}"
            end = next((i for i in range(number + 1, len(lines)) if lines[i] == END or BEGIN.match(lines[i])), len(lines))
            if end == len(lines) or lines[end] != END:
                raise DataError(f"{place}: the table has no {END}")
            out += ["", *table(marker[1], shlex.split(marker[2]), results, place), "", END]
            number = end
        number += 1
    return "\n".join(out)


def table(kind: str, names: Sequence[str], results: Path, place: str) -> list[str]:
    """The lines of one table and, below it, where its figures come from."""
    if kind not in KINDS:
        raise DataError(f"{place}: unknown table {kind}; known are {', '.join(KINDS)}")
    if not names:
        raise DataError(f"{place}: the table names no result file")
    sources = []
    for name in names:
        stem, _, title = name.partition("=")
        read = comparison_tables.read_published if kind == "published" else read_result
        sources.append(Source(stem, title or None, read(results / f"{stem}.json")))
    notes = [] if kind == "published" else ["", *dict.fromkeys(provenance(source) for source in sources)]
    return [*KINDS[kind](sources), *notes]


def chat(sources: Sequence[Source]) -> list[str]:
    head = ["", "tokens per forward", "agreement", "base NLL", "tokens per answer", "repetitive answers"]
    names = ["tokens_per_forward", "agreement", "base_nll", "mean_tokens", "repetitive_share"]
    forms = [two, percent, three, whole, percent]
    return rows(
        head, [[line.title, *(form(line.figures.get(n)) for n, form in zip(names, forms, strict=True))] for line in lines_of(sources)]
    )


def tasks(sources: Sequence[Source]) -> list[str]:
    head = ["", "right answers", "95 % interval", "tokens per forward", "tokens per answer"]
    names = ["accuracy", "accuracy", "tokens_per_forward", "mean_tokens"]
    forms = [percent, interval, two, whole]
    return rows(
        head, [[line.title, *(form(line.figures.get(n)) for n, form in zip(names, forms, strict=True))] for line in lines_of(sources)]
    )


def families(sources: Sequence[Source]) -> list[str]:
    lines = lines_of(sources)
    names = [name.removeprefix("accuracy_") for name in lines[0].figures if name.startswith("accuracy_")]
    head = ["family", *(f"{line.title}: {what}" for line in lines for what in ("right", "tokens per forward"))]
    body = []
    for name in names:
        cells = [(percent(x.figures.get(f"accuracy_{name}")), two(x.figures.get(f"tokens_per_forward_{name}"))) for x in lines]
        body.append([name, *(cell for pair in cells for cell in pair)])
    return rows(head, body)


def cpu(sources: Sequence[Source]) -> list[str]:
    head = ["", "chat: tokens/s", "tokens per forward", "tasks: tokens/s", "tokens per forward"]
    names = ["tokens_per_second_chat", "tokens_per_forward_chat", "tokens_per_second_tasks", "tokens_per_forward_tasks"]
    forms = [one, two, one, two]
    chosen = [line for line in lines_of(sources) if names[0] in line.figures]
    return rows(head, [[line.title, *(form(line.figures[n]) for n, form in zip(names, forms, strict=True))] for line in chosen])


def forward(sources: Sequence[Source]) -> list[str]:
    """Milliseconds of a forward by its new tokens; the widths of different files and models stand side by side."""
    prefix = "forward_ms_"
    chosen = [line for line in lines_of(sources) if any(name.startswith(prefix) for name in line.figures)]
    widths = sorted({int(name.removeprefix(prefix)) for line in chosen for name in line.figures if name.startswith(prefix)})
    body = [[line.title, *(two(line.figures.get(f"{prefix}{width}")) for width in widths)] for line in chosen]
    return rows(["milliseconds, new tokens:", *map(str, widths)], body)


def serving(sources: Sequence[Source]) -> list[str]:
    head = ["", "tokens/s", "tokens per forward", "GPU ms per forward", "host share", "first token, ms", "p50 latency, ms", "p99"]
    names = ["tokens_per_second", "tokens_per_forward", "device_ms_per_forward", "host_share"]
    names += ["first_token_ms_p50", "latency_seconds_p50", "latency_seconds_p99"]
    forms = [whole, two, two, percent, one, milliseconds, milliseconds]
    chosen = [line for line in lines_of(sources) if names[0] in line.figures]
    return rows(head, [[line.title, *(form(line.figures.get(n)) for n, form in zip(names, forms, strict=True))] for line in chosen])


def masked_diffusion(sources: Sequence[Source]) -> list[str]:
    """Time of an answer of plain masked diffusion in the published set-up, and over the mean answer of the other decoders."""
    head = ["", "s per answer", "GPU ms per forward", "over autoregressive", "over ReFusion"]
    names = ["seconds_per_answer", "device_ms_per_forward", "over_autoregressive", "over_refusion"]
    forms = [two, two, times, times]
    chosen = [line for line in lines_of(sources) if names[0] in line.figures]
    return rows(head, [[line.title, *(form(line.figures.get(n)) for n, form in zip(names, forms, strict=True))] for line in chosen])


def quantized(sources: Sequence[Source]) -> list[str]:
    """Weights of fewer bits: agreement with those of 16, right answers, speed one at a time, memory."""
    head = ["", "agreement", "NLL", "right answers", "95 % interval", "chat: AR tokens/s", "chat: slots", "tasks: slots", "GB"]
    names = ["argmax_agreement", "nll", "task_accuracy", "task_accuracy", "tokens_per_second_chat_autoregressive"]
    names += ["tokens_per_second_chat_refusion", "tokens_per_second_tasks_refusion", "peak_bytes_decode"]
    forms = [percent, three, percent, interval, whole, whole, whole, gigabytes]
    return rows(
        head, [[line.title, *(form(line.figures.get(n)) for n, form in zip(names, forms, strict=True))] for line in lines_of(sources)]
    )


def fusion(sources: Sequence[Source]) -> list[str]:
    head = ["", "answers", "same tokens", "forwards, two-pass", "forwards, fused", "saved"]
    names = ["num_answers", "same_tokens", "forwards_two_pass", "forwards_fused", "saved_share"]
    forms = [whole, whole, whole, whole, percent]
    return rows(
        head, [[line.title, *(form(line.figures.get(n)) for n, form in zip(names, forms, strict=True))] for line in lines_of(sources)]
    )


def training(sources: Sequence[Source]) -> list[str]:
    """Speed and use of the arithmetic of each variant, and what the plan foretold."""
    head = ["", "tokens/s", "FLOP utilisation", "packed", "s per step", "planned", "GB", "planned"]
    names = ["tokens_per_second", "model_flops_utilisation", "packed_share", "seconds_per_step", "seconds_per_step_planned"]
    names += ["memory_gb", "memory_gb_planned"]
    forms = [whole, percent, percent, three, three, one, one]
    chosen = [line for line in lines_of(sources) if names[0] in line.figures]
    return rows(head, [[line.title, *(form(line.figures.get(n)) for n, form in zip(names, forms, strict=True))] for line in chosen])


def parity(sources: Sequence[Source]) -> list[str]:
    """Mean losses of packed and compiled against padded and eager training, and how far they are apart."""
    head = ["", "steps", "term", "packed, compiled", "padded, eager", "apart", "worst 50 steps", "worst 10 steps"]
    body = []
    for line in lines_of(sources):
        for term in ("loss", "loss_ar", "loss_mdm"):
            if f"{term}_off_mean" in line.figures:
                values = (three(line.figures[f"{term}_packed"]), three(line.figures[f"{term}_padded"]))
                apart = (hundredth_percent(line.figures[f"{term}_off_{what}"]) for what in ("mean", "worst_fifty_steps", "worst_ten_steps"))
                body.append([line.title, whole(line.figures["steps"]), f"`{term}`", *values, *apart])
    return rows(head, body)


def side_by_side(sources: Sequence[Source]) -> list[str]:
    """Every figure, one column per run: for comparing trainings on the same data."""
    lines = lines_of(sources)
    names = dict.fromkeys(name for line in lines for name in line.figures)
    return rows(
        ["", *(line.title for line in lines)], [[f"`{name}`", *(plain(line.figures.get(name)) for line in lines)] for name in names]
    )


KINDS: dict[str, Callable[[Sequence[Source]], list[str]]] = {
    "chat": chat, "tasks": tasks, "families": families, "cpu": cpu, "forward": forward, "serving": serving,
    "masked-diffusion": masked_diffusion, "quantized": quantized, "fusion": fusion, "training": training, "parity": parity,
    "side-by-side": side_by_side, **comparison_tables.KINDS,
}  # fmt: skip


def provenance(source: Source) -> str:
    content = source.content
    found = content["machine"]
    machine = found.get("gpu") or f"{found['cpu']}, {found['cores']} cores"
    details = [machine, content["settings"].get("dtype"), f"torch {content['versions']['torch']}", content["date"][:10]]
    commit, _, dirty = content["commit"].partition("+")
    commit = f"{commit[:10]}{'+dirty' * bool(dirty)}"
    return f"<sub>`{source.stem}.json`: `{content['command']}` ({', '.join(filter(None, details))}, commit {commit})</sub>  "


if __name__ == "__main__":
    sys.exit(main())
