"""FSDP2 and DeepSpeed ZeRO on two GPUs against one: the same recipe, its losses and final weights, and FSDP2 resumed from a checkpoint.

    python benchmarks/two_gpus.py --base smollm2-135m --data 'pairs-*.jsonl.gz' --output two-gpus.json    # about two minutes
    python benchmarks/two_gpus.py --dry-run                                             # a toy model in two processes on a CPU

Three runs: on one GPU; with torchrun on two, weights, gradients and optimizer sharded; and the second again from its middle checkpoint.
Then, where DeepSpeed is installed, one for each of --zero-stages, on two GPUs too (3 without `model.compile`, as it must be); where it is
not, they are left out and the result file says so. The dry run, where accelerate does not shard, shares the toy model by plain data
parallelism instead of FSDP2. Each run is `refusion train`, nothing less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import torch
from safetensors.torch import load_file

from refusion import hub
from refusion.errors import RefusionError
from refusion.evaluation.results import Result, Run, write_result

RECIPE = """
[model]
base = "{base}"
mask_token = "{mask_token}"
attention = "{attention}"
compile = {compile}

[data]
sources = [{source}]
validation_rows = 64
cache = "{place}/cache"
pack_length = {length}
rows_per_step = {rows}
num_workers = {workers}

[objective]
serial_share = 0.5
text_order_share = 0.5
chunk_size = {chunk_size}

[optimizer]
learning_rate = 3e-4
warmup_ratio = 0.1

[run]
output = "{place}/unused"
max_steps = {steps}
save_steps = {half}
keep_checkpoints = 2
log_steps = 1
final_dtype = "float32"
tensorboard = false
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="checkpoint to train")
    parser.add_argument("--data", default="", help="glob of rows to train on")
    parser.add_argument("--steps", type=int, default=30, help="steps of a run; an even number")
    parser.add_argument("--rows", type=int, default=32, help="packed rows of 2048 tokens in a step")
    parser.add_argument("--seconds", type=float, default=150, help="a run that takes longer is ended")
    parser.add_argument("--zero-stages", type=int, nargs="*", default=[2, 3], choices=[1, 2, 3], help="of DeepSpeed; none: it is not run")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("two-gpus.json"))
    args = parser.parse_args()
    if not args.dry_run and torch.cuda.device_count() < 2:
        raise RefusionError(f"{torch.cuda.device_count()} GPU(s) here, two are needed; use --dry-run to see that the script works")
    with tempfile.TemporaryDirectory() as place:
        compare(args, Path(place))


def compare(args: argparse.Namespace, place: Path) -> None:
    """All three runs and the result file; what has been measured is written after each."""
    recipe = place / "recipe.toml"
    recipe.write_text(_recipe(args, place), encoding="utf-8")
    half = args.steps // 2
    sharded = [] if args.dry_run else ["--set", "parallel.name=fsdp"]
    stages = args.zero_stages if find_spec("deepspeed") else []
    left_out = (
        "DeepSpeed is not installed (`pip install 'deepspeed>=0.19'`), so ZeRO was left out." if args.zero_stages and not stages else ""
    )
    runs: list[Run] = []

    def add(name: str, command: list[str]) -> None:
        runs.append(_run(name, [*command, "--output", str(place / name)], place / name, args))
        settings = {name: value for name, value in vars(args).items() if name != "output"} | {
            "deepspeed": find_spec("deepspeed") is not None
        }
        figures, device = _differences(args, place), "cpu" if args.dry_run else "cuda"
        write_result(args.output, Result(name="two-gpus", settings=settings, figures=figures, runs=runs, notes=left_out, device=device))
        print(json.dumps({"label": name} | dict(runs[-1].figures)), flush=True)

    train = ["-m", "refusion", "train", str(recipe), "--json"]
    on_two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *train]
    together = [*on_two, *sharded]
    add("one", train)
    add("two", together)
    broken = place / "resumed"
    broken.mkdir()
    shutil.copytree(place / "two" / f"checkpoint-{half}", broken / f"checkpoint-{half}")
    for name in ("recipe.json", "data.json"):
        shutil.copy(place / "two" / name, broken)
    add("resumed", [*together, "--resume"])
    for stage in stages:
        eager = ["--set", "model.compile=false"] if stage == 3 else []
        add(f"zero{stage}", [*on_two, "--set", "parallel.name=deepspeed", "--set", f"parallel.zero_stage={stage}", *eager])
    if left_out:
        print(left_out, file=sys.stderr)
    print(json.dumps(_differences(args, place)))


