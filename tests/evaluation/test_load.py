"""Figures of decoders under load."""

from __future__ import annotations

import pytest

from refusion.evaluation.load import Load, comparison, cycled, quantile, run_of
from refusion.llm import RequestOutput, Stats


def load_of(*speeds: float, seconds: float) -> Load:
    """One answer of 10 tokens in 5 forwards for every speed."""
    outputs = [RequestOutput((1,), (2,) * 10, "", "length", Stats(10, 5, 10 / speed, 0.01 * speed)) for speed in speeds]
    return Load(outputs, seconds)


@pytest.mark.parametrize(("count", "p50", "p99"), [(1, 1, 1), (2, 1, 2), (100, 50, 99), (1000, 500, 990)])
def test_quantiles_are_values_that_occur(count: int, p50: int, p99: int) -> None:
    ordered = list(range(1, count + 1))
    assert [quantile(ordered, 0.5), quantile(ordered, 0.99)] == [p50, p99]


def test_a_load_is_tokens_over_wall_clock_with_its_requests_quartiles() -> None:
    run = run_of("refusion", load_of(10.0, 20.0, 40.0, 80.0, seconds=4.0), 1)
    assert run.figures["tokens_per_second"] == 10.0
    assert run.figures["tokens_per_second_request"].value == 30.0  # type: ignore[union-attr]
    assert run.figures["tokens_per_forward"].value == 2.0  # type: ignore[union-attr]
    assert run.figures["first_token_ms_p50"] == 200.0
    assert run.figures["ms_per_forward"] == 200.0


def test_the_lengths_that_were_prepared_stand_beside_the_speed() -> None:
    load = load_of(10.0, seconds=1.0)
    assert "prepared_lengths" not in run_of("autoregressive", load, 1).figures
    load.prepared_lengths += [8, 8]
    other = load_of(20.0, seconds=0.5)
    other.prepared_lengths += [2]
    load.add(other)
    figures = run_of("refusion", load, 1).figures
    assert (figures["prepared_lengths"], figures["prepared_lengths_last"]) == (6.0, 2)
    assert (figures["num_requests"], figures["seconds"]) == (2, 1.5)


def test_every_decoder_is_compared_with_one_token_at_a_time_and_auto_with_the_better() -> None:
    loads = {
        "refusion": load_of(60.0, seconds=0.2),
        "autoregressive": load_of(30.0, seconds=0.4),
        "block_diffusion": load_of(15.0, seconds=0.8),
        "auto": load_of(60.0, seconds=0.25),
    }
    assert comparison(loads, 1).figures == {
        "refusion_over_autoregressive": 2.0,
        "refusion_over_autoregressive_median": 2.0,
        "block_diffusion_over_autoregressive": 0.5,
        "block_diffusion_over_autoregressive_median": 0.5,
        "auto_over_better": 0.8,
    }


def test_prompts_are_used_again_where_there_are_too_few() -> None:
    assert cycled(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
