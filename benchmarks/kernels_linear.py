"""The dense kernels on an H100: right at the real shapes, how fast, and what programmatic dependent launch brings.

python benchmarks/kernels_linear.py                                   # check every kernel against float64; exit code 1 if one is off
python benchmarks/kernels_linear.py --sweep --output runs/linear      # which tiles suit which product; copy tuned.json beside the kernels
python benchmarks/kernels_linear.py --sweep --only smollm2-135m:128 qwen3-8b:1:qkv_proj    # only some of it, the table keeps the rest
python benchmarks/kernels_linear.py --sweep --quantized int8 float8 --skip-check --output runs/linear      # 8-bit weights of qwen3-8b
python benchmarks/kernels_linear.py --chain                           # eight layers' products with and without PDL
python benchmarks/kernels_linear.py --compile-only                    # no GPU: registers, spills and shared memory of the chosen configs
TRITON_INTERPRET=1 python benchmarks/kernels_linear.py --tiny --sweep --chain --output runs/linear   # dry run of all of it on a CPU
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernels_linear_sweep as sweeping
import torch
import torch.nn.functional as F
from kernels_linear_products import EPS, Inputs, Product, Weight, compile_for_h100, make_inputs, make_weight, products, run

from refusion.model.kernels import launch, linear
from refusion.model.kernels.config import choose_config
from refusion.model.quantize import QuantizedWeight

MODELS = ("qwen3-8b", "smollm2-135m")
ROWS = (1, 16, 32, 64, 128, 192, 256)
TOLERANCE = 1e-2  # of ||out - exact|| / ||exact||: a few roundings to bfloat16, 2**-9 each; the interpreter cuts off where a GPU rounds
INTERPRETED_TOLERANCE = 3e-2
NUM_LAYERS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time candidates and write tuned.json and sweep.json below --output")
    parser.add_argument("--chain", action="store_true", help="time a chain of layers with and without PDL")
    parser.add_argument("--compile-only", action="store_true", help="compile the chosen configs for an H100 and print their resources")
    parser.add_argument("--skip-check", action="store_true", help="no comparison with float64 first")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU; needs TRITON_INTERPRET=1")
    parser.add_argument("--output", type=Path, default=Path("runs/kernels-linear"), help="directory of the sweep's files")
    parser.add_argument("--budget-seconds", type=float, default=150.0, help="of the sweep")
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL:ROWS[:PRODUCT]", help="what the sweep measures; the rest is kept")
    parser.add_argument("--quantized", nargs="+", default=[], choices=["int8", "float8"], help="the sweep measures 8-bit weights instead")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="compile processes of the sweep")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.compile_only:
        return compile_report(("tiny",) if args.tiny else MODELS)
    device = "cpu" if args.tiny else "cuda"
    num_bad = 0 if args.skip_check else check(("tiny",) if args.tiny else MODELS, (1, 17) if args.tiny else ROWS, device, args.workers)
    if args.sweep:
        sweeping.sweep(args.output, args.budget_seconds, args.workers, args.tiny, args.only, args.quantized)
    if args.chain:
        for model in ("tiny",) if args.tiny else MODELS:
            chain(model, (3,) if args.tiny else (1, 32, 64, 128, 192), device)
    return 1 if num_bad else 0


def check(models: tuple[str, ...], rows: tuple[int, ...], device: str, num_workers: int) -> int:
    """Compare every kernel with float64; returns how many are off. Quantised weights are compared with their own exact values."""
    sweeping.compile_all(list(chosen(models, rows)), num_workers)
    num_bad, tolerance = 0, INTERPRETED_TOLERANCE if device == "cpu" else TOLERANCE
    for model in models:
        for product in products(model):
            for quantized in (None, "int8", "float8"):
                weight = make_weight(product, device, torch.bfloat16, quantized)
                wide = (weight.data.double() * weight.scale.double()[:, None]) if isinstance(weight, QuantizedWeight) else weight.double()
                errors = [error_of(product, make_inputs(product, num_rows, device, torch.bfloat16), weight, wide) for num_rows in rows]
                bad = [num_rows for num_rows, error in zip(rows, errors, strict=True) if not error < tolerance]  # NaN is bad too
                num_bad += len(bad)
                figures = " ".join(f"{error:.1e}" for error in errors)
                print(f"{model:13} {product.name:13} {quantized or 'bfloat16':9} {figures} {f'OFF at T={bad}' if bad else ''}", flush=True)
                del weight, wide
    return num_bad


def error_of(product: Product, inputs: Inputs, weight: Weight, wide: torch.Tensor) -> float:
    """Relative error of the output; infinite if two runs differ or a readout's token is not (nearly) the best."""
    out, again = (run(product, inputs, weight) for _ in range(2))
    x, gain = inputs.x.double(), inputs.norm_weight.double()
    normed = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + EPS) * gain
    if product.kind == "readout":
        if not all(torch.equal(one, two) for one, two in zip(out, again, strict=True)):
            return float("inf")
        logits = normed @ wide.T + inputs.bias_banned.double()
        normaliser = logits.logsumexp(dim=1)
        lost = (logits.amax(dim=1) - logits.gather(1, out.token_ids[:, None])[:, 0]).max()
        given = (logits.gather(1, inputs.given_ids.long()[:, None])[:, 0] - normaliser).exp()
        if lost > 0.02 or not torch.equal(out.given_is_argmax, out.token_ids == inputs.given_ids):
            return float("inf")
        return max(relative(out.confidence, (logits.amax(dim=1) - normaliser).exp()), relative(out.given_probability, given))
    if not torch.equal(out, again):
        return float("inf")
    if product.kind == "linear_add":
        return relative(out, inputs.residual.double() + x @ wide.T)
    if product.kind == "norm_linear":
        return relative(out, normed @ wide.T)
    gate, up = (normed @ wide.T).chunk(2, dim=1)
    return relative(out, F.silu(gate) * up)


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def chain(model: str, rows: tuple[int, ...], device: str) -> None:
    """Time the products of eight layers one after the other, as a forward runs them, attention left out."""
    shapes = products(model)[:4]
    weights: list[list[Any]] = [[make_weight(product, device, torch.bfloat16) for product in shapes] for _ in range(NUM_LAYERS)]
    num_bytes = 2 * sum(weight.numel() for layer in weights for weight in layer)
    gain = torch.ones(shapes[0].num_in, device=device, dtype=torch.bfloat16)
    width = shapes[1].num_in

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        for qkv, o, gate_up, down in weights:
            heads = linear.norm_linear(hidden, gain, EPS, qkv)[:, :width]  # the query stands in for what attention returns
            hidden = linear.linear_add(heads, o, hidden, in_place=True)
            gated = linear.norm_gated(hidden, gain, EPS, gate_up)
            hidden = linear.linear_add(gated, down, hidden, in_place=True)
        return hidden

    for num_rows in rows:
        hidden = torch.randn(num_rows, shapes[0].num_in, device=device, dtype=torch.bfloat16)
        timings = []
        for is_on in (False, True):
            launch.set_pdl(is_on)
            forward(hidden)
            timings.append(sweeping.time_calls([lambda hidden=hidden: forward(hidden)], on_gpu=device == "cuda") / NUM_LAYERS)
        launch.set_pdl(None)
        plain, dependent = (f"{seconds * 1e6:8.1f} us a layer {num_bytes / NUM_LAYERS / seconds / 1e12:5.2f} TB/s" for seconds in timings)
        print(f"chain {model:13} T={num_rows:<4} PDL off {plain}   on {dependent}", flush=True)


