from __future__ import annotations

import pytest
import torch

from refusion.model.quantize import KINDS, Kind, quantize


def random_weight() -> torch.Tensor:
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 6)[:, None]


def test_int8_is_off_by_at_most_half_a_step_of_its_row() -> None:
    weight = random_weight()
    made = quantize(weight, "int8")
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((made.dequantize(torch.float32) - weight).abs() <= 0.5001 * steps).all()


def test_float8_is_off_by_at_most_a_sixteenth_of_each_value() -> None:
    weight = random_weight()
    made = quantize(weight, "float8")
    # Three stored bits of mantissa: half a unit is 2**-4 of the value; below 2**-6 of the code range the steps stop shrinking at 2**-9.
    allowed = torch.maximum(weight.abs() / 16, made.scale[:, None] * 2**-10)
    assert ((made.dequantize(torch.float32) - weight).abs() <= 1.0001 * allowed).all()


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_largest_weight_of_a_row_keeps_its_value(kind: Kind) -> None:
    weight = random_weight()
    peak = weight.abs().argmax(dim=1, keepdim=True)
    kept = quantize(weight, kind).dequantize(torch.float32).gather(1, peak)
    torch.testing.assert_close(kept, weight.gather(1, peak), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_row_of_zeros_stays_zero(kind: Kind) -> None:
    weight = random_weight()
    weight[2] = 0
    made = quantize(weight.bfloat16(), kind)
    assert made.scale.dtype == torch.float32
    assert made.data.dtype == KINDS[kind][0]
    assert made.shape == weight.shape
    assert (made.dequantize(torch.bfloat16)[2] == 0).all()


@pytest.mark.parametrize("kind", list(KINDS))
def test_quantising_changes_sign_with_the_weight(kind: Kind) -> None:
    weight = random_weight()
    torch.testing.assert_close(quantize(-weight, kind).dequantize(torch.float32), -quantize(weight, kind).dequantize(torch.float32))
