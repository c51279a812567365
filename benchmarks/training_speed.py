"""How fast training runs: tokens per second at 135M, use of the arithmetic at 1.7B, and that speed changes no loss.

    python benchmarks/training_speed.py --base smollm2-135m --data 'pairs-*.jsonl.gz' --output training-speed.json   # one H100
    python benchmarks/training_speed.py --parts small --small flex flex+bfloat16 flex+whole sdpa                     # variants in turn
    python benchmarks/training_speed.py --dry-run                                       # a tiny model on a CPU, seconds

A variant is an attention, flex or sdpa, with `+bfloat16` for model.residual = "bfloat16" and `+whole` to compile the decoder as one graph
instead of layer by layer. Without --data the rows are random ids in lengths like those of chat pairs, and the weights random: neither
changes the speed. Model FLOPs are 6 per weight of every matrix (the head's included, the embedding table's not) and token that is no
padding, plus attention of a token to its own document, causal and so counted half; recomputation does not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import numpy as np
import torch
from training_setup import QWEN3_1_7B, SMOLLM2_135M, Deadline, KernelProfile, PaddedBatches, random_base, random_examples, shape_config

from refusion.errors import RefusionError
from refusion.evaluation.results import Result, Run, write_result
from refusion.training.base import BaseModel, load_base
from refusion.training.data import Examples
from refusion.training.plan import Plan, hardware_at_hand, make_plan, matrix_weights
from refusion.training.recipe import Recipe, recipe_from_table
from refusion.training.run import build_trainer, load_data
from refusion.training.trainer import RefusionTrainer

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 multiplications and additions a second, by the data sheets."""
VARIANTS = [f"{attention}{residual}{unit}" for attention in ("flex", "sdpa") for residual in ("", "+bfloat16") for unit in ("", "+whole")]
MEMORY_SHARE = 0.97
"""How much of the device a planned run may fill; the plan is an estimate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("small", "large", "parity"), default=["small", "large", "parity"])
    parser.add_argument("--base", default="", help="checkpoint for `small` and `parity`; by default random weights of SmolLM2-135M's shape")
    parser.add_argument("--data", default="", help="glob of JSONL rows for them (with --base)")
    parser.add_argument("--small", nargs="+", choices=VARIANTS, default=["flex"], metavar="VARIANT")
    parser.add_argument("--small-steps", type=int, default=60)
    parser.add_argument("--small-rows", type=int, default=32, help="rows of 2048 tokens in a step, all at once")
    parser.add_argument("--large", nargs="+", choices=VARIANTS, default=["flex"], metavar="VARIANT")
    parser.add_argument("--large-steps", type=int, default=14)
    parser.add_argument("--large-rows", type=int, default=0, help="rows of 4096 tokens at once, of 16 in a step; 0 = the most that fit")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for `large`, where memory is short")
    parser.add_argument("--parity", choices=VARIANTS, default="flex", metavar="VARIANT")
    parser.add_argument("--parity-steps", type=int, default=500)
    parser.add_argument("--parity-rows", type=int, default=8, help="rows of 1024 tokens in a step")
    parser.add_argument("--seconds", type=float, default=90, help="a variant's steps end after so long, compilation apart")
    parser.add_argument("--profile", action="store_true", help="also the time of each kernel, and the share of it that the device is busy")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, a few steps, nothing compiled")
    parser.add_argument("--output", type=Path, default=Path("training-speed.json"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.dry_run:
        raise RefusionError("no GPU here; use --dry-run to see that the script works")
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    runs: list[Run] = []
    _hardware()
    for part in args.parts:
        variants = {"small": args.small, "large": args.large, "parity": [args.parity]}[part]
        for variant in variants:
            _forget()
            runs.append({"small": small, "large": large, "parity": parity}[part](args, variant))
            print(json.dumps({"label": runs[-1].label} | dict(runs[-1].figures)), flush=True)
            # After every variant: what was measured stays, whatever becomes of the next one.
            write_result(args.output, Result(name="training-speed", settings=settings, runs=runs, device=device))


def small(args: argparse.Namespace, variant: str) -> Run:
    """Full fine-tuning of a 135M model, packed to 2048."""
    length, rows, steps = (256, 4, 6) if args.dry_run else (2048, args.small_rows, args.small_steps)
    recipe = _recipe(args, variant, length=length, rows=rows, steps=steps)
    return _speed(f"small {variant}", _trained(args, recipe, variant, SMOLLM2_135M), recipe)


def large(args: argparse.Namespace, variant: str) -> Run:
    """Full fine-tuning of a 1.7B shape, packed to 4096, with as many rows at once as fit."""
    args = argparse.Namespace(**{**vars(args), "base": "", "data": ""})
    length, rows, steps = (256, 8, 4) if args.dry_run else (4096, 16, args.large_steps)
    candidates = [rows // args.large_rows] if args.large_rows else [4, 8, 16][: 2 if args.dry_run else 3]
    for accumulation in candidates:
        checkpointing = args.gradient_checkpointing
        recipe = _recipe(args, variant, length=length, rows=rows, steps=steps, accumulation=accumulation, checkpointing=checkpointing)
        plan = _plan(recipe, shape_config(QWEN3_1_7B, is_tiny=args.dry_run))
        is_last = accumulation == candidates[-1]
        if not is_last and plan.total_bytes > MEMORY_SHARE * plan.available_bytes:
            continue
        try:
            return _speed(f"large {variant}", _trained(args, recipe, variant, QWEN3_1_7B), recipe)
        except torch.OutOfMemoryError:
            if is_last:
                raise RefusionError("the 1.7B shape does not fit, one row at a time; try --gradient-checkpointing") from None
            print(f"{rows // accumulation} rows at once do not fit, planned or not", file=sys.stderr, flush=True)
        _forget()
    raise AssertionError("the last candidate returns or raises")


def parity(args: argparse.Namespace, variant: str) -> Run:
    """Packed, compiled and fused against padded, eager and masked: the losses of every ten steps, same corruption, same data."""
    length, rows, steps = (256, 4, min(20, args.parity_steps)) if args.dry_run else (1024, args.parity_rows, args.parity_steps)
    fast, slow = (_recipe(args, variant, length=length, rows=rows, steps=steps, is_plain=is_plain) for is_plain in (False, True))
    curves = []
    for recipe in (fast, slow):
        curves.append(_losses(_trained(args, recipe, variant, SMOLLM2_135M, is_padded=recipe is slow).trainer))
        _forget()
    count = min(map(len, curves))
    packed, padded = (curve[:count] for curve in curves)
    figures: dict[str, float] = {"steps": packed[-1]["step"]}
    series: dict[str, list[float]] = {"step": [entry["step"] for entry in packed]}
    for term in ("loss", "loss_ar", "loss_mdm"):
        one, other = (np.array([entry[term] for entry in curve]) for curve in (packed, padded))
        series |= {f"{term}_packed": one.tolist(), f"{term}_padded": other.tolist()}
        figures |= {f"{term}_packed": float(one.mean()), f"{term}_padded": float(other.mean())}
        figures[f"{term}_off_mean"] = _off(one, other, count)
        figures[f"{term}_off_worst_fifty_steps"] = _off(one, other, 5)
        figures[f"{term}_off_worst_ten_steps"] = _off(one, other, 1)
    for name, curve in (("packed", packed), ("padded", padded)):
        figures[f"tokens_per_second_{name}"] = median(entry["tokens_per_second"] for entry in curve[1:])
    return Run(label=f"parity {variant}", settings={**_settings(fast), "steps": steps}, figures=figures, series=series)


def _off(one: np.ndarray, other: np.ndarray, window: int) -> float:
    """The largest relative difference between means over `window` neighbouring entries."""
    kernel = np.ones(min(window, len(one)))
    return float(np.abs(np.convolve(one, kernel, "valid") / np.convolve(other, kernel, "valid") - 1).max())


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run and what it was made from."""

    trainer: RefusionTrainer
    examples: Examples
    profile: KernelProfile | None
    seconds_before_second_step: float


