from __future__ import annotations

import numpy as np
import pytest

from refusion.evaluation.seeds import difference, mean_score, speed_ratio
from refusion.evaluation.statistics import wilson


def test_with_one_seed_the_interval_is_that_of_the_problems() -> None:
    right = np.zeros((1, 400))
    right[0, :300] = 1
    found, expected = mean_score({"task": right}), wilson(300, 400)
    assert found.value == 0.75
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=0.005)


def test_tasks_weigh_the_same_whatever_their_size() -> None:
    assert mean_score({"large": np.ones((2, 900)), "small": np.zeros((2, 10))}).value == 0.5


def test_seeds_that_differ_widen_the_interval() -> None:
    apart = np.stack([np.ones(1000), np.zeros(1000)])
    mixed = np.tile([1.0, 0.0], (2, 500))
    wide, narrow = mean_score({"task": apart}), mean_score({"task": mixed})
    assert wide.value == narrow.value == 0.5
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_a_difference_is_paired_by_problem() -> None:
    generator = np.random.default_rng(0)
    first = (generator.random((1, 500)) < 0.5).astype(float)
    second = first.copy()
    second[0, :5] = 1 - second[0, :5]
    paired, shuffled = difference({"t": first}, {"t": second}), difference({"t": first}, {"t": generator.permuted(second, axis=1)})
    assert paired.value == pytest.approx(first.mean() - second.mean())
    assert paired.low <= paired.value <= paired.high
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low)


def test_the_same_draws_give_the_same_interval() -> None:
    scores = {"t": np.tile([1.0, 0.0, 1.0], (2, 30))}
    assert mean_score(scores) == mean_score(scores)


def test_speeds_are_pooled_over_prompts() -> None:
    found = speed_ratio([(100.0, 1.0), (300.0, 1.0)], [(100.0, 2.0), (100.0, 2.0)])
    assert found.value == 4.0
    assert found.low <= 4.0 <= found.high
    with pytest.raises(AssertionError, match="prompts"):
        speed_ratio([(1.0, 1.0)], [])
