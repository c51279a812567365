from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refusion.errors import CheckpointError
from refusion.model.transformer import Transformer


@pytest.fixture
def copied(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny_checkpoints["qwen3-untied"], tmp_path / "copied"))


def rewrite(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file(change(tensors), path / "model.safetensors")


def test_shards_are_the_same_model_as_one_file(copied: Path, tiny_checkpoints: dict[str, Path]) -> None:
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{index % 3 + 1}-of-00003.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, copied / file)
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    whole, sharded = Transformer.from_pretrained(tiny_checkpoints["qwen3-untied"]), Transformer.from_pretrained(copied)
    for (name, expected), (_, found) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        assert torch.equal(expected, found), name
    (copied / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        Transformer.from_pretrained(copied)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not(tiny_checkpoints: dict[str, Path]) -> None:
    tied, untied = (Transformer.from_pretrained(tiny_checkpoints[kind]) for kind in ("qwen3", "qwen3-untied"))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)


def test_weights_take_the_dtype_asked_for(copied: Path) -> None:
    rewrite(copied, lambda tensors: {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
    assert {parameter.dtype for parameter in Transformer.from_pretrained(copied).parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in Transformer.from_pretrained(copied, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_missing_tensor_is_named(copied: Path) -> None:
    rewrite(copied, lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name})
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        Transformer.from_pretrained(copied)


def test_a_wrong_shape_is_named(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors | {"model.norm.weight": torch.ones(7)})
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(7,\), config\.json says \(48,\)"):
        Transformer.from_pretrained(copied)


@pytest.mark.parametrize("num_bytes", [0, 5, 1000, 50_000])
def test_a_truncated_file_is_named(copied: Path, num_bytes: int) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: .* truncated"):
        Transformer.from_pretrained(copied)


def test_pickled_weights_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        Transformer.from_pretrained(copied)