def _trained(args: argparse.Namespace, recipe: Recipe, variant: str, shape: dict[str, Any], *, is_padded: bool = False) -> Trained:
    started = time.perf_counter()
    base = load_base(recipe.model) if args.base else random_base(shape_config(shape, is_tiny=args.dry_run))
    examples = _examples(recipe, base) if args.data else random_examples(recipe, int(base.model.config.vocab_size))
    profile = KernelProfile(recipe.run.max_steps - 4) if args.profile and torch.cuda.is_available() else None
    deadline = Deadline(args.seconds)
    with tempfile.TemporaryDirectory() as place:
        trainer = build_trainer(recipe, base, examples, Path(place), None, lambda line: print(line, file=sys.stderr, flush=True))
        for callback in filter(None, (deadline, profile)):
            trainer.add_callback(callback)
        if is_padded:
            chunk_size, accumulation = recipe.objective.chunk_size, recipe.data.accumulation
            trainer.batches = PaddedBatches(trainer.batches.schedule, accumulation=accumulation, chunk_size=chunk_size)
        elif "+whole" in variant and recipe.model.compile:
            _compile_whole(trainer.network)
        trainer.train()
    assert deadline.started is not None, "a run has a first step"
    print(f"{time.perf_counter() - started:.0f} s with set-up and compilation", file=sys.stderr, flush=True)
    return Trained(trainer, examples, profile, deadline.started - started)


_loaded: dict[str, Examples] = {}


