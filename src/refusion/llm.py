"""The one front door: load a checkpoint by name or path, generate from text, token ids or chat messages."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from refusion import hub
from refusion.checkpoint import read_json
from refusion.decoding.diffusion_params import DEFAULT_BLOCK_SIZE, BlockDiffusionParams, DiffusionParams, MaskedDiffusionParams
from refusion.decoding.events import Event
from refusion.decoding.forward import EagerForward, ForwardFn
from refusion.decoding.params import SamplingParams, SlotParams, SlotSettings
from refusion.engine.build import build_engine, flat_network, quantized_network
from refusion.engine.core import Engine
from refusion.engine.costs import measured_costs
from refusion.engine.network import FlatNetwork
from refusion.engine.outputs import Piece, RequestOutput, Stats
from refusion.engine.requests import Answer, FindStop, NewRequest, State
from refusion.engine.settings import EngineSettings
from refusion.engine.slot_choice import SIZES, choose, read_choices
from refusion.engine.stream import AnswerStream
from refusion.errors import CheckpointError, RequestError
from refusion.model.config import ModelConfig
from refusion.model.quantize import KINDS, Kind
from refusion.model.transformer import Transformer
from refusion.tokenizer import Tokenizer

__all__ = [
    "DECODERS",
    "LLM",
    "BlockDiffusionParams",
    "EngineSettings",
    "GenerationFailed",
    "GenerationInterrupted",
    "MaskedDiffusionParams",
    "Piece",
    "Prompt",
    "RequestOutput",
    "SamplingParams",
    "SlotParams",
    "Stats",
]

DECODERS = ("refusion", "autoregressive", "auto", "masked_diffusion", "block_diffusion")
DIFFUSION: dict[str, type[DiffusionParams]] = {"masked_diffusion": MaskedDiffusionParams, "block_diffusion": BlockDiffusionParams}
"""Decoders with settings of their own, and the class of these."""
AS_RECOMMENDED = SlotParams()
"""Everything left to the checkpoint."""
MOST_RESOLVED = 256
"""Slot settings that are kept resolved."""
Prompt = str | list[int] | list[dict[str, str]]
OnOutput = Callable[[int, RequestOutput], None]


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C in `LLM.generate`; what was finished by then is kept."""

    def __init__(self, outputs: dict[int, RequestOutput]) -> None:
        super().__init__()
        self.outputs = outputs
        """Finished answers by the number of their prompt."""


class GenerationFailed(RequestError):
    """Some prompts of an `LLM.generate` could not be answered, for want of memory; the others are."""

    def __init__(self, reason: str, outputs: dict[int, RequestOutput]) -> None:
        super().__init__(reason)
        self.outputs = outputs
        """Finished answers by the number of their prompt."""


