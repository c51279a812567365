from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from refusion.errors import ConfigError
from refusion.evaluation.likelihood import BoundSettings, Pair, chain_likelihoods, masked_samples, slot_bounds
from refusion.model.transformer import Transformer

MASK = 5
PAIRS: list[Pair] = [([7, 8, 9], [11, 12]), ([30, 31], [40, 41, 42, 43, 44, 45, 46]), ([60], [61])]


@pytest.fixture(scope="module")
def model(tiny_checkpoints: dict[str, Path]) -> Transformer:
    return Transformer.from_pretrained(tiny_checkpoints["llama"])


@pytest.fixture(scope="module")
def reference(tiny_checkpoints: dict[str, Path]) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoints["llama"]).eval()


@torch.no_grad()
def log_probs(reference: torch.nn.Module, ids: list[int], positions: list[int] | None = None) -> torch.Tensor:
    """[T, V]; an explicit mask keeps transformers from guessing packed sequences out of the positions."""
    position_ids = None if positions is None else torch.tensor([positions])
    inputs = torch.tensor([ids])
    return reference(inputs, attention_mask=torch.ones_like(inputs), position_ids=position_ids).logits[0].float().log_softmax(-1)


def test_the_chain_is_the_sum_of_the_next_tokens(model: Transformer, reference: torch.nn.Module) -> None:
    found = chain_likelihoods(model, PAIRS, batch_size=2)
    for (context, answer), likelihood in zip(PAIRS, found, strict=True):
        ids = [*context, *answer]
        rows = log_probs(reference, ids[:-1])[len(context) - 1 :]
        assert likelihood.log_prob == pytest.approx(sum(row[token].item() for row, token in zip(rows, answer, strict=True)), abs=1e-4)
        assert likelihood.standard_error == 0.0
        assert likelihood.is_argmax == (rows.argmax(-1).tolist() == list(answer))


def test_greedy_continuations_are_known_as_such(model: Transformer, reference: torch.nn.Module) -> None:
    first = int(log_probs(reference, [7, 8])[-1].argmax())
    second = int(log_probs(reference, [7, 8, first])[-1].argmax())
    assert [found.is_argmax for found in chain_likelihoods(model, [([7, 8], [first, second]), ([7, 8], [first, second + 1])])] == [
        True,
        False,
    ]


def test_a_single_slot_is_scored_exactly_by_the_unshifted_mask_head(model: Transformer, reference: torch.nn.Module) -> None:
    (found,) = slot_bounds(model, PAIRS[:1], MASK, BoundSettings(slot_size=4))
    rows = log_probs(reference, [7, 8, 9, MASK, MASK])
    assert found.log_prob == pytest.approx(rows[3, 11].item() + rows[4, 12].item(), abs=1e-4)
    assert found.standard_error == 0.0


def exact_bound(reference: torch.nn.Module, context: list[int], answer: list[int], slot_size: int) -> float:
    """Every number of masked slots, every set of that size and every order of the clean ones, by hand."""
    slots = [list(range(start, min(start + slot_size, len(answer)))) for start in range(0, len(answer), slot_size)]
    by_count = []
    for count in range(1, len(slots) + 1):
        values = []
        for masked in itertools.combinations(range(len(slots)), count):
            for order in itertools.permutations(set(range(len(slots))) - set(masked)):
                clean = [token for slot in order for token in slots[slot]]
                hidden = [token for slot in masked for token in slots[slot]]
                ids = [*context, *(answer[i] for i in clean), *[MASK] * len(hidden)]
                positions = [*range(len(context)), *(len(context) + i for i in (*clean, *hidden))]
                rows = log_probs(reference, ids, positions)[-len(hidden) :]
                values.append(sum(row[answer[i]].item() for row, i in zip(rows, hidden, strict=True)))
        by_count.append(len(slots) / count * sum(values) / len(values))
    return sum(by_count) / len(by_count)


def test_the_bound_is_the_expectation_over_masked_sets(model: Transformer, reference: torch.nn.Module) -> None:
    context, answer = PAIRS[1]
    expected = exact_bound(reference, list(context), list(answer), slot_size=3)
    (found,) = slot_bounds(model, PAIRS[1:2], MASK, BoundSettings(slot_size=3, num_samples=600, seed=1), batch_size=64)
    assert 0 < found.standard_error < 0.2 * abs(expected)
    assert abs(found.log_prob - expected) < 4 * found.standard_error


def test_counting_masked_slots_equals_masking_with_probability_t() -> None:
    """For any loss f of a set: the integral over t of E[f(set)] / t is the mean over m of S / m times the mean of f over sets of m."""
    num_slots = 4
    losses = np.random.default_rng(0).random(2**num_slots)
    sizes = np.array([bin(index).count("1") for index in range(2**num_slots)])
    times = (np.arange(20000) + 0.5) / 20000
    weights = times[:, None] ** (sizes - 1) * (1 - times[:, None]) ** (num_slots - sizes)  # the set's probability over t
    integral = (weights[:, sizes > 0] @ losses[sizes > 0]).mean()
    # A set's loss is a sum over its slots: weight 1 / t for the whole sum, and S / m where m is drawn uniformly from 1 .. S.
    counted = np.mean([num_slots / m * losses[sizes == m].mean() for m in range(1, num_slots + 1)])
    assert integral == pytest.approx(counted, rel=1e-6)


def test_noise_depends_on_seed_and_tokens_alone(model: Transformer) -> None:
    settings = BoundSettings(slot_size=2, num_samples=6, seed=3)
    together = slot_bounds(model, PAIRS, MASK, settings, batch_size=5)
    for pair, found in zip(reversed(PAIRS), reversed(together), strict=True):
        assert slot_bounds(model, [pair], MASK, settings)[0].log_prob == pytest.approx(found.log_prob, abs=1e-4)
    other = slot_bounds(model, PAIRS, MASK, BoundSettings(slot_size=2, num_samples=6, seed=4))
    assert other[1].log_prob != pytest.approx(together[1].log_prob, abs=1e-3)


def test_numbers_of_masked_slots_are_spread_evenly() -> None:
    drawn = masked_samples(([1], list(range(10, 18))), MASK, BoundSettings(slot_size=2, num_samples=8))
    assert sorted(4 / weight for _, weight in drawn) == [1, 1, 2, 2, 3, 3, 4, 4]
    (single,) = masked_samples(([1], [10, 11]), MASK, BoundSettings(slot_size=2, num_samples=8))
    assert single[1] == 1.0


def test_one_sample_of_several_slots_has_no_known_error(model: Transformer) -> None:
    (found,) = slot_bounds(model, PAIRS[1:2], MASK, BoundSettings(slot_size=2, num_samples=1))
    assert math.isnan(found.standard_error)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="num_samples is 0"):
        BoundSettings(slot_size=2, num_samples=0)
