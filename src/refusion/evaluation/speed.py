"""How fast a checkpoint is on the machine at hand: prefill, a forward by its rows, and every decoder on real prompts.

Time is bounded: a decoder gets `seconds` at each batch size, and no prompt is begun after them. How load is measured stands in
`refusion.evaluation.load`, what a forward costs in `refusion.engine.costs`; showing the figures is up to the caller.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from refusion.engine.costs import CPU_WIDTHS, GPU_WIDTHS, NUM_CACHED, measure
from refusion.errors import CheckpointError, ConfigError, RefusionError
from refusion.evaluation.load import Load, Server, comparison, cycled, run_of, take_turns
from refusion.evaluation.results import Figure, Result, Run
from refusion.evaluation.statistics import Interval
from refusion.llm import DECODERS, DIFFUSION, LLM, EngineSettings, Prompt, SamplingParams, SlotParams

PROMPTS = Path(__file__).with_name("prompts.txt")
"""Prompts of many kinds, one a line, for who brings none."""
PREFILL_LENGTHS = (128, 512, 1024)
_WARM_UP_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedSettings:
    """What is measured, and for how long."""

    decoders: tuple[str, ...] = ()
    """Contenders; empty: all that the checkpoint supports and was trained for."""
    batch_sizes: tuple[int, ...] = ()
    """Requests that run together, each >= 1; empty: 1, 8 and 32 on a GPU, 1 on a CPU."""
    seconds: float = 20.0
    """Per decoder and batch size, > 0: no prompt is begun after them."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    slots: SlotParams = field(default_factory=SlotParams)

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ConfigError(f"seconds is {self.seconds:g}; it must be above 0")
        for size in self.batch_sizes:
            if size < 1:
                raise ConfigError(f"batch_size is {size}; it must be at least 1")
        for name in self.decoders:
            if name not in DECODERS:
                raise ConfigError(f"decoder is {name!r}; it must be one of {', '.join(DECODERS)}")

    def sizes(self, device_type: str) -> tuple[int, ...]:
        """batch_sizes on this kind of device."""
        return self.batch_sizes or ((1, 8, 32) if device_type == "cuda" else (1,))

    def engine(self, device_type: str) -> EngineSettings:
        """An engine with a seat for everybody, in which nobody finds what another contender prefilled."""
        return EngineSettings(max_num_seqs=max(self.sizes(device_type)), prefix_caching=False)


def measure_speed(
    llm: LLM, prompts: Sequence[Prompt], settings: SpeedSettings, on_progress: Callable[[str], None] = lambda _: None
) -> Result:
    """All figures of one checkpoint; its engine should be the one of `settings.engine`. Raises CheckpointError for a decoder it lacks."""
    decoders = contenders(llm, settings)
    encoded = [llm.encode(prompt) for prompt in prompts]
    server = Server(llm, settings.slots, settings.sampling)
    sizes = settings.sizes(llm.model.device.type)
    on_progress("a forward by its rows")
    runs = [Run(label="forward", settings={"cached_tokens": NUM_CACHED}, figures=forward_times(llm))]
    on_progress("prefill")
    runs.append(Run(label="prefill", settings={"statistic": "median and range"}, figures=prefill_speeds(llm)))
    for size in sizes:
        loads = _loads(server, decoders, encoded, size, settings.seconds, on_progress)
        runs += [run_of(decoder, load, size) for decoder, load in loads.items()]
        if len(loads) > 1:
            runs.append(comparison(loads, size))
    described = {
        "model": llm.path.name,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "decoders": decoders,
        "batch_sizes": sizes,
        "seconds": settings.seconds,
        "sampling": asdict(settings.sampling),
        "slots": asdict(llm.resolve_slots(settings.slots)),
        "num_prompts": len(prompts),
    }
    return Result(name="bench", settings=described, runs=runs, device=str(llm.model.device))


