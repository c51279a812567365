"""Drawing tokens with noise that belongs to the request, not to the batch it sits in.

Each draw needs one uniform number, a hash of (seed, position, attempt): `attempt` counts the request's logical drafts (one per plan, one
per infill turn), so fused and two-pass decoding use the same number for the same draft.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# B = requests, R = rows, V = vocabulary


@dataclass(frozen=True, slots=True)
class Draw:
    """How the rows of one forward are drawn: numbers where all are drawn alike, tensors with one value a row [R] otherwise."""

    temperature: float | Tensor
    top_p: float | Tensor
    seeds: Tensor  # [B]
    attempts: Tensor  # [B]
    shift: int = 0
    """Added to the positions that noise is keyed by."""

    @property
    def is_greedy(self) -> bool:
        return not isinstance(self.temperature, Tensor) and self.temperature == 0.0


def cut_answer(token_ids: list[int], eos_ids: Sequence[int], max_tokens: int) -> list[int]:
    """Tokens through the first EOS, at most `max_tokens`."""
    return token_ids[: min([max_tokens, *(token_ids.index(token) + 1 for token in eos_ids if token in token_ids)])]


def filtered_log_probs(logits: Tensor, draw: Draw) -> Tensor:
    """log top-p(softmax(logits / T)) [R, V], renormalised over what top-p keeps; the most probable token always stays."""
    log_probs = (logits / _by_row(draw.temperature)).log_softmax(dim=1)
    if not isinstance(draw.top_p, Tensor) and draw.top_p >= 1.0:
        return log_probs
    descending, order = log_probs.sort(dim=1, descending=True, stable=True)
    mass_before = descending.exp().cumsum(dim=1) - descending.exp()
    is_dropped = torch.zeros_like(log_probs, dtype=torch.bool).scatter(1, order, mass_before >= _by_row(draw.top_p))
    filtered = log_probs.masked_fill(is_dropped, -torch.inf).log_softmax(dim=1)
    # A row that asks for all keeps its numbers to the bit, as if nobody beside it wanted a filter.
    return torch.where(draw.top_p[:, None] >= 1.0, log_probs, filtered) if isinstance(draw.top_p, Tensor) else filtered


def _by_row(value: float | Tensor) -> float | Tensor:
    return value[:, None] if isinstance(value, Tensor) else value


def draw_tokens(log_probs: Tensor, seeds: Tensor, positions: Tensor, attempts: Tensor) -> Tensor:
    """One token per row [R] by inverting the cumulative distribution at the row's uniform number."""
    cumulative = log_probs.double().exp().cumsum(dim=1)  # [R, V]
    target = uniform(seeds, positions, attempts)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return drawn.clamp(max=log_probs.shape[1] - 1)


def uniform(seeds: Tensor, positions: Tensor, attempts: Tensor) -> Tensor:
    """Numbers in [0, 1), float64, a pure function of the three keys (int64, same shape)."""
    mixed = _mix(_mix(_mix(seeds) ^ positions) ^ attempts)
    return ((mixed >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def _mix(state: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on wrapping int64."""
    state = state + _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, by: int) -> Tensor:
    """Logical right shift: torch shifts int64 arithmetically."""
    return (state >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
