"""`refusion generate`: answer one prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from refusion.cli import options
from refusion.errors import RequestError
from refusion.hub import DEFAULT_MODEL

if TYPE_CHECKING:
    from refusion.llm import Prompt


def command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT|-", help="What to answer; - reads it from standard input.")],
    model: options.Model = DEFAULT_MODEL,
    decoder: options.Decoder = options.DecoderName.refusion,
    raw: Annotated[bool, typer.Option("--raw", help="Continue PROMPT as it stands, without the chat template.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also decode with the base model, one token per forward.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show slots as they are planned, verified, infilled and committed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    max_tokens: options.MaxTokens = options.DEFAULT_MAX_TOKENS,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
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
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
    cache_tokens: options.CacheTokens = None,
) -> None:
    """Answer one prompt: the text on standard output, what it cost on standard error.

    \b
    refusion generate "Why is the sky blue?"
    refusion generate --compare "Write a JSON object with three cities and their countries."
    refusion generate --watch --slot-size 8 --block-size 32 "Count from 1 to 20."
    echo "List five fruits." | refusion generate --json -
    refusion generate --model runs/llada/final --decoder masked_diffusion --threshold 0.9 --early-stop "Why is the sky blue?"
    refusion generate --raw --temperature 0.8 --seed 7 --stop "." "Once upon a time"
    """
    sampling = options.sampling_params(max_tokens, temperature, top_p, seed, stop)
    diffusion = options.diffusion_params(decoder, block_size, steps, threshold, block_cache, early_stop)
    slot_block = block_size if diffusion is None else None
    slots = options.slot_params(
        slot_size, slot_block, serial_blocks, slot_threshold, token_threshold, acceptance, correction, alternatives, infill_length, sliding
    )
    options.refuse_slots(decoder, slots)
    engine = options.engine_settings(cache_tokens)
    options.refuse_together({"--compare": compare, "--watch": watch})
    options.refuse_together({"--compare": compare, "--quantization": quantization is not None})
    options.refuse_together({"--compare": compare, f"--decoder {decoder.value}": decoder is not options.DecoderName.refusion})
    options.refuse_together({"--watch": watch, "--json": as_json})
    text = _read(prompt)
    with options.interruptible():
        from refusion.cli.answer import NoText, answer, make_display

        llm = options.load(model, device, dtype, engine, quantization)
        options.warn_of_untaught(decoder, llm)
        settings = options.resolve_slots(slots, llm)
        request: Prompt = text if raw else [{"role": "user", "content": text}]
        if compare:
            from refusion.cli.compare import compare_decoders

            comparison = compare_decoders(llm, model, request, sampling, slots)
            options.print_json(comparison.to_dict()) if as_json else comparison.print()
            return
        display = NoText() if as_json else make_display(llm, sampling, watch=watch)
        output = answer(llm, request, sampling, slots, decoder.value, display, diffusion)
        used = llm.resolve_diffusion(decoder.value, diffusion)
    if as_json:
        shown = {"slots": options.settings_dict(settings)} if output.decoder == "refusion" else {}
        shown |= {"diffusion": options.settings_dict(used)} if used is not None else {}
        options.print_json({"model": model, "decoder": output.decoder, **options.output_dict(output), **shown})
    else:
        typer.echo(options.summary(output, settings, used), err=True)


def _read(prompt: str) -> str:
    """The prompt, from standard input where it is `-`. Raises `RequestError` if there is nothing in it."""
    text = _stdin().removesuffix("\n") if prompt == "-" else prompt
    if not text.strip():
        raise RequestError("the prompt is empty; give it some text")
    return text


def _stdin() -> str:
    """All of standard input. Raises `RequestError` for bytes that are no text."""
    try:
        text = sys.stdin.read()
        text.encode()  # a stream that lets undecodable bytes through does so as lone surrogates
    except UnicodeError as error:
        raise RequestError(f"standard input is not UTF-8 text ({error}); convert it first") from error
    return text