def _recipe(args: argparse.Namespace, place: Path) -> str:
    tiny = {"base": "toy", "mask_token": "", "attention": "sdpa", "compile": "false", "source": "{ toy = 400 }", "length": 128, "rows": 4}
    full = {"base": args.base, "mask_token": "<empty_output>", "attention": "flex", "compile": "true", "length": 2048, "rows": args.rows}
    values = {**tiny, "workers": 0, "chunk_size": 64} if args.dry_run else {**full, "workers": 4, "chunk_size": 4096}
    return RECIPE.format(**{"source": f'{{ path = "{args.data}" }}', **values}, place=place, steps=args.steps, half=args.steps // 2)


def _run(name: str, command: list[str], run_dir: Path, args: argparse.Namespace) -> Run:
    """One `refusion train` in a process of its own; RefusionError with its last words if it fails."""
    started = time.perf_counter()
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": "0"} if name == "one" else {})}
    log = run_dir.with_suffix(".log")
    with open(log, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=args.seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"nothing within {args.seconds:.0f} s"
    if code != 0:
        words = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RefusionError(f"run {name} ended with {code}:\n{words}")
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    names = ("tokens_per_second", "validation_ar", "validation_mdm", "peak_memory_gb")
    figures = {key: report[key] for key in names if report[key] is not None} | {"seconds": time.perf_counter() - started}
    return Run(label=name, settings={}, figures=figures, series={"loss": _losses(run_dir, args.steps)})


def _losses(run_dir: Path, steps: int) -> list[float]:
    state = json.loads((run_dir / f"checkpoint-{steps}" / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def _differences(args: argparse.Namespace, place: Path) -> dict[str, float]:
    """How far two GPUs are from one, and the resumed run from the unbroken one, where they have run."""
    figures: dict[str, float] = {}
    zero = [(f"zero{stage}_against_one", "one", f"zero{stage}") for stage in args.zero_stages]
    for name, first, second in (("two_against_one", "one", "two"), ("resumed_against_unbroken", "two", "resumed"), *zero):
        if not (place / second / "final").exists():
            continue
        losses = [_losses(place / run, args.steps) for run in (first, second)]
        assert len(losses[0]) == len(losses[1]) == args.steps, [len(curve) for curve in losses]
        figures[f"{name}_loss_off_worst"] = max(abs(b / a - 1) for a, b in zip(*losses, strict=True))
        figures[f"{name}_loss_off_mean"] = abs(sum(losses[1]) / sum(losses[0]) - 1)
        figures[f"{name}_weights_off"] = _weights_off(args, place / first / "final", place / second / "final")
    return figures


def _weights_off(args: argparse.Namespace, first: Path, second: Path) -> float:
    """Distance between two final models over the distance that training moved the first."""
    one, other, before = _weights(first), _weights(second), _base_weights(args)
    apart = sum((one[name] - other[name]).square().sum().item() for name in one)
    moved = sum((one[name] - before[name].float()).square().sum().item() for name in one)
    return (apart / moved) ** 0.5


def _weights(final: Path) -> dict[str, Any]:
    return {name: value.float() for name, value in load_file(final / "model.safetensors").items()}


def _base_weights(args: argparse.Namespace) -> dict[str, Any]:
    from refusion.training.base import load_base
    from refusion.training.recipe import ModelSettings

    if args.dry_run:
        return load_base(ModelSettings(base="toy")).model.state_dict()
    return _weights(hub.resolve(args.base))


if __name__ == "__main__":
    harness.script(main)
