"""A PEFT adapter directory as packed weights: low-rank differences, trained token rows, whole replaced modules.

Read straight from its two files, so neither `peft` nor a built model is needed. Variants that are more than a sum (DoRA and the like)
are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusion.checkpoint import read_json, read_tensors
from refusion.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "target_parameters")
_TOKENS = ".token_adapter.trainable_tokens_delta"


def read_adapter(path: Path) -> tuple[dict[str, Tensor], float]:
    """Packed tensors in the form of `deltas` and the scale of the low-rank part, lora_alpha / r.

    Where modules have scales of their own, these are folded into `lora_B` and the scale is 1. Raises CheckpointError for anything
    but plain LoRA.
    """
    config = read_json(path / "adapter_config.json")
    _check_supported(config, path)
    tensors = read_tensors(path / "adapter_model.safetensors")
    packed: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name.endswith(_TOKENS):
            module = name.removesuffix(_TOKENS)
            packed[f"{module}.weight.rows"] = _token_rows(config, module, path)
            packed[f"{module}.weight.values"] = tensor  # PEFT calls them deltas, but they are the new rows
        elif name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            packed[f"{module}.weight.lora_A"] = tensor
            scales[module] = _scale(config, module, tensor.shape[0])
        elif name.endswith(".lora_B.weight"):
            packed[f"{name.removesuffix('.lora_B.weight')}.weight.lora_B"] = tensor
        elif name.endswith((".weight", ".bias")) and "lora" not in name:
            packed[f"{name}.exact"] = tensor
        else:
            raise CheckpointError(f"{path} holds {name}, which this version cannot merge; merge it with peft first")
    return packed, _common_scale(packed, scales)


def _check_supported(config: dict[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} is an adapter of type {config.get('peft_type')!r}; only LORA can be merged")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise CheckpointError(f"{path} uses {name}, which this version cannot merge; merge it with peft first")


def _token_rows(config: dict[str, Any], module: str, path: Path) -> Tensor:
    """Token ids of a trained-rows entry: one list for the embedding, or a table by module."""
    import torch

    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((ids for name, ids in indices.items() if module == name or module.endswith(f".{name}")), None)
    if not indices:
        raise CheckpointError(f"{path} holds trained rows of {module} but its adapter_config.json does not say which")
    return torch.tensor(indices, dtype=torch.int32)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the module's name or its end."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)


def _common_scale(packed: dict[str, Tensor], scales: dict[str, float]) -> float:
    if len(set(scales.values())) <= 1:
        return next(iter(scales.values()), 1.0)
    for module, scale in scales.items():
        packed[f"{module}.weight.lora_B"] = packed[f"{module}.weight.lora_B"].float() * scale
    return 1.0
