"""Slots: every layout supervises each answer token exactly as specified, and positions undo the permutation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refusion.slots import (
    AR_TERM,
    IGNORED,
    MDM_TERM,
    SlotRow,
    autoregressive_row,
    cut_slots,
    keyed_uniforms,
    mask_probability,
    permute_slots,
    permuted_row,
    row_generator,
    serial_row,
)

MASK = 9999
lengths = st.tuples(st.integers(1, 12), st.integers(1, 60))
seeds = st.integers(0, 2**32)


def _pair(sizes: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Ids that are all different, so that a label says which token it is: text position i has id 100 + i."""
    num_prompt, length = sizes
    return list(range(100, 100 + num_prompt)), list(range(100 + num_prompt, 100 + num_prompt + length))


@given(lengths, seeds, st.sampled_from([1, 4, 8, 32]), st.booleans())
def test_every_answer_token_of_a_permuted_row_stands_once_at_its_own_position(
    sizes: tuple[int, int], seed: int, k: int, order: bool
) -> None:
    prompt, answer = _pair(sizes)
    row = permute_slots(prompt, answer, mask_token_id=MASK, generator=row_generator(seed, 0, 0), slot_size=k, keep_text_order=order)
    restored = np.empty(len(prompt) + len(answer), dtype=np.int64)
    restored[row.position_ids] = np.where(row.is_masked, row.labels, row.input_ids)
    assert restored.tolist() == prompt + answer
    assert sorted(row.position_ids.tolist()) == list(range(len(restored)))


@given(lengths, seeds, st.sampled_from([1, 4, 8, 32]), st.booleans())
def test_permuted_row_supervises_each_token_as_specified(sizes: tuple[int, int], seed: int, k: int, order: bool) -> None:
    prompt, answer = _pair(sizes)
    row = permute_slots(prompt, answer, mask_token_id=MASK, generator=row_generator(seed, 0, 0), slot_size=k, keep_text_order=order)
    is_masked_slot = {}
    for i in range(len(prompt), len(row.labels)):
        offset = int(row.position_ids[i]) - len(prompt)
        slot = offset // k
        masked = row.input_ids[i] == MASK
        assert is_masked_slot.setdefault(slot, masked) == masked, "a slot is masked as a whole"
        if masked:
            assert (row.labels[i], row.terms[i]) == (answer[offset], MDM_TERM)
        elif offset % k == k - 1 or offset == len(answer) - 1:
            assert row.labels[i] == IGNORED
        else:
            assert (row.labels[i], row.terms[i], row.teacher_rows[i]) == (answer[offset + 1], AR_TERM, len(prompt) + offset)
    assert (row.labels[: len(prompt)] == IGNORED).all()
    assert ((row.labels == IGNORED) == (row.terms == 0)).all()
    masked_positions = row.position_ids[row.is_masked]
    assert (np.diff(masked_positions) > 0).all(), "masked slots stand in text order"
    if order:
        assert (np.diff(row.position_ids[~row.is_masked]) > 0).all()
    assert np.allclose(row.weights[row.is_masked], 1 / (row.mask_probability * len(answer)))


@given(lengths, seeds, st.sampled_from([1, 4, 8, 32]))
def test_permuted_row_is_plain_causal(sizes: tuple[int, int], seed: int, k: int) -> None:
    prompt, answer = _pair(sizes)
    row = permute_slots(prompt, answer, mask_token_id=MASK, generator=row_generator(seed, 0, 0), slot_size=k)
    assert (_seen(row) == np.tril(np.ones((len(row.labels),) * 2, dtype=bool))).all()


@given(lengths, seeds, st.sampled_from([1, 4, 8, 32]))
def test_serial_row_supervises_every_answer_token_twice(sizes: tuple[int, int], seed: int, k: int) -> None:
    prompt, answer = _pair(sizes)
    row = serial_row(prompt, answer, mask_token_id=MASK, generator=row_generator(seed, 0, 0), slot_size=k)
    assert row.labels[row.terms == AR_TERM].tolist() == answer
    assert row.labels[row.is_masked].tolist() == answer
    clean = np.flatnonzero(row.terms == AR_TERM)
    assert (row.labels[clean] == row.input_ids[clean] + 1).all(), "ids grow by one, so the target is the next token of the text"
    assert np.isclose(row.weights[row.is_masked].sum(), 1.0)
    assert row.mask_probability == 1.0


