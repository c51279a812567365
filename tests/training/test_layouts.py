"""Layouts of the baselines: hand-worked rows, masks cell by cell against the papers' own description, weights that are unbiased."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedModel

from refusion.errors import ConfigError
from refusion.slots import AR_TERM, IGNORED, MDM_TERM, SlotRow, row_generator
from refusion.training.attention import FLEX_NAME, block_mask, visibility
from refusion.training.base import toy_config
from refusion.training.batches import Batch, pack_batch
from refusion.training.layouts import block_diffusion_row, make_layout, masked_diffusion_row, shortest_lengths
from refusion.training.objectives import LossSettings, packed_loss
from refusion.training.recipe import ObjectiveSettings

MASK = 2
TOLERANCE = 2e-5  # float32 sums in another order
NAMES = ("refusion", "autoregressive", "masked_diffusion", "block_diffusion", "refusion behind the end")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(toy_config()).eval()


def test_masked_diffusion_never_masks_the_prompt_and_masks_predict_themselves() -> None:
    prompt, answer = _pair(5, 40)
    row = _masked(prompt, answer)
    is_masked = row.is_masked
    assert not is_masked[:5].any()
    assert 0 < is_masked.sum() < 40
    assert (row.input_ids[is_masked] == MASK).all()
    assert (row.labels[is_masked] == np.concatenate([prompt, answer])[is_masked]).all()
    assert (row.input_ids[~is_masked] == np.concatenate([prompt, answer])[~is_masked]).all()
    assert (row.labels[~is_masked] == IGNORED).all()
    assert (row.visible == 45).all()


def test_masked_diffusion_loss_is_lladas(model: PreTrainedModel) -> None:
    """GUIDELINES.md of LLaDA: sum of CE / p_mask / answer_length over the masks, divided by the batch size; attention is full."""
    pairs = [_pair(5, 20, 0), _pair(3, 33, 1)]
    rows = [_masked(*pair, seed=i) for i, pair in enumerate(pairs)]
    expected = torch.tensor(0.0)
    for row in rows:
        ids = torch.tensor(row.input_ids).unsqueeze(0)
        everything = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        logits = model(ids, attention_mask=everything, position_ids=torch.arange(ids.shape[1]).unsqueeze(0), use_cache=False).logits[0]
        losses = F.cross_entropy(logits, torch.tensor(row.labels), reduction="none", ignore_index=IGNORED)
        expected = expected + losses.sum() / row.mask_probability / row.answer_length
    loss = packed_loss(model, _normalised(pack_batch([rows], 96, pad_id=MASK)), LossSettings())
    torch.testing.assert_close(loss["mdm"], expected / 2, atol=TOLERANCE, rtol=TOLERANCE)
    assert loss["ar"] == 0


def test_block_diffusion_row_by_hand() -> None:
    row = block_diffusion_row(
        np.array([10, 11, 12]), np.array([20, 21, 22, 23, 24]), mask_token_id=MASK, generator=row_generator(0, 0, 0), block_size=2
    )
    noisy = slice(7, 12)
    assert row.input_ids[:7].tolist() == [10, 11, 12, 20, 21, 22, 23]  # the last clean block, 24, is seen by none and left out
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7]
    assert row.visible.tolist() == [2, 2, 3, 5, 5, 7, 7, 3, 3, 5, 5, 7]
    assert row.group.tolist() == [0] * 7 + [-1, -1, -2, -2, -3]
    assert all(row.input_ids[noisy][i] in (MASK, token) for i, token in enumerate([20, 21, 22, 23, 24]))
    assert (row.labels[noisy] != IGNORED).tolist() == (row.input_ids[noisy] == MASK).tolist()
    probability = np.asarray(row.mask_probability)[noisy]
    assert len(set(probability.tolist())) == 3, "each block has its own t"
    np.testing.assert_allclose(row.weights[noisy], np.where(row.is_masked[noisy], 1 / probability, 0))
    assert row.num_units == 5


@pytest.mark.parametrize("block_size", [1, 4, 7, 64])
def test_block_diffusion_mask_is_that_of_the_paper_cell_by_cell(block_size: int) -> None:
    """Block-diagonal, offset block-causal and block-causal (section 3 and its figure), written out from the tokens' roles."""
    rows = [[_blocks(*_pair(5, 19), block_size), _blocks(*_pair(6, 3, 1), block_size, 1)], [_blocks(*_pair(1, 30, 2), block_size, 2)]]
    batch = pack_batch(rows, 96, pad_id=MASK)
    seen = visibility(batch["start"], batch["visible"], batch["group"])
    for r, documents in enumerate(rows):
        roles: list[tuple[int, str, int]] = []
        for d, document in enumerate(documents):
            num_prompt = int(document.position_ids.max()) + 1 - document.answer_length
            prompt_blocks = math.ceil(num_prompt / block_size)
            for position, group in zip(document.position_ids.tolist(), document.group.tolist(), strict=True):
                answer_block = prompt_blocks + (position - num_prompt) // block_size
                block = position // block_size if position < num_prompt else answer_block
                roles.append((d, "noisy" if group else "clean", block))
        for i, (document, kind, block) in enumerate(roles):
            for j, (other, other_kind, other_block) in enumerate(roles):
                if kind == "noisy":
                    expected = other_block == block if other_kind == "noisy" else other_block < block
                else:
                    expected = other_kind == "clean" and other_block <= block
                assert seen[r, i, j].item() == (expected and document == other), (r, i, j)
        assert not seen[r, : len(roles), len(roles) :].any(), "nothing sees padding"
        assert torch.equal(seen[r, len(roles) :, :].float(), torch.eye(96)[len(roles) :]), "padding sees itself alone"


