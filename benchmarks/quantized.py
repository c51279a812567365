"""8-bit weights: what they change in the text, what they cost and save, and that the 8B carrier decodes with them in 24 GB.

    python benchmarks/quantized.py --device cuda --data heldout.jsonl.gz
    python benchmarks/quantized.py --device cuda --models carrier --kinds bfloat16 int8
    python benchmarks/quantized.py --model TINY --carrier hidden_size=140,... --data chat.jsonl        # a dry run on a CPU, in plain torch

Every model and kind of weights runs in a process of its own, the 16-bit one first: it writes the reference, greedy autoregressive answers
with the log-probabilities of every token. `argmax_agreement`, `kl` (of the reference from this one, nats a token) and `nll` are over
those answers, teacher-forced. The process of a quantised carrier may allocate no more than 24 GB of the GPU's memory, loading included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import carrier
import harness
import serving
import tasks
import torch
from torch import Tensor

from refusion import LLM, SamplingParams
from refusion.engine.build import moved_network
from refusion.engine.network import FlatNetwork, KeyValues
from refusion.engine.ops import PlainOps
from refusion.engine.shapes import TILE_ROWS
from refusion.errors import RefusionError
from refusion.evaluation.results import Figure, Run, to_plain
from refusion.evaluation.statistics import wilson
from refusion.llm import EngineSettings, RequestOutput
from refusion.model.config import ModelConfig
from refusion.model.quantize import Kind, QuantizedWeight, quantize
from refusion.model.rows import PROMPT, Rows, Spans, plain_tiles
from refusion.model.segments import NO_PARENT

# T = tokens of a prompt with its answer, N = those of the answer, V = vocabulary of the small model

CAP_BYTES = 24_000_000_000
KINDS = ("bfloat16", *get_args(Kind))
MODELS = ("small", "carrier")
DECODERS = ("autoregressive", "refusion")


def main() -> None:
    args = flags()
    if args.worker is not None:
        measure(args, *args.worker)
        return
    runs: list[Run] = []
    llm = LLM.from_pretrained(args.model, device="cpu")
    described = {"carrier": args.carrier, "num_prompts": args.num_prompts, "num_tasks": args.num_tasks}
    finish = partial(harness.finish, args, "quantized", llm, runs, **described)
    with tempfile.TemporaryDirectory() as scratch, harness.written_at_any_end(finish, runs):
        for model in args.models:
            for kind in sorted(args.kinds, key=lambda kind: kind != "bfloat16"):
                runs.append(in_own_process(model, kind, Path(scratch)))
                print(json.dumps({"label": runs[-1].label} | to_plain(runs[-1].figures)), flush=True)


def flags() -> argparse.Namespace:
    parser = harness.parser("8-bit weights against 16-bit ones.", output="quantized.json", max_tokens=128)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="the model itself, and inside its carrier")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="weights; bfloat16 stands for the exact ones")
    parser.add_argument("--carrier", default="8b", help="shape of the carrier: 8b or NAME=N,...")
    parser.add_argument("--data", type=Path, default=None, help="chat rows with `query`; by default the shared held-out ones")
    parser.add_argument("--tasks-data", type=Path, default=None, help="task rows; by default made from the held-out seed")
    parser.add_argument("--num-prompts", type=int, default=16, help="chat prompts")
    parser.add_argument("--num-tasks", type=int, default=210, help="task rows")
    parser.add_argument("--task-tokens", type=int, default=320, help="new tokens of a task at most")
    parser.add_argument("--worker", nargs=3, default=None, metavar=("MODEL", "KIND", "SCRATCH"), help=argparse.SUPPRESS)
    return parser.parse_args()


def in_own_process(model: str, kind: str, scratch: Path) -> Run:
    """The figures that a worker left. Raises RefusionError if it failed, whose last line says why."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", model, kind, str(scratch)]
    done = subprocess.run(command, stdout=2, check=False)  # what it prints is no result
    if done.returncode:
        raise RefusionError(f"{model} with {kind} weights failed with exit code {done.returncode}; what it said stands above")
    return Run(**json.loads((scratch / f"{model}-{kind}.json").read_text()))


