"""A recipe small enough to train in a test, and the run that it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from refusion.training.recipe import Recipe, recipe_from_table

SMALL: dict[str, dict[str, Any]] = {
    "model": {"base": "toy"},
    "data": {"sources": [{"toy": 60}], "pack_length": 128, "rows_per_step": 4},
    "objective": {"slot_sizes": [4, 8], "serial_share": 0.5, "text_order_share": 0.5, "chunk_size": 64},
    "optimizer": {"learning_rate": 1e-2},
    "run": {"output": "unused", "max_steps": 4, "log_steps": 1, "final_dtype": "float32", "tensorboard": False},
}


@pytest.fixture
def small_recipe() -> Callable[..., Recipe]:
    """Build the small recipe; keyword arguments are sections whose keys are added: small_recipe(run={"seed": 1})."""

    def build(**sections: Mapping[str, Any]) -> Recipe:
        table = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in SMALL.keys() | sections.keys()}
        if "name" in sections.get("objective", {}):
            table["objective"] = {"chunk_size": 64, **sections["objective"]}
        return recipe_from_table(table)

    return build


@pytest.fixture
def final_weights() -> Callable[[Path], dict[str, Tensor]]:
    """The weights of a finished run."""
    torch.set_num_threads(1)
    return lambda run_dir: load_file(run_dir / "final" / "model.safetensors")
