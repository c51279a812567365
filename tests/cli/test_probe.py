"""The probe that `refusion train` wires into training."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from refusion.cli.probe import make_probe
from refusion.training.base import load_base
from refusion.training.data import load_examples
from refusion.training.recipe import recipe_from_table
from refusion.training.run import train

TABLE = {
    "model": {"base": "toy"},
    "data": {"sources": [{"toy": 40}], "pack_length": 128, "rows_per_step": 4, "validation_rows": 6},
    "optimizer": {"learning_rate": 1e-2},
    "run": {"output": "unused", "max_steps": 2, "tensorboard": False, "probe_steps": 1, "probe_rows": 3},
}


def test_an_untrained_model_agrees_with_itself_as_far_as_its_masks_do() -> None:
    recipe = recipe_from_table(TABLE)
    base = load_base(recipe.model)
    examples = load_examples(recipe.data, tokenizer=None, mask_token_id=2, vocab_size=64)
    probe = make_probe(recipe, base, examples.select(torch.arange(4).numpy()))
    figures = probe(base.model)
    assert figures == probe(base.model), "greedy, so the same again"
    assert 0.9 <= figures["tpf"] <= 8
    assert 0 <= figures["agreement"] <= 1
    # Verified tokens are the argmax of the causal pass, so most of them are the base's own.
    assert figures["agreement"] > 1 / 64


def test_training_reports_probes_of_full_and_adapted_models(tmp_path: Path) -> None:
    for method in ("full", "lora"):
        lines: list[str] = []
        recipe = recipe_from_table({**TABLE, "method": {"name": method}})
        train(recipe, output=tmp_path / method, probe_factory=make_probe, report=lines.append)
        probed = [line for line in lines if "probe_tpf" in line]
        assert len(probed) == 2
        assert all(math.isfinite(float(line.split()[-1])) for line in probed)
