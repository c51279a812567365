"""The loss: golden values, the chunked form equal to the plain one, packed equal to padded, and logits under permuted positions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from refusion.slots import autoregressive_row, permute_slots, row_generator, serial_row
from refusion.training import hybrid_loss
from refusion.training.attention import FLEX_NAME, TILE, block_mask, dense_mask, visibility
from refusion.training.batches import pack_batch
from refusion.training.cross_entropy import linear_cross_entropy
from refusion.training.layouts import block_diffusion_row, masked_diffusion_row
from refusion.training.objectives import LossSettings, bind_objective, packed_loss

TOLERANCE = 2e-5  # float32 sums in another order


@pytest.fixture(scope="module")
def golden_model(golden_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(golden_dir / "tiny-refusion", dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def golden_batches(golden_dir: Path) -> list[dict[str, Any]]:
    return json.loads((golden_dir / "loss.json").read_text())


def test_hybrid_loss_gives_the_golden_values(golden_model: PreTrainedModel, golden_batches: list[dict[str, Any]]) -> None:
    for batch in golden_batches:
        ids = torch.tensor(batch["permuted_input_ids"])
        # The 2-D mask of ones keeps transformers from inferring packed sequences out of the permuted positions.
        logits = golden_model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.tensor(batch["position_ids"])).logits
        terms = hybrid_loss(logits, *_loss_arguments(batch))
        assert terms.ar.item() == pytest.approx(batch["ar_loss"], abs=1e-5)
        assert terms.mdm.item() == pytest.approx(batch["mdm_loss"], abs=1e-5)
        assert terms.total.item() == pytest.approx(batch["loss"], abs=2e-5)


def test_terms_without_targets_are_zero_with_finite_gradients() -> None:
    for masked in (True, False):
        logits = torch.randn(1, 4, 7, requires_grad=True)
        labels = torch.tensor([[-100, 1, 2, -100]])
        terms = hybrid_loss(logits, labels, torch.full((1, 4), masked), torch.tensor([0.5]), torch.tensor([2]))
        terms.total.backward()
        assert (terms.ar if masked else terms.mdm).item() == 0.0
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
    logits = torch.randn(1, 4, 7, requires_grad=True)
    terms = hybrid_loss(logits, torch.full((1, 4), -100), torch.zeros(1, 4).bool(), torch.tensor([0.5]), torch.tensor([2]))
    terms.total.backward()
    assert terms.total.item() == 0.0


def test_logits_under_permuted_positions_equal_those_under_an_explicit_causal_mask(
    golden_model: PreTrainedModel, golden_batches: list[dict[str, Any]], tiny_checkpoints: dict[str, Path]
) -> None:
    """Guards against transformers inferring packed sequences, for both model types and for a 2-D mask of ones and our 4-D mask alike."""
    positions = torch.tensor(golden_batches[0]["position_ids"])
    length = positions.shape[1]
    for model in (golden_model, AutoModelForCausalLM.from_pretrained(tiny_checkpoints["llama"], dtype=torch.float32)):
        ids = torch.randint(6, 90, positions.shape, generator=torch.Generator().manual_seed(0))
        causal = torch.full((length, length), float("-inf")).triu(1).expand(len(ids), 1, length, length)
        model.set_attn_implementation("eager")
        plain = model(ids, attention_mask=causal, position_ids=positions, use_cache=False).logits
        model.set_attn_implementation("sdpa")
        start, visible = torch.zeros_like(ids), torch.arange(1, length + 1).expand_as(ids)
        ours = dense_mask(start, visible, torch.zeros_like(ids), torch.float32)
        for mask in (torch.ones_like(ids), ours, ours == 0):
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            torch.testing.assert_close(logits, plain, atol=1e-4, rtol=1e-4)


def test_visibility_follows_its_definition() -> None:
    rows = [[_serial(5, 20, 0), _permuted(3, 14, 1)], [_autoregressive(4, 9)]]
    batch = pack_batch(rows, 96, pad_id=2)
    seen = visibility(batch["start"], batch["visible"], batch["group"])
    start, visible, group = (batch[name].numpy() for name in ("start", "visible", "group"))
    for r, i, j in np.ndindex(*seen.shape):
        in_group = group[r, i] == group[r, j] and group[r, i] > 0 and j <= i and start[r, i] == start[r, j]
        assert seen[r, i, j].item() == (start[r, i] <= j < visible[r, i] or in_group)
    assert seen.diagonal(dim1=1, dim2=2).all(), "every token, padding too, sees itself: no empty softmax"


@pytest.mark.parametrize("length", [256, 320, 200], ids=["whole tiles", "half a tile", "a ragged end"])
def test_tiles_of_flex_attention_are_those_of_the_visibility(length: int) -> None:
    """Needed tiles are exactly those that hold a pair; a tile that skips the mask holds nothing else."""
    rows = [
        [_autoregressive(3, 190, 9)],  # one document longer than a tile: full tiles below the diagonal
        [_serial(5, 40, 0), _permuted(3, 60, 1)],
        [_bidirectional(4, 150), _blocks(3, 20)],
        [_blocks(30, 80), _autoregressive(4, 9)],
        [],
    ]
    batch = pack_batch(rows, length, pad_id=2)
    start, visible, group = batch["start"], batch["visible"], batch["group"]
    seen = torch.zeros(len(rows), -(-length // TILE) * TILE, -(-length // TILE) * TILE, dtype=torch.bool)
    seen[:, :length, :length] = visibility(start, visible, group)
    tiles = seen.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).transpose(2, 3)  # [R, Q, K, G, G]
    mask = block_mask(start, visible, group)
    partial, full = _tile_set(mask.kv_num_blocks, mask.kv_indices), _tile_set(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any()
    assert torch.equal(partial | full, tiles.flatten(3).any(-1))
    assert (full <= tiles.flatten(3).all(-1)).all()
    assert full.any() or length == 200
    index = torch.arange(length)
    row = torch.arange(len(rows)).view(-1, 1, 1)
    assert torch.equal(mask.mask_mod(row, torch.tensor(0), index.view(-1, 1), index), seen[:, :length, :length])


def test_a_group_that_is_torn_apart_is_no_layout() -> None:
    row = _serial(3, 20, 0)
    with pytest.raises(AssertionError, match="a group is torn apart"):
        pack_batch(
            [[dataclasses.replace(row, group=np.where(row.group == 2, 1, row.group) * (np.arange(len(row.group)) % 5 > 0))]], 64, pad_id=2
        )


@pytest.mark.parametrize("layout", ["permuted", "serial", "autoregressive", "mixed"])
def test_packed_documents_have_the_losses_of_padded_ones(golden_model: PreTrainedModel, layout: str) -> None:
    make = {"permuted": _permuted, "serial": _serial, "autoregressive": _autoregressive}
    kinds = [make[layout]] * 6 if layout != "mixed" else [_permuted, _serial, _autoregressive] * 2
    documents = [kind(3 + i, 10 + 5 * i, i) for i, kind in enumerate(kinds)]
    packed = _normalised(pack_batch([documents[:3], documents[3:]], 256, pad_id=2, chunk_size=32))
    together = packed_loss(golden_model, packed, LossSettings(chunk_size=32))
    ar, mdm = torch.tensor(0.0), torch.tensor(0.0)
    for document in documents:
        alone = pack_batch([[document]], 128, pad_id=2, chunk_size=32)
        alone |= {name: packed[name] for name in ("ar_normaliser", "mdm_normaliser")}
        terms = packed_loss(golden_model, alone, LossSettings(chunk_size=32))
        ar, mdm = ar + terms["ar"], mdm + terms["mdm"]
    torch.testing.assert_close(together["ar"], ar, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(together["mdm"], mdm, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("num_behind", [0, 9])
def test_packed_loss_equals_hybrid_loss_on_whole_logits(golden_model: PreTrainedModel, num_behind: int) -> None:
    documents = [_permuted(4 + i, 20 + 3 * i, i, num_behind) for i in range(3)]
    length = 64
    packed = _normalised(pack_batch([[d] for d in documents], length, pad_id=2))
    terms = packed_loss(golden_model, packed, LossSettings())
    ids = packed["input_ids"]
    logits = golden_model(ids, attention_mask=torch.ones_like(ids), position_ids=packed["position_ids"]).logits
    plain = hybrid_loss(
        logits,
        packed["labels"],
        packed["terms"] == 2,
        torch.tensor([d.mask_probability for d in documents]),
        torch.tensor([d.answer_length for d in documents]),
    )
    torch.testing.assert_close(terms["ar"], plain.ar, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(terms["mdm"], plain.mdm, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(terms["loss"], plain.total, atol=TOLERANCE, rtol=TOLERANCE)


def test_flex_attention_sees_what_the_dense_mask_sees(golden_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(golden_dir / "tiny-refusion", dtype=torch.float32)
    batch = _normalised(pack_batch([[_permuted(4, 20, 0), _serial(5, 30, 1)], [_serial(3, 40, 2)]], 128, pad_id=2))
    with torch.no_grad():
        dense = packed_loss(model, batch, LossSettings())
        model.config._attn_implementation = FLEX_NAME
        torch.testing.assert_close(packed_loss(model, batch, LossSettings())["loss"], dense["loss"], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("only_row", [None, 4])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_chunked_cross_entropy_has_value_and_gradients_of_the_plain_one(only_row: int | None, has_teacher: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    count, size, vocabulary, chunk = 24, 6, 11, 8
    hidden = torch.randn(count, size, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(vocabulary, (count,), generator=generator)
    scales = torch.rand(count, generator=generator)
    teacher_hidden = torch.randn(16, size, generator=generator, dtype=torch.float64)
    teacher_weight = torch.randn(vocabulary, size, generator=generator, dtype=torch.float64)
    distill = torch.rand(16, generator=generator)
    teacher = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "distill": distill} if has_teacher else {}
    total, losses = linear_cross_entropy(hidden, weight, labels, scales, chunk_size=chunk, only_row=only_row, **teacher)
    (3 * total).backward()

    log_probs = (hidden @ weight.T).log_softmax(-1)
    expected = -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if has_teacher:
        soft = -((teacher_hidden @ teacher_weight.T).softmax(-1) * log_probs[:16]).sum(-1)
        expected = torch.cat([(1 - distill) * expected[:16] + distill * soft, expected[16:]])
    grad_hidden, grad_weight = torch.autograd.grad(3 * (expected * scales).sum(), (hidden, weight))
    if only_row is not None:
        grad_weight = torch.zeros_like(grad_weight).index_copy(0, torch.tensor([only_row]), grad_weight[only_row : only_row + 1])
    tolerance = {"atol": 1e-5, "rtol": 1e-5}  # the chunks compute in float32
    torch.testing.assert_close(losses.double(), expected.detach(), **tolerance)
    torch.testing.assert_close(hidden.grad, grad_hidden, **tolerance)
    torch.testing.assert_close(weight.grad, grad_weight, **tolerance)


def test_distillation_towards_oneself_of_clean_text_is_the_entropy(golden_model: PreTrainedModel) -> None:
    """With the student as its own teacher and distill = 1, a plain causal target's gradient vanishes: its softmax is the teacher's."""
    documents = [_autoregressive(5, 20), _autoregressive(6, 30)]
    batch = _normalised(pack_batch([documents], 128, pad_id=2, originals=[[d.input_ids for d in documents]], chunk_size=16))
    golden_model.zero_grad()
    packed_loss(golden_model, batch, LossSettings(chunk_size=16, distill=1.0), golden_model)["loss"].backward()
    gradients = [p.grad.abs().max().item() for p in golden_model.parameters() if p.grad is not None]
    golden_model.zero_grad()
    assert max(gradients) < 1e-5


def test_teacher_rows_hold_the_logits_that_predict_the_same_target() -> None:
    """Each distilled target's teacher row stands one text position before the target, in the row of its own document."""
    pairs = [(list(range(10, 14)), list(range(14, 40))), (list(range(50, 53)), list(range(53, 70)))]
    documents = [
        serial_row(*pairs[0], mask_token_id=2, generator=row_generator(0, 0, 0), slot_size=4),
        permute_slots(*pairs[1], mask_token_id=2, generator=row_generator(0, 0, 3), slot_size=4),
    ]
    originals = [np.array(p + a) for p, a in pairs]
    batch = pack_batch([documents], 128, pad_id=2, originals=[originals], chunk_size=8)
    assert batch["num_teacher_chunks"] * 8 >= (batch["target_teacher"] >= 0).sum()
    text = batch["teacher_input_ids"].flatten()
    for label, row, weight in zip(batch["target_labels"], batch["target_teacher"], batch["target_weights"], strict=True):
        if row >= 0:
            assert weight > 0
            assert text[row + 1] == label


