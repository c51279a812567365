from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refusion.errors import CheckpointError
from refusion.model.config import ModelConfig, RopeScaling

Edit = Callable[..., Path]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; use one of llama, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ({"mlp_bias": True}, "feed-forward layer with biases"),
        ({"hidden_act": "gelu"}, "another activation than silu"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "lacks 'factor'"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_name(edited: Edit, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_pretrained(edited(**changes))


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_malformed_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_directory_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; a checkpoint directory holds"):
        ModelConfig.from_pretrained(tmp_path)


def test_eos_is_every_id_of_the_generation_config(edited: Edit) -> None:
    path = edited(eos_token_id=2)
    assert ModelConfig.from_pretrained(path).eos_token_ids == (2,)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert ModelConfig.from_pretrained(path).eos_token_ids == (2, 7)
    (path / "generation_config.json").write_text("{}")
    assert ModelConfig.from_pretrained(path).eos_token_ids == (2,)


def test_rotation_settings_of_older_and_newer_transformers_are_the_same(edited: Edit) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    path = edited(rope_parameters={**scaling, "rope_theta": 5e5})
    new = ModelConfig.from_pretrained(path)
    raw = json.loads((path / "config.json").read_text())
    del raw["rope_parameters"]
    (path / "config.json").write_text(json.dumps({**raw, "rope_theta": 5e5, "rope_scaling": scaling}))
    old = ModelConfig.from_pretrained(path)
    assert new == old
    assert (old.rope_theta, old.rope_scaling) == (
        5e5,
        RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    )


def test_missing_head_settings_follow_from_the_others(edited: Edit) -> None:
    config = ModelConfig.from_pretrained(edited(num_key_value_heads=None, head_dim=None))
    assert (config.num_key_value_heads, config.head_dim) == (4, 12)
