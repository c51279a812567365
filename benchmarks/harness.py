"""What the benchmark scripts share: flags, settings, data, the loop over settings, and the result file.

The scripts use the library through `LLM` alone. `--sweep FILE.json` runs many settings in one process: a JSON list of objects with
`SlotParams` fields and, if wanted, `decoder` and `label`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from refusion import LLM, SamplingParams, SlotParams
from refusion.errors import ConfigError, DataError, RefusionError
from refusion.evaluation.results import Figure, Result, Run, to_plain, write_result
from refusion.llm import RequestOutput
from refusion.synthesis.jsonl import read_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way of decoding; the same for every prompt."""

    decoder: str = "refusion"
    slots: SlotParams = field(default_factory=SlotParams)
    label: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answers of one setting and the wall-clock seconds they took together."""

    setting: Setting
    outputs: list[RequestOutput]
    seconds: float


def parser(description: str, *, output: str, max_tokens: int = 256) -> argparse.ArgumentParser:
    """The flags every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--model", default="smollm2-135m-refusion", help="named model or directory")
    made.add_argument("--output", type=Path, default=RESULTS / output, help="result file")
    made.add_argument("--limit", type=int, default=None, help="at most so many prompts")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--dtype", default=None, choices=["float32", "bfloat16"], help="by default what the device computes in")
    made.add_argument("--batch-size", type=int, default=None, help="prompts decoded together; by default 1 on a CPU, 64 on a GPU")
    made.add_argument("--max-tokens", type=int, default=max_tokens, help="new tokens at most")
    made.add_argument("--notes", default="", help="a sentence for the result file")
    made.add_argument("--save-texts", type=Path, default=None, help="JSONL file for the answers themselves")
    made.add_argument("--sweep", type=Path, default=None, help="JSON list of settings to run one after the other")
    slots = made.add_argument_group("slots (left out: what the checkpoint recommends)")
    slots.add_argument("--decoder", default="refusion", choices=["refusion", "autoregressive"])
    slots.add_argument("--slot-size", type=int)
    slots.add_argument("--block-size", type=int, help="in tokens")
    slots.add_argument("--serial-blocks", type=int, help="instead of --block-size")
    slots.add_argument("--slot-threshold", type=float)
    slots.add_argument("--token-threshold", type=float)
    slots.add_argument("--acceptance", choices=["paper", "argmax", "exact"])
    slots.add_argument("--correction", choices=["paper", "autoregressive"])
    slots.add_argument("--alternatives", type=int, help="runner-ups tried beside each draft")
    slots.add_argument("--infill-length", type=int, help="tokens drafted at most behind a failed draft")
    slots.add_argument("--sliding", action=argparse.BooleanOptionalAction, help="slots begin where the text ends")
    slots.add_argument("--max-candidates", type=int, help="accepted lengths prepared")
    slots.add_argument("--two-pass", action="store_true", help="no fused rounds, no fused infill")
    return made


