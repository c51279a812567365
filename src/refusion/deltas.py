"""What training changed, small: a tuned model as a file to be applied to its base.

A packed set of tensors tells by its names how each weight of the base changes:

- `NAME.codes` + `NAME.scales`: a quantised difference. Groups of consecutive weights (row by row) share one float16 scale; each
  difference is scale times a level of the codebook that is optimal for Gaussian values, 1 to 4 bits each.
- `NAME.lora_A` + `NAME.lora_B`: a low-rank difference, scale * B @ A.
- `NAME.rows` + `NAME.values`: whole rows of an embedding, exact; they overrule the difference.
- `NAME.exact`: the whole new tensor.

A name that does not occur is unchanged. `save_packed` adds what the file is for; the hub knows where files lie.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from refusion.atomic import atomic_file
from refusion.checkpoint import WEIGHTS, read_json, read_state_dict, side_files, write_json
from refusion.errors import CheckpointError

# G = groups, n = weights per group, N = weights in all

_FORMAT = "refusion-weights"
_VERSION = "1"
_PARTS = ("codes", "scales", "lora_A", "lora_B", "rows", "values", "exact")
_MAX_EXACT_ROWS = 64  # an embedding with at most so many changed rows keeps them exactly

# Positive levels of the Lloyd-Max quantiser of a unit Gaussian (J. Max, Quantizing for minimum distortion, 1960, table I).
_LEVELS = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}


def encode_deltas(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    bits: int,
    group_size: int = 128,
    embedding_bits: int | None = None,
    exact_rows: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Pack `tuned` as differences from `base`: same names and shapes, floating point.

    Linear weights get `bits` each, embeddings and an untied head `embedding_bits` (`bits` if None; 0 keeps only exact rows), vectors
    are stored whole. `exact_rows` names rows that are stored whole, such as the mask token's; an embedding in which few rows changed
    keeps just those. Raises CheckpointError if names or shapes differ.
    """
    _check_same_layout(base, tuned)
    packed: dict[str, Tensor] = {}
    for name, weight in tuned.items():
        if torch.equal(weight.float(), base[name].float()):
            continue
        if weight.ndim != 2:
            packed[f"{name}.exact"] = weight.contiguous()
            continue
        rows = list((exact_rows or {}).get(name, ()))
        is_table = _is_table(name)
        if is_table and len(changed := _changed_rows(base[name], weight)) <= _MAX_EXACT_ROWS:
            rows, num_bits = changed, 0
        else:
            num_bits = embedding_bits if is_table and embedding_bits is not None else bits
        if num_bits:
            packed[f"{name}.codes"], packed[f"{name}.scales"] = quantise(weight.float() - base[name].float(), num_bits, group_size)
        if rows:
            packed[f"{name}.rows"] = torch.tensor(rows, dtype=torch.int32)
            packed[f"{name}.values"] = weight[rows].contiguous()
    return packed


def apply_deltas(base: Mapping[str, Tensor], packed: Mapping[str, Tensor], *, lora_scale: float = 1.0) -> dict[str, Tensor]:
    """The tuned weights: computed in float32, in the dtypes of `base`. Raises CheckpointError if `packed` does not fit `base`."""
    check_fits(base, packed)
    return {name: apply_delta(name, weight, packed, lora_scale=lora_scale) for name, weight in base.items()}