def test_a_bound_model_remains_a_causal_lm(golden_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(golden_dir / "tiny-refusion", dtype=torch.float32)
    ids = torch.arange(10, 30).unsqueeze(0)
    before = model(ids).logits
    bind_objective(model, LossSettings())
    assert torch.equal(model(ids).logits, before)
    assert set(model(objective_batch=_normalised(pack_batch([[_permuted(4, 20, 0)]], 64, pad_id=2)))) == {"loss", "ar", "mdm"}


def _loss_arguments(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = torch.tensor(batch["labels"])
    return labels, torch.tensor(batch["is_masked"]), torch.tensor(batch["p_mask"]), torch.tensor(batch["answer_lengths"])


def _normalised(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"ar_normaliser": torch.tensor(max(batch["num_ar"], 1.0)), "mdm_normaliser": torch.tensor(float(batch["num_documents"]))}


def _ids(num_prompt: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(5, 100, num_prompt), generator.integers(5, 100, length)


def _permuted(num_prompt: int, length: int, seed: int = 0, num_behind: int = 0) -> Any:
    pair, generator = _ids(num_prompt, length, seed), row_generator(0, 0, seed)
    return permute_slots(*pair, mask_token_id=2, generator=generator, num_behind=num_behind)


def _serial(num_prompt: int, length: int, seed: int = 0) -> Any:
    return serial_row(*_ids(num_prompt, length, seed), mask_token_id=2, generator=row_generator(0, 0, seed), slot_size=8)


def _autoregressive(num_prompt: int, length: int, seed: int = 0) -> Any:
    return autoregressive_row(*_ids(num_prompt, length, seed))


def _bidirectional(num_prompt: int, length: int, seed: int = 0) -> Any:
    return masked_diffusion_row(*_ids(num_prompt, length, seed), mask_token_id=2, generator=row_generator(0, 0, seed))


def _blocks(num_prompt: int, length: int, seed: int = 0) -> Any:
    return block_diffusion_row(*_ids(num_prompt, length, seed), mask_token_id=2, generator=row_generator(0, 0, seed), block_size=16)


def _tile_set(counts: Tensor, indices: Tensor) -> Tensor:
    """[R, Q, K] bool from the ordered form: the first counts[r, 0, q] of indices[r, 0, q]."""
    is_listed = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), is_listed).squeeze(1)
