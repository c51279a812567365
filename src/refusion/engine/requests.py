"""What the engine is asked for, where each request stands, and the answer it ends with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from typing import Protocol

import numpy as np
from torch import Tensor

from refusion.decoding.diffusion_params import BlockDiffusionParams, DiffusionParams, MaskedDiffusionParams
from refusion.decoding.events import Event
from refusion.decoding.params import SamplingParams, SlotSettings
from refusion.decoding.sampling import cut_answer
from refusion.engine.lanes import LaneKey
from refusion.engine.prefix import ROOT
from refusion.engine.runner import HostPages
from refusion.errors import RequestError

GAP = -1
"""Stands in an unfinished answer where no token is final yet."""
SMALLEST_LANE = 256
"""Answers up to this many tokens share lanes whatever their max_tokens; above it, lanes grow by powers of two."""
SMALLEST_PROMPT = 512
"""The same of prompts, for decoders whose lanes hold them."""

DIFFUSION_DECODERS = ("masked_diffusion", "block_diffusion")

OnEvent = Callable[[Event], None]


class FindStop(Protocol):
    """Number of answer tokens to keep if a stop string has appeared, else None."""

    def __call__(self, token_ids: list[int], /) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request ends with."""

    request: int  # the `index` it came with
    token_ids: list[int]
    decoder: str  # what wrote it
    is_stopped: bool  # by EOS, a stop id or a stop string; otherwise the length ran out
    num_generated: int  # tokens through the first EOS, before a stop string was cut off
    num_forwards: int
    seconds: float  # from the moment it got a seat
    first_token_seconds: float  # from the moment it was asked until its first token was final
    error: RequestError | None = None  # why it could not be finished

    @property
    def finish_reason(self) -> str:
        return "stop" if self.is_stopped else "length"


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRequest:
    """What a caller asks for. Its callbacks run on the thread that steps the engine."""

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    eos_ids: tuple[int, ...]
    """Ids that end the answer, stop ids included."""
    decoder: str
    """"refusion", "autoregressive", "auto", "masked_diffusion" or "block_diffusion"."""
    slots: SlotSettings | None
    """How "refusion" and "auto" cut the answer into slots."""
    diffusion: DiffusionParams | None = None
    """Resolved settings of "masked_diffusion" and "block_diffusion"."""
    index: int = 0
    """The caller's number for it: `Event.request`, `Answer.request`."""
    on_answer: Callable[[Answer], None]
    """Called once, unless the request is aborted."""
    on_event: OnEvent | None = None
    find_stop: FindStop | None = None