@given(lengths, seeds, st.sampled_from([1, 4, 8, 32]))
def test_serial_mask_groups_see_the_text_before_their_slot_and_themselves(sizes: tuple[int, int], seed: int, k: int) -> None:
    prompt, answer = _pair(sizes)
    row = serial_row(prompt, answer, mask_token_id=MASK, generator=row_generator(seed, 0, 0), slot_size=k)
    seen = _seen(row)
    text = len(prompt) + len(answer)
    for i in np.flatnonzero(row.is_masked):
        group = np.flatnonzero(row.group == row.group[i])
        first = int(row.position_ids[group[0]])
        assert len(group) <= k
        assert (row.position_ids[group] == np.arange(first, first + len(group))).all()
        assert np.flatnonzero(seen[i]).tolist() == [*range(first), *(int(j) for j in group if j <= i)]
        assert row.teacher_rows[i] == (first - 1 if i == group[0] else -1)
    assert (seen[:text] == np.tril(np.ones((text, len(row.labels)), dtype=bool))).all()


def test_serial_cuts_fall_everywhere() -> None:
    rows = [serial_row([1], list(range(40)), mask_token_id=MASK, generator=row_generator(0, 0, i), slot_size=4) for i in range(100)]
    assert {int(np.flatnonzero(np.diff(row.group))[1]) - 40 for row in rows} == {1, 2, 3, 4}


@given(lengths, seeds, st.integers(0, 40))
def test_serial_row_keeps_to_its_limits(sizes: tuple[int, int], seed: int, room: int) -> None:
    prompt, answer = _pair(sizes)
    limit = len(prompt) + len(answer) + room
    row = serial_row(prompt, answer, mask_token_id=MASK, generator=row_generator(seed, 0, 0), slot_size=8, max_groups=2, max_length=limit)
    assert len(row.labels) <= limit
    assert row.group.max() <= 2
    assert (row.labels[row.is_masked] == 100 + row.position_ids[row.is_masked]).all()


@given(lengths)
def test_autoregressive_row_predicts_every_answer_token_once(sizes: tuple[int, int]) -> None:
    prompt, answer = _pair(sizes)
    row = autoregressive_row(prompt, answer)
    targets = np.flatnonzero(row.terms)
    assert row.labels[targets].tolist() == answer
    assert (targets == np.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)).all()
    assert not row.is_masked.any()


@given(seeds, st.integers(0, 5), st.integers(0, 10**9))
@settings(max_examples=20)
def test_the_same_key_gives_the_same_row(seed: int, epoch: int, example: int) -> None:
    draws = [permute_slots([1, 2], list(range(80)), mask_token_id=MASK, generator=row_generator(seed, epoch, example)) for _ in range(2)]
    assert draws[0].input_ids.tolist() == draws[1].input_ids.tolist()
    assert draws[0].mask_probability == draws[1].mask_probability


def test_noise_shapes_the_masking_probability_and_uniform_is_the_papers() -> None:
    assert mask_probability(0.25) == (1.0 - 1e-3) * 0.25 + 1e-3
    assert [mask_probability(u, "cosine") for u in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.70740, 0.001], abs=1e-5)
    assert [mask_probability(u, "clipped") for u in (0.0, 0.5, 1.0)] == pytest.approx([0.3007, 0.55045, 0.8002], abs=1e-5)
    rows = [
        permute_slots([1, 2], list(range(80)), mask_token_id=MASK, generator=row_generator(0, 0, i), slot_size=4, noise="clipped")
        for i in range(300)
    ]
    assert 0.3 <= min(row.mask_probability for row in rows) < 0.33
    assert 0.77 < max(row.mask_probability for row in rows) <= 0.81


@given(lengths, seeds, st.sampled_from([1, 4, 8]))
def test_without_border_targets_a_serial_row_lacks_the_first_token_of_each_slot_alone(sizes: tuple[int, int], seed: int, k: int) -> None:
    prompt, answer = _pair(sizes)
    whole, bare = (
        serial_row(prompt, answer, mask_token_id=MASK, generator=row_generator(seed, 0, 0), slot_size=k, has_border_targets=is_taught)
        for is_taught in (True, False)
    )
    masked = np.flatnonzero(whole.is_masked)
    firsts = whole.labels[masked[np.diff(whole.group[masked], prepend=0) != 0]]  # the first token of each slot
    lost = np.flatnonzero(whole.labels != bare.labels)
    taught = set(whole.labels[~whole.is_masked].tolist())
    assert whole.labels[lost].tolist() == [token for token in firsts.tolist() if token in taught]
    assert (bare.labels[lost] == IGNORED).all()
    assert not bare.weights[lost].any()
    assert (bare.teacher_rows[lost] == -1).all()
    assert whole.input_ids.tolist() == bare.input_ids.tolist()


