"""Every kernel of our own once or a few times, on shapes small enough for compute-sanitizer; `gpu_checks.py` runs it.

    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/kernels_once.py
    TRITON_INTERPRET=1 python benchmarks/kernels_once.py --device cpu      # without a GPU, in Triton's interpreter

Sizes are multiples of nothing, so that whatever reads or writes past an end does so here. Results are compared with the plain twins only
as far as they must be finite; the tests compare them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("model", "engine")]  # random forwards, and small requests

from engines import COSTS, DIFFUSION, EOS, EXACT, SLIDING, SLOTS, new_request, run  # noqa: E402  # pyright: ignore[reportMissingImports]
from flat_forwards import CHAIN, GROUPS, LONE, PLAN, Seat, forward_of  # noqa: E402  # pyright: ignore[reportMissingImports]
from forward import CASES, random_model  # noqa: E402

from refusion.engine.build import build_engine, flat_network  # noqa: E402
from refusion.engine.settings import EngineSettings  # noqa: E402
from refusion.model.kernels import linear, norms, readout, rotary, store  # noqa: E402
from refusion.model.kernels.attention import Workspace, attend, rotate_and_attend  # noqa: E402
from refusion.model.kernels.attention_config import Config as AttentionConfig  # noqa: E402
from refusion.model.kernels.attention_config import invariant_config, padded_rows  # noqa: E402
from refusion.model.kernels.config import Config  # noqa: E402
from refusion.model.kernels.owed import normed  # noqa: E402
from refusion.model.quantize import quantize  # noqa: E402
from refusion.model.rows import plain_tiles  # noqa: E402

NUM_OUT, NUM_IN, EPS = 84, 136, 1e-5
CONFIGS = {
    "loop": Config(16, 32, 1, 3, 4, 16),
    "split": Config(64, 16, 3, 3, 4, 16),
    "wide": Config(64, 32, 2, 3, 4, 64, extra_t=16),
    "whole": Config(16, 256, 1, 2, 4, 16),
    "lanes": Config(32, 64, 1, 3, 4, 16, lanes=4),
    "turned": Config(64, 32, 2, 3, 4, 64, prenorm=True, turned=True),
    "invariant": linear.INVARIANT,
    "chosen": linear.AUTO,
}
TWO_PIECES = {
    "two pieces": Config(32, 32, 1, 3, 4, 64, extra_t=16, prenorm=True, extra_n=16),
    "two pieces, turned": Config(64, 32, 1, 3, 4, 64, prenorm=True, turned=True, extra_n=32),
}
OWING = {
    "owing": Config(64, 16, 3, 3, 4, 64, extra_t=16, owes_sum=True),
    "owing, turned": Config(64, 32, 2, 3, 4, 64, extra_n=32, owes_sum=True, turned=True),
}
SEATS = [Seat(100, 0, CHAIN + PLAN + GROUPS), Seat(17, 9), Seat(0, 21), Seat(33, 0, LONE), Seat(5, 2, CHAIN)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Every kernel once.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for Triton's interpreter")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="which kernels")
    args = parser.parse_args()
    torch.manual_seed(0)
    names = [name for part in args.parts for name in PARTS[part](args.device)]
    if args.device == "cuda":
        torch.cuda.synchronize()
    print(json.dumps({"num_cases": len(names)}))


def products(device: str) -> Iterator[str]:
    """All products and the readout, by tiles and kind of weights."""
    plain = torch.randn(NUM_OUT, NUM_IN, device=device).to(torch.bfloat16) / NUM_IN**0.5
    gain = torch.ones(NUM_IN, device=device, dtype=torch.bfloat16)
    bias, banned = torch.zeros(NUM_OUT, device=device, dtype=torch.bfloat16), torch.zeros(NUM_OUT, device=device)
    for name, config in CONFIGS.items():
        for weight in (plain, quantize(plain, "int8" if name != "turned" else "float8")):
            for num_rows in (1, 70):
                x = torch.randn(num_rows, NUM_IN, device=device).to(torch.bfloat16)
                residual = torch.zeros(num_rows, NUM_OUT, device=device, dtype=torch.bfloat16)
                given = torch.arange(num_rows, device=device, dtype=torch.int32) - 1
                finite(linear.norm_linear(x, gain, EPS, weight, bias, config=config), name)
                finite(linear.norm_gated(x, gain, EPS, weight, config=config), name)
                finite(linear.linear_add(x, weight, residual, bias, config=config), name)
                if config is linear.AUTO or config is linear.INVARIANT or config.split_k == 1:
                    finite(readout.readout(x, gain, EPS, weight, banned, given, config=config).confidence, name)
        yield name
    for num_rows in (1, 70):
        x = torch.randn(num_rows, NUM_IN, device=device).to(torch.bfloat16)
        for name, config in TWO_PIECES.items():
            finite(linear.norm_linear(x, gain, EPS, plain, bias, config=config), name)
            finite(linear.norm_gated(x, gain, EPS, plain, config=config), name)
        for name, config in OWING.items():
            residual = torch.zeros(num_rows, NUM_OUT, device=device, dtype=torch.bfloat16)
            owed = linear.linear_add_owed(x, plain, residual, config=config)
            finite(normed(owed, bias + 1, EPS), name)
            finite(linear.linear_add(x, plain, residual, config=config), name)
    yield from (*TWO_PIECES, *OWING)


def attentions(device: str) -> Iterator[str]:
    """Attention apart from the rotation and joined with it, one part and several, at the head dimensions of real models."""
    for head_dim, num_groups in ((64, 3), (128, 4)):
        forward = forward_of(SEATS, head_dim=head_dim, num_groups=num_groups, page_size=64, dtype=torch.bfloat16).to(device)
        num_rows, num_heads = forward.query.shape[:2]
        num_kv_heads = forward.new_keys.shape[1]
        context = (forward.keys, forward.values, forward.rows, forward.spans)
        is_real = forward.rows.seat >= 0
        angles = torch.rand(64, head_dim // 2, device=device)
        gain = torch.ones(head_dim, device=device, dtype=torch.bfloat16)
        turned = (forward.rows.rank.abs() % 64, angles.cos(), angles.sin(), gain, gain, EPS, num_heads, num_kv_heads, head_dim)
        for block in (4, 16):
            tile_rows = padded_rows(block, num_groups)
            num_tiles = num_rows // block + 2 * len(SEATS)
            tiles = plain_tiles(forward.spans, block, num_tiles)
            workspace = Workspace(8 * num_tiles * num_kv_heads, tile_rows, head_dim, torch.device(device))
            cuts = (None, AttentionConfig(1, 32, 16, 4, 2), AttentionConfig(3, 64, 32, 8, 2), invariant_config())
            for config in cuts if block == 16 else cuts[:1]:
                found = attend(forward.query.clone(), forward.new_keys, forward.new_values, *context, tiles, workspace, config)
                finite(found[is_real], "attend")
                qkv = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(torch.bfloat16)
                new = torch.zeros(2, num_rows, num_kv_heads, head_dim, device=device, dtype=torch.bfloat16)
                finite(rotate_and_attend(qkv, *turned, new[0], new[1], *context, tiles, workspace, config)[is_real], "rotate_and_attend")
        yield f"attention of {head_dim}"


def small_kernels(device: str) -> Iterator[str]:
    """Norm, gating, rotation, commit."""
    x = torch.randn(7, 90, device=device).to(torch.bfloat16)
    finite(norms.rms_norm(x, torch.ones(90, device=device, dtype=torch.bfloat16), EPS), "rms_norm")
    finite(norms.silu_multiply(x), "silu_multiply")
    yield "norms"
    qkv, angles = torch.randn(5, (9 + 6) * 64, device=device).to(torch.bfloat16), torch.rand(8, 32, device=device)
    new, pages = (torch.zeros(2, 6, size, 3, 64, device=device, dtype=torch.bfloat16) for size in (5, 12))
    positions = torch.arange(5, device=device, dtype=torch.int32)
    gain = torch.ones(64, device=device, dtype=torch.bfloat16)
    finite(rotary.rotate_and_store(qkv, positions, angles.cos(), angles.sin(), gain, gain, EPS, 9, 3, 64, new[0, 0], new[1, 0]), "rotary")
    source, target = torch.tensor([[4, -1, 0], [11, 3, 0]], device=device, dtype=torch.int32)
    store.store_rows(new[0], new[1], pages[0], pages[1], source, target)
    yield "rotation and commit"


def engines(device: str) -> Iterator[str]:
    """Layout, verdicts, agenda and commit of all decoders: requests of several lengths together, prompts in pieces, graphs replayed."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_model(CASES["tiny"].config, torch.device(device), dtype)
    banned = torch.tensor([model.config.mask_token_id], device=device)  # or a diffusion decoder would write masks for ever
    for settings in ({}, {"batch_invariant": True}):
        limits = EngineSettings(max_num_seqs=3, max_prompt_rows=32, max_decode_rows=512, cache_tokens=1024, **settings)
        engine = build_engine(flat_network(model, limits), limits, banned_ids=banned, costs=lambda: COSTS)
        slots = (SLOTS, replace(SLOTS, alternatives=1), SLIDING, EXACT)
        kinds = [
            *({"decoder": "refusion", "slots": each} for each in slots),
            *({"decoder": name} for name in ("autoregressive", *DIFFUSION)),
        ]
        for options in kinds:
            answers: list[Any] = []
            for index, length in enumerate((1, 40, 3, 17, 9)):
                engine.add(new_request([7 + index] * length, answers, index=index, eos_ids=(EOS,), max_tokens=12, **options))
            run(engine)
            assert len(answers) == 5, f"{len(answers)} of 5 requests were answered"
        yield f"engine {settings}"


PARTS: dict[str, Callable[[str], Iterator[str]]] = {
    "products": products,
    "attention": attentions,
    "small": small_kernels,
    "engine": engines,
}


def finite(values: Tensor, name: str) -> None:
    assert bool(values.isfinite().all()), f"{name}: {int((~values.isfinite()).sum())} of {values.numel()} numbers are not finite"


if __name__ == "__main__":
    main()
