from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refusion.decoding.decisions import choose_slots, infill_prefix, passing, verify_prefix


def mask(*rows: str) -> Tensor:
    """[W, K] bool from pictures: x is true."""
    return torch.tensor([[cell == "x" for cell in row] for row in rows])


def test_choose_slots_takes_all_above_the_threshold() -> None:
    scores = torch.tensor([[0.95, 0.9, 0.91]])
    assert choose_slots(scores, torch.tensor([[True, True, True]]), 0.9).tolist() == [[True, False, True]]


def test_choose_slots_keeps_one_slot_when_none_is_confident() -> None:
    scores = torch.tensor([[0.2, 0.6, 0.5], [0.5, 0.1, 0.2]])
    assert choose_slots(scores, torch.ones(2, 3, dtype=torch.bool), 0.9).tolist() == [[False, True, False], [True, False, False]]


def test_choose_slots_takes_the_first_of_equals() -> None:
    assert choose_slots(torch.tensor([[0.5, 0.5, 0.5]]), torch.tensor([[False, True, True]]), 0.9).tolist() == [[False, True, False]]


def test_choose_slots_never_takes_what_is_no_candidate() -> None:
    scores = torch.tensor([[0.99, 0.0], [0.99, 0.99]])
    is_candidate = torch.tensor([[False, True], [False, False]])
    assert choose_slots(scores, is_candidate, 0.9).tolist() == [[False, True], [False, False]]


def test_passing_needs_more_than_the_threshold_but_for_the_first_unverified_token() -> None:
    probability = torch.tensor([[[0.0, 0.4, 0.41, 0.0], [0.0, 0.0, 0.0, 0.9]]])
    is_argmax = torch.zeros(1, 2, 4, dtype=torch.bool)
    passes = passing(probability, is_argmax, torch.tensor([[0, 2]]), threshold=0.4, accept_argmax=False)
    assert torch.equal(passes[0], mask("x.x.", "xxxx"))


def test_passing_accepts_an_argmax_only_where_asked() -> None:
    probability, is_argmax = torch.zeros(1, 1, 3), torch.tensor([[[False, True, False]]])
    for accept, picture in ((True, "xx."), (False, "x..")):
        passes = passing(probability, is_argmax, torch.zeros(1, 1, dtype=torch.long), threshold=0.4, accept_argmax=accept)
        assert torch.equal(passes[0], mask(picture))


def verify(passes: Tensor, chosen: list[bool], is_eos: Tensor):
    return verify_prefix(passes[None], torch.tensor([chosen]), is_eos[None])


def test_verify_commits_through_the_first_eos_of_the_passing_prefix() -> None:
    # Case a: slot 1 is not chosen, the prefix of slots 0 and 2 breaks at the last token and holds two EOS.
    verdict = verify(mask("xxx", "...", "xx."), [True, False, True], mask("...", "...", "xxx"))
    assert torch.equal(verdict.is_committed[0], mask("xxx", "...", "x.."))
    assert (verdict.has_eos.item(), verdict.is_full.item(), verdict.needs_infill.item()) == (True, False, False)


def test_verify_does_not_see_an_eos_behind_a_failed_token() -> None:
    verdict = verify(mask("xxx", "x.x"), [True, True], mask("...", ".xx"))
    assert torch.equal(verdict.is_committed[0], mask("xxx", "..."))
    assert not verdict.has_eos.item()


def test_verify_commits_the_whole_slots_of_the_prefix() -> None:
    # Case b: n = 5 of 9, so one slot of three is committed.
    verdict = verify(mask("xxx", "xx.", "xxx"), [True, True, True], mask("...", "...", "..."))
    assert torch.equal(verdict.is_committed[0], mask("xxx", "...", "..."))
    assert (verdict.is_full.item(), verdict.needs_infill.item()) == (False, False)


def test_verify_is_full_when_every_chosen_slot_passes() -> None:
    verdict = verify(mask("xx", "..", "xx"), [True, False, True], mask("..", "xx", ".."))
    assert torch.equal(verdict.is_committed[0], mask("xx", "..", "xx"))
    assert (verdict.is_full.item(), verdict.needs_infill.item()) == (True, False)