class LLM:
    """A checkpoint ready to answer."""

    def __init__(
        self,
        path: Path,
        model: Transformer,
        tokenizer: Tokenizer | None,
        engine: EngineSettings | None = None,
        network: FlatNetwork | None = None,
    ) -> None:
        """network: the model as the engine runs it, where `model` itself was emptied into it."""
        self._network, self.has_model = network, network is None
        self.path, self.model, self.tokenizer = path, model, tokenizer
        self.config: ModelConfig = model.config
        self.engine_settings = engine or EngineSettings()
        self.recommended: dict[str, Any] = _recommended(path, model.device.type)
        self._tokens_per_forward: float | None = self.recommended.pop("tokens_per_forward", None)
        self._choices = read_choices(self.recommended.pop("choices", ()))
        self._resolved: dict[SlotParams, SlotSettings] = {}  # what was asked before: once a request takes too long
        objective = _trained_objective(path)
        self.trained_objective: str | None = objective.get("name")
        """What `refusion train` taught the checkpoint; None: nothing, or by other means."""
        self._trained_block_size: int | None = (
            objective.get("block_size", DEFAULT_BLOCK_SIZE) if self.trained_objective == "block_diffusion" else None
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        engine: EngineSettings | None = None,
        quantization: Kind | None = None,
    ) -> "LLM":
        """Load a named model (fetched on first use) or a hub-layout directory.

        dtype: "float32", "bfloat16" or None: bfloat16 where the device computes in it, else float32. engine: how much it may take.
        quantization: "int8" or "float8" holds the matrices in 8 bits (on a GPU only), prepared one by one, so that a model fits which
        would not at its full size; requests are served as ever, but `model.logits` and `forward_fn` are not available then.
        Raises `CheckpointError` for a missing or damaged checkpoint, `RequestError` for a device that is not there.
        """
        path = hub.resolve(str(name_or_path))
        target = _device(device)
        _check_quantization(quantization, target)
        _check_batch_invariant(engine, target, _dtype(dtype, target))
        is_whole = quantization is None
        model = Transformer.from_pretrained(path, device=str(target) if is_whole else "cpu", dtype=_dtype(dtype, target))
        network = None if quantization is None else quantized_network(model, target, quantization, engine)
        tokenizer = Tokenizer.from_pretrained(path) if (path / "tokenizer.json").exists() else None
        return cls(path, model, tokenizer, engine, network)

    @cached_property
    def engine(self) -> Engine:
        """Runs the requests; made when the first one comes."""
        network = self._network or flat_network(self.model, self.engine_settings)
        return build_engine(network, self.engine_settings, banned_ids=self.banned_ids(), tokens_per_forward=self._tokens_per_forward)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        slots: SlotParams | None = None,
        decoder: str = "refusion",
        *,
        diffusion: DiffusionParams | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_output: OnOutput | None = None,
        progress: bool = False,
        batch_size: int | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt, in the order given.

        prompts: str (raw text), list[int] (token ids) or chat messages (templated). decoder: "refusion", "autoregressive" or "auto",
        which takes the faster one at the load of the moment; "masked_diffusion" and "block_diffusion" are baselines for checkpoints
        trained that way, with settings of their own in `diffusion`. on_event: called with every `Event` as it happens. on_output:
        called with number and answer of each prompt as it is finished. batch_size: prompts decoded together at most (default: what
        the engine holds).
        Raises `RequestError` if a prompt cannot be served and `ConfigError` for settings out of range; nothing has run by then.
        Ctrl-C raises `GenerationInterrupted`, which carries what is finished.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts is a single string; put it in a list")
        if any(isinstance(prompt, dict) for prompt in prompts):
            raise RequestError("prompts holds a chat message; put the messages of one prompt in a list of their own")
        if batch_size is not None and batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; it must be at least 1")
        settings = (sampling, slots, decoder)
        requests = [self.new_request(prompt, *settings, diffusion=diffusion, index=index) for index, prompt in enumerate(prompts)]
        outputs: dict[int, RequestOutput] = {}
        errors: list[RequestError] = []
        with _progress(progress, decoder, len(requests)) as advance:

            def on_answer(answer: Answer) -> None:
                if answer.error is not None:
                    errors.append(answer.error)
                    return
                outputs[answer.request] = self.to_output(requests[answer.request], answer)
                advance()
                if on_output is not None:
                    on_output(answer.request, outputs[answer.request])

            self._run([replace(request, on_event=on_event, on_answer=on_answer) for request in requests], outputs, errors, batch_size)
        if errors:
            raise GenerationFailed(str(errors[0]), outputs) from errors[0]
        return [outputs[index] for index in range(len(requests))]

    def warm_up(
        self,
        decoders: Sequence[str] = ("refusion", "autoregressive"),
        *,
        batch_size: int | None = None,
        sampling: SamplingParams | None = None,
        slots: SlotParams | None = None,
        diffusion: DiffusionParams | None = None,
        prompt_tokens: int = 512,
    ) -> int:
        """Compile and capture what up to `batch_size` such requests together need (default: what the engine holds), before they come.

        prompt_tokens: of the longest prompt. Returns how many forwards it ran; what is ready, and everything on a CPU, takes none.
        Raises `RequestError` while requests are open.
        """
        sampling = sampling or SamplingParams()
        count = batch_size or self.engine_settings.seats(self.model.device.type)
        longest = max(min(prompt_tokens, self.config.max_position_embeddings - sampling.max_tokens), 1)
        own = {decoder: diffusion if decoder in DIFFUSION else None for decoder in decoders}
        requests = [self.new_request([0], sampling, slots, decoder, diffusion=own[decoder]) for decoder in decoders]
        return sum(self.engine.warm_up(new, num_requests=count, prompt_tokens=longest) for new in requests)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        slots: SlotParams | None = None,
        decoder: str = "refusion",
        *,
        diffusion: DiffusionParams | None = None,
    ) -> Iterator[str]:
        """The text of one answer in pieces, as it becomes certain; closing the iterator aborts the request.

        Raises like `generate`, before the first piece.
        """
        if self.tokenizer is None:
            raise RequestError(f"{self.path} has no tokenizer; text cannot be streamed, use generate")
        new = self.new_request(prompt, sampling, slots, decoder, diffusion=diffusion)
        return self._pieces(new, AnswerStream(self.tokenizer, new.sampling, new.eos_ids))

    def new_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        slots: SlotParams | None = None,
        decoder: str = "refusion",
        *,
        diffusion: DiffusionParams | None = None,
        index: int = 0,
    ) -> NewRequest:
        """A checked request for `engine`; its `on_answer` is still to be set. Raises `RequestError` and `ConfigError` like `generate`."""
        sampling = sampling or SamplingParams()
        prompt_ids = self._encode(prompt, index)
        self._check_length(prompt_ids, index, sampling)
        params = self.resolve_diffusion(decoder, diffusion)
        decoder, settings = self._decoder(decoder, slots or AS_RECOMMENDED)
        new = NewRequest(
            prompt_ids=prompt_ids,
            sampling=sampling,
            eos_ids=(*self.eos_ids(), *sampling.stop_token_ids),
            decoder=decoder,
            slots=settings,
            diffusion=params,
            index=index,
            on_answer=lambda _: None,
            find_stop=self._stop_finder(sampling),
        )
        self.engine.check(new)
        return new

    def resolve_slots(self, slots: SlotParams) -> SlotSettings:
        """What is left out filled in as the checkpoint recommends for this device.

        Where it knows several slot sizes, block sizes and numbers of candidate lengths and all of these are left out, those are taken that
        the measured cost of forwards on this machine calls fastest (measuring takes seconds, once). Raises `ConfigError`.
        """
        settings = self._resolved.get(slots)
        if settings is None:
            if len(self._resolved) >= MOST_RESOLVED:
                self._resolved.clear()
            is_open = all(getattr(slots, name) is None for name in SIZES)
            settings = self._resolved[slots] = slots.resolve(self._fastest if is_open and self._choices else self.recommended)
        return settings

    @cached_property
    def _fastest(self) -> dict[str, Any]:
        """What is recommended, in the sizes that suit this machine."""
        others = {name: value for name, value in self.recommended.items() if name not in SIZES}
        return others | dict(choose(self._choices, measured_costs(self.engine.runner.network)))

    def new_stream(self, new: NewRequest) -> AnswerStream | None:
        """Turns the events of a request into text; None without a tokenizer."""
        return AnswerStream(self.tokenizer, new.sampling, new.eos_ids) if self.tokenizer is not None else None

    def to_output(self, new: NewRequest, answer: Answer) -> RequestOutput:
        """What the caller gets of an answer."""
        text = self.tokenizer.decode(answer.token_ids) if self.tokenizer is not None else ""
        cuts = [place for stop in new.sampling.stop if (place := text.find(stop)) >= 0]
        text = text[: min(cuts)] if cuts else text
        stats = Stats(answer.num_generated, answer.num_forwards, answer.seconds, answer.first_token_seconds)
        reason = "stop" if answer.is_stopped else "length"
        return RequestOutput(tuple(new.prompt_ids), tuple(answer.token_ids), text, reason, stats, answer.decoder)

    def _run(
        self, requests: list[NewRequest], outputs: dict[int, RequestOutput], errors: list[RequestError], batch_size: int | None
    ) -> None:
        """Step the engine until every request is in `outputs` or has left an error, at most `batch_size` of them at a time."""
        engine, waiting = self.engine, deque(requests)
        most = batch_size or len(requests)
        try:
            while (num_over := len(outputs) + len(errors)) < len(requests):
                for _ in range(min(len(waiting), most - (len(requests) - len(waiting) - num_over))):
                    engine.add(waiting.popleft())
                engine.step()
        except KeyboardInterrupt as interrupt:
            engine.reset(RequestError("the engine was interrupted"))  # which may have been anywhere in a step
            raise GenerationInterrupted(outputs) from interrupt
        except BaseException:
            engine.reset()
            raise

    def _pieces(self, new: NewRequest, stream: AnswerStream) -> Iterator[str]:
        texts: deque[str] = deque()
        answers: list[Answer] = []
        request = self.engine.add(replace(new, on_event=lambda event: texts.append(stream.push(event)), on_answer=answers.append))
        try:
            while not answers:
                self._step()
                while texts:
                    if text := texts.popleft():
                        yield text
                if request.state is State.FINISHED and not answers:
                    raise RequestError("the engine was reset while this answer was written")
        finally:
            self.engine.abort(request)
        if answers[0].error is not None:
            raise answers[0].error

    def _step(self) -> None:
        """A step of the engine. What breaks it off ends all requests that are open, for nobody knows how far it came."""
        try:
            self.engine.step()
        except BaseException as error:
            reason = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}"
            self.engine.reset(RequestError(f"the engine {reason}"))
            raise

    def forward_fn(self) -> ForwardFn:
        """The network as decoders see it, never emitting the mask token, other specials than EOS, or rows past the tokenizer.

        Raises `RequestError` for a quantised model.
        """
        if not self.has_model:
            raise RequestError("a quantised model is not available outside its engine; load it without quantization")
        return EagerForward(self.model, self.banned_ids())

    def banned_ids(self) -> Tensor:
        """[N] token ids that are never emitted."""
        banned: set[int] = set()
        if self.config.mask_token_id is not None:
            banned.add(self.config.mask_token_id)
        if self.tokenizer is not None:
            banned |= set(self.tokenizer.special_ids) - set(self.eos_ids())
            banned |= set(range(self.tokenizer.vocab_size, self.config.vocab_size))
        return torch.tensor(sorted(banned), dtype=torch.long, device=self.model.device)

    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer."""
        return self.tokenizer.eos_token_ids if self.tokenizer is not None else self.config.eos_token_ids

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt, as `generate` sees them."""
        return self._encode(prompt, 0)

    def _encode(self, prompt: Prompt, index: int) -> list[int]:
        if isinstance(prompt, list) and prompt and all(issubclass(kind, int) for kind in set(map(type, prompt))):
            ids: list[int] = list(map(int, prompt))  # type: ignore[arg-type]  # every item is an int here
        elif self.tokenizer is None:
            raise RequestError(f"prompt {index}: {self.path} has no tokenizer; give token ids")
        elif isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.encode_chat(prompt) if prompt else []  # type: ignore[arg-type]  # a list of messages
        if not ids:
            raise RequestError(f"prompt {index} is empty; give it some text")
        outside = [token for token in ids if not 0 <= token < self.config.vocab_size]
        if outside:
            raise RequestError(f"prompt {index} has token id {outside[0]}; ids of this model are 0 .. {self.config.vocab_size - 1}")
        return ids

    def _check_length(self, ids: list[int], index: int, sampling: SamplingParams) -> None:
        context = self.config.max_position_embeddings
        if len(ids) >= context:
            raise RequestError(
                f"prompt {index} has {len(ids)} tokens, with room for an answer more than the context of {context}; shorten the prompt"
            )
        if len(ids) + sampling.max_tokens > context:
            raise RequestError(
                f"prompt {index} has {len(ids)} tokens and max_tokens is {sampling.max_tokens}, "
                f"together more than the context of {context}; shorten the prompt or lower max_tokens to {context - len(ids)}"
            )

    def resolve_diffusion(self, decoder: str, given: DiffusionParams | None) -> DiffusionParams | None:
        """The settings a diffusion decoder will work with, None for the others. Raises `RequestError` for settings of another decoder."""
        kind = DIFFUSION.get(decoder)
        if given is not None and (kind is None or not isinstance(given, kind)):
            wanted = f"takes {kind.__name__}" if kind is not None else "has no diffusion settings"
            raise RequestError(f"decoder {decoder!r} {wanted}; {type(given).__name__} has no effect on it")
        params = given if given is not None or kind is None else kind()
        return params.resolve(self._trained_block_size) if isinstance(params, BlockDiffusionParams) else params

    def _decoder(self, name: str, params: SlotParams) -> tuple[str, SlotSettings | None]:
        """The decoder and its slot settings. Raises if there is no such decoder, or not with this checkpoint."""
        if name not in DECODERS:
            raise RequestError(f"unknown decoder {name!r}; use one of {', '.join(DECODERS)}")
        has_mask = self.config.mask_token_id is not None
        if name not in ("autoregressive", "auto") and not has_mask:
            raise CheckpointError(f"{self.path} has no mask token; add one with `refusion convert`, or use decoder='autoregressive'")
        if name in ("refusion", "auto") and has_mask:
            return name, self.resolve_slots(params)
        params.resolve(self.recommended)  # raises if they make no sense, needed or not
        return (name if name in DIFFUSION else "autoregressive"), None

    def _stop_finder(self, sampling: SamplingParams) -> FindStop | None:
        if not sampling.stop:
            return None
        if self.tokenizer is None:
            raise RequestError(f"stop strings need a tokenizer, and {self.path} has none; use stop_token_ids")
        decode = self.tokenizer.decode

        def find(token_ids: list[int]) -> int | None:
            """Number of tokens to keep: the fewest whose text holds a stop string."""
            if not _holds(decode(token_ids), sampling.stop):
                return None
            low, high = 1, len(token_ids)  # more tokens never make a stop string vanish
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if _holds(decode(token_ids[:middle]), sampling.stop) else (middle + 1, high)
            return low

        return find


