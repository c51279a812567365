"""`refusion bench`: how fast a checkpoint is on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refusion.cli import options
from refusion.errors import DataError
from refusion.hub import DEFAULT_MODEL

if TYPE_CHECKING:
    from refusion.llm import LLM, Prompt

BAR_WIDTH = 40


def command(
    model: options.Model = DEFAULT_MODEL,
    decoder: Annotated[
        list[str] | None, typer.Option(help="Only this decoder; may be repeated. Default: all the checkpoint was trained for.")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Prompts decoded together; may be repeated. Default: 1, 8 and 32 on a GPU, 1 on a CPU.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for each decoder at each batch size; no prompt is begun after it.")] = 20.0,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A prompt a line, or JSON lines with `query` (.gz too). Default: built-in ones.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompts as they stand, without the chat template.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a result file.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a .png, .svg or .pdf; needs matplotlib.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content of the result file and nothing else.")] = False,
    max_tokens: options.MaxTokens = options.DEFAULT_MAX_TOKENS,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
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
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
) -> None:
    """Measure prefill, a forward by its rows, and tokens per forward, tokens/s and time to the first text of every decoder.

    \b
    refusion bench
    refusion bench --device cuda --output bench.json --plot bench.svg
    refusion bench --decoder refusion --decoder autoregressive --batch-size 1 --seconds 60 --prompts prompts.txt
    refusion bench --json --seconds 5 --max-tokens 64
    """
    sampling = options.sampling_params(max_tokens, temperature, top_p, seed, None)
    slots = options.slot_params(
        slot_size, block_size, serial_blocks, slot_threshold, token_threshold, acceptance, correction, alternatives, infill_length, sliding
    )
    with options.interruptible():
        from refusion.evaluation.results import content_of, write_result
        from refusion.evaluation.speed import PROMPTS, SpeedSettings, measure_speed
        from refusion.evaluation.speed_plot import check_format, plot_speed

        with options.usage_errors():
            settings = SpeedSettings(
                decoders=tuple(decoder or ()), batch_sizes=tuple(batch_size or ()), seconds=seconds, sampling=sampling, slots=slots
            )
            if plot is not None:
                check_format(plot)
        texts = _read(prompts or PROMPTS)
        llm = options.load(model, device, dtype, settings.engine(device.partition(":")[0]), quantization)
        options.resolve_slots(slots, llm)
        with _progress() as show:
            result = measure_speed(llm, _requests(llm, texts, raw), settings, show)
        content = content_of(result) if output is None else write_result(output, result)
        if plot is not None:
            plot_speed(content, plot)
    options.print_json(content) if as_json else _print(content, with_bars=plot is None)


def _read(path: Path) -> list[str]:
    """One prompt a line, or `query` (or the first user turn) of JSON lines. Raises DataError for a file without any."""
    from refusion.synthesis.jsonl import read_queries

    if {".jsonl", ".json"} & set(path.suffixes):
        found = read_queries(path)
    else:
        try:
            found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
    if not found:
        raise DataError(f"{path} holds no prompt; write one a line, or JSON lines with `query`")
    return found


def _requests(llm: LLM, texts: list[str], raw: bool) -> list[Prompt]:
    """Chats, or plain text where that is wanted or the checkpoint knows no chat."""
    assert llm.tokenizer is not None, "checked when the model was loaded"
    is_plain = raw or not llm.tokenizer.has_chat_template
    return [text if is_plain else [{"role": "user", "content": text}] for text in texts]


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being measured, on a terminal; nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("loading") as status:
        yield lambda text: status.update(text)


def _print(content: dict[str, Any], *, with_bars: bool) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout)
    for line in _machine_lines(content):
        console.print(line, highlight=False)
    console.print(_table(content))
    if with_bars:
        for line in _bars(content):
            console.print(line, highlight=False)


def _machine_lines(content: dict[str, Any]) -> Iterator[str]:
    """Prefill and forwards in a line each."""
    figures = {run["label"]: run["figures"] for run in content["runs"]}
    prefill = {name.removeprefix("prefill_tokens_per_second_"): found["value"] for name, found in figures["prefill"].items()}
    yield "prefill, tokens/s: " + ", ".join(f"{value:,.0f} at {length}" for length, value in prefill.items())
    forward = {name.removeprefix("forward_ms_"): value for name, value in figures["forward"].items()}
    yield "a forward, ms by rows: " + ", ".join(f"{rows}: {value:.2f}" for rows, value in forward.items())


def _table(content: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("decoder", "batch", caption="× AR: over autoregressive; TPF: tokens per forward")
    for name in ("tokens/s", "× AR", "TPF", "ms/forward", "first text, ms"):
        table.add_column(name, justify="right")
    loads = _loads(content)
    one_by_one = {run["settings"]["concurrency"]: run["figures"]["tokens_per_second"] for run in loads if _decoder(run) == "autoregressive"}
    for run in loads:
        figures, size = run["figures"], run["settings"]["concurrency"]
        speed = figures["tokens_per_second"]
        ratio = speed / one_by_one[size] if size in one_by_one else None
        shown = (speed, ratio, figures["tokens_per_forward"]["value"], figures.get("ms_per_forward"), figures["first_token_ms_p50"])
        table.add_row(
            _decoder(run),
            str(size),
            *("–" if value is None else f"{value:,.{digits}f}" for value, digits in zip(shown, (1, 2, 2, 2, 1), strict=True)),
        )
    return table


def _bars(content: dict[str, Any]) -> Iterator[str]:
    """Tokens per second of every decoder as bars, longest first within the width of the longest of all."""
    loads = _loads(content)
    most = max(run["figures"]["tokens_per_second"] for run in loads)
    name_width = max(len(run["label"]) for run in loads)
    for run in loads:
        speed = run["figures"]["tokens_per_second"]
        yield f"{run['label']:>{name_width}} {'█' * max(1, round(BAR_WIDTH * speed / most))} {speed:,.1f} tokens/s"


def _loads(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in content["runs"] if "tokens_per_second" in run["figures"]]


def _decoder(run: dict[str, Any]) -> str:
    return run["settings"]["decoder"]
