"""A tiny model behind a small engine, and the plain padded decoders to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import MASK, Plain, make_engine

from refusion.decoding.forward import EagerForward
from refusion.engine.build import flat_network
from refusion.engine.core import Engine
from refusion.engine.network import FlatNetwork
from refusion.model.transformer import Transformer


@pytest.fixture(scope="session")
def model(tiny_checkpoints: dict[str, Path]) -> Transformer:
    torch.set_num_threads(1)
    return Transformer.from_pretrained(tiny_checkpoints["qwen3"])


@pytest.fixture(scope="session")
def network(model: Transformer) -> FlatNetwork:
    return flat_network(model)


@pytest.fixture(scope="session")
def plain(model: Transformer) -> Plain:
    """What the plain padded decoder makes of a request, computed once."""
    return Plain(EagerForward(model, torch.tensor([MASK])))


@pytest.fixture
def new_engine(network: FlatNetwork) -> Callable[..., Engine]:
    """new_engine(cache_tokens=64, page_size=4): an engine with these settings."""

    def make(**settings: Any) -> Engine:
        return make_engine(network, **settings)

    return make