def measure(args: argparse.Namespace, model: str, kind: str, scratch: str) -> None:
    """Everything about one model with one kind of weights, left as JSON in `scratch`."""
    is_cuda = args.device.startswith("cuda")
    is_capped = is_cuda and model == "carrier" and kind != "bfloat16"
    if is_capped:
        device = torch.device("cuda", torch.device(args.device).index or 0)  # torch wants an index here
        torch.cuda.set_per_process_memory_fraction(CAP_BYTES / torch.cuda.get_device_properties(device).total_memory, device)
    started = time.perf_counter()
    llm = loaded(args, model, kind)
    figures: dict[str, Figure] = {"load_seconds": time.perf_counter() - started} | memory(args.device, "load")
    chat = [llm.encode(harness.chat(row["query"])) for row in serving.prompt_rows("chat", args.data, args.num_prompts)]
    rows = serving.prompt_rows("tasks", args.tasks_data, args.num_tasks)
    server = serving.Server(llm, harness.settings(args)[0].slots, SamplingParams(max_tokens=args.max_tokens))
    loads = serving.loads_at(server, DECODERS, chat, 1, serving.LEAST_WARM_UP)
    reference = Path(scratch) / f"{model}.pt"
    if kind == "bfloat16":
        write_reference(reference, llm.engine.runner.network, chat, {name: load.outputs for name, load in loads.items()})
    if reference.exists():
        figures |= against(torch.load(reference, weights_only=True), llm.engine.runner.network, loads)
    for decoder, load in loads.items():
        figures |= speeds(f"chat_{decoder}", load)
    long_server = replace(server, sampling=SamplingParams(max_tokens=args.task_tokens))
    task_load = serving.loads_at(long_server, ["refusion"], [llm.encode(harness.chat(row["query"])) for row in rows], 1, 4)["refusion"]
    is_right = tasks.judge(rows, [output.text for output in task_load.outputs])
    figures |= {"task_accuracy": wilson(sum(is_right), len(is_right))} | speeds("tasks_refusion", task_load) | memory(args.device, "decode")
    if is_capped:
        free, total = torch.cuda.mem_get_info(args.device)
        figures |= {"cap_bytes": CAP_BYTES, "device_bytes": total - free}  # with the driver's own, which the cap leaves out
        assert total - free <= CAP_BYTES, f"{total - free} bytes of the device are in use, more than {CAP_BYTES}"
    run = {"label": f"{model}, {kind}", "settings": {"model": model, "weights": kind}, "figures": to_plain(figures)}
    (Path(scratch) / f"{model}-{kind}.json").write_text(json.dumps(run))


# ---- loading ----


def loaded(args: argparse.Namespace, model: str, kind: str) -> LLM:
    """At batch 1; 8-bit weights are made one by one, so that the exact model never lies on the GPU."""
    engine = EngineSettings(max_num_seqs=1, prefix_caching=False, cache_tokens=8192 if args.device.startswith("cuda") else None)
    quantization: Any = None if kind == "bfloat16" else kind
    shape = carrier.Shape.parse(args.carrier)
    options = {"device": args.device, "dtype": args.dtype, "engine": engine}
    if args.device.startswith("cuda") or quantization is None:
        if model == "small":
            return LLM.from_pretrained(args.model, quantization=quantization, **options)
        return carrier.load_llm(args.model, shape, quantization=quantization, **options)
    exact = LLM.from_pretrained(args.model, **options) if model == "small" else carrier.load_llm(args.model, shape, **options)
    network = moved_network(exact.model, PlainQuantizedOps(exact.config, exact.model.dtype, quantization), torch.device("cpu"))
    return LLM(exact.path, exact.model, exact.tokenizer, engine, network)