def test_keys_that_differ_give_different_rows() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    rows = [permute_slots([1, 2], list(range(80)), mask_token_id=MASK, generator=row_generator(*key)) for key in keys]
    assert len({row.mask_probability for row in rows}) == 4


def test_keyed_uniforms_are_uniform_and_independent_of_their_neighbours() -> None:
    ids = np.arange(20_000)
    values = keyed_uniforms(3, 1, ids, 0)
    assert np.histogram(values, bins=10, range=(0, 1))[0] == pytest.approx(np.full(10, 2000), rel=0.1)
    assert values[7] == keyed_uniforms(3, 1, np.array([7]), 0)[0]
    assert abs(np.corrcoef(values, keyed_uniforms(3, 1, ids, 1))[0, 1]) < 0.03
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("clean_order", "clean_ids", "clean_positions", "clean_labels", "masked_positions", "masked_labels"),
    [
        ([2, 0], [1, 20, 21, 22, 23], [10, 2, 3, 4, 5], [IGNORED, 21, 22, 23, IGNORED], [6, 7, 8, 9], [1] * 4),
        ([1], [1], [6], [IGNORED], [2, 3, 4, 5, 10, 11, 12, 13], [20, 21, 22, 23, 1, 1, 1, 1]),
        ([0, 1, 2], [20, 21, 22, 23, 1, 1], [2, 3, 4, 5, 6, 10], [21, 22, 23, IGNORED, IGNORED, IGNORED], [], []),
    ],
)
def test_slots_behind_the_end_are_masks_for_eos_and_stand_clean_through_their_first_eos(
    clean_order: list[int],
    clean_ids: list[int],
    clean_positions: list[int],
    clean_labels: list[int],
    masked_positions: list[int],
    masked_labels: list[int],
) -> None:
    """20 21 22 23 | 1 (EOS) and three more | four behind the end."""
    order = np.array(clean_order, dtype=np.int64)
    row = permuted_row([10, 11], [20, 21, 22, 23, 1], cut_slots(12, 4), order, mask_token_id=MASK, mask_probability=0.5)
    num_clean, num_masked = 2 + len(clean_ids), len(masked_labels)
    assert row.input_ids.tolist() == [10, 11, *clean_ids, *[MASK] * num_masked]
    assert row.position_ids.tolist() == [0, 1, *clean_positions, *masked_positions]
    assert row.labels.tolist() == [IGNORED, IGNORED, *clean_labels, *masked_labels]
    assert row.is_masked.tolist() == [False] * num_clean + [True] * num_masked
    has_next = [label != IGNORED for label in clean_labels]
    assert row.weights.tolist() == [0, 0, *map(float, has_next), *[1 / (0.5 * 12)] * num_masked]
    text = [10, 11, 20, 21, 22, 23, 1]
    for label, teacher, term in zip(row.labels, row.teacher_rows, row.terms, strict=True):
        assert (teacher >= 0) == (term == AR_TERM)
        assert teacher < 0 or text[teacher + 1] == label
    assert (_seen(row) == np.tril(np.ones((len(row.labels),) * 2, dtype=bool))).all()


@pytest.mark.parametrize(
    ("first", "masked_positions", "masked_labels"),
    [
        (1, [2, 3, 4, 5, 6], [20, 21, 22, 23, 1]),
        (2, [2, 3, 4, 5, 6, 7], [20, 21, 22, 23, 1, 1]),
        (4, [2, 3, 4, 5, 6, 7, 8, 9], [20, 21, 22, 23, 1, 1, 1, 1]),
    ],
)
def test_the_last_slot_of_a_serial_row_goes_on_behind_the_end(first: int, masked_positions: list[int], masked_labels: list[int]) -> None:
    prompt, answer = [10, 11], [20, 21, 22, 23, 1]
    seed = next(s for s in range(100) if row_generator(s, 0, 0).integers(1, 5) == first)
    row, plain = (
        serial_row(prompt, answer, mask_token_id=MASK, generator=row_generator(seed, 0, 0), slot_size=4, num_behind=n) for n in (3, 0)
    )
    num_masked = len(masked_labels)
    assert row.input_ids.tolist() == [*prompt, *answer, *[MASK] * num_masked]
    assert row.position_ids.tolist() == [*range(7), *masked_positions]
    assert row.labels.tolist() == [IGNORED, *answer, IGNORED, *masked_labels]
    assert row.weights.tolist() == [0, *[1] * 5, 0, *[1 / num_masked] * num_masked]
    assert (row.terms[:7] == plain.terms[:7]).all()
    for name in ("input_ids", "position_ids", "labels", "terms", "visible", "group", "teacher_rows"):
        assert getattr(row, name)[: len(plain.labels)].tolist() == getattr(plain, name).tolist(), name
    last = len(row.labels) - 1
    assert np.flatnonzero(_seen(row)[last]).tolist() == [*range(2 + first), *np.flatnonzero(row.group == row.group.max())]


