"""`refusion eval`: the paper's benchmarks on one checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refusion.cli import options
from refusion.hub import DEFAULT_MODEL

if TYPE_CHECKING:
    from refusion.evaluation.benchmarks import Benchmark


class SettingName(StrEnum):
    """Whose slot settings."""

    paper = "paper"
    one = "one"


def command(
    suite: Annotated[str, typer.Option(help="Set of benchmarks: paper.")] = "paper",
    model: options.Model = DEFAULT_MODEL,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with one sub-folder of rows per benchmark; else the hub.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Only these benchmarks of the suite.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each benchmark.")] = None,
    decoder: options.Decoder = options.DecoderName.refusion,
    setting: Annotated[
        SettingName,
        typer.Option(help="Slot settings: the paper's for each benchmark, or one for all (the next flags, or the model's own)."),
    ] = SettingName.paper,
    slot_size: options.SlotSize = None,
    block_size: options.BlockSize = None,
    serial_blocks: options.SerialBlocks = None,
    slot_threshold: options.SlotThreshold = None,
    token_threshold: options.TokenThreshold = None,
    acceptance: options.Acceptance = None,
    correction: options.Correction = None,
    alternatives: options.Alternatives = None,
    infill_length: options.InfillLength = None,
    sliding: options.Sliding = None,
    steps: options.Steps = None,
    threshold: options.Threshold = None,
    block_cache: options.BlockCache = None,
    early_stop: options.EarlyStop = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Result file; answers go to FILE's .samples folder. Default: eval-MODEL-DECODER.json."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the answers that an interrupted run left.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result file instead of a table.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Questions decoded together; default: what suits the device.")] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
) -> None:
    """Run MMLU-Pro, ARC-Challenge, GSM8K, MATH, GPQA, HumanEval and MBPP: 0-shot, chat template, 512 new tokens.

    \b
    refusion eval --suite paper --model smollm2-135m-refusion --device cuda
    refusion eval --tasks gsm8k,humaneval --data benchmarks-data --limit 20
    refusion eval --setting one --slot-size 16 --block-size 64 --output one.json
    refusion eval --decoder autoregressive --model smollm2-135m --output base.json
    refusion eval --decoder block_diffusion --model runs/blocks/final --threshold 0.9 --output blocks.json
    refusion eval --output one.json --setting one --slot-size 16 --block-size 64 --resume
    """
    diffusion = options.diffusion_params(decoder, block_size, steps, threshold, block_cache, early_stop)
    slot_block = block_size if diffusion is None else None
    slots = options.slot_params(
        slot_size, slot_block, serial_blocks, slot_threshold, token_threshold, acceptance, correction, alternatives, infill_length, sliding
    )
    options.refuse_slots(decoder, slots)
    with options.usage_errors():
        from refusion.engine.settings import EngineSettings
        from refusion.evaluation.suite import SuiteSettings, run_suite, samples_directory

        settings = SuiteSettings(
            suite=suite, tasks=_names(tasks), data=data, limit=limit, decoder=decoder.value, setting=setting.value, slots=slots,
            diffusion=diffusion, batch_size=batch_size, seed=seed,
        )  # fmt: skip
    target = output or Path(f"eval-{Path(model).name}-{decoder.value}.json")
    with _interruptible(samples_directory(target)):
        import lm_eval  # noqa: F401  (its absence is told before a model is loaded)

        engine = None if batch_size is None else EngineSettings(max_num_seqs=batch_size)
        llm = options.load(model, device, dtype, engine)
        options.warn_of_untaught(decoder, llm)
        with _progress() as show:
            content = run_suite(llm, settings, target, model_name=model, resume=resume, on_progress=show, on_missing=_tell)
    options.print_json(content) if as_json else _print_table(content)
    typer.echo(f"written to {target}, answers to {samples_directory(target)}", err=True)


def _names(tasks: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (tasks or "").split(",") if name.strip())


def _tell(message: str) -> None:
    typer.echo(f"refusion: left out: {' '.join(message.split())}", err=True)


@contextmanager
def _interruptible(samples: Path) -> Iterator[None]:
    """Ctrl-C loses only the group of answers being written, and the user is told how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = f"the answers so far are in {samples}: " if any(samples.glob("*.jsonl")) else "before the first answer: "
        typer.echo(f"stopped; {kept}run the same command with --resume to go on", err=True)
        raise typer.Exit(130) from error


@contextmanager
def _progress() -> Iterator[Callable[[Benchmark, int, int], None]]:
    """A bar per benchmark on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def show(benchmark: Benchmark, done: int, total: int) -> None:
            if benchmark.name not in bars:
                bars[benchmark.name] = progress.add_task(benchmark.title, total=total)
            progress.update(bars[benchmark.name], completed=done)

        yield show


def _print_table(content: dict[str, Any]) -> None:
    """Score with its standard error, tokens per forward and tokens per second of every benchmark."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("benchmark", no_wrap=True), *(f"{name}" for name in ("score %", "± s.e.", "questions", "tokens/forward", "tokens/s"))
    )
    for run in content["runs"]:
        figures = run["figures"]
        table.add_row(
            run["settings"]["title"], _shown(figures["score"]["value"], 100), _shown(figures["standard_error"], 100),
            str(figures["num_samples"]), _shown(figures["tokens_per_forward"]["value"]), _shown(figures["tokens_per_second"]),
        )  # fmt: skip
    means = content["figures"]
    table.add_row("mean", _shown(means["mean_score"], 100), _shown(means["mean_score_standard_error"], 100), "", "", "")
    Console(file=sys.stdout).print(table)


def _shown(value: float | None, factor: float = 1.0) -> str:
    return "–" if value is None else f"{factor * value:.2f}"
