from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from refusion.errors import RequestError
from refusion.model.cache import KVCache
from refusion.model.config import ModelConfig


@pytest.fixture
def config(tiny_checkpoints: dict[str, Path]) -> ModelConfig:
    return ModelConfig.from_pretrained(tiny_checkpoints["qwen3"])


def filled(cache: KVCache, config: ModelConfig, numbers: list[list[float]]) -> None:
    """Write new rows whose keys hold these numbers and whose values hold their negatives, in every layer."""
    cache.reserve(len(numbers[0]))
    rows = torch.tensor(numbers)[:, None, :, None].expand(-1, config.num_key_value_heads, -1, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.write(layer, rows + 100 * layer, -rows)


def committed(cache: KVCache) -> list[list[float]]:
    """The numbers of the committed rows, checked to be the same in every layer, head and dimension."""
    held = []
    for request, length in enumerate(cache.lengths.tolist()):
        keys, values = cache.keys[:, request, :, :length], cache.values[:, request, :, :length]
        numbers = keys[0, 0, :, 0]
        layers = 100 * torch.arange(keys.shape[0])[:, None, None, None]
        assert torch.equal(keys, (numbers[None, None, :, None] + layers).expand_as(keys))
        assert torch.equal(values, -numbers[None, None, :, None].expand_as(values))
        held.append(numbers.tolist())
    return held


def new_cache(config: ModelConfig, capacity: int = 8) -> KVCache:
    return KVCache(config, 2, capacity, device=torch.device("cpu"), dtype=torch.float32)


def keep(cache: KVCache, rows: list[list[int]], counts: list[int]) -> None:
    places: Tensor = torch.arange(len(rows[0])) < torch.tensor(counts)[:, None]
    cache.keep(torch.tensor(rows), places)


def test_kept_rows_follow_the_committed_ones_in_the_order_given(config: ModelConfig) -> None:
    cache = new_cache(config)
    filled(cache, config, [[1, 2, 3], [4, 5, 6]])
    keep(cache, [[0, 1, 2], [2, 0, 0]], [3, 1])
    assert committed(cache) == [[1, 2, 3], [6]]
    filled(cache, config, [[7, 8, 9], [10, 11, 12]])
    keep(cache, [[2, 0, 0], [1, 0, 2]], [1, 3])
    assert committed(cache) == [[1, 2, 3, 9], [6, 11, 10, 12]]
    assert cache.longest == 4


def test_rows_that_are_not_kept_are_overwritten(config: ModelConfig) -> None:
    cache = new_cache(config)
    filled(cache, config, [[1, 2], [3, 4]])
    keep(cache, [[0, 1], [0, 1]], [0, 0])
    assert cache.longest == 0
    filled(cache, config, [[5, 6], [7, 8]])
    keep(cache, [[1, 0], [0, 1]], [2, 1])
    assert committed(cache) == [[6, 5], [7]]


def test_is_committed_hides_the_gap_behind_shorter_requests(config: ModelConfig) -> None:
    cache = new_cache(config)
    filled(cache, config, [[1, 2], [3, 4]])
    keep(cache, [[0, 1], [0, 1]], [2, 1])
    assert cache.is_committed().tolist() == [[True, True], [True, False]]


def test_write_returns_committed_and_new_rows_together(config: ModelConfig) -> None:
    cache = new_cache(config)
    filled(cache, config, [[1, 2], [3, 4]])
    keep(cache, [[1, 0], [0, 1]], [2, 1])
    new = torch.full((2, config.num_key_value_heads, 1, config.head_dim), 9.0)
    keys, values = cache.write(0, new, -new)
    assert keys[:, 0, :, 0].tolist() == [[2, 1, 9], [3, 4, 9]]
    assert torch.equal(values[:, :, 2], -new[:, :, 0])


def test_reserve_grows_and_keeps_what_is_committed(config: ModelConfig) -> None:
    cache = new_cache(config, capacity=2)
    filled(cache, config, [[1, 2], [3, 4]])
    keep(cache, [[0, 1], [0, 1]], [2, 2])
    filled(cache, config, [[5, 6, 7], [8, 9, 10]])
    assert cache.capacity >= 5
    keep(cache, [[2, 0, 0], [0, 1, 2]], [1, 3])
    assert committed(cache) == [[1, 2, 7], [3, 4, 8, 9, 10]]


def test_reserve_says_what_to_do_when_memory_is_short(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.nn.functional, "pad", no_memory)
    with pytest.raises(RequestError, match="lower the batch size or max_tokens"):
        new_cache(config).reserve(100)


def test_select_keeps_requests_in_the_order_given(config: ModelConfig) -> None:
    cache = new_cache(config)
    filled(cache, config, [[1, 2], [3, 4]])
    keep(cache, [[0, 1], [0, 1]], [2, 1])
    cache.select(torch.tensor([1]))
    assert committed(cache) == [[3]]
    assert cache.longest == 1
    cache.select(torch.tensor([], dtype=torch.long))
    assert cache.longest == 0
