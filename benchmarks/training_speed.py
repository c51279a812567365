"""How fast training runs: tokens per second at 135M, use of the arithmetic at 1.7B, and that speed changes no loss.

    python benchmarks/training_speed.py --output training-speed.json                  # one H100, under four minutes
    python benchmarks/training_speed.py --dry-run                                     # a tiny model on a CPU, seconds
    python benchmarks/training_speed.py --base smollm2-135m --data 'pairs-*.jsonl.gz' # real text and weights at 135M

Without --data the rows are random ids in lengths like those of chat pairs, and the weights random: neither changes the speed. Model FLOPs
are 6 per weight of every matrix (the head's included, the embedding table's not) and token that is no padding, plus attention of a token
to its own document, causal and so counted half; recomputation does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from refusion.errors import RefusionError
from refusion.evaluation.results import Result, Run, write_result
from refusion.training.base import BaseModel, load_base, toy_config
from refusion.training.batches import Batch, PackedBatches, pack_batch
from refusion.training.data import Examples
from refusion.training.plan import matrix_weights
from refusion.training.recipe import Recipe, recipe_from_table
from refusion.training.run import build_trainer, load_data
from refusion.training.trainer import RefusionTrainer

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 multiplications and additions a second, by the data sheets."""
SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QWEN3_1_7B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
MASK_ID = 2


