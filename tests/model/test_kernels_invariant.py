"""Batch invariance: a row's result does not depend, bit for bit, on how many rows share its forward."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from flat_forwards import CHAIN, GROUPS, LONE, PLAN, Forward, Seat, forward_of

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, whose own functions read it too
pytest.importorskip("triton")

from refusion.model.kernels import linear, readout
from refusion.model.kernels.attention import Workspace, attend
from refusion.model.kernels.attention_config import invariant_config as attention_config
from refusion.model.kernels.attention_config import padded_rows
from refusion.model.kernels.config import invariant_config
from refusion.model.quantize import QuantizedWeight, quantize
from refusion.model.rows import plain_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# Rows of a forward; 192 and 300 take several row tiles, the others one of growing size.
NUMBERS = (1, 2, 16, 17, 40, 64, 100, 192, 300)
SHAPES = [(6144, 4096), (24576, 4096), (4096, 12288), (960, 576), (3072, 576), (576, 1536)]


def products(x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, residual: torch.Tensor) -> list[torch.Tensor]:
    """All products of the rows, and their readout."""
    gain = torch.linspace(0.5, 1.5, x.shape[1], device=x.device).to(x.dtype)
    banned = torch.zeros(weight.shape[0], device=x.device)
    given = torch.arange(len(x), device=x.device, dtype=torch.int32) % weight.shape[0]
    return [
        linear.norm_linear(x, gain, EPS, weight, config=linear.INVARIANT),
        linear.norm_gated(x, gain, EPS, weight, config=linear.INVARIANT),
        linear.linear_add(x, weight, residual, config=linear.INVARIANT),
        *readout.readout(x, gain, EPS, weight, banned, given, config=linear.INVARIANT),
    ]


def check(num_out: int, num_in: int, numbers: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(numbers), num_in, generator=generator).to(DEVICE, torch.bfloat16)
    plain = (torch.randn(num_out, num_in, generator=generator) / num_in**0.5).to(DEVICE, torch.bfloat16)
    weight = plain if kind == "bfloat16" else quantize(plain, "int8" if kind == "int8" else "float8")
    residual = torch.randn(max(numbers), num_out, generator=generator).to(DEVICE, torch.bfloat16)
    whole = products(x, weight, residual)
    for count in numbers:
        for found, expected in zip(products(x[:count], weight, residual[:count]), whole, strict=True):
            assert torch.equal(found, expected[:count]), f"{count} rows"


@pytest.mark.parametrize(
    ("num_out", "num_in", "numbers", "kind"),
    [
        (42, 520, (1, 16, 17, 40, 130), "bfloat16"),  # small tiles; nine blocks of K in two parts
        (42, 520, (1, 40), "int8"),
        (
            64 * 48,
            72,
            (70, 130),
            "bfloat16",
        ),  # large tiles, of equal height: the interpreter's products hang on that, a GPU's do not
    ],
)
def test_a_row_of_a_product_does_not_depend_on_the_others(num_out: int, num_in: int, numbers: tuple[int, ...], kind: str) -> None:
    check(num_out, num_in, numbers, kind)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "float8"])
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_the_same_at_real_shapes(num_out: int, num_in: int, kind: str) -> None:
    check(num_out, num_in, NUMBERS, kind)


@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
@pytest.mark.parametrize("kind", ["norm_linear", "norm_gated", "linear_add", "readout"])
def test_what_rounds_a_sum_is_the_same_for_every_number_of_rows(num_out: int, num_in: int, kind: linear.Kind) -> None:
    configs = [invariant_config(num_out, num_in, count, kind) for count in NUMBERS]
    assert len({replace(config, block_t=0, num_stages=0) for config in configs}) == 1
    assert configs[0].prenorm
    assert configs[0].lanes == 1
    assert all(config.extra_t == 0 for config in configs)
    assert kind != "readout" or len(set(configs)) == 1


CROWD = [Seat(90, 5, CHAIN), Seat(37, 0, CHAIN + PLAN + GROUPS), Seat(3, 0, PLAN), Seat(200, 0, LONE), Seat(0, 33)]


@pytest.mark.parametrize("seat", range(len(CROWD)))
def test_attention_of_a_seat_does_not_depend_on_the_other_seats(seat: int) -> None:
    crowd = forward_of(CROWD, seed=1)
    alone = forward_of([CROWD[seat]], padding=(0, 0))
    mine = rows_of(crowd, seat)
    for name in ("query", "new_keys", "new_values"):
        getattr(crowd, name)[mine] = getattr(alone, name)
    place = torch.arange(CROWD[seat].cached)
    pages = [forward.spans.cache_rows(torch.full_like(place, owner), place) for forward, owner in ((crowd, seat), (alone, 0))]
    for name in ("keys", "values"):
        getattr(crowd, name)[pages[0]] = getattr(alone, name)[pages[1]]
    assert torch.equal(attended(crowd)[mine], attended(alone))


def rows_of(forward: Forward, seat: int) -> torch.Tensor:
    return (forward.rows.seat == seat).nonzero()[:, 0]


def attended(forward: Forward) -> torch.Tensor:
    """As the engine does it: the same tiles of 16 rows and the same splits, however many tiles there are."""
    forward = forward.to(DEVICE)
    num_kv_heads, head_dim = forward.new_keys.shape[1:]
    tile_rows = padded_rows(16, forward.query.shape[1] // num_kv_heads)
    config = attention_config()
    num_tiles = sum(-(-int(size) // 16) for size in counts(forward))
    workspace = Workspace(num_tiles * num_kv_heads * config.splits, tile_rows, head_dim, torch.device(DEVICE))
    return attend(*forward.arguments, plain_tiles(forward.spans, 16, num_tiles), workspace, config).cpu()


def counts(forward: Forward) -> list[torch.Tensor]:
    spans = forward.spans
    return [*(spans.prompt_end - spans.prompt_start), *(spans.row_end - spans.row_start)]
