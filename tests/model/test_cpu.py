"""The operators for a CPU against their plain twins; reordered products only where the processor has bfloat16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from refusion.model import attention_ops, cpu, ops
from refusion.model.config import ModelConfig
from refusion.model.cpu import CpuOps, PackedWeight
from refusion.model.quantize import quantize
from refusion.model.rows import PADDING, Rows, Spans, Tiles

EPS = 1e-5
NUM_OUT, NUM_IN = 42, 72  # no multiple of any block
# Both sides sum in float32, in different orders; in bfloat16 the plain twin rounds after every step, the other now and then later.
TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 4e-2)}  # relative, absolute
DTYPES = [torch.float32, torch.bfloat16]
CONFIG = ModelConfig(
    model_type="qwen3",
    vocab_size=1000,
    hidden_size=NUM_IN,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=EPS,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    attention_bias=False,
    mask_token_id=None,
    eos_token_ids=(0,),
)


class Case:
    """Random inputs of one product."""

    def __init__(self, num_rows: int, dtype: torch.dtype, num_out: int = NUM_OUT) -> None:
        self.generator = torch.Generator().manual_seed(num_rows)
        self.dtype = dtype
        self.x = self.normal(num_rows, NUM_IN)
        self.norm = (1 + self.normal(NUM_IN) / 4, EPS)
        self.weight = self.normal(num_out, NUM_IN) / NUM_IN**0.5
        self.bias = self.normal(num_out)
        self.residual = self.normal(num_rows, num_out)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)


def is_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    relative, absolute = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 16, 17, 70])
def test_every_product_is_that_of_its_plain_twin(num_rows: int, dtype: torch.dtype) -> None:
    case, fast = Case(num_rows, dtype), CpuOps(CONFIG, dtype)
    weight, residual = fast.prepare(case.weight), case.residual.clone()
    for bias in (None, case.bias):
        is_close(fast.norm_linear(case.x, *case.norm, weight, bias), ops.norm_linear(case.x, *case.norm, case.weight, bias))
        is_close(fast.linear_add(case.x, weight, residual, bias), ops.linear_add(case.x, case.weight, case.residual, bias))
    is_close(fast.norm_gated(case.x, *case.norm, weight), ops.norm_gated(case.x, *case.norm, case.weight))
    assert torch.equal(residual, case.residual), "the residual is read, not written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_reordered_where_the_processor_computes_in_their_dtype(dtype: torch.dtype) -> None:
    if not cpu.has_packed_products(dtype):
        pytest.skip(f"no reordered products in {dtype} here")
    weight = Case(1, dtype).weight
    packed = CpuOps(CONFIG, dtype).prepare(weight)
    assert isinstance(packed, PackedWeight)
    assert packed.shape == weight.shape


def test_without_reordered_products_the_plain_ones_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_packed_products", lambda dtype: False)
    case, fast = Case(5, torch.bfloat16), CpuOps(CONFIG, torch.bfloat16)
    assert fast.prepare(case.weight) is case.weight
    assert torch.equal(fast.linear_add(case.x, case.weight, case.residual), ops.linear_add(case.x, case.weight, case.residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_weights_go_through_plain_products(dtype: torch.dtype) -> None:
    case, fast = Case(5, dtype), CpuOps(CONFIG, dtype)
    weight = quantize(case.weight, "int8")
    assert fast.prepare(weight) is weight
    is_close(fast.norm_linear(case.x, *case.norm, weight), ops.norm_linear(case.x, *case.norm, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 5, cpu.ROWS_AT_ONCE + 3])
@pytest.mark.parametrize("vocab_size", [101, cpu.CHUNK, 1000])
def test_the_readout_is_that_of_its_plain_twin(num_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    case, fast = Case(num_rows, dtype, num_out=vocab_size), CpuOps(CONFIG, dtype)
    bias = torch.zeros(vocab_size)
    bias[3] = bias[-1] = -torch.inf
    given = torch.arange(num_rows, dtype=torch.int32) % vocab_size - 1
    found = fast.readout(case.x, *case.norm, fast.prepare(case.weight), bias, given, 3)
    expected = ops.readout(case.x, *case.norm, case.weight, bias, given, 3)
    top = (ops.rms_norm(case.x, *case.norm).float() @ case.weight.float().T + bias).topk(5, dim=1).values
    is_apart = top[:, :-1] - top[:, 1:] > TOLERANCE[dtype][1]  # the norms are rounded at different places
    is_clear = is_apart[:, 0]
    assert is_clear.any()
    assert torch.equal(found.runner_ups[is_apart.all(dim=1)], expected.runner_ups[is_apart.all(dim=1)])
    assert torch.equal(found.token_ids[is_clear], expected.token_ids[is_clear])
    relative = 5 * TOLERANCE[dtype][0]
    torch.testing.assert_close(found.confidence[is_clear], expected.confidence[is_clear], rtol=relative, atol=1e-5)
    torch.testing.assert_close(found.given_probability, expected.given_probability, rtol=relative, atol=1e-5)
    assert torch.equal(found.given_is_argmax, found.token_ids == given)
    assert found.confidence.dtype == found.given_probability.dtype == torch.float32


def test_equal_logits_after_rounding_are_told_apart() -> None:
    """Logits 20 and 20.05 are both 20 in bfloat16; the greater one wins, whatever its id, and the probabilities are those of float32."""
    fast = CpuOps(CONFIG, torch.bfloat16)
    if not fast.is_packing:
        pytest.skip("no reordered products in bfloat16 here")
    weight = torch.zeros(512, 64, dtype=torch.bfloat16)
    weight[7, 0], weight[300, 0], weight[300, 1] = 20.0, 20.0, 0.05
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    norm = torch.ones(64, dtype=torch.bfloat16)
    found = fast.readout(x, norm, 0.0, fast.prepare(weight), torch.zeros(512), torch.tensor([7], dtype=torch.int32))
    expected = (x.float() @ weight.float().T).softmax(dim=1)[0]
    assert found.token_ids.tolist() == [300]
    torch.testing.assert_close(found.confidence, expected[[300]])
    torch.testing.assert_close(found.given_probability, expected[[7]])


@pytest.mark.parametrize("width", [7, 100, cpu.CHUNK, 3 * cpu.CHUNK, 1000])
def test_the_largest_logits_are_found_whatever_the_vocabulary(width: int) -> None:
    logits = torch.stack([torch.randperm(width, generator=torch.Generator().manual_seed(i)) for i in range(50)]).float()
    assert torch.equal(cpu._largest(logits), logits.topk(cpu.CANDIDATES, dim=1).indices.sort(dim=1).values)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_is_that_of_its_plain_twin_in_every_layer_of_every_forward(has_norm: bool, dtype: torch.dtype) -> None:
    fast, heads = CpuOps(CONFIG, dtype), (CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim)
    case = Case(9, dtype)
    angles = torch.arange(64).float()[:, None] / 10 ** torch.arange(0, 1, 1 / 8)
    for forward in range(2):
        fast.plan_attention(*one_seat(9))
        positions = torch.arange(9, dtype=torch.int32) * 3 + forward
        for _ in range(2):
            qkv = case.normal(9, 10 * CONFIG.head_dim)
            norms = (1 + case.normal(16) / 4, 1 + case.normal(16) / 4) if has_norm else (None, None)
            outcomes = []
            for chosen in (fast, attention_ops):
                keys, values = (torch.zeros(9, 2, CONFIG.head_dim, dtype=dtype) for _ in range(2))
                query = chosen.rotate_and_store(qkv, positions, angles.cos(), angles.sin(), *norms, EPS, *heads, keys, values)
                outcomes.append((query, keys, values))
            for found, expected in zip(*outcomes, strict=True):
                is_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 11])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("pages", [[2, 3], [3, 1]])
@pytest.mark.parametrize("apart_from", [1, 512])
def test_attention_is_that_of_its_plain_twin(
    num_rows: int, padding: int, pages: list[int], apart_from: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_ops, "APART_FROM", apart_from)
    case, fast = Case(num_rows, dtype), CpuOps(CONFIG, dtype)
    rows, spans, tiles = one_seat(num_rows + padding)
    spans.row_end.fill_(num_rows)
    rows.seat[num_rows:] = PADDING
    rows.rank.copy_(torch.arange(num_rows + padding))
    spans.cached.fill_(21)
    spans = replace(spans, page_table=torch.tensor([pages], dtype=torch.int32))
    keys, values = case.normal(64, 2, 16), case.normal(64, 2, 16)
    new_keys, new_values = case.normal(num_rows + padding, 2, 16), case.normal(num_rows + padding, 2, 16)
    query = case.normal(num_rows + padding, 6, 16)
    found = fast.attend(query, new_keys, new_values, keys, values, rows, spans, tiles, fast.plan_attention(rows, spans, tiles))
    is_close(found, attention_ops.attend(query, new_keys, new_values, keys, values, rows, spans))


def one_seat(num_rows: int) -> tuple[Rows, Spans, Tiles]:
    """Rows of one autoregressive-like seat without a cache; the tiles are the kernels' and empty."""
    rows = Rows.empty(num_rows, torch.device("cpu"))
    rows.seat.zero_()
    zero = torch.zeros(1, dtype=torch.int32)
    spans = Spans(zero.clone(), zero, zero, zero, zero + num_rows, torch.zeros(1, 1, dtype=torch.int32), 16)
    return rows, spans, Tiles(zero, zero, zero, 16)
