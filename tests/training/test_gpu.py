"""On a GPU: compiled FlexAttention has the gradients of dense masks, and whole runs end where plain ones do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from refusion.slots import SlotRow, permute_slots, row_generator, serial_row
from refusion.training.attention import FLEX_NAME
from refusion.training.batches import Batch, pack_batch
from refusion.training.layouts import block_diffusion_row, masked_diffusion_row
from refusion.training.objectives import LossSettings, packed_loss
from refusion.training.recipe import Recipe
from refusion.training.run import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYOUTS: dict[str, Callable[..., SlotRow]] = {
    "serial": lambda *pair, **options: serial_row(*pair, slot_size=8, **options),
    "permuted": permute_slots,
    "masked_diffusion": masked_diffusion_row,
    "block_diffusion": lambda *pair, **options: block_diffusion_row(*pair, block_size=16, **options),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [512, 320], ids=["whole tiles", "half a tile"])
def test_compiled_flex_attention_has_loss_and_gradients_of_dense_masks(layout: str, length: int) -> None:
    """bfloat16 rounds in another order: about three digits of a gradient are common, as between two dense kernels."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=192, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).cuda()
    compiled = LlamaForCausalLM(config).cuda()
    compiled.load_state_dict(model.state_dict())
    compiled.config._attn_implementation = FLEX_NAME
    for module in [*compiled.model.layers, compiled.model.norm]:
        module.compile(dynamic=False)
    for seed in range(2):  # the second batch has other tiles in the same graph
        batch = _batch(layout, length, seed)
        plain, fast = (_loss_and_gradients(network, batch) for network in (model, compiled))
        assert fast[0] == pytest.approx(plain[0], rel=2e-3)
        for name, gradient in plain[1].items():
            assert (fast[1][name] - gradient).norm() < 0.03 * gradient.norm(), name


@pytest.mark.parametrize("objective", ["refusion", "autoregressive", "masked_diffusion", "block_diffusion"])
def test_a_fast_run_ends_near_a_plain_one(tmp_path: Path, small_recipe: Callable[..., Recipe], objective: str) -> None:
    common: dict[str, Any] = {"data": {"rows_per_step": 8, "sources": [{"toy": 400}]}, "objective": {"name": objective}}
    run = {"run": {"max_steps": 30, "log_steps": 10}}
    models = {"fast": {"attention": "flex", "compile": True, "residual": "bfloat16"}, "plain": {"precision": "float32"}}
    reports = {
        name: train(small_recipe(**common, **run, model=model), output=tmp_path / name, report=lambda line: None)
        for name, model in models.items()
    }
    assert reports["fast"].loss == pytest.approx(reports["plain"].loss, rel=0.02)
    assert reports["fast"].peak_memory_gb is not None


def _batch(layout: str, length: int, seed: int) -> Batch:
    generator = np.random.default_rng(seed)
    rows: list[list[SlotRow]] = []
    for r in range(3):
        documents, used = [], 0
        while True:
            pair = generator.integers(8, 300, int(generator.integers(3, 30))), generator.integers(8, 300, int(generator.integers(20, 120)))
            document = LAYOUTS[layout](*pair, mask_token_id=2, generator=row_generator(seed, r, len(documents)))
            used += len(document.input_ids)
            if used > length:
                break
            documents.append(document)
        rows.append(documents)
    batch = pack_batch(rows, length, pad_id=2, chunk_size=256)
    batch |= {"ar_normaliser": torch.tensor(max(batch["num_ar"], 1.0)), "mdm_normaliser": torch.tensor(float(batch["num_units"]))}
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in batch.items()}


def _loss_and_gradients(model: Any, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = packed_loss(model, batch, LossSettings(chunk_size=256))["loss"]
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
