"""Bounds of the diffusion baselines against all their terms written out, under the masks of the training layouts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from refusion.decoding.diffusion_params import BlockDiffusionParams, MaskedDiffusionParams
from refusion.evaluation.diffusion_likelihood import diffusion_bounds, diffusion_samples
from refusion.model.transformer import Transformer
from refusion.training.attention import dense_mask
from refusion.training.layouts import block_diffusion_row, masked_diffusion_row

MASK = 5
CONTEXT, ANSWER = [7, 8, 9], [11, 12, 13, 14]


@pytest.fixture(scope="module")
def model(tiny_checkpoints: dict[str, Path]) -> Transformer:
    return Transformer.from_pretrained(tiny_checkpoints["llama"])


@pytest.fixture(scope="module")
def reference(tiny_checkpoints: dict[str, Path]) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoints["llama"]).eval()


@torch.no_grad()
def trained(reference: torch.nn.Module, noisy: list[int], answer: list[int], block_size: int | None) -> torch.Tensor:
    """[A, V] log-probabilities at the noisy tokens of a training row."""
    generator = np.random.default_rng(0)
    given = {"mask_token_id": MASK, "generator": generator}
    if block_size is None:
        row = masked_diffusion_row(np.array(CONTEXT), np.array(answer), **given)
    else:
        row = block_diffusion_row(np.array(CONTEXT), np.array(answer), block_size=block_size, **given)
    input_ids = row.input_ids.copy()
    input_ids[-len(noisy) :] = noisy  # these masks instead of the drawn ones
    ids, positions = torch.tensor(input_ids)[None], torch.tensor(row.position_ids)[None]
    mask = dense_mask(torch.zeros_like(ids), torch.tensor(row.visible)[None], torch.tensor(row.group)[None], torch.float32)
    logits = reference(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]
    return logits[-len(noisy) :].float().log_softmax(-1)


def exact_bound(reference: torch.nn.Module, answer: list[int], block_size: int | None) -> float:
    """Every block, every number of masks and every set of that size."""
    size, total = block_size or len(answer), 0.0
    for first in range(0, len(answer), size):
        block = range(first, min(first + size, len(answer)))
        for count in range(1, len(block) + 1):
            values = []
            for masked in itertools.combinations(block, count):
                noisy = [MASK if place in masked else token for place, token in enumerate(answer)]
                rows = trained(reference, noisy, answer, block_size)
                values.append(sum(rows[place, answer[place]].item() for place in masked))
            total += len(block) / count * sum(values) / len(values) / len(block)
    return total


@pytest.mark.parametrize("block_size", [None, 1, 2, 3])
def test_the_bound_converges_to_the_sum_over_all_masks(model: Transformer, reference: torch.nn.Module, block_size: int | None) -> None:
    params = MaskedDiffusionParams() if block_size is None else BlockDiffusionParams(block_size=block_size)
    (found,) = diffusion_bounds(model, [(CONTEXT, ANSWER)], MASK, params, num_samples=800, seed=0, batch_size=200)
    expected = exact_bound(reference, ANSWER, block_size)
    if block_size == 1:
        assert found.standard_error == 0.0
        assert found.log_prob == pytest.approx(expected, abs=1e-4)
    else:
        assert 0 < found.standard_error < 0.3
        assert abs(found.log_prob - expected) < 4 * found.standard_error


@pytest.mark.parametrize("block_size", [None, 2, 3])
def test_a_sample_is_a_row_of_the_training_layout(model: Transformer, reference: torch.nn.Module, block_size: int | None) -> None:
    from refusion.evaluation.scoring import score_rows

    params = MaskedDiffusionParams() if block_size is None else BlockDiffusionParams(block_size=block_size)
    samples = diffusion_samples((CONTEXT, ANSWER), MASK, params, 5, 0)
    for (row, weights), score in zip(samples, score_rows(model, [row for row, _ in samples], 2), strict=True):
        noisy = list(row.input_ids)[-len(ANSWER) :]
        expected = trained(reference, noisy, ANSWER, block_size)
        places = [place for place, token in enumerate(noisy) if token == MASK]
        assert score.log_probs == pytest.approx([expected[place, ANSWER[place]].item() for place in places], abs=1e-4)
        assert len(weights) == len(places)
        assert list(row.targets) == [ANSWER[place] for place in places]


def test_one_token_is_exact_and_noise_belongs_to_the_pair(model: Transformer, reference: torch.nn.Module) -> None:
    params = MaskedDiffusionParams()
    (found,) = diffusion_bounds(model, [(CONTEXT, [11])], MASK, params, num_samples=4, seed=0)
    assert (found.log_prob, found.standard_error) == (pytest.approx(trained(reference, [MASK], [11], None)[0, 11].item(), abs=1e-4), 0.0)
    pairs = [(CONTEXT, ANSWER), ([60], [61, 62])]
    together = diffusion_bounds(model, pairs, MASK, params, num_samples=4, seed=1)
    alone = [diffusion_bounds(model, [pair], MASK, params, num_samples=4, seed=1)[0] for pair in pairs]
    assert [found.log_prob for found in together] == pytest.approx([found.log_prob for found in alone], abs=1e-4)
    assert math.isfinite(together[0].standard_error)
