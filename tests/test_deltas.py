from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from refusion import deltas
from refusion.deltas import PackedWeights, apply_deltas, dequantise, encode_deltas, load_packed, materialise, quantise, save_packed
from refusion.errors import CheckpointError

# Mean squared error of the optimal quantiser of a unit Gaussian (Max 1960, table I), with a little room for scales per group.
DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def _gaussian(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_the_error_is_that_of_the_optimal_quantiser(bits: int, scale: float) -> None:
    delta = _gaussian(128, 576, scale=scale)
    restored = dequantise(*quantise(delta, bits), delta.shape)
    error = (restored - delta).square().mean() / delta.square().mean()
    assert 0.9 * DISTORTION[bits] < error < 1.02 * DISTORTION[bits]


@settings(max_examples=50, deadline=None)
@given(bits=st.sampled_from([1, 2, 3, 4]), rows=st.integers(1, 9), columns=st.integers(1, 70), group_size=st.sampled_from([8, 64, 128]))
def test_codes_survive_packing_without_waste(bits: int, rows: int, columns: int, group_size: int) -> None:
    delta = _gaussian(rows, columns)
    codes, scales = quantise(delta, bits, group_size)
    num_groups = -(-rows * columns // group_size)
    assert codes.shape == (num_groups, group_size // 8, bits)
    assert codes.dtype == torch.uint8
    assert scales.shape == (num_groups,)
    restored = dequantise(codes, scales, delta.shape)
    assert restored.shape == delta.shape
    # Scales are least-squares, so storing a difference always beats dropping it.
    assert (restored - delta).square().sum() <= delta.square().sum()


def test_every_code_of_every_width_is_packed_and_unpacked() -> None:
    for bits in (1, 2, 3, 4):
        codes = torch.arange(2**bits).repeat(16)[: 8 * 2**bits].view(2, -1)
        assert torch.equal(deltas._unpack_bits(deltas._pack_bits(codes, bits)), codes)


def test_three_bits_on_106_million_weights_fit_into_42_megabytes() -> None:
    delta = _gaussian(96, 576)
    codes, scales = quantise(delta, 3)
    bytes_per_weight = (codes.nbytes + scales.nbytes) / delta.numel()
    assert bytes_per_weight == (3 + 16 / 128) / 8
    assert bytes_per_weight * 106e6 <= 42e6


def test_a_last_group_that_is_short_is_scaled_by_its_own_weights() -> None:
    delta = torch.cat([_gaussian(1, 128), torch.full((1, 1), 7.0)], 1)
    restored = dequantise(*quantise(delta, 1), delta.shape)
    assert restored[0, -1] == pytest.approx(7.0, rel=1e-3)


def test_zeros_stay_zero() -> None:
    assert not dequantise(*quantise(torch.zeros(3, 50), 3), (3, 50)).any()


@pytest.mark.parametrize(("bits", "group_size", "match"), [(5, 128, "bits is 5"), (3, 12, "group_size is 12")])
def test_impossible_widths_are_refused(bits: int, group_size: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        quantise(torch.ones(2, 8), bits, group_size)


def _models() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    base = {
        "model.embed_tokens.weight": _gaussian(200, 16).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": _gaussian(32, 16).bfloat16(),
        "model.layers.0.mlp.down_proj.weight": _gaussian(16, 32).bfloat16(),
        "model.norm.weight": torch.ones(16).bfloat16(),
    }
    tuned = {name: weight.clone() for name, weight in base.items()}
    tuned["model.embed_tokens.weight"][5] += 3
    tuned["model.layers.0.mlp.up_proj.weight"] += _gaussian(32, 16, scale=0.05).bfloat16()
    tuned["model.norm.weight"] += 0.25
    return base, tuned


def test_only_what_changed_is_packed_and_little_changes_exactly() -> None:
    base, tuned = _models()
    packed = encode_deltas(base, tuned, bits=4)
    assert set(packed) == {
        "model.embed_tokens.weight.rows",
        "model.embed_tokens.weight.values",
        "model.layers.0.mlp.up_proj.weight.codes",
        "model.layers.0.mlp.up_proj.weight.scales",
        "model.norm.weight.exact",
    }
    restored = apply_deltas(base, packed)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight"):
        assert torch.equal(restored[name], tuned[name])
    name = "model.layers.0.mlp.up_proj.weight"
    assert restored[name].dtype == torch.bfloat16
    error = (restored[name].float() - tuned[name].float()).square().mean()
    assert error < 0.2 * (base[name].float() - tuned[name].float()).square().mean()


def test_an_embedding_that_changed_everywhere_is_quantised_around_its_exact_rows() -> None:
    base, tuned = _models()
    name = "model.embed_tokens.weight"
    tuned[name] = tuned[name] + _gaussian(200, 16, scale=0.05).bfloat16()
    packed = encode_deltas(base, tuned, bits=3, embedding_bits=2, exact_rows={name: [5]})
    assert packed[f"{name}.codes"].shape[-1] == 2
    restored = apply_deltas(base, packed)[name]
    assert torch.equal(restored[5], tuned[name][5])
    assert not torch.equal(restored[6], base[name][6])
    frozen = encode_deltas(base, tuned, bits=3, embedding_bits=0, exact_rows={name: [5]})
    assert f"{name}.codes" not in frozen
    assert torch.equal(apply_deltas(base, frozen)[name][6], base[name][6])


def test_low_rank_parts_add_their_scaled_product() -> None:
    base, _ = _models()
    name = "model.layers.0.mlp.up_proj.weight"
    packed = {f"{name}.lora_A": _gaussian(4, 16), f"{name}.lora_B": _gaussian(32, 4)}
    restored = apply_deltas({name: base[name].float()}, packed, lora_scale=0.5)[name]
    expected = base[name].float() + 0.5 * packed[f"{name}.lora_B"] @ packed[f"{name}.lora_A"]
    torch.testing.assert_close(restored, expected)


def test_weights_of_another_base_are_refused() -> None:
    base, tuned = _models()
    packed = encode_deltas(base, tuned, bits=2)
    with pytest.raises(CheckpointError, match="which the base model lacks"):
        apply_deltas({"model.norm.weight": base["model.norm.weight"]}, packed)
    wider = {name: torch.cat([weight, weight]) for name, weight in base.items()}
    with pytest.raises(CheckpointError, match=r"do not fit|have shape"):
        apply_deltas(wider, {name: tensor for name, tensor in packed.items() if "norm" in name or "up_proj" in name})
    with pytest.raises(CheckpointError, match="must have the same weights"):
        encode_deltas(base, {}, bits=2)
    with pytest.raises(CheckpointError, match="has shape"):
        encode_deltas(base, wider, bits=2)


def _packed_file(path: Path) -> PackedWeights:
    base, tuned = _models()
    packed = PackedWeights(
        tensors=encode_deltas(base, tuned, bits=3),
        kind="deltas",
        base="smollm2-135m",
        base_sha256="ab",
        mask_token_id=5,
    )
    save_packed(path, packed)
    return packed


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    packed = _packed_file(tmp_path / "weights.safetensors")
    restored = load_packed(tmp_path / "weights.safetensors")
    assert (restored.kind, restored.base, restored.base_sha256, restored.mask_token_id) == ("deltas", "smollm2-135m", "ab", 5)
    assert set(restored.tensors) == set(packed.tensors)
    assert all(torch.equal(restored.tensors[name], tensor) for name, tensor in packed.tensors.items())


def test_a_truncated_file_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    _packed_file(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors cannot be read"):
        load_packed(path)


def test_other_files_are_not_mistaken_for_packed_weights(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a file of packed weights"):
        load_packed(tmp_path / "other.safetensors")


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    _packed_file(path)
    before = path.read_bytes()

    def full(tensors: object, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(deltas, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        _packed_file(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_materialise_writes_a_checkpoint_that_transformers_opens(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = load_file(tiny_model_dir / "model.safetensors")
    tuned = {name: weight + _gaussian(*weight.shape, scale=0.01) for name, weight in base.items()}
    name = "model.embed_tokens.weight"
    packed = encode_deltas(base, tuned, bits=4, exact_rows={name: [5]})
    (tmp_path / "tuned").mkdir()
    block = {"slots": {"slot_size": 8}}
    weights = PackedWeights(tensors=packed, kind="deltas", base="tiny", base_sha256="", mask_token_id=5)
    materialise(tiny_model_dir, weights, tmp_path / "tuned", refusion=block)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert model.config.refusion == block
    assert model.config.mask_token_id == 5
    assert torch.equal(model.state_dict()[name][5], tuned[name][5])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tuned")) == 262
