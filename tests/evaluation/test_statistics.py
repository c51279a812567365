from __future__ import annotations

import math

import pytest

from refusion.evaluation.statistics import forward_stats, pooled_ratio, until_eos, wilson

EOS = 3


def test_tokens_per_forward_are_pooled_and_end_at_the_first_eos() -> None:
    stats = forward_stats([[9, 9, EOS, 9], [9] * 6], [1, 3], [EOS])
    assert stats.num_tokens == 9
    assert stats.tokens_per_forward == 9 / 4
    assert stats.quantiles == {"p10": 2.0, "p50": 3.0, "p90": 3.0}
    assert until_eos([9, 9], {EOS}) == 2


def test_pooled_interval_grows_with_the_spread_between_answers() -> None:
    even, uneven = pooled_ratio([5, 5, 5, 5], [10] * 4), pooled_ratio([10, 0, 10, 0], [10] * 4)
    assert even.value == uneven.value == 0.5
    assert even.high - even.low == 0
    assert uneven.high - uneven.low > 0.5
    assert math.isnan(pooled_ratio([1], [2]).low)


def test_wilson_gives_the_textbook_interval() -> None:
    found = wilson(8, 10)
    assert (found.value, round(found.low, 4), round(found.high, 4)) == (0.8, 0.4902, 0.9433)
    assert wilson(0, 10).low == pytest.approx(0, abs=1e-12)
