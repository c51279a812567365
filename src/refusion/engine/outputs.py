"""What a caller gets: the answer as text and tokens, and what it cost."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Stats:
    """What an answer cost."""

    num_tokens: int
    """Generated tokens up to and including the first EOS."""
    num_forwards: int
    """Forwards that yielded tokens or verdicts; one that only prefills does not count."""
    seconds: float
    """Wall clock from the moment the request got its place among those that run to its end."""
    first_token_seconds: float = 0.0
    """Wall clock from the moment the request was made until its first token was final."""

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
    decoder: str = "refusion"
    """What wrote it: "refusion", "autoregressive", "masked_diffusion" or "block_diffusion"."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer that is still being written."""

    text: str
    """The text that became certain."""
    output: RequestOutput | None = None
    """The whole answer, with the last piece."""