class PlainQuantizedOps(PlainOps):
    """The same weights in plain torch, for machines without a GPU."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, kind: Kind) -> None:
        super().__init__(config, dtype)
        self.kind: Kind = kind

    def prepare(self, weight: Tensor) -> QuantizedWeight:  # pyright: ignore[reportIncompatibleMethodOverride]: any weight will do
        return quantize(weight, self.kind)


# ---- comparing ----


def write_reference(path: Path, network: FlatNetwork, prompts: Sequence[list[int]], outputs: dict[str, list[RequestOutput]]) -> None:
    """Prompts, greedy answers of both decoders and log-probabilities [N, V] float32 of the autoregressive ones."""
    answers = {name: [list(output.token_ids) for output in found] for name, found in outputs.items()}
    log_probs = [answer_log_probs(network, *pair).cpu() for pair in zip(prompts, answers["autoregressive"], strict=True)]
    torch.save({"prompts": list(prompts), "answers": answers, "log_probs": log_probs}, path)


def against(reference: dict[str, Any], network: FlatNetwork, loads: dict[str, serving.Load]) -> dict[str, Figure]:
    """How far this network is from the reference."""
    agreements, divergences, losses = [], [], []
    answers = reference["answers"]["autoregressive"]
    for prompt, answer, stored in zip(reference["prompts"], answers, reference["log_probs"], strict=True):
        expected, found = stored.to(network.device), answer_log_probs(network, prompt, answer)
        agreements += (expected.argmax(1) == found.argmax(1)).tolist()
        shares = expected.exp()
        divergences += torch.where(shares > 0, shares * (expected - found), 0.0).sum(1).tolist()
        losses += (-found.gather(1, torch.tensor(answer, device=network.device)[:, None])[:, 0]).tolist()
    figures: dict[str, Figure] = {
        "num_scored": len(losses),
        "argmax_agreement": statistics.fmean(agreements),
        "kl": statistics.fmean(divergences),
        "nll": statistics.fmean(losses),
    }
    for decoder, load in loads.items():
        pairs = list(zip(reference["answers"][decoder], [list(output.token_ids) for output in load.outputs], strict=True))
        figures[f"same_answers_{decoder}"] = sum(one == other for one, other in pairs) / len(pairs)
        same = sum(carrier.common_prefix(one, other) for one, other in pairs)
        figures[f"same_prefix_share_{decoder}"] = same / sum(len(one) for one, _ in pairs)
    return figures


@torch.no_grad()
def answer_log_probs(network: FlatNetwork, prompt: list[int], answer: list[int]) -> Tensor:
    """[N, V] float32 of the tokens of an answer, each after those before it."""
    device, size = network.device, len(prompt) + len(answer) - 1
    rows = Rows.empty(size, device)
    place = torch.arange(size, device=device)
    for field, values in ((rows.token_ids, torch.tensor([*prompt, *answer][:-1])), (rows.positions, place), (rows.rank, place)):
        field.copy_(values)
    rows.seat.zero_()
    rows.segment.fill_(PROMPT)
    rows.parent.fill_(NO_PARENT)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    spans = Spans(zero, zero, zero + size, zero + size, zero + size, torch.zeros(1, 1, dtype=torch.int32, device=device), 16)
    pool, new = (KeyValues.empty(network.config, number, device, network.dtype) for number in (16, size))
    hidden = network.forward(rows, spans, plain_tiles(spans, TILE_ROWS, -(-size // TILE_ROWS)), pool, new)
    return network.logits(hidden[len(prompt) - 1 :]).log_softmax(dim=1)


# ---- costs ----


def speeds(name: str, load: serving.Load) -> dict[str, Figure]:
    num_forwards = sum(output.stats.num_forwards for output in load.outputs)
    figures: dict[str, Figure] = {
        f"tokens_per_second_{name}": load.tokens_per_second,
        f"tokens_per_forward_{name}": load.num_tokens / num_forwards,
        f"ms_per_forward_{name}": 1000 * load.seconds / num_forwards,
    }
    return figures | ({f"device_ms_per_forward_{name}": statistics.fmean(load.device_ms)} if load.device_ms else {})


def memory(device: str, what: str) -> dict[str, Figure]:
    """Most bytes allocated so far."""
    return {f"peak_bytes_{what}": torch.cuda.max_memory_allocated(device)} if device.startswith("cuda") else {}


if __name__ == "__main__":
    harness.script(main)