def test_block_diffusion_with_single_token_blocks_is_autoregressive(model: PreTrainedModel) -> None:
    """A block of one masked token sees exactly the text before it: the bound is tight there, as the paper says."""
    prompt, answer = _pair(4, 12)
    row = _blocks(prompt, answer, 1)
    batch = _normalised(pack_batch([[row]], 32, pad_id=MASK))
    loss = packed_loss(model, batch, LossSettings())["mdm"]
    expected = 0.0
    for i in np.flatnonzero(row.is_masked):
        position = int(row.position_ids[i])
        ids = torch.tensor([*np.concatenate([prompt, answer])[:position], MASK]).unsqueeze(0)
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
        expected += F.cross_entropy(logits, torch.tensor(row.labels[i])).item() * row.weights[i] / len(answer)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_packed_losses_are_padded_losses(model: PreTrainedModel, name: str) -> None:
    layout = make_layout(_objective(name), mask_token_id=MASK, seed=0, pack_length=256)
    documents = [layout.row(0, i, *_pair(3 + i, 10 + 5 * i, i)) for i in range(6)]
    packed = _normalised(pack_batch([documents[:3], documents[3:]], 256, pad_id=MASK, chunk_size=32))
    together = packed_loss(model, packed, LossSettings(chunk_size=32))
    alone = [pack_batch([[document]], 160, pad_id=MASK, chunk_size=32) for document in documents]
    normalisers = {n: packed[n] for n in ("ar_normaliser", "mdm_normaliser")}
    terms = [packed_loss(model, batch | normalisers, LossSettings(chunk_size=32)) for batch in alone]
    for term in ("loss", "ar", "mdm"):
        total = torch.stack([values[term] for values in terms]).sum()
        torch.testing.assert_close(together[term], total, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_no_document_sees_another(model: PreTrainedModel, name: str) -> None:
    """Whatever the neighbour in the row holds, the first document's hidden states stay as they are."""
    layout = make_layout(_objective(name), mask_token_id=MASK, seed=0, pack_length=256)
    mine = layout.row(0, 0, *_pair(4, 20))
    hidden = []
    for neighbour in (1, 2):
        batch = pack_batch(
            [[layout.row(0, 9, *_pair(7, 25, neighbour)), mine, layout.row(0, 8, *_pair(9, 12, neighbour))]], 192, pad_id=MASK
        )
        assert len(batch["input_ids"][0]) == 192
        seen = visibility(batch["start"], batch["visible"], batch["group"])[0]
        first = int((batch["start"][0] > 0).nonzero()[0])
        assert not seen[first:, :first].any()
        mask = torch.zeros(1, 1, 192, 192).masked_fill(~seen, float("-inf"))
        arguments = {"position_ids": batch["position_ids"], "attention_mask": mask, "use_cache": False}
        states = model.base_model(input_ids=batch["input_ids"], **arguments).last_hidden_state[0]
        hidden.append(states[first : first + len(mine.input_ids)])
    torch.testing.assert_close(hidden[0], hidden[1], atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_flex_block_masks_are_the_dense_masks_cell_by_cell(name: str) -> None:
    layout = make_layout(_objective(name), mask_token_id=MASK, seed=0, pack_length=256)
    rows = [[layout.row(0, i, *_pair(5 + i, 30 + i, i)) for i in range(2)], [layout.row(0, 7, *_pair(20, 90, 7))]]
    batch = pack_batch(rows, 256, pad_id=MASK)
    where = [batch[n] for n in ("start", "visible", "group")]
    seen, mask = visibility(*where), block_mask(*where)
    length = torch.arange(256)
    for r in range(2):
        cells = torch.vmap(lambda q, r=r: torch.vmap(lambda k: mask.mask_mod(torch.tensor(r), torch.tensor(0), q, k))(length))(length)
        assert torch.equal(cells, seen[r])
    tiles = seen.view(2, 2, 128, 2, 128).any(4).any(2)
    assert torch.equal(mask.to_dense().squeeze(1).bool(), tiles), "no tile that is needed is skipped, none that is empty is computed"


@pytest.mark.parametrize("name", ["masked_diffusion", "block_diffusion"])
def test_flex_attention_has_the_loss_of_the_dense_mask(name: str) -> None:
    model = LlamaForCausalLM(toy_config()).eval()
    layout = make_layout(_objective(name), mask_token_id=MASK, seed=0, pack_length=128)
    batch = _normalised(pack_batch([[layout.row(0, i, *_pair(5, 20, i)) for i in range(2)]], 128, pad_id=MASK))
    with torch.no_grad():
        dense = packed_loss(model, batch, LossSettings())["loss"]
        model.config._attn_implementation = FLEX_NAME
        torch.testing.assert_close(packed_loss(model, batch, LossSettings())["loss"], dense, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["masked_diffusion", "block_diffusion"])
def test_weights_make_every_answer_token_count_once_in_expectation(name: str) -> None:
    """E[1 / t over masked tokens] is the number of answer tokens: the 1 / t weight undoes the chance of being masked."""
    layout = make_layout(_objective(name), mask_token_id=MASK, seed=0, pack_length=256)
    prompt, answer = _pair(3, 24)
    rows = [layout.row(0, i, prompt, answer) for i in range(3000)]
    per_unit = sum(row.weights.sum() for row in rows) / sum(row.num_units for row in rows)
    assert per_unit == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_planned_and_shortest_lengths_bound_the_rows(name: str) -> None:
    objective = _objective(name)
    layout = make_layout(objective, mask_token_id=MASK, seed=0, pack_length=256)
    for i in range(40):
        prompt, answer = _pair(1 + i % 7, 1 + i, i)
        lengths = np.array([len(prompt)]), np.array([len(answer)])
        row = layout.row(0, i, prompt, answer)
        assert shortest_lengths(objective, *lengths)[0] <= len(row.input_ids) <= layout.lengths(0, np.array([i]), *lengths)[0]
        assert set(np.unique(row.terms)) <= {0, AR_TERM, MDM_TERM}


@pytest.mark.parametrize("name", ["masked_diffusion", "block_diffusion"])
def test_padded_answers_end_in_as_many_eos_as_fill_a_region(name: str) -> None:
    objective = ObjectiveSettings(name=name, pad_answers=8)  # pyright: ignore[reportArgumentType]
    layout = make_layout(objective, mask_token_id=MASK, seed=0, pack_length=256)
    plain = make_layout(ObjectiveSettings(name=name), mask_token_id=MASK, seed=0, pack_length=256)  # pyright: ignore[reportArgumentType]
    for length in (1, 7, 8, 9, 20):
        prompt, answer = _pair(3, length)
        padded = np.concatenate([answer, np.repeat(answer[-1], -length % 8)])
        row, expected = layout.row(0, length, prompt, answer), plain.row(0, length, prompt, padded)
        for field in ("input_ids", "labels", "weights", "visible", "group", "position_ids"):
            assert np.array_equal(getattr(row, field), getattr(expected, field)), field
        lengths = np.array([3]), np.array([length])
        assert layout.lengths(0, np.array([0]), *lengths)[0] == shortest_lengths(objective, *lengths)[0] == len(row.input_ids)


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_refusion_goes_on_behind_the_end_as_far_as_a_packed_row_has_room(share: float, groups: int) -> None:
    objective = ObjectiveSettings(serial_share=share, serial_groups=groups, pad_answers=32)
    layout = make_layout(objective, mask_token_id=MASK, seed=0, pack_length=64)
    reached = 0
    for i in range(200):
        prompt, answer = _pair(4, 1 + i % 60, i)
        row, lengths = layout.row(0, i, prompt, answer), (np.array([4]), np.array([len(answer)]))
        assert len(row.input_ids) <= layout.lengths(0, np.array([i]), *lengths)[0] <= 64
        assert shortest_lengths(objective, *lengths)[0] == 4 + len(answer)
        assert row.position_ids.max() < min(4 + len(answer) + -len(answer) % 32, 64)
        behind = row.position_ids >= 4 + len(answer)
        assert (row.labels[behind & row.is_masked] == answer[-1]).all()
        reached += int(behind.sum())
    assert reached > 200


def test_an_answer_that_fills_its_multiple_has_the_rows_that_it_has_without_padding() -> None:
    plain, padded = (
        make_layout(ObjectiveSettings(serial_share=0.5, pad_answers=n), mask_token_id=MASK, seed=0, pack_length=256) for n in (0, 8)
    )
    for i in range(50):
        prompt, answer = _pair(3, 8 * (1 + i % 5), i)
        row, expected = padded.row(0, i, prompt, answer), plain.row(0, i, prompt, answer)
        for field in ("input_ids", "labels", "weights", "terms", "visible", "group", "position_ids", "teacher_rows"):
            assert np.array_equal(getattr(row, field), getattr(expected, field)), field


def test_padding_is_for_objectives_that_fill_regions() -> None:
    with pytest.raises(ConfigError, match=r"objective\.pad_answers = 8 must be left out: it has no effect on the autoregressive objective"):
        ObjectiveSettings(name="autoregressive", pad_answers=8)


def _objective(name: str) -> ObjectiveSettings:
    behind = {"name": "refusion", "serial_share": 0.5, "pad_answers": 16}
    options = {"refusion": {"serial_share": 0.5}, "block_diffusion": {"block_size": 8}, "refusion behind the end": behind}
    return ObjectiveSettings(**{"name": name, **options.get(name, {})})  # pyright: ignore[reportArgumentType]


def _pair(num_prompt: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(8, 64, num_prompt), generator.integers(8, 64, length)


def _masked(prompt: np.ndarray, answer: np.ndarray, seed: int = 0) -> SlotRow:
    return masked_diffusion_row(prompt, answer, mask_token_id=MASK, generator=row_generator(0, 0, seed))


def _blocks(prompt: np.ndarray, answer: np.ndarray, block_size: int, seed: int = 0) -> SlotRow:
    return block_diffusion_row(prompt, answer, mask_token_id=MASK, generator=row_generator(0, 0, seed), block_size=block_size)


def _normalised(batch: Batch) -> Batch:
    return batch | {"ar_normaliser": torch.tensor(max(batch["num_ar"], 1.0)), "mdm_normaliser": torch.tensor(float(batch["num_units"]))}
