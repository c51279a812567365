"""Flags that `generate` and `chat` share, and how they become settings. No torch here: a wrong flag is told before anything loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refusion.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from refusion.decoding.diffusion_params import DiffusionParams
    from refusion.decoding.params import SamplingParams, SlotParams, SlotSettings
    from refusion.engine.settings import EngineSettings
    from refusion.llm import LLM, RequestOutput


class DecoderName(StrEnum):
    """How the answer is written."""

    refusion = "refusion"
    autoregressive = "autoregressive"
    auto = "auto"
    masked_diffusion = "masked_diffusion"
    block_diffusion = "block_diffusion"


DIFFUSION = (DecoderName.masked_diffusion, DecoderName.block_diffusion)


class BlockCacheName(StrEnum):
    """What masked diffusion does not compute again within a block."""

    none = "none"
    prefix = "prefix"
    dual = "dual"


class AcceptanceName(StrEnum):
    """When a drafted token stands."""

    paper = "paper"
    argmax = "argmax"
    exact = "exact"


class CorrectionName(StrEnum):
    """What replaces the first draft that fails."""

    paper = "paper"
    autoregressive = "autoregressive"


class DtypeName(StrEnum):
    """What the network computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class QuantizationName(StrEnum):
    """How the matrices of the network are held."""

    int8 = "int8"
    float8 = "float8"


