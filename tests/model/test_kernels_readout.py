"""The fused readout against its plain twin: in Triton's interpreter without a GPU (TRITON_INTERPRET=1), compiled with one."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, whose own functions read it too
pytest.importorskip("triton")

from refusion.model import ops
from refusion.model.kernels.config import Config
from refusion.model.kernels.readout import readout
from refusion.model.quantize import quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
VOCABULARY, NUM_IN = 75, 40
CONFIGS = {
    "loop": Config(16, 16, 1, 2, 4, 16),
    "one block": Config(32, 64, 1, 2, 4, 16),
    "wide": Config(16, 16, 1, 2, 4, 32, extra_t=16),
    "lanes": Config(16, 32, 1, 2, 4, 16, lanes=2),
    "norm first": Config(64, 16, 1, 2, 4, 16, prenorm=True),
}


class Case:
    """Random rows over a vocabulary of which one whole tile and a few single tokens are banned."""

    def __init__(self, num_rows: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(num_rows)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        self.x = normal(num_rows, NUM_IN)
        self.norm = (1 + normal(NUM_IN) / 4, EPS)
        self.weight = normal(VOCABULARY, NUM_IN) / 2
        self.bias_banned = torch.zeros(VOCABULARY, device=DEVICE)
        self.bias_banned[[*range(16, 32), 3, 74]] = -torch.inf
        self.given_ids = torch.randint(VOCABULARY, (num_rows,), generator=generator, dtype=torch.int32).to(DEVICE)


def is_equal(found: ops.Readout, expected: ops.Readout, rtol: float = 1e-4) -> None:
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.given_is_argmax, expected.given_is_argmax)
    assert torch.equal(found.runner_ups, expected.runner_ups)
    torch.testing.assert_close(found.confidence, expected.confidence, rtol=rtol, atol=1e-7)
    torch.testing.assert_close(found.given_probability, expected.given_probability, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 70])
@pytest.mark.parametrize("name", CONFIGS)
def test_readout_is_that_of_the_plain_twin(name: str, num_rows: int) -> None:
    case = Case(num_rows)
    arguments = (case.x, *case.norm, case.weight, case.bias_banned, case.given_ids)
    for num_runner_ups in (0, 1, 3):
        expected = ops.readout(*arguments, num_runner_ups)
        assert expected.runner_ups.shape == (num_rows, num_runner_ups)
        is_equal(readout(*arguments, num_runner_ups, config=CONFIGS[name]), expected)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_quantised_heads_are_read_alike(kind: str) -> None:
    case = Case(5)
    weight = quantize(case.weight, "int8" if kind == "int8" else "float8")
    arguments = (case.x, *case.norm, weight, case.bias_banned, case.given_ids)
    is_equal(readout(*arguments, config=CONFIGS["wide"]), ops.readout(*arguments))
    is_equal(readout(*arguments), ops.readout(*arguments))


def test_bfloat16_rows_agree_with_exact_logits() -> None:
    case = Case(9, torch.bfloat16)
    arguments = (case.x, *case.norm, case.weight, case.bias_banned, case.given_ids)
    found, expected = readout(*arguments, config=CONFIGS["loop"]), ops.readout(*arguments)
    torch.testing.assert_close(found.confidence, expected.confidence, rtol=0.1, atol=1e-3)
    torch.testing.assert_close(found.given_probability, expected.given_probability, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_ties_go_to_the_lowest_id_within_and_across_tiles(name: str) -> None:
    case = Case(2)
    case.x[:] = 1.0
    case.norm = (torch.ones_like(case.norm[0]), 0.0)
    case.weight[:] = 0.0
    case.weight[[9, 40, 41, 70]] = 0.25  # sums of quarters are exact
    case.given_ids = torch.tensor([41, 9], dtype=torch.int32, device=DEVICE)
    found = readout(case.x, *case.norm, case.weight, case.bias_banned, case.given_ids, 3, config=CONFIGS[name])
    assert found.token_ids.tolist() == [9, 9]
    assert found.runner_ups.tolist() == [[40, 41, 70]] * 2
    assert found.given_is_argmax.tolist() == [False, True]
    torch.testing.assert_close(found.given_probability, found.confidence)  # equal logits, equal probabilities


def test_banned_and_missing_given_tokens_have_no_probability() -> None:
    case = Case(4)
    case.given_ids = torch.tensor([-1, 16, 3, -7], dtype=torch.int32, device=DEVICE)
    found = readout(case.x, *case.norm, case.weight, case.bias_banned, case.given_ids, config=CONFIGS["loop"])
    assert found.given_probability.tolist() == [0.0] * 4
    assert not found.given_is_argmax.any()


def test_a_banned_token_never_wins() -> None:
    case = Case(3)
    case.weight[3] = 100 * torch.sign(case.x[0])
    found = readout(case.x, *case.norm, case.weight, case.bias_banned, case.given_ids, config=CONFIGS["loop"])
    assert (case.bias_banned[found.token_ids] == 0).all()
    assert torch.isfinite(found.confidence).all()


def test_a_lone_candidate_is_certain() -> None:
    case = Case(3)
    case.bias_banned[:] = -torch.inf
    case.bias_banned[50] = 0.0
    case.given_ids = torch.tensor([50, 51, -1], dtype=torch.int32, device=DEVICE)
    found = readout(case.x, *case.norm, case.weight, case.bias_banned, case.given_ids, config=CONFIGS["loop"])
    assert found.token_ids.tolist() == [50] * 3
    assert found.confidence.tolist() == [1.0] * 3
    assert found.given_probability.tolist() == [1.0, 0.0, 0.0]
    assert found.given_is_argmax.tolist() == [True, False, False]


def test_a_network_that_says_no_numbers_still_names_tokens() -> None:
    """Whatever they are, the embedding has them: a diverged model must not bring the engine down."""
    case = Case(3)
    case.x[1] = torch.nan
    found = readout(case.x, *case.norm, case.weight, case.bias_banned, case.given_ids, num_runner_ups=2, config=CONFIGS["loop"])
    for ids in (found.token_ids, found.runner_ups):
        assert ((ids >= 0) & (ids < len(case.weight))).all()


def test_two_runs_agree_bit_by_bit() -> None:
    case = Case(17)
    arguments = (case.x, *case.norm, case.weight, case.bias_banned, case.given_ids)
    assert all(torch.equal(one, two) for one, two in zip(readout(*arguments), readout(*arguments), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_rows", [1, 33, 192, 1000])
def test_a_real_head_is_read_alike(num_rows: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(num_rows, 576, generator=generator, device="cuda").bfloat16()
    weight = (torch.randn(49152, 576, generator=generator, device="cuda") / 8).bfloat16()
    banned = torch.zeros(49152, device="cuda")
    banned[5:17] = -torch.inf
    arguments = (
        x,
        torch.ones(576, device="cuda", dtype=torch.bfloat16),
        EPS,
        weight,
        banned,
        torch.zeros(num_rows, dtype=torch.int32, device="cuda"),
    )
    found, expected = readout(*arguments), ops.readout(*arguments)
    assert (found.token_ids == expected.token_ids).float().mean() > 0.98  # bfloat16 rounds the rows differently: near ties may turn
    torch.testing.assert_close(found.confidence, expected.confidence, rtol=0.1, atol=1e-3)
