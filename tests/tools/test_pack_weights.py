from __future__ import annotations

import json
import shutil
from pathlib import Path

import pack_weights
import pytest
import torch
from safetensors.torch import load_file, save_file

from refusion.deltas import apply_deltas, load_packed


@pytest.fixture
def base(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pack_weights.hub, "gguf_sha256", lambda name: "ab")
    return tiny_model_dir


def test_a_tuned_checkpoint_is_packed(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(base, tmp_path / "tuned")
    weights = load_file(base / "model.safetensors")
    tuned = {name: weight + 0.01 * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(tuned, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--base", base, "--tuned", tmp_path / "tuned", "--output", tmp_path / "packed"]
    assert pack_weights.main([str(argument) for argument in [*arguments, "--bits", 4, "--embedding-bits", 2]]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_bytes"] == (tmp_path / "packed").stat().st_size
    assert "lost share" in captured.err
    packed = load_packed(tmp_path / "packed")
    assert (packed.kind, packed.mask_token_id) == ("deltas", 5)
    assert packed.tensors["model.embed_tokens.weight.codes"].shape[-1] == 2
    assert torch.equal(apply_deltas(weights, packed.tensors)["model.embed_tokens.weight"][5], tuned["model.embed_tokens.weight"][5])


def test_of_several_tuned_checkpoints_the_weighted_mean_is_packed(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(base / "model.safetensors")
    name, embedding = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    for change in (1.0, 3.0):
        shutil.copytree(base, tmp_path / str(change))
        tuned = {key: weight + change for key, weight in weights.items()}
        save_file(tuned, tmp_path / str(change) / "model.safetensors", metadata={"format": "pt"})
    models = ["--tuned", str(tmp_path / "1.0"), str(tmp_path / "3.0"), "--output", str(tmp_path / "packed"), "--base", str(base)]
    assert pack_weights.main([*models, "--shares", "0.5", "0.25", "--bits", "4"]) == 0
    restored = apply_deltas(weights, load_packed(tmp_path / "packed").tensors)
    torch.testing.assert_close(restored[name], weights[name] + 1.25, atol=0.2, rtol=0)  # 4 bits
    torch.testing.assert_close(restored["model.norm.weight"], weights["model.norm.weight"] + 1.25)
    torch.testing.assert_close(restored[embedding][5], weights[embedding][5] + 5 / 3)  # the mask row takes no part of the base's
    with pytest.raises(SystemExit) as stopped:
        pack_weights.main([*models, "--shares", "1"])
    assert stopped.value.code == 2
    assert "1 shares for 2 tuned models" in capsys.readouterr().err


def test_an_adapter_is_packed_in_bfloat16(base: Path, tmp_path: Path) -> None:
    module = "base_model.model.model.layers.0.mlp.up_proj"
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    save_file(
        {f"{module}.lora_A.weight": torch.ones(4, 48), f"{module}.lora_B.weight": torch.ones(80, 4)}, tmp_path / "adapter_model.safetensors"
    )
    assert pack_weights.main(["--base", str(base), "--adapter", str(tmp_path), "--output", str(tmp_path / "packed")]) == 0
    packed = load_packed(tmp_path / "packed")
    assert (packed.kind, packed.lora_scale) == ("lora", 2.0)
    assert {tensor.dtype for tensor in packed.tensors.values()} == {torch.bfloat16}
    restored = apply_deltas(load_file(base / "model.safetensors"), packed.tensors, lora_scale=packed.lora_scale)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(restored[name], load_file(base / "model.safetensors")[name] + 8.0)


def test_a_missing_checkpoint_is_one_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack_weights.main(["--base", str(base), "--tuned", str(tmp_path), "--output", str(tmp_path / "packed")]) == 1
    assert "is missing" in capsys.readouterr().err