def compile_report(models: tuple[str, ...]) -> int:
    """Compile for an H100 what `choose_config` picks and print registers, spills and shared memory; returns the exit code."""
    for job in chosen(models, ROWS):
        assert job.config is not None
        for kernel in compile_for_h100(job.product, job.num_rows, job.config, job.quantized):
            name = f"{job.product.model:13} {job.product.name:13} {job.quantized or 'bfloat16':9} T={job.num_rows:<4}"
            print(f"{name} {kernel.metadata.name:21} {resources(kernel)}", flush=True)
    return 0


def chosen(models: tuple[str, ...], rows: tuple[int, ...]) -> Iterator[sweeping.Job]:
    """What `choose_config` picks, the library left out."""
    for model in models:
        for product in products(model):
            for dtype in ("bfloat16", "int8", "float8"):
                for num_rows in rows:
                    config = choose_config(product.num_out, product.num_in, num_rows, product.kind, dtype)
                    if config is not None:
                        yield sweeping.Job(product, num_rows, config, None if dtype == "bfloat16" else dtype)


def resources(kernel: Any) -> str:
    """Registers and stack of a compiled kernel from cuobjdump, which Triton ships, and its shared memory."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([str(cuobjdump), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text
    instruction = "wgmma" if "wgmma.mma_async" in kernel.asm["ptx"] else "mma" if "mma.sync" in kernel.asm["ptx"] else "-"
    return f"{usage[1]:>4} registers {usage[2]:>4} bytes spilled {kernel.metadata.shared:>7} bytes shared  {instruction}"


if __name__ == "__main__":
    sys.exit(main())
