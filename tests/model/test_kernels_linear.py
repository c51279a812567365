"""The dense kernels against their plain twins: in Triton's interpreter without a GPU (TRITON_INTERPRET=1), compiled with one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, whose own functions read it too
pytest.importorskip("triton")

from refusion.model import ops
from refusion.model.kernels import config as table
from refusion.model.kernels import launch, linear
from refusion.model.kernels.config import SKINNY_ROWS, Config, choose_config, cover, heuristic
from refusion.model.kernels.norms import rms_norm, silu_multiply
from refusion.model.kernels.owed import Owed
from refusion.model.kernels.readout import readout
from refusion.model.quantize import QuantizedWeight, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
NUM_OUT, NUM_IN = 42, 72  # no multiple of any tile
CONFIGS = {
    "loop": Config(16, 16, 1, 2, 4, 16),
    "one block": Config(16, 128, 1, 2, 4, 16),
    "split": Config(32, 16, 3, 2, 4, 16),  # five blocks over three parts: the last part is half empty
    "wide": Config(16, 32, 1, 2, 4, 32, extra_t=16),
    "wide and split": Config(32, 16, 2, 2, 4, 32, extra_t=16),
    "wide and one block": Config(32, 128, 1, 2, 4, 32, extra_t=16),
    "lanes": Config(16, 32, 1, 2, 4, 16, lanes=2),
    "lanes, wide and split": Config(32, 64, 2, 2, 4, 32, extra_t=16, lanes=4),
    "lanes and one block": Config(16, 128, 1, 2, 4, 16, lanes=4),
    "turned": Config(32, 16, 3, 2, 4, 16, turned=True),
    "turned, wide and one block": Config(16, 128, 1, 2, 4, 32, extra_t=16, prenorm=True, turned=True),
    "norm first": Config(16, 32, 1, 2, 4, 16, prenorm=True),
    "two pieces of weight": Config(16, 32, 1, 2, 4, 32, extra_t=16, extra_n=16, prenorm=True),
    "two pieces of weight, turned": Config(32, 16, 1, 2, 4, 16, extra_n=16, prenorm=True, turned=True),
}
OWING = {
    "owing": Config(32, 16, 3, 2, 4, 16, owes_sum=True),
    "owing, in four pieces": Config(32, 16, 2, 2, 4, 32, extra_t=16, extra_n=16, owes_sum=True),
    "owing, turned": Config(16, 32, 2, 2, 4, 32, extra_n=16, owes_sum=True, turned=True),
}
# Both sides sum in float32, in different orders. In bfloat16 the twins round after every step, the kernels once; the interpreter cuts off.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


class Case:
    """Random inputs of one product."""

    def __init__(self, num_rows: int, dtype: torch.dtype = torch.float32, num_out: int = NUM_OUT, num_in: int = NUM_IN) -> None:
        generator = torch.Generator().manual_seed(num_rows)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        self.x = normal(num_rows, num_in)
        self.norm = (1 + normal(num_in) / 4, EPS)
        self.weight = normal(num_out, num_in) / num_in**0.5
        self.bias = normal(num_out)
        self.residual = normal(num_rows, num_out)


def is_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 70])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_product_is_that_of_its_plain_twin(name: str, num_rows: int) -> None:
    case, config = Case(num_rows), CONFIGS[name]
    x, norm, weight = case.x, case.norm, case.weight
    is_close(linear.norm_linear(x, *norm, weight, config=config), ops.norm_linear(x, *norm, weight))
    is_close(linear.norm_gated(x, *norm, weight, config=config), ops.norm_gated(x, *norm, weight))
    is_close(linear.linear_add(x, weight, case.residual, config=config), ops.linear_add(x, weight, case.residual))
    assert not launch.counters(x.device).any()


@pytest.mark.parametrize("name", ["loop", "split", "wide and split"])
def test_a_bias_is_added_once(name: str) -> None:
    case, config = Case(17), CONFIGS[name]
    x, norm, weight, bias = case.x, case.norm, case.weight, case.bias
    is_close(linear.norm_linear(x, *norm, weight, bias, config=config), ops.norm_linear(x, *norm, weight, bias))
    is_close(linear.linear_add(x, weight, case.residual, bias, config=config), ops.linear_add(x, weight, case.residual, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 17, 70])
@pytest.mark.parametrize("name", OWING)
def test_what_a_product_owes_is_added_up_by_the_norm_behind_it(name: str, num_rows: int, dtype: torch.dtype) -> None:
    case, config = Case(num_rows, dtype), OWING[name]
    expected = ops.linear_add(case.x, case.weight, case.residual)
    generator = torch.Generator().manual_seed(1)
    gains = (1 + torch.randn(NUM_OUT, generator=generator) / 4).to(DEVICE, dtype)
    next_weight = (torch.randn(NUM_IN, NUM_OUT, generator=generator) / NUM_OUT**0.5).to(DEVICE, dtype)

    def owed() -> Owed:
        hidden = linear.linear_add_owed(case.x, case.weight, case.residual.clone(), config=config)
        assert isinstance(hidden, Owed)
        return hidden

    is_close(owed().paid(), expected)
    is_close(owed().normed(gains, EPS), ops.rms_norm(expected, gains, EPS))
    hidden = owed()
    for config_of_next in (None, CONFIGS["loop"], CONFIGS["norm first"]):  # the library's product, and two that meet a sum that is paid
        is_close(
            linear.norm_linear(hidden, gains, EPS, next_weight, config=config_of_next), ops.norm_linear(expected, gains, EPS, next_weight)
        )
    is_close(linear.norm_gated(owed(), gains, EPS, next_weight, config=CONFIGS["loop"]), ops.norm_gated(expected, gains, EPS, next_weight))
    is_close(hidden.paid(), expected)
    again = linear.linear_add(case.x, case.weight, hidden, in_place=True, config=CONFIGS["loop"])
    is_close(again, ops.linear_add(case.x, case.weight, expected))


def test_a_product_with_a_bias_owes_nothing() -> None:
    case = Case(17)
    found = linear.linear_add_owed(case.x, case.weight, case.residual.clone(), case.bias, config=OWING["owing"])
    assert isinstance(found, torch.Tensor)
    is_close(found, ops.linear_add(case.x, case.weight, case.residual, case.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("name", ["loop", "one block", "wide and split", "turned"])
def test_quantised_weights_are_scaled_back(name: str, kind: str, dtype: torch.dtype) -> None:
    case, config = Case(5, dtype), CONFIGS[name]
    weight = quantize(case.weight, "int8" if kind == "int8" else "float8")
    is_close(
        linear.norm_linear(case.x, *case.norm, weight, case.bias, config=config), ops.norm_linear(case.x, *case.norm, weight, case.bias)
    )
    is_close(linear.norm_gated(case.x, *case.norm, weight, config=config), ops.norm_gated(case.x, *case.norm, weight))
    is_close(linear.linear_add(case.x, weight, case.residual, config=config), ops.linear_add(case.x, weight, case.residual))


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_stays_within_its_roundings(name: str) -> None:
    case, config = Case(18, torch.bfloat16), CONFIGS[name]
    is_close(linear.norm_linear(case.x, *case.norm, case.weight, config=config), ops.norm_linear(case.x, *case.norm, case.weight))
    is_close(linear.norm_gated(case.x, *case.norm, case.weight, config=config), ops.norm_gated(case.x, *case.norm, case.weight))
    is_close(linear.linear_add(case.x, case.weight, case.residual, config=config), ops.linear_add(case.x, case.weight, case.residual))


@pytest.mark.parametrize("order", ["off", "early", "late"])
def test_results_do_not_depend_on_when_the_next_kernel_starts(order: launch.Order) -> None:
    case = Case(17)
    alone = linear.linear_add(case.x, case.weight, case.residual, config=CONFIGS["split"])
    launch.set_overlap(launch.Overlap(small=order))
    assert torch.equal(linear.linear_add(case.x, case.weight, case.residual, config=CONFIGS["split"]), alone)
    launch.set_overlap(None)


@pytest.mark.parametrize("name", ["split", "library"])
def test_a_residual_is_spared_unless_given_away(name: str) -> None:
    case, config = Case(5), CONFIGS.get(name)
    expected, residual = ops.linear_add(case.x, case.weight, case.residual), case.residual.clone()
    is_close(linear.linear_add(case.x, case.weight, case.residual, config=config), expected)
    assert torch.equal(case.residual, residual)
    is_close(linear.linear_add(case.x, case.weight, case.residual, in_place=True, config=config), expected)


def test_rows_may_be_a_slice_of_wider_ones() -> None:
    case = Case(6)
    wide = torch.cat((case.x, case.x), dim=1)[:, :NUM_IN]
    found = linear.linear_add(wide, case.weight, case.residual, config=CONFIGS["split"])
    is_close(found, ops.linear_add(case.x, case.weight, case.residual))


@pytest.mark.parametrize("num_rows", [1, 40, SKINNY_ROWS + 1, 300])
def test_the_chosen_config_computes_the_same(num_rows: int) -> None:
    case = Case(num_rows, torch.bfloat16)
    quantised = quantize(case.weight, "int8")
    is_close(linear.norm_linear(case.x, *case.norm, case.weight, case.bias), ops.norm_linear(case.x, *case.norm, case.weight, case.bias))
    is_close(linear.norm_gated(case.x, *case.norm, case.weight), ops.norm_gated(case.x, *case.norm, case.weight))
    is_close(linear.linear_add(case.x, quantised, case.residual), ops.linear_add(case.x, quantised, case.residual))


def test_float32_goes_to_the_library_unless_quantised() -> None:
    assert choose_config(NUM_OUT, NUM_IN, 1, "norm_linear", "float32") is None
    assert choose_config(NUM_OUT, NUM_IN, 1, "norm_linear", "int8") is not None
    assert choose_config(NUM_OUT, NUM_IN, 4096, "norm_linear", "int8") is not None
    assert choose_config(NUM_OUT, NUM_IN, 1, "readout", "float32") is not None
    case = Case(9)
    is_close(linear.norm_gated(case.x, *case.norm, case.weight), ops.norm_gated(case.x, *case.norm, case.weight))
    is_close(
        linear.linear_add(case.x, case.weight, case.residual, case.bias), ops.linear_add(case.x, case.weight, case.residual, case.bias)
    )


def test_small_kernels_are_their_twins() -> None:
    case = Case(7)
    is_close(rms_norm(case.x, *case.norm), ops.rms_norm(case.x, *case.norm))
    gate, up = case.x.chunk(2, dim=1)
    is_close(silu_multiply(case.x), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("num_rows", [1, 16, 17, 48, 64, 70, 96, 128, 160, 192, 200, 256])
def test_tiles_cover_all_rows_with_little_waste(num_rows: int) -> None:
    block_t, extra_t = cover(num_rows)
    assert num_rows <= block_t + extra_t <= max(32, num_rows * 1.5)
    assert extra_t == 0 or 16 <= extra_t < block_t


@pytest.mark.parametrize("num_rows", [1, 32, 64, 192, 4096])
@pytest.mark.parametrize("shape", [(960, 576), (576, 576), (3072, 576), (576, 1536), (6144, 4096), (4096, 12288), (24576, 4096)])
def test_heuristic_configs_are_sound(shape: tuple[int, int], num_rows: int) -> None:
    config = heuristic(*shape, num_rows, "norm_linear", "int8")
    sizes = (config.block_n, config.block_k, config.block_t)
    assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    assert 1 <= config.split_k <= -(-shape[1] // config.block_k)
    assert config.num_stages >= 2
    assert config.block_k >= 16 * config.lanes


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Gives the card another name, and room for every tile."""
    monkeypatch.setattr(table, "shared_limit", lambda: 1 << 30)

    def call(name: str) -> None:
        monkeypatch.setenv("REFUSION_CARD", name)
        table.card.cache_clear()

    yield call
    table.card.cache_clear()


