"""Weights from a hub-layout directory into the inference transformer; projections are fused on the way."""

from pathlib import Path

import torch
from torch import Tensor, nn

from refusion.checkpoint import open_tensors, weight_files
from refusion.errors import CheckpointError

# fused parameter -> the checkpoint parameters it stacks, in this order
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def load_weights(model: nn.Module, path: Path, *, device: torch.device, dtype: torch.dtype) -> None:
    """Fill every parameter of `model` (built on the meta device) from the checkpoint in `path`.

    Raises `CheckpointError` for a missing file, a missing tensor or a wrong shape.
    """
    files = {name: file for file in weight_files(path) for name in _names(file)}
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    for name, parameter in list(model.named_parameters(remove_duplicate=True)):
        parts = [_read(files, part, path) for part in _sources(name)]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if tensor.shape != parameter.shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}, config.json says {tuple(parameter.shape)}")
        _assign(model, name, tensor.to(device=device, dtype=dtype))
    if tied:
        model.get_submodule("lm_head").weight = model.get_submodule("embed_tokens").weight


def _names(file: Path) -> list[str]:
    with open_tensors(file) as tensors:
        return list(tensors.keys())


def _sources(name: str) -> list[str]:
    """Checkpoint names behind one parameter: `layers.0.mlp.gate_up_proj.weight` is gate_proj and up_proj."""
    name = name if name.startswith("lm_head") else f"model.{name}"
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            return [name.replace(fused, part) for part in parts]
    return [name]


def _read(files: dict[str, Path], name: str, path: Path) -> Tensor:
    if name not in files:
        raise CheckpointError(f"{path} lacks the tensor {name}; it is not a complete Qwen3 or Llama checkpoint")
    with open_tensors(files[name]) as tensors:
        return tensors.get_tensor(name)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
