from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from refusion.decoding.forward import ROWS_AT_ONCE, EagerForward, ForwardBatch, Rows, readout_logits
from refusion.decoding.sampling import Draw
from refusion.model.ops import next_best
from refusion.model.segments import Segments

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
NOTHING = torch.tensor([], dtype=torch.long)


def rows(given: int, count: int = 1) -> Rows:
    one = torch.ones(count, dtype=torch.long)
    return Rows(one, one, torch.arange(count), one * given)


def draw(temperature: float, top_p: float = 1.0, seed: int = 0) -> Draw:
    return Draw(temperature, top_p, torch.tensor([seed]), torch.tensor([1]))


def test_greedy_readout_is_argmax_and_its_softmax_probability() -> None:
    readout = readout_logits(LOGITS.clone(), NOTHING, draw(0.0), rows(given=2))
    probability = LOGITS.softmax(dim=1)[0]
    assert readout.token_ids.tolist() == [1]
    assert readout.confidence.tolist() == pytest.approx([float(probability[1])])
    assert readout.given_probability.tolist() == pytest.approx([float(probability[2])])
    assert readout.given_is_argmax.tolist() == [False]
    assert readout_logits(LOGITS.clone(), NOTHING, draw(0.0), rows(given=1)).given_is_argmax.tolist() == [True]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_have_no_probability_and_the_rest_sums_to_one(temperature: float) -> None:
    banned = torch.tensor([1, 3])
    by_token = [readout_logits(LOGITS.clone(), banned, draw(temperature), rows(given)) for given in range(4)]
    probability = [float(readout.given_probability) for readout in by_token]
    assert probability == pytest.approx([1 / (1 + torch.e), 0.0, torch.e / (1 + torch.e), 0.0])
    assert [bool(readout.given_is_argmax) for readout in by_token] == [False, False, True, False]
    assert int(by_token[0].token_ids) in (0, 2)


def test_sampled_scores_and_tests_use_the_distribution_that_tokens_are_drawn_from() -> None:
    logits = LOGITS.expand(200, -1).clone()
    readout = readout_logits(logits, NOTHING, draw(0.5, top_p=0.95), rows(given=2, count=200))
    kept = (LOGITS[0, [1, 2]] / 0.5).softmax(dim=0)  # 0.867 and 0.117 reach 0.95, the rest is cut
    assert set(readout.token_ids.tolist()) == {1, 2}
    expected = [float(kept[0] if token == 1 else kept[1]) for token in readout.token_ids.tolist()]
    assert readout.confidence.tolist() == pytest.approx(expected, rel=1e-5)
    assert readout.given_probability.tolist() == pytest.approx([float(kept[1])] * 200, rel=1e-5)


class _Counting:
    """A network whose logits are one-hot at the token after the input token."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def new_cache(self, num_requests: int, capacity: int) -> Any:
        return None

    def forward(self, token_ids: Tensor, positions: Tensor, segments: Segments, cache: Any) -> Tensor:
        return torch.nn.functional.one_hot(token_ids + 1, 9).float()

    def lm_head(self, hidden: Tensor) -> Tensor:
        self.sizes.append(len(hidden))
        return hidden


def test_only_rows_that_are_read_reach_the_head_a_limited_number_at_a_time() -> None:
    network = _Counting()
    token_ids = torch.arange(ROWS_AT_ONCE + 10).remainder(8)[None]
    is_read = torch.ones_like(token_ids, dtype=torch.bool)
    is_read[0, 3] = False
    batch = ForwardBatch(token_ids, torch.zeros_like(token_ids), Segments.causal(is_read), is_read, torch.zeros_like(token_ids), draw(0.0))
    readout = EagerForward(network, NOTHING)(batch, None)  # type: ignore[arg-type]  # this network has no cache
    assert network.sizes == [ROWS_AT_ONCE, 9]
    assert torch.equal(readout.token_ids, torch.where(is_read, token_ids + 1, 0))
    assert float(readout.confidence[0, 3]) == 0.0


def test_a_forward_that_nobody_reads_is_all_zeros() -> None:
    token_ids = torch.zeros(2, 3, dtype=torch.long)
    is_read = torch.zeros_like(token_ids, dtype=torch.bool)
    batch = ForwardBatch(token_ids, token_ids, Segments.causal(~is_read), is_read, token_ids, draw(0.0))
    readout = EagerForward(_Counting(), NOTHING)(batch, None)  # type: ignore[arg-type]
    assert not readout.token_ids.any()
    assert not readout.given_is_argmax.any()


def test_runner_ups_lie_one_row_behind_the_other() -> None:
    """Kernels read them without a stride; the lowest id comes first among equals."""
    logits = torch.tensor([[1.0, 5.0, 3.0, 3.0], [4.0, 0.0, 2.0, 9.0]])
    found = next_best(logits.clone(), logits.argmax(dim=1), 2)
    assert found.tolist() == [[2, 3], [0, 2]]
    assert found.is_contiguous()
    assert next_best(logits, logits.argmax(dim=1), 0).shape == (2, 0)
