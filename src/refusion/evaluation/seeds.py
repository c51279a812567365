"""Accuracy over problems and training seeds: means, paired differences and ratios with 95 % intervals that know both.

Two sources of chance are resampled (percentile bootstrap): which problems were asked, the same draw for everyone who is compared, and which
seeds a model was trained with, a draw of its own for each. With few seeds the second part is itself only an estimate; with one seed it is
missing, and the interval speaks of these weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from refusion.evaluation.statistics import Interval

Scores = Mapping[str, npt.NDArray[np.float64]]
"""Task -> [S, N] score of every seed on every problem; the problems of a task are the same, in the same order, for everyone."""

# R = resamples, S = seeds, N = problems

NUM_RESAMPLES = 4000


def mean_score(scores: Scores, seed: int = 0) -> Interval:
    """Unweighted mean over tasks."""
    return _interval(_point(scores), _resampled([scores], seed)[0])


def difference(first: Scores, second: Scores, seed: int = 0) -> Interval:
    """Mean of the first minus mean of the second, problem by problem the same."""
    one, other = _resampled([first, second], seed)
    return _interval(_point(first) - _point(second), one - other)


def speed_ratio(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]], seed: int = 0) -> Interval:
    """Tokens per second of the first over the second, from (tokens, seconds) of each on the same prompts; resampled over prompts."""
    assert len(first) == len(second), f"{len(first)} prompts against {len(second)}"
    one, other = np.array(first, dtype=np.float64), np.array(second, dtype=np.float64)  # [N, 2]
    weights = _weights(np.random.default_rng(seed), len(one))  # [R, N]
    pooled = [weights @ part for part in (one, other)]  # [R, 2] each
    values = (pooled[0][:, 0] / pooled[0][:, 1]) / (pooled[1][:, 0] / pooled[1][:, 1])
    point = (one[:, 0].sum() / one[:, 1].sum()) / (other[:, 0].sum() / other[:, 1].sum())
    return _interval(float(point), values)


def _point(scores: Scores) -> float:
    return float(np.mean([values.mean() for values in scores.values()]))


def _resampled(models: Sequence[Scores], seed: int) -> list[npt.NDArray[np.float64]]:
    """[R] mean over tasks of every model."""
    generator = np.random.default_rng(seed)
    tasks = list(models[0])
    assert all(list(scores) == tasks for scores in models), "models were asked different tasks"
    seeds = [_weights(generator, len(next(iter(scores.values())))) for scores in models]  # [R, S] each
    totals = [np.zeros(NUM_RESAMPLES) for _ in models]
    for task in tasks:
        problems = _weights(generator, models[0][task].shape[1])  # [R, N]
        for total, scores, of_seeds in zip(totals, models, seeds, strict=True):
            total += ((problems @ scores[task].T) * of_seeds).sum(axis=1) / len(tasks)
    return totals


def _weights(generator: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    """[R, count] how often each was drawn, over `count`."""
    return generator.multinomial(count, np.full(count, 1 / count), size=NUM_RESAMPLES) / count


def _interval(value: float, resampled: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))