def test_a_card_has_entries_of_its_own_before_those_of_all(called: Callable[[str], None]) -> None:
    shared = table.tuned_entries(None)
    name = next(iter(table.TUNED_BY_CARD))
    own = table.tuned_entries(name)
    assert own.keys() >= shared.keys()
    called(f"NVIDIA {name}")
    assert table.card() == name
    for key, entry in own.items():
        kind, num_out, num_in, num_rows, dtype = key.split(":")
        chosen = choose_config(int(num_out), int(num_in), int(num_rows), kind, dtype)  # pyright: ignore[reportArgumentType]
        assert chosen == (None if entry is None else Config(**entry)), key


def test_tiles_that_a_large_card_measured_are_not_taken_where_they_do_not_fit(
    called: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    called("some card")
    for limit, fits_all in ((227 * 1024, True), (99 * 1024, False)):  # of an H100, and of a GeForce of the same years
        monkeypatch.setattr(table, "shared_limit", lambda limit=limit: limit)
        has_other = False
        for key, entry in table.tuned_entries(None).items():
            kind, num_out, num_in, num_rows, dtype = key.split(":")
            chosen = choose_config(int(num_out), int(num_in), int(num_rows), kind, dtype)  # pyright: ignore[reportArgumentType]
            measured = None if entry is None else Config(**entry)
            has_other |= chosen != measured
            assert chosen != measured or measured is None or measured.shared_bytes(table.WIDTHS[dtype]) <= limit, key
        assert has_other != fits_all


def test_a_card_is_known_by_a_whole_word_of_its_name(called: Callable[[str], None]) -> None:
    for name, known in {"NVIDIA H200 NVL": "H200", "NVIDIA GH200 480GB": None, "NVIDIA H100 80GB HBM3": None, "NVIDIA H20": None}.items():
        called(name)
        assert table.card() == known, name


def test_products_refuse_configs_that_their_kernels_cannot_keep() -> None:
    case = Case(3)
    with pytest.raises(AssertionError, match="residual stream"):
        linear.norm_linear(case.x, *case.norm, case.weight, config=Config(32, 16, 2, 2, 4, 16, prenorm=True, owes_sum=True))
    banned, given = torch.zeros(NUM_OUT, device=DEVICE), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(AssertionError, match="one piece"):
        readout(case.x, *case.norm, case.weight, banned, given, config=CONFIGS["two pieces of weight"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_code_of_a_float8_weight_becomes_its_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    codes = torch.where(codes.float().isnan(), torch.zeros_like(codes.float()), codes.float()).to(torch.float8_e4m3fn)
    weight = QuantizedWeight(codes.repeat(64, 1), torch.ones(64, device="cuda"))  # [64, 256]
    one_each = torch.eye(256, dtype=torch.bfloat16, device="cuda")
    nothing = torch.zeros(256, 64, dtype=torch.bfloat16, device="cuda")
    for name in ("loop", "lanes", "turned"):
        found = linear.linear_add(one_each, weight, nothing, config=CONFIGS[name])
        assert torch.equal(found.float(), codes.float()[:, None].expand_as(found)), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_rows", [1, 33, 192])
@pytest.mark.parametrize(("num_out", "num_in"), [(6144, 4096), (960, 576)])
def test_a_captured_split_product_repeats_bit_by_bit(num_out: int, num_in: int, num_rows: int) -> None:
    case = Case(num_rows, torch.bfloat16, num_out, num_in)
    block_t, extra_t = cover(num_rows)
    config = Config(64, 64, 4, 3, 4, block_t, extra_t)
    first = linear.norm_linear(case.x, *case.norm, case.weight, config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = linear.norm_linear(case.x, *case.norm, case.weight, config=config)
    for _ in range(20):
        graph.replay()
        assert torch.equal(found, first)
    is_close(first, ops.norm_linear(case.x, *case.norm, case.weight))
    assert not launch.counters(case.x.device).any()