class PaddedBatches(PackedBatches):
    """The documents of the same steps, one a row, padded to the longest: what training without packing computes."""

    def micro_batch(self, step: int, part: int) -> Batch:
        rows = self.schedule.rows(step, self.process * self.accumulation + part, self.accumulation * self.num_processes)
        corruption = self.schedule.corruption
        documents = [[corruption.row(epoch, int(i))] for epoch, ids in rows for i in ids]
        length = max(len(document[0].input_ids) for document in documents)
        return pack_batch(documents, -(-length // 8) * 8, pad_id=corruption.mask_token_id, chunk_size=self.chunk_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("small", "large", "parity"), default=["small", "large", "parity"])
    parser.add_argument("--base", default="", help="checkpoint for `small` and `parity`; by default random weights of SmolLM2-135M's shape")
    parser.add_argument("--data", default="", help="glob of JSONL rows for them (with --base)")
    parser.add_argument("--attention", choices=("flex", "sdpa"), default="flex")
    parser.add_argument("--small-steps", type=int, default=80)
    parser.add_argument("--small-rows", type=int, default=32, help="rows of 2048 tokens in a step, all at once")
    parser.add_argument("--large-steps", type=int, default=10)
    parser.add_argument("--large-rows", type=int, default=2, help="rows of 4096 tokens at once; a step has four times as many")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for `large`, where memory is short")
    parser.add_argument("--parity-steps", type=int, default=100)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, a few steps, nothing compiled")
    parser.add_argument("--output", type=Path, default=Path("training-speed.json"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.dry_run:
        raise RefusionError("no GPU here; use --dry-run to see that the script works")
    runs = []
    for part in args.parts:
        run = {"small": small, "large": large, "parity": parity}[part](args)
        print(json.dumps({"label": run.label} | dict(run.figures)), flush=True)
        runs.append(run)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    write_result(args.output, Result(name="training-speed", settings=settings, runs=runs, device=device))


def small(args: argparse.Namespace) -> Run:
    """Full fine-tuning of a 135M model, packed to 2048."""
    length, rows, steps = (256, 4, 6) if args.dry_run else (2048, args.small_rows, args.small_steps)
    recipe = _recipe(args, length=length, rows=rows, steps=steps)
    trainer, examples, _ = _trained(args, recipe, SMOLLM2_135M)
    return Run(label="small", settings=_settings(recipe), figures=_speed(trainer, examples, recipe))


def large(args: argparse.Namespace) -> Run:
    """Full fine-tuning of a 1.7B shape, packed to 4096."""
    length, rows, steps = (256, 2, 4) if args.dry_run else (4096, args.large_rows, args.large_steps)
    recipe = _recipe(args, length=length, rows=4 * rows, steps=steps, accumulation=4, checkpointing=args.gradient_checkpointing)
    args = argparse.Namespace(**{**vars(args), "base": "", "data": ""})
    trainer, examples, _ = _trained(args, recipe, QWEN3_1_7B)
    return Run(label="large", settings=_settings(recipe), figures=_speed(trainer, examples, recipe))


def parity(args: argparse.Namespace) -> Run:
    """Packed, compiled and fused against padded, eager and masked: the losses of every ten steps, same corruption, same data."""
    length, rows, steps = (256, 4, min(20, args.parity_steps)) if args.dry_run else (1024, 16, args.parity_steps)
    fast, slow = (_recipe(args, length=length, rows=rows, steps=steps, is_plain=is_plain) for is_plain in (False, True))
    packed, _, _ = _trained(args, fast, SMOLLM2_135M)
    packed_losses = _losses(packed)
    del packed
    padded, _, _ = _trained(args, slow, SMOLLM2_135M, is_padded=True)
    padded_losses = _losses(padded)
    figures: dict[str, float] = {}
    for term in ("loss", "loss_ar", "loss_mdm"):
        ratios = [abs(a[term] / b[term] - 1) for a, b in zip(packed_losses, padded_losses, strict=True)]
        means = [float(np.mean([entry[term] for entry in losses])) for losses in (packed_losses, padded_losses)]
        figures |= {f"{term}_packed": means[0], f"{term}_padded": means[1], f"{term}_off_mean": abs(means[0] / means[1] - 1)}
        figures[f"{term}_off_worst_ten_steps"] = max(ratios)
    figures["tokens_per_second_padded"] = median(e["tokens_per_second"] for e in padded_losses[1:])
    figures["tokens_per_second_packed"] = median(e["tokens_per_second"] for e in packed_losses[1:])
    return Run(label="parity", settings={**_settings(fast), "steps": steps}, figures=figures)


def _recipe(
    args: argparse.Namespace,
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
                "attention": args.attention if is_fast else "sdpa",
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
            "run": {"output": "unused", "max_steps": steps, "log_steps": 2 if args.dry_run else 10, "tensorboard": False},
        }
    )


def _trained(
    args: argparse.Namespace, recipe: Recipe, shape: dict[str, Any], *, is_padded: bool = False
) -> tuple[RefusionTrainer, Examples, BaseModel]:
    started = time.perf_counter()
    base = _random_base(shape, args.dry_run) if not args.base else load_base(recipe.model)
    if args.data:
        examples, _ = load_data(recipe, base, lambda line: None)
    else:
        examples = _random_examples(recipe, int(base.model.config.vocab_size))
    with tempfile.TemporaryDirectory() as place:
        trainer = build_trainer(recipe, base, examples, Path(place), None, lambda line: print(line, file=sys.stderr, flush=True))
        if is_padded:
            chunk_size, accumulation = recipe.objective.chunk_size, recipe.data.accumulation
            trainer.batches = PaddedBatches(trainer.batches.schedule, accumulation=accumulation, chunk_size=chunk_size)
        trainer.train()
    print(f"{time.perf_counter() - started:.0f} s with set-up and compilation", file=sys.stderr, flush=True)
    return trainer, examples, base


def _random_base(shape: dict[str, Any], is_dry: bool) -> BaseModel:
    config: Any = toy_config() if is_dry else Qwen3Config(**shape) if "head_dim" in shape else LlamaConfig(**shape)
    with torch.random.fork_rng(), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return BaseModel(model=model, path=None, tokenizer=None, mask_token_id=MASK_ID)


def _random_examples(recipe: Recipe, vocab_size: int) -> Examples:
    """Prompts and answers in lengths like those of chat pairs (median 30 and 150, log-normal), enough for the run."""
    generator = np.random.default_rng(0)
    needed = recipe.run.max_steps * recipe.data.rows_per_step * recipe.data.pack_length
    count = max(64, int(needed / 150 / 4))
    longest = recipe.data.pack_length // 2 - 8
    scale = min(1.0, longest / 400)
    prompt, answer = (np.clip(generator.lognormal(np.log(m * scale), 0.7, count), 2, longest).astype(np.int64) for m in (30, 150))
    ends = np.cumsum(prompt + answer)
    return Examples(
        tokens=generator.integers(8, vocab_size, int(ends[-1]), dtype=np.int64).astype(np.int32),
        starts=ends - prompt - answer,
        answers=ends - answer,
        ends=ends,
        weights=np.ones(count),
        is_distilled=np.zeros(count, dtype=bool),
    )


def _losses(trainer: RefusionTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss_ar" in entry]


def _speed(trainer: RefusionTrainer, examples: Examples, recipe: Recipe) -> dict[str, float]:
    """Medians over the log intervals but the first two, which compile; padding is not counted."""
    config: Any = trainer.network.config
    entries = _losses(trainer)
    speed = median(entry["tokens_per_second"] for entry in entries[min(2, len(entries) - 1) :])
    corruption = trainer.batches.schedule.corruption
    ids = np.arange(len(examples))
    lengths = corruption.lengths(0, ids)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # 6 * layers * heads * head_dim * length a token is causal attention over its own document, counted half.
    own_length = float((lengths.astype(np.float64) ** 2).sum() / lengths.sum())
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_dim * own_length
    flops = speed * (6 * matrix_weights(config) + attention)
    figures = {"tokens_per_second": speed, "model_flops_per_second": flops}
    rows = trainer.batches.schedule.plans[0]
    figures["packed_share"] = float(lengths[rows.ids % len(examples)].sum() / (rows.num_rows * recipe.data.pack_length))
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
        if peak is not None:
            figures["model_flops_utilisation"] = flops / peak
        figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return figures


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
