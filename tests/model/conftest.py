"""Fixtures of the inference transformer's tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny products are slower on several threads, and the tests share their machine."""
    torch.set_num_threads(1)


@pytest.fixture
def edited(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny Llama checkpoint with other entries in config.json; None removes one."""

    def edit(**changes: Any) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(tiny_checkpoints["llama"], path)
        config = json.loads((path / "config.json").read_text(encoding="utf-8")) | changes
        config = {name: value for name, value in config.items() if value is not None}
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return path

    return edit