def _examples(recipe: Recipe, base: BaseModel) -> Examples:
    """Rows are tokenised once for all parts that pack them to one length."""
    key = f"{recipe.data.sources} {recipe.data.pack_length}"
    if key not in _loaded:
        _loaded[key], _ = load_data(recipe, base, lambda line: None)
    return _loaded[key]


def _compile_whole(model: Any) -> None:
    """One graph instead of one a layer."""
    for module in [*model.base_model.layers, model.base_model.norm]:
        module._compiled_call_impl = None
    model.base_model.compile(dynamic=False)


def _recipe(
    args: argparse.Namespace,
    variant: str,
    *,
    length: int,
    rows: int,
    steps: int,
    accumulation: int = 1,
    checkpointing: bool = False,
    is_plain: bool = False,
) -> Recipe:
    is_fast = not (is_plain or args.dry_run)
    source: dict[str, Any] = {"path": args.data} if args.data else {"toy": 1}
    return recipe_from_table(
        {
            "model": {
                "base": args.base or "toy",
                "mask_token": "<empty_output>" if args.base else "",
                "attention": variant.split("+")[0] if is_fast else "sdpa",
                "residual": "bfloat16" if is_fast and "+bfloat16" in variant else "float32",
                "compile": is_fast,
                "gradient_checkpointing": checkpointing,
            },
            "data": {
                "sources": [source],
                "pack_length": length,
                "rows_per_step": rows,
                "accumulation": accumulation,
                "num_workers": 0 if args.dry_run else 8,
            },
            "objective": {"serial_share": 0.5, "text_order_share": 0.5, "chunk_size": 64 if args.dry_run else 4096},
            "optimizer": {"learning_rate": 1e-3 if args.dry_run else 3e-4, "warmup_ratio": 0.02},
            "run": {"output": "unused", "max_steps": steps, "log_steps": 10 if steps > 20 else 2, "tensorboard": False},
        }
    )


def _losses(trainer: RefusionTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss_ar" in entry]


def _speed(label: str, run: Trained, recipe: Recipe) -> Run:
    """Medians over the log intervals but the first two, which compile; padding is not counted."""
    trainer, corruption = run.trainer, run.trainer.batches.schedule.corruption
    config: Any = trainer.network.config
    entries = _losses(trainer)
    speed = median(entry["tokens_per_second"] for entry in entries[min(2, len(entries) - 1) :])
    lengths = corruption.lengths(0, np.arange(len(run.examples)))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # 6 * layers * heads * head_dim * length a token is causal attention over its own document, counted half.
    own_length = float((lengths.astype(np.float64) ** 2).sum() / lengths.sum())
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_dim * own_length
    flops = speed * (6 * matrix_weights(config) + attention)
    share = trainer.batches.schedule.packed_share
    tokens = recipe.data.rows_per_step * recipe.data.pack_length
    plan = _plan(recipe, config)
    figures = {
        "tokens_per_second": speed,
        "model_flops_per_second": flops,
        "packed_share": share,
        "seconds_per_step": share * tokens / speed,
        "seconds_per_step_planned": plan.seconds_per_step,
        "memory_gb_planned": plan.total_bytes / 1e9,
        "seconds_before_second_step": run.seconds_before_second_step,
        "loader_seconds_per_batch": _loader_seconds(trainer),
    }
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
        if peak is not None:
            figures["model_flops_utilisation"] = flops / peak
        free, total = torch.cuda.mem_get_info()  # the allocator keeps what it ever took
        figures |= {"memory_gb": (total - free) / 1e9, "memory_gb_allocated": torch.cuda.max_memory_allocated() / 1e9}
    series: dict[str, dict[str, float]] = {}
    if run.profile is not None:
        figures["device_busy_share"] = run.profile.busy_share
        series["kernel_ms_per_step"] = run.profile.kernel_ms
    return Run(label=label, settings=_settings(recipe), figures=figures, series=series)


def _loader_seconds(trainer: RefusionTrainer) -> float:
    """Seconds in which one loader process makes a micro-batch."""
    started = time.perf_counter()
    for step in range(2):
        trainer.batches.micro_batch(step, 0)
    return (time.perf_counter() - started) / 2


@cache
def _hardware() -> Any:
    return hardware_at_hand()


def _plan(recipe: Recipe, config: Any) -> Plan:
    return make_plan(recipe, _hardware(), config)


def _forget() -> None:
    """Give the device's memory back before the next model is made."""
    gc.collect()
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _settings(recipe: Recipe) -> dict[str, Any]:
    table = recipe.to_table()
    return {name: table[name] for name in ("model", "data", "objective")}


def script() -> NoReturn:
    """What a user can mend comes out as one line with exit code 1."""
    try:
        main()
    except RefusionError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    script()
