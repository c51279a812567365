"""Make the file of weights that a tuned named model ships as: quantised differences of a full fine-tuning, or a low-rank adapter.

    python tools/pack_weights.py --tuned runs/full/final --bits 3 --embedding-bits 0
    python tools/pack_weights.py --tuned runs/one/final runs/further/final --shares 0.15 0.85 --bits 3 --embedding-bits 0
    python tools/pack_weights.py --adapter runs/lora/final

Of several tuned models the weighted mean is packed (Wortsman et al., Model soups, arXiv 2203.05482); shares that sum to less than 1 leave
the rest to the base. The file is written to src/refusion/weights/NAME.safetensors; its size and its distance from the tuned weights are
printed. The recommended slot settings stand beside it in NAME.json, which becomes the `refusion` block of the finished config.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from refusion import hub
from refusion.adapter import read_adapter
from refusion.checkpoint import read_json, read_state_dict
from refusion.deltas import PackedWeights, apply_deltas, encode_deltas, save_packed
from refusion.errors import RefusionError

WEIGHTS = Path(__file__).resolve().parent.parent / "src" / "refusion" / "weights"
EMBEDDING = "model.embed_tokens.weight"


def main(arguments: list[str] | None = None) -> int:
    """Parse, pack, write, report; returns the exit code."""
    options = _parse(arguments)
    try:
        base_path = hub.resolve(options.base)
        base = read_state_dict(base_path)
        mask_token_id = read_json(base_path / "config.json")["mask_token_id"]
        if options.adapter is not None:
            kind = "lora"
            tensors, scale = _pack_adapter(options.adapter)
        else:
            kind, scale = "deltas", 1.0
            tensors = _pack_tuned(options, base, mask_token_id)
        weights = PackedWeights(
            tensors=tensors,
            kind=kind,
            base=options.base,
            base_sha256=hub.gguf_sha256(options.base),
            mask_token_id=mask_token_id,
            lora_scale=scale,
        )
        save_packed(options.output, weights)
    except RefusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"path": str(options.output), "num_bytes": options.output.stat().st_size, "kind": kind}))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tuned", type=Path, nargs="+", help="checkpoint of a full fine-tuning, or several to be averaged")
    source.add_argument("--adapter", type=Path, help="directory of a PEFT LoRA adapter")
    parser.add_argument("--shares", type=float, nargs="+", default=None, help="of the tuned models; by default all alike")
    parser.add_argument("--base", default="smollm2-135m", help="named model that was tuned")
    parser.add_argument("--bits", type=int, default=3, choices=(1, 2, 3, 4), help="bits per linear weight")
    parser.add_argument("--embedding-bits", type=int, choices=(0, 1, 2, 3, 4), help="bits per embedding weight; 0: only the mask row")
    parser.add_argument("--group-size", type=int, default=128, help="weights that share a scale")
    parser.add_argument("--output", type=Path, default=WEIGHTS / "smollm2-135m-refusion.safetensors")
    options = parser.parse_args(arguments)
    options.shares = options.shares or [1 / len(options.tuned or [0])] * len(options.tuned or [])
    if len(options.shares) != len(options.tuned or []):
        parser.error(f"{len(options.shares)} shares for {len(options.tuned or [])} tuned models")
    if min(options.shares, default=1.0) <= 0:
        parser.error(f"shares must be above 0, not {options.shares}")
    return options


def _pack_tuned(options: argparse.Namespace, base: dict[str, Tensor], mask_token_id: int) -> dict[str, Tensor]:
    """Quantised differences, the mask token's row exact."""
    tuned = _mean(options, base, mask_token_id)
    tensors = encode_deltas(
        base,
        tuned,
        bits=options.bits,
        group_size=options.group_size,
        embedding_bits=options.embedding_bits,
        exact_rows={EMBEDDING: [mask_token_id]},
    )
    _report_distance(base, tuned, apply_deltas(base, tensors))
    return tensors


def _mean(options: argparse.Namespace, base: dict[str, Tensor], mask_token_id: int) -> dict[str, Tensor]:
    """base + the weighted sum of the changes; of the mask token's row, which the base never learnt, the weighted mean."""
    models = [
        {name: tensor for name, tensor in read_state_dict(path).items() if name in base or name != "lm_head.weight"}
        for path in options.tuned
    ]
    if len(models) == 1 and options.shares == [1.0]:
        return models[0]
    shares, mean = options.shares, dict[str, Tensor]()
    for name, tensor in models[0].items():
        from_base = base[name].float()
        changed = from_base + sum(share * (model[name].float() - from_base) for share, model in zip(shares, models, strict=True))
        if name == EMBEDDING:
            rows = [share * model[name][mask_token_id].float() for share, model in zip(shares, models, strict=True)]
            changed[mask_token_id] = torch.stack(rows).sum(0) / sum(shares)
        mean[name] = changed.to(tensor.dtype)
    return mean


def _pack_adapter(path: Path) -> tuple[dict[str, Tensor], float]:
    """The adapter in bfloat16; token ids stay whole numbers."""
    tensors, scale = read_adapter(path)
    return {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}, scale


def _report_distance(base: dict[str, Tensor], tuned: dict[str, Tensor], restored: dict[str, Tensor]) -> None:
    """How much of the change survives, as the share of its squared length that is lost."""
    lost = sum((restored[name].float() - weight.float()).square().sum().item() for name, weight in tuned.items())
    whole = sum((base[name].float() - weight.float()).square().sum().item() for name, weight in tuned.items())
    print(f"lost share of the squared change: {lost / whole if whole else 0.0:.4f}", file=sys.stderr)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