@given(lengths, seeds, st.sampled_from([1, 4, 8, 32]), st.integers(0, 40), st.booleans())
def test_behind_the_end_masks_predict_its_eos_and_nothing_else_is_predicted(
    sizes: tuple[int, int], seed: int, k: int, num_behind: int, is_serial: bool
) -> None:
    prompt, answer = _pair(sizes)
    end = 100 + len(prompt) + len(answer) - 1  # the EOS
    make = serial_row if is_serial else permute_slots
    row = make(prompt, answer, mask_token_id=MASK, generator=row_generator(seed, 0, 0), slot_size=k, num_behind=num_behind)
    is_masked = row.is_masked
    assert (row.labels[is_masked] == np.minimum(100 + row.position_ids[is_masked], end)).all()
    clean = row.terms == AR_TERM
    assert (row.labels[clean] == row.input_ids[clean] + 1).all()
    assert row.position_ids[clean].max(initial=0) < len(prompt) + len(answer) - 1, "nothing is predicted from an EOS"
    assert row.position_ids.max() < len(prompt) + len(answer) + num_behind
    assert np.allclose(row.weights[is_masked], 1 / (row.mask_probability * row.answer_length))
    if is_serial:
        assert is_masked.sum() == row.answer_length
        assert row.answer_length - len(answer) <= min(num_behind, k - 1)
    else:
        assert row.answer_length == len(answer) + num_behind
        behind = np.flatnonzero(~is_masked & (row.position_ids >= len(prompt) + len(answer)))
        assert ((row.position_ids[behind] - len(prompt)) % k == 0).all(), "a clean slot behind the end is its first EOS alone"
        assert (row.input_ids[behind] == end).all()


def test_slots_are_cut_as_documented() -> None:
    assert cut_slots(10, 4).tolist() == [0, 4, 8, 10]
    assert cut_slots(10, 4, 1).tolist() == [0, 1, 5, 9, 10]
    assert cut_slots(3, 8).tolist() == [0, 3]


def test_permuted_rows_reproduce_the_golden_batches(golden_dir: Path) -> None:
    """Cut and order are read off the golden rows; ids, positions, labels and the mask must follow from them."""
    for batch in json.loads((golden_dir / "loss.json").read_text()):
        for b, pair in enumerate(batch["rows"]):
            prompt, answer = pair["prompt_ids"], pair["answer_ids"]
            total = len(prompt) + len(answer)
            positions, labels = np.array(batch["position_ids"][b][:total]), np.array(batch["labels"][b][:total])
            is_masked = np.array(batch["is_masked"][b][:total], dtype=bool)
            candidates = [
                row
                for k in (4, 8, 16, 32)
                if (row := _row_with_order(prompt, answer, k, positions, is_masked, batch["p_mask"][b])) is not None
                and row.labels.tolist() == labels.tolist()
            ]
            assert candidates, "one of the slot sizes gives the golden labels"
            assert candidates[0].input_ids.tolist() == batch["permuted_input_ids"][b][:total]
            assert candidates[0].position_ids.tolist() == positions.tolist()
            assert candidates[0].is_masked.tolist() == is_masked.tolist()


def _row_with_order(
    prompt: list[int], answer: list[int], k: int, positions: np.ndarray, is_masked: np.ndarray, probability: float
) -> SlotRow | None:
    """The row for slots of k tokens in the order in which their clean tokens stand; None if that is no order of whole slots."""
    clean = positions[len(prompt) :][~is_masked[len(prompt) :]] - len(prompt)
    order = list(dict.fromkeys((clean // k).tolist()))
    row = permuted_row(
        prompt, answer, cut_slots(len(answer), k), np.array(order, dtype=np.int64), mask_token_id=2, mask_probability=probability
    )
    return row if row.position_ids.tolist() == positions.tolist() else None


def _seen(row: SlotRow) -> np.ndarray:
    """[T, T] what each token of the row sees, written out from the definition."""
    index = np.arange(len(row.labels))
    in_group = (row.group[:, None] == row.group) & (row.group[:, None] > 0) & (index <= index[:, None])
    return (index < row.visible[:, None]) | in_group