def contenders(llm: LLM, settings: SpeedSettings) -> tuple[str, ...]:
    """The decoders to measure: those named, or all that this checkpoint supports and was trained for.

    A diffusion decoder over weights of another objective writes nonsense, and how fast nonsense comes depends on what it says; so does slot
    decoding over the weights of a diffusion objective. Raises CheckpointError if a named one is not supported.
    """
    if settings.decoders:
        for name in settings.decoders:
            _request(llm, name, settings)
        return tuple(dict.fromkeys(settings.decoders))
    objective = llm.trained_objective
    known = ("autoregressive", objective) if objective in DIFFUSION else tuple(name for name in DECODERS if name not in DIFFUSION)
    found = tuple(name for name in known if _is_supported(llm, name, settings))
    return found if set(found) != {"autoregressive", "auto"} else ("autoregressive",)  # nothing to choose from


def forward_times(llm: LLM, widths: Sequence[int] | None = None, repeats: int = 5) -> dict[str, Figure]:
    """Milliseconds of one forward of the engine's network, readout included, by number of new tokens."""
    widths = widths or (GPU_WIDTHS if llm.model.device.type == "cuda" else CPU_WIDTHS)
    costs = measure(llm.engine.runner.network, widths, repeats)
    return {f"forward_ms_{width}": 1000 * seconds for width, seconds in zip(costs.widths, costs.seconds, strict=True)}


def prefill_speeds(llm: LLM, lengths: Sequence[int] = PREFILL_LENGTHS, repeats: int = 5) -> dict[str, Figure]:
    """Prompt tokens per second by length of the prompt, one request alone, until its first token is there: median and range.

    Lengths beyond the model's context or the engine's cache are left out.
    """
    one_token = SamplingParams(max_tokens=1)
    found: dict[str, Figure] = {}
    for length in lengths:
        prompt: list[int] = [token % llm.config.vocab_size for token in range(1, length + 1)]
        try:
            llm.warm_up(("autoregressive",), batch_size=1, sampling=one_token, prompt_tokens=length)
            outputs = [llm.generate([prompt], one_token, decoder="autoregressive")[0] for _ in range(repeats + 1)][1:]
        except RefusionError:  # no room for it
            continue
        speeds = sorted(length / out.stats.first_token_seconds for out in outputs)
        found[f"prefill_tokens_per_second_{length}"] = Interval(statistics.median(speeds), speeds[0], speeds[-1])
    return found


def _loads(
    server: Server, decoders: Sequence[str], prompts: Sequence[Prompt], size: int, seconds: float, on_progress: Callable[[str], None]
) -> dict[str, Load]:
    """What every decoder did in its seconds; alone in turns, else one after the other."""
    loads = {decoder: Load() for decoder in decoders}
    longest = max(len(prompt) for prompt in prompts)
    short = replace(server, sampling=replace(server.sampling, max_tokens=min(server.sampling.max_tokens, _WARM_UP_TOKENS)))
    for decoder in decoders:
        on_progress(f"{decoder}, batch {size}: warming up")
        server.warm_up([decoder], longest, size)
        short.serve(Load(), decoder, cycled(prompts, size), size)
        server.warm_up([decoder], longest, size)  # by now experience may have changed what is prepared
    if size == 1:
        _alone(server, loads, prompts, seconds, on_progress)
    else:
        for decoder, load in loads.items():
            on_progress(f"{decoder}, batch {size}")
            server.serve_for(load, decoder, prompts, size, seconds)
    return loads


def _alone(server: Server, loads: dict[str, Load], prompts: Sequence[Prompt], seconds: float, on_progress: Callable[[str], None]) -> None:
    """Prompt by prompt, as long as the slowest decoder has time; the prompts are not used twice."""
    contenders = [partial(server.serve, load, decoder, concurrency=1) for decoder, load in loads.items()]
    for number, prompt in enumerate(prompts, 1):
        on_progress(f"batch 1, prompt {number} of {len(prompts)}")
        take_turns(contenders[number % len(loads) :] + contenders[: number % len(loads)], [prompt])
        if max(load.seconds for load in loads.values()) >= seconds:
            return


def _is_supported(llm: LLM, decoder: str, settings: SpeedSettings) -> bool:
    try:
        _request(llm, decoder, settings)
    except CheckpointError:
        return False
    return True


def _request(llm: LLM, decoder: str, settings: SpeedSettings) -> None:
    """Raises what a request of this decoder would raise."""
    llm.new_request([0], settings.sampling, settings.slots, decoder)