Model = Annotated[str, typer.Option(help="Named model (`refusion models list`) or directory of a checkpoint.")]
Decoder = Annotated[
    DecoderName,
    typer.Option(
        help="Plan and infill slots, write one token per forward, or (auto) what is faster here; masked and block diffusion are baselines "
        "for models trained that way."
    ),
]
SlotSize = Annotated[
    int | None, typer.Option(help="Tokens in a slot; this and the next nine are the model's own for the device where left out.")
]
BlockSize = Annotated[
    int | None, typer.Option(help="Tokens in a serial block, a multiple of the slot size; in a block of a diffusion decoder.")
]
SerialBlocks = Annotated[int | None, typer.Option(help="Serial blocks the answer is cut into, instead of --block-size.")]
SlotThreshold = Annotated[float | None, typer.Option(help="Plan the slots whose first token is more probable, 0 to 1.")]
TokenThreshold = Annotated[float | None, typer.Option(help="Keep drafted tokens that are more probable, 0 to 1.")]
Acceptance = Annotated[
    AcceptanceName | None,
    typer.Option(
        help="paper: by the token threshold; argmax: or by being the most probable token; exact (with --sliding): the token that would be "
        "written there anyway."
    ),
]
Correction = Annotated[
    CorrectionName | None,
    typer.Option(help="Replace the first draft that fails by the next mask prediction (paper) or by the token that judged it."),
]
Alternatives = Annotated[
    int | None, typer.Option(help="Runner-ups of each draft that are tried beside it, 0 to 3; they may replace it without another forward.")
]
InfillLength = Annotated[int | None, typer.Option(help="Tokens drafted at most behind a draft that failed.")]
Sliding = Annotated[
    bool | None, typer.Option("--sliding/--no-sliding", help="Begin slots where the text ends; drafts run on past what was accepted.")
]
Steps = Annotated[int | None, typer.Option(help="Diffusion decoders: forwards of a block, 1 to the block size.")]
Threshold = Annotated[float | None, typer.Option(help="Diffusion decoders, instead of --steps: commit what is more probable, 0 to 1.")]
BlockCache = Annotated[BlockCacheName | None, typer.Option(help="Masked diffusion: reuse keys and values within a block, approximately.")]
EarlyStop = Annotated[bool, typer.Option("--early-stop", help="Masked diffusion: stop once an EOS has everything before it written.")]
MaxTokens = Annotated[int, typer.Option(help="Most new tokens.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the most probable token.")]
TopP = Annotated[float, typer.Option(help="Draw from the most probable tokens with this much probability together.")]
Seed = Annotated[int, typer.Option(help="The same seed draws the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
CacheTokens = Annotated[int | None, typer.Option(help="Tokens of prompt and answer the KV cache holds; left out: a whole context.")]
Dtype = Annotated[DtypeName | None, typer.Option(help="Left out: bfloat16 where the device computes in it, else float32.")]
Quantization = Annotated[QuantizationName | None, typer.Option(help="Hold the weights in 8 bits, on a GPU.")]

DEFAULT_MAX_TOKENS = 256


def sampling_params(max_tokens: int, temperature: float, top_p: float, seed: int, stop: list[str] | None) -> SamplingParams:
    """Checked settings of the sampling flags; a value out of range is a usage error."""
    from refusion.decoding.params import SamplingParams

    with usage_errors():
        return SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=tuple(stop or ()))


def slot_params(
    slot_size: int | None,
    block_size: int | None,
    serial_blocks: int | None,
    slot_threshold: float | None,
    token_threshold: float | None,
    acceptance: AcceptanceName | None,
    correction: CorrectionName | None,
    alternatives: int | None,
    infill_length: int | None,
    sliding: bool | None,
) -> SlotParams:
    """Checked settings of the slot flags; a value out of range is a usage error."""
    from refusion.decoding.params import SlotParams

    with usage_errors():
        return SlotParams(
            slot_size=slot_size,
            block_size=block_size,
            serial_blocks=serial_blocks,
            slot_threshold=slot_threshold,
            token_threshold=token_threshold,
            acceptance=acceptance.value if acceptance else None,
            correction=correction.value if correction else None,
            alternatives=alternatives,
            infill_length=infill_length,
            sliding=sliding,
        )


def diffusion_params(
    decoder: DecoderName,
    block_size: int | None,
    steps: int | None,
    threshold: float | None,
    block_cache: BlockCacheName | None,
    early_stop: bool,
) -> DiffusionParams | None:
    """Checked settings of a diffusion decoder, None for the others; a flag that has no effect on the decoder is a usage error."""
    is_masked = decoder is DecoderName.masked_diffusion
    given = {"block_size": block_size, "steps": steps, "threshold": threshold, "block_cache": block_cache, "early_stop": early_stop or None}
    allowed = {"block_size"} if decoder not in DIFFUSION else given.keys() if is_masked else {"block_size", "steps", "threshold"}
    with usage_errors():
        _refuse_without_effect(decoder, [name for name, value in given.items() if value is not None and name not in allowed])
        if decoder not in DIFFUSION:
            return None
        from refusion.decoding.diffusion_params import BlockDiffusionParams, MaskedDiffusionParams

        if not is_masked:
            return BlockDiffusionParams(block_size=block_size, steps=steps, threshold=threshold)
        size = {} if block_size is None else {"block_size": block_size}
        cache = block_cache.value if block_cache else "none"
        return MaskedDiffusionParams(**size, steps=steps, threshold=threshold, cache=cache, early_stop=early_stop)


def refuse_slots(decoder: DecoderName, slots: SlotParams) -> None:
    """Slot flags of a diffusion decoder are a usage error."""
    from dataclasses import asdict

    with usage_errors():
        _refuse_without_effect(decoder, [name for name, value in asdict(slots).items() if decoder in DIFFUSION and value is not None])


def _refuse_without_effect(decoder: DecoderName, names: list[str]) -> None:
    if names:
        raise ConfigError(f"{names[0]} has no effect on --decoder {decoder.value}; leave it out")


def refuse_together(flags: dict[str, bool]) -> None:
    """Two flags that contradict one another are a usage error."""
    if all(flags.values()):
        with usage_errors():
            raise ConfigError(f"{' and '.join(flags)} do not go together; leave one out")


@contextmanager
def usage_errors() -> Iterator[None]:
    """A `ConfigError` in here comes from a flag: one line that names the flag, exit code 2."""
    try:
        yield
    except ConfigError as error:
        field, _, rest = str(error).partition(" ")
        flag = f"--{field.replace('_', '-')}" if re.fullmatch(r"[a-z]+(_[a-z]+)*", field) else field
        typer.echo(f"refusion: error: {flag} {rest}", err=True)
        raise typer.Exit(2) from error


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the command with exit code 130 and no traceback."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from error


def engine_settings(cache_tokens: int | None) -> EngineSettings:
    """Checked settings of an engine for one request at a time; a value out of range is a usage error."""
    from refusion.engine.settings import EngineSettings

    with usage_errors():
        return EngineSettings(max_num_seqs=1, cache_tokens=cache_tokens)


def load(
    model: str,
    device: str,
    dtype: DtypeName | None,
    engine: EngineSettings | None = None,
    quantization: QuantizationName | None = None,
) -> LLM:
    """The model, fetched with a progress bar if it is not here. Raises `CheckpointError` if it cannot be talked to in text."""
    from refusion.llm import LLM

    llm = LLM.from_pretrained(
        model,
        device=device,
        dtype=dtype.value if dtype else None,
        engine=engine,
        quantization=quantization.value if quantization else None,
    )
    if llm.tokenizer is None:
        raise CheckpointError(f"{llm.path} has no tokenizer.json; put the tokenizer of its base beside the weights")
    return llm


def warn_of_untaught(decoder: DecoderName, llm: LLM) -> None:
    """Say so where a model is decoded in a way that nobody taught it."""
    if decoder in DIFFUSION and llm.trained_objective != decoder.value and llm.config.mask_token_id is not None:
        name = decoder.value
        typer.echo(f"refusion: warning: {llm.path.name} was not trained for {name}; expect nonsense (docs/baselines.md)", err=True)


def resolve_slots(slots: SlotParams, llm: LLM) -> SlotSettings:
    """The slot settings this model will decode with; flags that do not fit its own are a usage error."""
    with usage_errors():
        return llm.resolve_slots(slots)


def summary(output: RequestOutput, slots: SlotSettings, diffusion: DiffusionParams | None = None) -> str:
    """One line on what an answer cost; `slots` counts where slots were decoded, `diffusion` holds the settings of a diffusion decoder."""
    stats = output.stats
    cost = f"{stats.num_tokens} tokens in {stats.num_forwards} forwards ({stats.tokens_per_forward:.2f} tokens per forward)"
    how = "autoregressive" if output.decoder == "autoregressive" else settings_text(slots, diffusion)
    return f"{cost}, {stats.tokens_per_second:.1f} tokens/s; {how}"


def settings_text(slots: SlotSettings, diffusion: DiffusionParams | None) -> str:
    """The settings that count in words."""
    if diffusion is None:
        return slots_text(slots)
    from refusion.decoding.diffusion_params import MaskedDiffusionParams

    kind, extras = "block", []
    if isinstance(diffusion, MaskedDiffusionParams):
        kind = "masked"
        extras += [f"{diffusion.cache} cache"] if diffusion.cache != "none" else []
        extras += ["early stop"] if diffusion.early_stop else []
    pace = f"threshold {diffusion.threshold:g}" if diffusion.threshold is not None else f"{diffusion.steps_per_block} steps a block"
    return ", ".join([f"{kind} diffusion in blocks of {diffusion.block_size}", pace, *extras])


def slots_text(slots: SlotSettings) -> str:
    """Slot settings in words, without those that have no effect: slots that slide are not chosen, and exact acceptance has no threshold."""
    cut = f"{slots.serial_blocks} serial blocks" if slots.serial_blocks else f"blocks of {slots.block_size or slots.slot_size}"
    thresholds = f", thresholds {slots.slot_threshold:g}/{slots.token_threshold:g}"
    if slots.sliding:
        thresholds = "" if slots.acceptance == "exact" else f", token threshold {slots.token_threshold:g}"
    rules = f"{slots.acceptance} acceptance, {slots.correction} correction"
    tried = f", {slots.alternatives} alternative{'s' * (slots.alternatives > 1)}" if slots.alternatives else ""
    drafted = f", {slots.most_masks} masks behind a failed draft" if slots.infill_length else ""
    cut = "sliding with the text" if slots.sliding else f"in {cut}"
    return f"slots of {slots.slot_size} {cut}{thresholds}, {rules}{tried}{drafted}"


def output_dict(output: RequestOutput) -> dict[str, Any]:
    """An answer and its cost, for --json."""
    stats = output.stats
    return {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "num_tokens": stats.num_tokens,
        "num_forwards": stats.num_forwards,
        "tokens_per_forward": stats.tokens_per_forward,
        "seconds": stats.seconds,
        "first_token_seconds": stats.first_token_seconds,
        "tokens_per_second": stats.tokens_per_second,
    }


def settings_dict(settings: SlotSettings | DiffusionParams) -> dict[str, Any]:
    """Settings of a decoder, for --json."""
    from dataclasses import asdict

    return asdict(settings)


def print_json(content: dict[str, Any]) -> None:
    """One object on standard output."""
    import json

    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