def test_verify_infills_when_not_even_one_slot_passes() -> None:
    # Case c: the second slot would pass by itself, but the concatenation breaks before it.
    verdict = verify(mask("x.", "xx"), [True, True], mask("..", ".."))
    assert not verdict.is_committed.any()
    assert verdict.needs_infill.item()


def infill(passes: Tensor, chosen: list[bool], is_eos: Tensor):
    return infill_prefix(passes[None], torch.tensor([chosen]), is_eos[None])


def test_infill_judges_every_slot_by_itself() -> None:
    verdict = infill(mask("xx.x", "xxxx", "xxxx"), [True, True, False], mask("....", "....", "xxxx"))
    assert verdict.lengths.tolist() == [[2, 4, 0]]
    assert verdict.is_complete.tolist() == [[False, True, False]]
    assert not verdict.has_eos.any()
    assert not verdict.is_dropped.any()


def test_infill_completes_a_slot_at_its_eos_and_drops_the_slots_behind() -> None:
    verdict = infill(mask("x...", "xxx.", "xxxx"), [True, True, True], mask("....", ".xx.", "x..."))
    assert verdict.lengths.tolist() == [[1, 2, 0]]
    assert verdict.is_complete.tolist() == [[False, True, False]]
    assert verdict.is_dropped.tolist() == [[False, False, True]]
    assert verdict.has_eos.tolist() == [[False, True, False]]
    assert not verdict.is_accepted[0, 2].any()


def test_infill_ignores_an_eos_that_did_not_pass() -> None:
    verdict = infill(mask("x...", "xxxx"), [True, True], mask(".x..", "...."))
    assert not verdict.is_dropped.any()
    assert verdict.lengths.tolist() == [[1, 4]]


@st.composite
def verdict_inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """passes [B, W, K] (token 0 always passes), is_chosen [B, W], is_eos [B, W, K]."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    passes = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.5, 0.8, 0.95]))
    passes[:, :, 0] = True
    is_eos = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.4]))
    return passes, torch.rand(shape[:2], generator=generator) < 0.7, is_eos


@settings(max_examples=150, deadline=None)
@given(verdict_inputs())
def test_verify_prefix_equals_its_definition(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    passes, is_chosen, is_eos = inputs
    verdict = verify_prefix(passes, is_chosen, is_eos)
    size = passes.shape[2]
    for row in range(len(passes)):
        chain = [(slot, place) for slot in range(passes.shape[1]) if is_chosen[row, slot] for place in range(size)]
        failed = [index for index, cell in enumerate(chain) if not passes[row][cell]]
        prefix = chain[: failed[0]] if failed else chain
        ends = [index for index, cell in enumerate(prefix) if is_eos[row][cell]]
        committed = prefix[: ends[0] + 1] if ends else prefix[: len(prefix) // size * size]
        assert [tuple(cell) for cell in verdict.is_committed[row].nonzero().tolist()] == committed
        assert bool(verdict.has_eos[row]) == bool(ends)
        assert bool(verdict.is_full[row]) == (not ends and committed == chain)
        assert bool(verdict.needs_infill[row]) == (not ends and len(prefix) < size)


@settings(max_examples=150, deadline=None)
@given(verdict_inputs())
def test_infill_prefix_equals_its_definition(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    passes, is_chosen, is_eos = inputs
    verdict = infill_prefix(passes, is_chosen, is_eos)
    size = passes.shape[2]
    for row in range(len(passes)):
        is_over = False
        for slot in range(passes.shape[1]):
            chosen = bool(is_chosen[row, slot])
            failed = [place for place in range(size) if not passes[row, slot, place]]
            length = failed[0] if failed else size
            ends = [place for place in range(length) if is_eos[row, slot, place]]
            length = 0 if is_over or not chosen else ends[0] + 1 if ends else length
            has_eos = chosen and not is_over and bool(ends)
            assert int(verdict.lengths[row, slot]) == length
            assert verdict.is_accepted[row, slot].tolist() == [place < length for place in range(size)]
            assert bool(verdict.has_eos[row, slot]) == has_eos
            assert bool(verdict.is_dropped[row, slot]) == (chosen and is_over)
            assert bool(verdict.is_complete[row, slot]) == (chosen and not is_over and (has_eos or length == size))
            is_over = is_over or has_eos
