from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refusion.decoding.sampling import Draw, cut_answer, draw_tokens, filtered_log_probs, uniform


def _draw(temperature: float = 1.0, top_p: float = 1.0) -> Draw:
    return Draw(temperature, top_p, torch.tensor([0]), torch.tensor([1]))


def _keys(count: int, *, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.full((count,), seed), torch.arange(count), torch.ones(count, dtype=torch.long)


def test_noise_is_uniform_over_positions_seeds_and_attempts() -> None:
    run, ones = torch.arange(20_000), torch.ones(20_000, dtype=torch.long)
    for keys in ((ones, run, ones), (run, ones, ones), (ones, ones, run)):
        numbers = uniform(*keys)
        assert numbers.dtype == torch.float64
        assert 0.0 <= float(numbers.min()) < float(numbers.max()) < 1.0
        counts = torch.histc(numbers.float(), bins=20, min=0.0, max=1.0)
        # A bin holds 1000 +- 31; five deviations.
        assert (counts - 1000).abs().max() < 155
        # Neighbouring keys are independent: the correlation of 20,000 pairs is 0 +- 0.007.
        assert abs(float(torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1])) < 0.035


def test_noise_depends_on_each_key_and_on_nothing_else() -> None:
    seed, position, attempt = (torch.tensor([value]) for value in (7, 11, 13))
    number = uniform(seed, position, attempt)
    assert uniform(torch.tensor([7, 7]), torch.tensor([99, 11]), torch.tensor([13, 13]))[1] == number[0]
    assert len({float(uniform(*(key + (index == i) for i, key in enumerate((seed, position, attempt))))) for index in range(4)}) == 4


def test_noise_takes_any_int64_seed() -> None:
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        assert 0.0 <= float(uniform(torch.tensor([seed]), torch.tensor([0]), torch.tensor([0]))) < 1.0


def test_drawn_tokens_have_their_probabilities() -> None:
    probability = torch.tensor([0.5, 0.3, 0.0, 0.2])
    count = 20_000
    drawn = draw_tokens(probability.log().expand(count, -1), *_keys(count))
    shares = torch.bincount(drawn, minlength=4) / count
    assert shares[2] == 0
    # Standard deviation of a share is at most 0.0035; five of them.
    assert shares.tolist() == pytest.approx(probability.tolist(), abs=0.018)


def test_top_p_keeps_the_smallest_set_with_enough_mass_and_renormalises() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in (
        (0.49, [1.0]),
        (0.51, [0.625, 0.375]),
        (0.79, [0.625, 0.375]),
        (0.81, [0.5263, 0.3158, 0.1579]),
        (1.0, [0.5, 0.3, 0.15, 0.05]),
    ):
        expected = kept + [0.0] * (4 - len(kept))
        assert filtered_log_probs(logits, _draw(top_p=top_p)).exp()[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_top_p_keeps_the_most_probable_token_however_small_it_is() -> None:
    assert filtered_log_probs(torch.zeros(1, 5), _draw(top_p=1e-6)).exp()[0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_temperature_sharpens_before_top_p_cuts() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    assert torch.allclose(filtered_log_probs(logits, _draw(0.5)).exp(), torch.softmax(logits / 0.5, dim=1))
    assert (filtered_log_probs(logits, _draw(0.1, 0.9)).exp() > 0).sum() == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.floats(0.1, 3.0))
def test_filtered_probabilities_are_a_distribution_over_a_head_of_enough_mass(seed: int, top_p: float, temperature: float) -> None:
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(seed)) * 3
    plain = torch.softmax(logits / temperature, dim=1)
    kept = filtered_log_probs(logits, _draw(temperature, top_p)).exp()
    assert kept.sum(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    for row in range(3):
        is_kept = kept[row] > 0
        assert float(plain[row][is_kept].sum()) >= top_p - 1e-5
        assert float(plain[row][is_kept].sum() - plain[row][is_kept].min()) < top_p + 1e-5  # the smallest such set
        assert is_kept.all() or plain[row][is_kept].min() >= plain[row][~is_kept].max()


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 0] = logits[0, 3] = -torch.inf
    drawn = draw_tokens(filtered_log_probs(logits, _draw(2.0)).expand(500, -1), *_keys(500))
    assert set(drawn.tolist()) == {1, 2}


def test_cut_answer_keeps_the_first_eos_and_at_most_max_tokens() -> None:
    assert cut_answer([5, 6, 0, 7, 0], [0, 9], 10) == [5, 6, 0]
    assert cut_answer([5, 9, 0], [0, 9], 10) == [5, 9]
    assert cut_answer([5, 6, 7, 0], [0], 3) == [5, 6, 7]
    assert cut_answer([], [0], 3) == []
