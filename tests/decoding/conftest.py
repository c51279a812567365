"""Fixtures of the decoder tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refusion.model.transformer import Transformer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny products are slower on several threads, and the tests share their machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_model(golden_dir: Path) -> Transformer:
    """The network that the golden traces were made with."""
    return Transformer.from_pretrained(golden_dir / "tiny-refusion")