def apply_delta(name: str, weight: Tensor, packed: Mapping[str, Tensor], *, lora_scale: float = 1.0) -> Tensor:
    """One weight of the tuned model; `weight` itself where `packed` does not mention it."""
    parts = {part: packed[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in packed}
    if not parts:
        return weight
    if "exact" in parts:
        return _as_shape(name, parts["exact"], weight)
    try:
        result = weight.float()
        if "codes" in parts:
            result = result + dequantise(parts["codes"], parts["scales"], weight.shape)
        if "lora_A" in parts:
            result = result + lora_scale * (parts["lora_B"].float() @ parts["lora_A"].float())
        if "rows" in parts:
            result = result.index_copy(0, parts["rows"].long(), parts["values"].float())
    except (KeyError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"the packed weights of {name} do not fit this base model: {error}") from error
    return _as_shape(name, result, weight)


def check_fits(base: Mapping[str, object], packed: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if `packed` changes a weight that `base` lacks."""
    unknown = sorted({name.rsplit(".", 1)[0] for name in packed} - set(base))
    if unknown:
        raise CheckpointError(f"the packed weights change {unknown[0]}, which the base model lacks; they belong to another base")


def quantise(delta: Tensor, bits: int, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """Codes [G, n/8, bits] uint8 and scales [G] float16 of a float tensor of any shape; the last group is filled up with zeros.

    Eight codes share `bits` bytes, so the shape of the codes tells bits and group size. Scales are chosen by least squares,
    alternating with the choice of codes.
    """
    if bits not in _LEVELS:
        raise ValueError(f"bits is {bits}, allowed are {sorted(_LEVELS)}")
    if group_size <= 0 or group_size % 8:
        raise ValueError(f"group_size is {group_size}, allowed are positive multiples of 8")
    num_groups = math.ceil(delta.numel() / group_size)
    groups = torch.nn.functional.pad(delta.reshape(-1).float(), (0, num_groups * group_size - delta.numel())).view(num_groups, group_size)
    codebook = _codebook(bits, delta.device)
    is_real = (torch.arange(groups.numel(), device=groups.device) < delta.numel()).view(num_groups, group_size)
    scales = (groups.square().sum(1) / is_real.sum(1)).sqrt()  # [G], the right one for Gaussian values
    for _ in range(2):
        levels = codebook[_nearest(groups, scales, codebook)] * is_real  # [G, n]
        scales = (groups * levels).sum(1) / levels.square().sum(1)
    scales = scales.clamp(0, torch.finfo(torch.float16).max).to(torch.float16)
    return _pack_bits(_nearest(groups, scales.float(), codebook), bits), scales


def dequantise(codes: Tensor, scales: Tensor, shape: Sequence[int]) -> Tensor:
    """The float32 tensor of `shape` that `quantise` stored."""
    bits = codes.shape[-1]
    levels = _codebook(bits, codes.device)[_unpack_bits(codes)]  # [G, n]
    return (levels * scales.float().unsqueeze(1)).flatten()[: math.prod(shape)].view(*shape)


def _codebook(bits: int, device: torch.device) -> Tensor:
    """All 2**bits levels, ascending."""
    positive = torch.tensor(_LEVELS[bits], device=device)
    return torch.cat([-positive.flip(0), positive])


def _nearest(groups: Tensor, scales: Tensor, codebook: Tensor) -> Tensor:
    """Index of the level nearest to each weight over its scale; [G, n] int64."""
    borders = (codebook[1:] + codebook[:-1]) / 2
    return torch.bucketize(groups / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1), borders)


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """[G, n] codes to [G, n/8, bits] bytes: eight codes make one number of 8*bits bits, lowest code and lowest byte first."""
    eights = codes.view(codes.shape[0], -1, 8)
    number = (eights << (bits * torch.arange(8, device=codes.device))).sum(-1)  # [G, n/8]
    return ((number.unsqueeze(-1) >> (8 * torch.arange(bits, device=codes.device))) & 255).to(torch.uint8)


def _unpack_bits(packed: Tensor) -> Tensor:
    bits = packed.shape[-1]
    number = (packed.long() << (8 * torch.arange(bits, device=packed.device))).sum(-1)  # [G, n/8]
    codes = (number.unsqueeze(-1) >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    return codes.flatten(1)


def _check_same_layout(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    if difference := sorted(set(base) ^ set(tuned)):
        raise CheckpointError(f"base and tuned model must have the same weights; {difference[0]} is in only one of them")
    for name, weight in tuned.items():
        if weight.shape != base[name].shape:
            raise CheckpointError(f"{name} has shape {list(weight.shape)} in the tuned model and {list(base[name].shape)} in the base")


def _is_table(name: str) -> bool:
    """Embeddings and the head: one row per token."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def _changed_rows(base: Tensor, tuned: Tensor) -> list[int]:
    return (base.float() != tuned.float()).any(1).nonzero().flatten().tolist()  # on the host: happens once per file


def _as_shape(name: str, result: Tensor, weight: Tensor) -> Tensor:
    if result.shape != weight.shape:
        raise CheckpointError(f"the packed weights of {name} have shape {list(result.shape)}, the base model has {list(weight.shape)}")
    return result.to(weight.dtype)


# ---- files ----


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeights:
    """Packed tensors and what a reader must know of them."""

    tensors: dict[str, Tensor]
    kind: Literal["deltas", "lora"]
    base: str
    """Named model that they change."""
    base_sha256: str
    """Checksum of that model's GGUF file."""
    mask_token_id: int
    lora_scale: float = 1.0


def save_packed(path: Path, packed: PackedWeights) -> None:
    """Write one safetensors file, whole or not at all."""
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "kind": packed.kind,
        "base": packed.base,
        "base_sha256": packed.base_sha256,
        "mask_token_id": str(packed.mask_token_id),
        "lora_scale": repr(packed.lora_scale),
    }
    with atomic_file(path) as draft:
        save_file(packed.tensors, draft, metadata=metadata)


def load_packed(path: Path) -> PackedWeights:
    """Read a file of `save_packed`. Raises CheckpointError if it is damaged or of a later version."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; reinstall refusion or fetch the file again") from error
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise CheckpointError(f"{path} is not a file of packed weights that this version reads; update refusion")
    kind = metadata["kind"]
    assert kind in ("deltas", "lora"), f"{path}: kind is {kind}"
    return PackedWeights(
        tensors=tensors,
        kind=kind,
        base=metadata["base"],
        base_sha256=metadata["base_sha256"],
        mask_token_id=int(metadata["mask_token_id"]),
        lora_scale=float(metadata["lora_scale"]),
    )


def materialise(base: Path, packed: PackedWeights, target: Path, *, refusion: Mapping[str, Any]) -> None:
    """Fill the empty directory `target` with the tuned model: base checkpoint plus packed weights, in the base's dtype.

    `refusion` becomes the block of that name in config.json: recommended slot settings and the name of the base.
    """
    tensors = apply_deltas(read_state_dict(base), packed.tensors, lora_scale=packed.lora_scale)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / WEIGHTS, metadata={"format": "pt"})
    write_json(
        target / "config.json", {**read_json(base / "config.json"), "mask_token_id": packed.mask_token_id, "refusion": dict(refusion)}
    )
    for file in side_files(base):
        shutil.copyfile(file, target / file.name)
