"""How probable a model holds a given continuation: exact for the autoregressive chain, a Monte-Carlo bound for slot diffusion.

The bound. Slots are the units of an absorbing diffusion: at time t ~ U(0, 1) each slot is masked with probability t, as in training, and

    log p(x) >= E_t E_masked [ 1/t * sum over masked tokens of log p(token | clean slots) ].

Integrating t out turns it into a sum over the *number* m of masked slots, uniform on 1..S, with a random set of that size and the weight
S/m: the integral of t^(m-1) (1-t)^(S-m) is the Beta function, so a set of m slots weighs 1 / (m C(S, m)), and the expectation is the same.
That form has far less variance, and none for a continuation of a single slot, where it is exact. Rows are those of training: context |
clean slots in random order | masks in text order, positions of the original text, mask head unshifted (ReFusion, arXiv 2512.13586,
section 3; the counting form is the one of LLaDA, arXiv 2502.09992, equation 6).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refusion.errors import ConfigError
from refusion.evaluation.scoring import ScoreRow, TokenScores, score_rows
from refusion.model.transformer import Transformer
from refusion.slots import MDM_TERM, cut_slots, permuted_row, row_generator

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of what follows it; neither may be empty."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Natural logarithm of a probability, or a lower bound of it whose Monte-Carlo error is `standard_error` (0: exact, NaN: unknown)."""

    log_prob: float
    standard_error: float
    is_argmax: bool
    """Autoregressive: every token is the most probable one. Bound: the same in every sample, which does not say what decoding yields."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundSettings:
    """How the bound is estimated."""

    slot_size: int
    """Tokens in a slot, >= 1."""
    num_samples: int = 32
    """Masked sets drawn per continuation, >= 1; a continuation of one slot takes a single one."""
    seed: int = 0
    """Noise is keyed by seed and tokens: the order and the batch of the requests change nothing."""

    def __post_init__(self) -> None:
        for name in ("slot_size", "num_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


def chain_likelihoods(model: Transformer, pairs: Sequence[Pair], batch_size: int = 8) -> list[Likelihood]:
    """Left to right, every token given all before it; exact."""
    scores = score_rows(model, [ScoreRow.continuation(context, answer) for context, answer in pairs], batch_size)
    return [Likelihood(score.total, 0.0, all(score.is_argmax)) for score in scores]


def slot_bounds(
    model: Transformer, pairs: Sequence[Pair], mask_token_id: int, settings: BoundSettings, batch_size: int = 8
) -> list[Likelihood]:
    """The bound of every pair, its samples batched together."""
    samples = [masked_samples(pair, mask_token_id, settings) for pair in pairs]
    scores = iter(score_rows(model, [row for drawn in samples for row, _ in drawn], batch_size))
    is_exact = [len(answer) <= settings.slot_size for _, answer in pairs]
    return [_bound([(weight, next(scores)) for _, weight in drawn], exact) for drawn, exact in zip(samples, is_exact, strict=True)]


def masked_samples(pair: Pair, mask_token_id: int, settings: BoundSettings) -> list[tuple[ScoreRow, float]]:
    """Rows with some slots masked, and the weight S/m of each; m is spread evenly over 1..S from a random start."""
    context, answer = pair
    borders = cut_slots(len(answer), settings.slot_size)
    num_slots = len(borders) - 1
    num_samples = settings.num_samples if num_slots > 1 else 1
    key = zlib.crc32(np.asarray([len(context), *context, *answer], dtype=np.int64).tobytes())
    generator = row_generator(settings.seed, 0, key)
    start = float(generator.random())
    rows = []
    for index in range(num_samples):
        num_masked = 1 + int((start + index / num_samples) % 1.0 * num_slots)
        clean = generator.permutation(num_slots)[num_masked:].astype(np.int64)
        row = permuted_row(context, answer, borders, clean, mask_token_id=mask_token_id, mask_probability=num_masked / num_slots)
        masked = np.flatnonzero(row.terms == MDM_TERM)
        score_row = ScoreRow(row.input_ids.tolist(), row.position_ids.tolist(), masked.tolist(), row.labels[masked].tolist())
        rows.append((score_row, num_slots / num_masked))
    return rows


def _bound(samples: list[tuple[float, TokenScores]], is_exact: bool) -> Likelihood:
    values = np.array([weight * score.total for weight, score in samples])
    # The number of masked slots is spread evenly, which only makes the true error smaller than this one.
    spread = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Likelihood(float(values.mean()), 0.0 if is_exact else spread, all(all(score.is_argmax) for _, score in samples))