def script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main`; what a user can mend comes out as one line with exit code 1, Ctrl-C as one with 130."""
    try:
        main()
    except RefusionError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def settings(args: argparse.Namespace) -> list[Setting]:
    """The one setting of the flags, or those of the sweep. Raises DataError for a file that is no list of settings."""
    if args.sweep is None:
        names = [item.name for item in fields(SlotParams) if getattr(args, item.name, None) is not None]
        given = {name: getattr(args, name) for name in names}
        if args.two_pass:
            given |= {"fuse_plan": False, "max_candidates": 0}
        return [Setting(decoder=args.decoder, slots=SlotParams(**given), label=args.decoder)]
    try:
        rows = json.loads(args.sweep.read_text())
        return [setting_from(row) for row in rows]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{args.sweep} is no JSON list of settings: {error}") from error


def setting_from(row: dict[str, Any]) -> Setting:
    """One entry of a sweep file. Raises ConfigError for unknown keys."""
    known = {item.name for item in fields(SlotParams)}
    slots = {key: value for key, value in row.items() if key not in ("decoder", "label")}
    unknown = sorted(slots.keys() - known)
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(unknown)}; known are decoder, label, {', '.join(sorted(known))}")
    decoder = row.get("decoder", "refusion")
    text = ", ".join(f"{key}={value}" for key, value in slots.items())
    return Setting(decoder=decoder, slots=SlotParams(**slots), label=row.get("label") or ", ".join(filter(None, [decoder, text])))


def grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """The sweep entries of all combinations."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def outcomes(llm: LLM, prompts: Sequence[Any], args: argparse.Namespace) -> Iterator[Outcome]:
    """Answers all prompts under each setting."""
    sampling = SamplingParams(max_tokens=args.max_tokens)
    chosen = settings(args)
    # Warm up, so that the first setting is timed like the others.
    llm.generate(list(prompts[:1]), SamplingParams(max_tokens=8), chosen[0].slots, decoder=chosen[0].decoder)
    for setting in chosen:
        started = time.perf_counter()
        outputs = llm.generate(list(prompts), sampling, setting.slots, decoder=setting.decoder, progress=True, batch_size=args.batch_size)
        yield Outcome(setting, outputs, time.perf_counter() - started)


@contextmanager
def written_at_any_end(write: Callable[..., None], runs: Sequence[Run]) -> Iterator[None]:
    """Call `write` at the end, and with is_complete=False for the runs there are by then if something ends the script before."""
    try:
        yield
    except BaseException:
        if runs:
            write(is_complete=False)
        raise
    write()


def finish(args: argparse.Namespace, name: str, llm: LLM, runs: Sequence[Run], **more: Any) -> None:
    """Write the result file; a single run's figures also stand at the top."""
    described = {
        "model": llm.path.name if Path(args.model).exists() else args.model,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "sampling": asdict(SamplingParams(max_tokens=args.max_tokens)),
        "batch_size": args.batch_size,
        **more,
    }
    figures = runs[0].figures if len(runs) == 1 else {}
    if len(runs) == 1:
        described |= runs[0].settings
    write_result(args.output, Result(name=name, settings=described, figures=figures, runs=runs, notes=args.notes, device=args.device))
    print(f"written {args.output}", file=sys.stderr)


def run_of(llm: LLM, setting: Setting, figures: dict[str, Figure]) -> Run:
    """The run with its slot settings printed whole, and one line of it on stdout."""
    described: dict[str, Any] = {"decoder": setting.decoder}
    if setting.decoder == "refusion":
        described["slots"] = asdict(llm.resolve_slots(setting.slots))
    print(json.dumps({"label": setting.label} | to_plain(figures)), flush=True)
    return Run(label=setting.label, settings=described, figures=figures)


def save_texts(args: argparse.Namespace, setting: Setting, rows: Sequence[dict[str, Any]], outputs: Sequence[RequestOutput]) -> None:
    """Append query, answer and cost of each prompt, for reading."""
    if args.save_texts is None:
        return
    with args.save_texts.open("a", encoding="utf-8") as file:
        for row, out in zip(rows, outputs, strict=True):
            said = {"setting": setting.label, "query": row["query"], "answer": out.text, "finish_reason": out.finish_reason}
            cost = {"tokens": out.stats.num_tokens, "forwards": out.stats.num_forwards}
            file.write(json.dumps(said | cost, ensure_ascii=False) + "\n")


def shared(*parts: str) -> Path:
    """A file of the shared data: $REFUSION_SHARED, or `shared` beside the checkout."""
    return Path(os.environ.get("REFUSION_SHARED") or ROOT.parent / "shared", *parts)


def chat_prompts() -> Path:
    """The held-out self-written pairs."""
    return shared("data", "smollm2_selfwritten", "heldout.jsonl.gz")


def rows_of(path: Path, rows: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows FIRST:LAST of a JSONL file, at most `limit`. Raises DataError."""
    return select([row for _, row in read_rows(path)], rows, limit)


def select(found: Sequence[Any], rows: str | None, limit: int | None) -> list[Any]:
    """Elements FIRST:LAST, at most `limit`. Raises DataError for another notation."""
    if rows is not None:
        first, _, last = rows.partition(":")
        try:
            found = found[int(first or 0) : int(last) if last else None]
        except ValueError as error:
            raise DataError(f"--rows is {rows!r}; write it as FIRST:LAST") from error
    return list(found[:limit])


def chat(query: str) -> list[dict[str, str]]:
    """A single user turn; the template adds the system prompt."""
    return [{"role": "user", "content": query}]
