"""The one front door: load a checkpoint by name or path, generate from text, token ids or chat messages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from refusion import hub
from refusion.checkpoint import read_json
from refusion.decoding.autoregressive import AutoregressiveDecoder
from refusion.decoding.events import Event
from refusion.decoding.forward import EagerForward, ForwardFn
from refusion.decoding.params import SamplingParams, SlotParams, SlotSettings
from refusion.decoding.refusion import ReFusionDecoder
from refusion.engine.batch import Answer, Decoder, run_batch
from refusion.errors import CheckpointError, RequestError
from refusion.model.config import ModelConfig
from refusion.model.transformer import Transformer
from refusion.tokenizer import Tokenizer

DECODERS = ("refusion", "autoregressive")
Prompt = str | list[int] | list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Stats:
    """What an answer cost."""

    num_tokens: int
    """Generated tokens up to and including the first EOS."""
    num_forwards: int
    """Forwards that yielded tokens or verdicts; the first one also prefills."""
    seconds: float
    """Wall clock from the start of the request's batch to the end of the request."""

    @property
    def tokens_per_forward(self) -> float:
        return self.num_tokens / self.num_forwards

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One answer."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    stats: Stats


class LLM:
    """A checkpoint ready to answer."""

    def __init__(self, path: Path, model: Transformer, tokenizer: Tokenizer | None) -> None:
        self.path, self.model, self.tokenizer = path, model, tokenizer
        self.config: ModelConfig = model.config
        self.recommended: dict[str, Any] = _recommended(path, model.device.type)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: str = "cpu", dtype: str | torch.dtype | None = None) -> "LLM":
        """Load a named model (fetched on first use) or a hub-layout directory.

        dtype: "float32", "bfloat16" or None: bfloat16 where the device computes in it, else float32.
        Raises `CheckpointError` for a missing or damaged checkpoint, `RequestError` for a device that is not there.
        """
        path = hub.resolve(str(name_or_path))
        target = _device(device)
        model = Transformer.from_pretrained(path, device=str(target), dtype=_dtype(dtype, target))
        tokenizer = Tokenizer.from_pretrained(path) if (path / "tokenizer.json").exists() else None
        return cls(path, model, tokenizer)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        slots: SlotParams | None = None,
        decoder: str = "refusion",
        *,
        on_event: Callable[[Event], None] | None = None,
        progress: bool = False,
        batch_size: int | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt, in the order given.

        prompts: str (raw text), list[int] (token ids) or chat messages (templated). decoder: "refusion" or "autoregressive".
        on_event: called with every `Event` as it happens. batch_size: prompts decoded together (default: 1 on a CPU, 64 on a GPU).
        Raises `RequestError` if a prompt cannot be served and `ConfigError` for settings out of range; nothing has run by then.
        """
        sampling = sampling or SamplingParams()
        if isinstance(prompts, str):
            raise RequestError("prompts is a single string; put it in a list")
        if any(isinstance(prompt, dict) for prompt in prompts):
            raise RequestError("prompts holds a chat message; put the messages of one prompt in a list of their own")
        if batch_size is not None and batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; it must be at least 1")
        prompt_ids = [self._encode(prompt, index) for index, prompt in enumerate(prompts)]
        for index, ids in enumerate(prompt_ids):
            self._check_length(ids, index, sampling)
        make = self._decoder_factory(decoder, sampling, (slots or SlotParams()).resolve(self.recommended))
        size = batch_size or (64 if self.model.device.type == "cuda" else 1)
        find_stop = self._stop_finder(sampling)
        outputs: dict[int, RequestOutput] = {}
        with _progress(progress, decoder) as bar:
            task = bar.add_task(decoder, total=len(prompt_ids))
            for start in range(0, len(prompt_ids), size):
                group = prompt_ids[start : start + size]
                seeds = [sampling.seed] * len(group)
                for answer in run_batch(
                    make(), group, seeds, device=self.model.device, first_request=start, find_stop=find_stop, on_event=on_event
                ):
                    outputs[answer.request] = self._output(prompt_ids[answer.request], answer, sampling)
                    bar.advance(task)
        return [outputs[index] for index in range(len(prompt_ids))]

    def forward_fn(self) -> ForwardFn:
        """The network as decoders see it, never emitting the mask token, other specials than EOS, or rows past the tokenizer."""
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
        if isinstance(prompt, list) and prompt and all(isinstance(item, int) for item in prompt):
            ids = [int(item) for item in prompt]  # type: ignore[arg-type]  # every item is an int here
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
        if len(ids) + sampling.max_tokens > context:
            raise RequestError(
                f"prompt {index} has {len(ids)} tokens and max_tokens is {sampling.max_tokens}, "
                f"together more than the context of {context}; shorten the prompt or lower max_tokens to {max(context - len(ids), 0)}"
            )

    def _decoder_factory(self, name: str, sampling: SamplingParams, slots: SlotSettings) -> Callable[[], Decoder]:
        eos_ids = torch.tensor([*self.eos_ids(), *sampling.stop_token_ids], dtype=torch.long, device=self.model.device)
        forward = self.forward_fn()
        if name == "autoregressive":
            return lambda: AutoregressiveDecoder(forward, sampling, eos_ids=eos_ids)
        if name != "refusion":
            raise RequestError(f"unknown decoder {name!r}; use one of {', '.join(DECODERS)}")
        mask_id = self.config.mask_token_id
        if mask_id is None:
            raise CheckpointError(f"{self.path} has no mask token; add one with `refusion convert`, or use decoder='autoregressive'")
        return lambda: ReFusionDecoder(forward, slots, sampling, mask_id=mask_id, eos_ids=eos_ids)

    def _stop_finder(self, sampling: SamplingParams) -> Callable[[list[int]], int | None] | None:
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

    def _output(self, prompt_ids: list[int], answer: Answer, sampling: SamplingParams) -> RequestOutput:
        text = self.tokenizer.decode(answer.token_ids) if self.tokenizer is not None else ""
        cuts = [place for stop in sampling.stop if (place := text.find(stop)) >= 0]
        text = text[: min(cuts)] if cuts else text
        stats = Stats(answer.num_generated, answer.num_forwards, answer.seconds)
        return RequestOutput(tuple(prompt_ids), tuple(answer.token_ids), text, "stop" if answer.is_stopped else "length", stats)


def _holds(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def _recommended(path: Path, device: str) -> dict[str, Any]:
    """Slot settings of the checkpoint's `refusion` block for this device (`slots.cpu`, `slots.cuda`)."""
    block = read_json(path / "config.json").get("refusion") or {}
    return dict((block.get("slots") or {}).get(device) or {})


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


def _progress(is_wanted: bool, title: str) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (is_wanted and console.is_terminal))