class State(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Saved:
    """All there is of a preempted request."""

    pages: HostPages
    rounds: dict[str, Tensor]
    report: np.ndarray  # [R]
    written: np.ndarray  # [N]
    num_cached: int


@dataclass(eq=False, slots=True)
class Request:
    """A request on its way. `eq=False`: two requests are never the same one."""

    new: NewRequest
    arrival: int
    prompt_ids: np.ndarray  # [P] int32
    asked_at: float
    key: LaneKey | None = None  # None: decoder "auto" has not chosen yet
    state: State = State.WAITING
    seat: int = -1
    pages: list[int] = field(default_factory=list)
    num_prefilled: int = 0  # prompt tokens in the cache
    chain: int = ROOT  # of its last page the prefix cache knows
    num_known_pages: int = 0  # whole prompt pages the prefix cache was told of
    saved: Saved | None = None
    seated_at: float | None = None
    first_token_at: float | None = None
    num_forwards: int = 0
    token_ids: list[int] | None = None  # the finished answer

    @property
    def prefill_ids(self) -> np.ndarray:
        """The prompt tokens that come before the first decode row: autoregressive decoding runs the last one as that row, diffusion all."""
        assert self.key is not None, "which tokens are prefilled depends on the decoder"
        if self.key.diffusion is not None:
            return self.prompt_ids[:0]
        return self.prompt_ids if self.key.slots is not None else self.prompt_ids[:-1]

    @property
    def sharable_ids(self) -> np.ndarray:
        """The prompt tokens whose pages may come from other requests; where the last prompt row names the first token, it has to run."""
        assert self.key is not None, "which tokens are prefilled depends on the decoder"
        names_first = self.key.slots is not None and self.key.slots.names_first
        return self.prompt_ids[:-1] if names_first else self.prefill_ids

    @property
    def has_listeners(self) -> bool:
        return self.new.on_event is not None or self.new.find_stop is not None

    @property
    def is_seated(self) -> bool:
        return self.seat >= 0


def lane_key(new: NewRequest, decoder: str) -> LaneKey:
    """The lane a request belongs to if it is decoded like this."""
    max_prompt = max(SMALLEST_PROMPT, 1 << (len(new.prompt_ids) - 1).bit_length()) if decoder in DIFFUSION_DECODERS else 0
    sampling = new.sampling
    has_top_p = sampling.temperature > 0.0 and sampling.top_p < 1.0
    how = (decoder, new.slots if decoder == "refusion" else None, new.diffusion if decoder in DIFFUSION_DECODERS else None)
    return _lane_key(*how, sampling.max_tokens, new.eos_ids, max_prompt, is_greedy=sampling.temperature == 0.0, has_top_p=has_top_p)


@lru_cache(maxsize=4096)  # asked several times a request, which takes longer than it should at a thousand requests a second
def _lane_key(
    decoder: str,
    slots: SlotSettings | None,
    diffusion: DiffusionParams | None,
    most_tokens: int,
    eos_ids: tuple[int, ...],
    max_prompt: int,
    *,
    is_greedy: bool,
    has_top_p: bool,
) -> LaneKey:
    max_tokens = max(SMALLEST_LANE, 1 << (most_tokens - 1).bit_length())
    width = 1
    if decoder == "refusion":
        assert slots is not None, "slot decoding needs slot settings"
        width = min(slots.slots_per_block(most_tokens), slots.num_slots(max_tokens))
        # However the blocks were described, those of the same length are the same.
        slots = replace(slots, block_size=width * slots.slot_size, serial_blocks=None)
    elif decoder in DIFFUSION_DECODERS:
        assert diffusion is not None, "diffusion decoders need settings of their own"
        width = diffusion.size if isinstance(diffusion, BlockDiffusionParams) else min(diffusion.block_size, max_tokens)
    return LaneKey(
        decoder=decoder,
        slots=slots,
        diffusion=diffusion,
        width=width,
        max_tokens=max_tokens,
        max_prompt=max_prompt,
        eos_ids=tuple(sorted(set(eos_ids))),
        is_greedy=is_greedy,
        has_top_p=has_top_p,
    )


def cache_room(new: NewRequest, key: LaneKey) -> int:
    """Most tokens whose keys and values may be cached, prompt and answer together."""
    prompt, answer = len(new.prompt_ids), new.sampling.max_tokens
    if isinstance(key.diffusion, MaskedDiffusionParams):
        return 0 if key.diffusion.cache == "none" else prompt + answer
    if key.diffusion is not None:
        return prompt + -(-answer // key.width) * key.width - key.width  # the last block stays as it is
    if key.slots is None:
        return prompt - 1 + answer
    if key.slots.sliding:
        return prompt + answer
    return prompt + -(-answer // key.slots.slot_size) * key.slots.slot_size


def first_room(new: NewRequest, key: LaneKey) -> int:
    """Tokens a request has room for in the cache from the moment it is seated: its prompt, or all there ever will be."""
    if isinstance(key.diffusion, MaskedDiffusionParams):
        return cache_room(new, key)
    return len(new.prompt_ids) - (key.decoder == "autoregressive")


def diffusion_rows(new: NewRequest, key: LaneKey, prefill_rows: int) -> int:
    """Most decode rows one forward takes for a request of a diffusion lane."""
    if isinstance(key.diffusion, MaskedDiffusionParams):
        return len(new.prompt_ids) + new.sampling.max_tokens
    return max(min(len(new.prompt_ids), prefill_rows), key.width) + key.width


def final_tokens(written: np.ndarray, new: NewRequest) -> list[int]:
    """The answer as far as it is certain: from its beginning to the first gap, the first EOS or max_tokens."""
    first = (written == GAP).argmax()  # 0 where there is none
    tokens: list[int] = (written[:first] if written[first] == GAP else written).tolist()
    return cut_answer(tokens, new.eos_ids, new.sampling.max_tokens)