def _holds(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def _recommended(path: Path, device: str) -> dict[str, Any]:
    """Slot settings of the checkpoint's `refusion` block for this device (`slots.cpu`, `slots.cuda`)."""
    block = read_json(path / "config.json").get("refusion") or {}
    return dict((block.get("slots") or {}).get(device) or {})


def _trained_objective(path: Path) -> dict[str, Any]:
    """The objective's settings in the checkpoint's `refusion` block; empty where it names none."""
    training = (read_json(path / "config.json").get("refusion") or {}).get("training") or {}
    return dict(training.get("objective") or {})


def _device(device: str) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"unknown device {device!r}; use cpu or cuda") from error
    if target.type not in ("cpu", "cuda"):
        raise RequestError(f"device {device!r} is not supported; use cpu or cuda")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise RequestError("no CUDA device is available to this torch; use device='cpu'")
    return target


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        is_native = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if is_native else torch.float32
    if dtype not in ("float32", "bfloat16"):
        raise RequestError(f"unknown dtype {dtype!r}; use float32 or bfloat16")
    return getattr(torch, dtype)


def _check_quantization(quantization: Kind | None, device: torch.device) -> None:
    if quantization is None:
        return
    if quantization not in KINDS:
        raise RequestError(f"unknown quantization {quantization!r}; use {' or '.join(KINDS)}")
    if device.type != "cuda":
        raise RequestError(f"quantization {quantization!r} needs a GPU; leave it out on device {device.type!r}")


def _check_batch_invariant(engine: EngineSettings | None, device: torch.device, dtype: torch.dtype) -> None:
    if engine is None or not engine.batch_invariant:
        return
    if device.type != "cuda":
        raise RequestError(f"batch_invariant needs a GPU; on device {device.type!r} load with dtype float32, where batches change no token")
    if dtype == torch.float32:
        raise RequestError("batch_invariant is for 16-bit weights; in float32 batches change no token, leave it out")


@contextmanager
def _progress(is_wanted: bool, title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, if it is wanted; what comes out moves it on by one."""
    console = Console(stderr=True) if is_wanted else None
    if console is None or not console.is_terminal:
        yield lambda: None
        return
    with Progress(TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
