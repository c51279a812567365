"""Packing and the order of batches: nothing split, nothing lost, the same for any number of processes, from any step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refusion.training.batches import Batch, Corruption, PackedBatches, Schedule, make_schedule, pack_rows, plan_epoch
from refusion.training.data import Examples, load_examples
from refusion.training.recipe import DataSettings, ObjectiveSettings, Source

PACK = 128


@pytest.fixture(scope="module")
def examples() -> Examples:
    settings = DataSettings(sources=(Source(toy=40), Source(toy=30, weight=2.5)), pack_length=PACK)
    return load_examples(settings, tokenizer=None, mask_token_id=2, vocab_size=64)


def _schedule(examples: Examples, max_steps: int = 0, epochs: float = 1.0, **objective: float) -> Schedule:
    settings = ObjectiveSettings(slot_sizes=(4, 8), **{"serial_share": 0.5, **objective})  # pyright: ignore[reportArgumentType]
    corruption = Corruption(examples=examples, objective=settings, mask_token_id=2, seed=0, pack_length=PACK)
    return make_schedule(corruption, rows_per_step=4, max_steps=max_steps, epochs=epochs)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300))
def test_packing_keeps_every_document_whole_and_once(lengths: list[int]) -> None:
    rows = pack_rows(np.array(lengths), 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)


def test_packing_fits_best() -> None:
    assert pack_rows(np.array([5, 4, 3, 2]), 8) == [[0, 2], [1, 3]]
    lengths = np.random.default_rng(0).integers(20, 400, 5000)
    assert lengths.sum() / (len(pack_rows(lengths, 1024)) * 1024) > 0.95


def test_an_epoch_repeats_each_source_by_its_weight(examples: Examples) -> None:
    corruption = _schedule(examples).corruption
    plans = [plan_epoch(corruption, epoch) for epoch in range(2)]
    counts = [np.bincount(plan.ids % len(examples), minlength=len(examples)) for plan in plans]
    assert (counts[0][:40] == 1).all()
    assert set(counts[0][40:]) == {2, 3}
    assert (counts[0] != counts[1]).any(), "who is repeated a third time is drawn anew"
    assert all(len(set(plan.ids.tolist())) == len(plan.ids) for plan in plans), "copies have ids, and so corruptions, of their own"


@pytest.mark.parametrize("padding", [0, 16])
@pytest.mark.parametrize("groups", [0, 2])
def test_planned_lengths_bound_the_rows(examples: Examples, groups: int, padding: int) -> None:
    corruption = _schedule(examples, serial_groups=groups, text_order_share=0.5, pad_answers=padding).corruption
    ids = np.arange(len(examples))
    planned = corruption.lengths(3, ids)
    actual = np.array([len(corruption.row(3, int(i)).input_ids) for i in ids])
    assert (actual <= planned).all()
    if not groups and not padding:
        assert (actual == planned).all()


def test_layouts_are_drawn_in_their_shares(examples: Examples) -> None:
    corruption = _schedule(examples, serial_share=0.3).corruption
    rows = [corruption.row(0, i) for i in range(1000)]
    assert sum(row.mask_probability == 1.0 for row in rows) == pytest.approx(300, abs=60)


def test_processes_and_accumulation_divide_a_step_without_rest(examples: Examples) -> None:
    schedule = _schedule(examples)
    whole = next(iter(PackedBatches(schedule)))
    parts = [PackedBatches(schedule, accumulation=2, process=p, num_processes=2).micro_batch(0, a) for p in range(2) for a in range(2)]
    assert _rows(whole) == sorted(row for part in parts for row in _rows(part))
    for name in ("num_documents", "num_ar", "num_tokens"):
        assert whole[name] == sum(part[name] for part in parts)


def test_batches_from_a_later_step_are_those_of_an_unbroken_run(examples: Examples) -> None:
    schedule = _schedule(examples, max_steps=9, distill=0.5, pad_answers=16)
    unbroken, resumed = list(PackedBatches(schedule))[5:], list(PackedBatches(schedule, start_step=5))
    assert len(unbroken) == len(resumed) == 4
    for a, b in zip(unbroken, resumed, strict=True):
        assert all(torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a)


def test_a_run_by_epochs_shows_every_example_and_fills_the_last_step(examples: Examples) -> None:
    schedule = _schedule(examples, epochs=2.0)
    batches = list(PackedBatches(schedule))
    assert len(batches) == schedule.num_steps
    assert sum(batch["num_documents"] for batch in batches) == sum(len(plan.ids) for plan in schedule.plans)
    assert {batch["input_ids"].shape for batch in batches} == {(4, PACK)}


def test_targets_are_the_labels_of_the_rows_in_whole_chunks(examples: Examples) -> None:
    batch = PackedBatches(_schedule(examples), chunk_size=32).micro_batch(0, 0)
    assert len(batch["target_index"]) % 32 == 0
    real = batch["target_weights"] > 0
    index = batch["target_index"][real]
    assert sorted(index.tolist()) == batch["terms"].flatten().nonzero().flatten().tolist()
    assert torch.equal(batch["target_labels"][real], batch["labels"].flatten()[index])
    assert torch.equal(batch["target_weights"][real], batch["weights"].flatten()[index])


def test_targets_are_filled_up_with_tokens_of_their_own(examples: Examples) -> None:
    """Indexing adds up the gradients of repeated tokens one after the other."""
    batch = PackedBatches(_schedule(examples), chunk_size=128).micro_batch(0, 0)
    assert (batch["target_weights"] == 0).any()
    assert len(batch["target_index"].unique()) == len(batch["target_index"])
    few = PackedBatches(_schedule(examples), chunk_size=4096).micro_batch(0, 0)
    assert len(few["target_index"]) == 4096
    assert few["target_index"].max() < few["input_ids"].numel(), "four rows of 128 tokens cannot fill a chunk; the rest repeats one"


def _rows(batch: Batch) -> list[list[int]]:
    return sorted(batch["input_ids"].tolist())
