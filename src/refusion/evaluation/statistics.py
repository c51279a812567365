"""Counts over answers: tokens per forward, shares, and 95 % intervals for them. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Z95 = 1.959964
"""Two-sided 95 % point of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ForwardStats:
    """Tokens per forward, pooled (all tokens / all forwards) and over answers."""

    tokens_per_forward: float
    interval: Interval
    num_tokens: int
    num_forwards: int
    quantiles: dict[str, float]
    """p10, p50, p90 of the answers' own tokens per forward."""


def forward_stats(token_ids: Sequence[Sequence[int]], num_forwards: Sequence[int], eos_token_ids: Iterable[int]) -> ForwardStats:
    """Generated tokens up to and including the first EOS, per forward."""
    eos = set(eos_token_ids)
    counts = [until_eos(tokens, eos) for tokens in token_ids]
    interval = pooled_ratio(counts, num_forwards)
    ratios = sorted(count / max(1, forwards) for count, forwards in zip(counts, num_forwards, strict=True))
    quantiles = {f"p{q}": ratios[min(len(ratios) - 1, len(ratios) * q // 100)] for q in (10, 50, 90)} if ratios else {}
    return ForwardStats(interval.value, interval, sum(counts), sum(num_forwards), quantiles)


def until_eos(tokens: Sequence[int], eos: set[int]) -> int:
    """Number of tokens up to and including the first EOS."""
    return next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))


def pooled_ratio(numerators: Sequence[int], denominators: Sequence[int]) -> Interval:
    """sum / sum with the interval of a ratio estimator whose units are answers (their tokens are not independent)."""
    total = sum(denominators)
    if total == 0:
        return Interval(math.nan, math.nan, math.nan)
    value, count = sum(numerators) / total, len(denominators)
    if count < 2:
        return Interval(value, math.nan, math.nan)
    squares = sum((a - value * n) ** 2 for a, n in zip(numerators, denominators, strict=True))
    half = Z95 * math.sqrt(squares * count / (count - 1)) / total
    return Interval(value, value - half, value + half)


def wilson(successes: int, trials: int) -> Interval:
    """A share with Wilson's score interval."""
    if trials == 0:
        return Interval(math.nan, math.nan, math.nan)
    share, z2 = successes / trials, Z95**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return Interval(share, middle - half, middle + half)
