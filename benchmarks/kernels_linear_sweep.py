"""Measure which tiles suit which product: candidates from a small cost model, compiled in parallel, timed in CUDA graphs.

Weights rotate through a pool larger than the L2 cache, so each one comes from memory as in a real forward. The most valuable shapes come
first and the budget is kept: what was not reached is simply absent from the table, and `choose_config` falls back to its heuristic.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from kernels_linear_products import QUANTIZED, Inputs, Product, Weight, compile_for_h100, make_inputs, products, run

from refusion.model.kernels.config import SKINNY_ROWS, TUNED, TUNED_BY_CARD, Config, card, cover, tuned_entries
from refusion.model.quantize import QuantizedWeight, quantize

MAX_CANDIDATES = 18
MAX_WIDE = 36  # of a product with many rows and a big weight, which can also be cut into two pieces of weight rows, turned, or left owing
MAX_QUANTIZED = 12  # of a product with 8-bit weights, which are many
SMALL_WEIGHT = 4_000_000  # numbers; a head is larger
SHARED_LIMIT = 227 * 1024
ROTATION = 160e6  # bytes of weights between two uses of the same one; the L2 cache of an H100 holds 50 MB
POOL = 640_000_000  # weights in the pool, at least the largest head
MEMORY, L2, TENSOR = 3.0e12, 5.5e12, 6e14  # bytes, bytes and operations a second an H100 reaches; only the ranking of candidates uses them
LATENCY = 0.8e-6  # seconds until a first load arrives
QUANTIZED_PRIORITY = tuple(("qwen3-8b", rows) for rows in (1, 32, 128, 192, 16, 64))
PRIORITY = (
    *(("qwen3-8b", rows) for rows in (1, 32, 192, 128)),
    *(("smollm2-135m", rows) for rows in (16, 32, 64, 1)),
    *(("qwen3-8b", rows) for rows in (64, 16, 256)),
    *(("smollm2-135m", rows) for rows in (128, 192, 256)),
)


@dataclass(frozen=True, slots=True)
class Job:
    """One candidate of one product; config None = the library."""

    product: Product
    num_rows: int
    config: Config | None
    quantized: str | None = None


def candidates(product: Product, num_rows: int, limit: int = MAX_CANDIDATES, quantized: str | None = None) -> list[Config]:
    """What won at other rows, with these row tiles, and the most promising configs by the cost model; of each row tile alike.

    At most two of a family, so that a wrong model does not drop what would have won; of 8-bit weights, for which it leaves the conversion
    out, one of each, and the tiles that convert with the fewest instructions in any case.
    """
    tiles = row_tiles(product, num_rows)
    kept: list[Config] = []
    for block_t, extra_t in tiles:
        known = [*winners(product, quantized), *(_converting_well(product) if quantized and block_t <= 32 else ())]
        known = [replace(config, block_t=block_t, extra_t=extra_t) for config in known]
        known = [config for config in dict.fromkeys(known) if is_sensible(product, config, quantized)][: limit // len(tiles) // 2]
        found = [
            config
            for config in _configs(product, block_t, extra_t, quantized)
            if is_sensible(product, config, quantized) and config not in known
        ]
        for config in sorted(found, key=lambda config: estimate(product, num_rows, config, quantized)):
            if len(known) < limit // len(tiles) and sum(_family(product, like) == _family(product, config) for like in known) < (
                1 if quantized else 2
            ):
                known.append(config)
        kept += known
    return kept


def most_candidates(product: Product, num_rows: int, quantized: str | None) -> int:
    """How many are worth measuring."""
    if quantized:
        return MAX_QUANTIZED
    return MAX_WIDE if num_rows > SKINNY_ROWS and product.num_out * product.num_in > SMALL_WEIGHT else MAX_CANDIDATES


def _converting_well(product: Product) -> Iterator[Config]:
    """For few rows: every warp its own part of K, so that 8-bit weights reach registers in pieces of eight bytes and none twice."""
    for block_n, block_k, num_stages, num_warps in ((32, 256, 5, 4), (64, 256, 4, 4), (32, 512, 4, 8), (64, 512, 4, 8)):
        num_tiles, num_blocks = product.num_out // block_n, product.num_in // block_k
        split_k = 1 if product.kind == "readout" else max(1, min(4, 264 // num_tiles, num_blocks // 4))
        yield Config(block_n, block_k, split_k, num_stages, num_warps, 16, lanes=num_warps)


def winners(product: Product, quantized: str | None = None) -> list[Config]:
    """Measured best configs of the product in the installed table, those of many rows first."""
    table = tuned_entries(card())
    entries = (table.get(product.key(rows, quantized or "bfloat16")) for rows in (256, 192, 128, 64, 32, 16, 1))
    return [Config(**entry) for entry in entries if entry]


def row_tiles(product: Product, num_rows: int) -> list[tuple[int, int]]:
    """One tile of all rows; for small weights also several: reading the weight again from the L2 cache costs less than idle processors."""
    whole = cover(num_rows)
    is_small = product.num_out * product.num_in <= SMALL_WEIGHT and num_rows > 32
    return [whole, *((rows, 0) for rows in (16, 32, 64) if is_small and rows < num_rows <= 8 * rows)]


def _configs(product: Product, block_t: int, extra_t: int, quantized: str | None = None) -> Iterator[Config]:
    has_norm, rows = product.kind != "linear_add", block_t + extra_t
    if rows > SKINNY_ROWS and not quantized and product.kind != "readout":
        yield from _wide_configs(product, block_t, extra_t)
    turns = (False, True) if quantized or rows > SKINNY_ROWS else (False,)
    for block_n in (16, 32, 64, 128, 256):
        for block_k in (64, 128, 256, 512, 1024):
            for split_k in (1,) if product.kind == "readout" else (1, 2, 3, 4, 6, 8):
                for num_stages in (2, 3, 4, 5, 6):  # 2: no loop, no pipeline
                    for num_warps in (4, 8):
                        for lanes, turned in ((1, False), (num_warps, False), (1, True)):
                            for prenorm in (False, True) if has_norm and rows >= 64 else (False,):
                                if turned in turns:
                                    yield Config(block_n, block_k, split_k, num_stages, num_warps, block_t, extra_t, lanes, prenorm, turned)


def _wide_configs(product: Product, block_t: int, extra_t: int) -> Iterator[Config]:
    """For many rows: two pieces of weight rows, and parts that are left to the norm behind."""
    has_norm = product.kind != "linear_add"
    splits = (1,) if has_norm else (1, 2, 3, 4, 6, 8)
    for block_n, extra_n in ((64, 0), (64, 32), (128, 0), (128, 64), (256, 0)):
        for block_k in (32, 64, 128):
            for split_k in splits:
                for num_stages in (3, 4, 5, 6):
                    for num_warps in (4, 8):
                        for turned in (False, True):
                            if extra_n or split_k > 1:
                                yield Config(
                                    block_n, block_k, split_k, num_stages, num_warps, block_t, extra_t,
                                    prenorm=has_norm, turned=turned, extra_n=extra_n, owes_sum=split_k > 1,
                                )  # fmt: skip


def _family(product: Product, config: Config) -> tuple[Any, ...]:
    is_whole = config.block_k >= product.num_in
    return config.weight_rows, config.split_k, config.lanes > 1, config.prenorm, config.turned, is_whole, config.owes_sum


def is_sensible(product: Product, config: Config, quantized: str | None = None) -> bool:
    """Whether a config could win and fits the machine."""
    blocks = -(-product.num_in // config.block_k)
    # What wgmma can take is no work for lanes, but for 8-bit weights, which reach it through registers in pieces of two bytes.
    widest_lanes = 64 if quantized and config.rows <= 32 else 32
    if config.lanes > 1 and (config.block_n > widest_lanes or config.rows > 64 or config.block_k < 32 * config.lanes):
        return False  # or too little for each warp
    if quantized and not config.turned and config.rows > 64:
        return False
    if config.block_k >= product.num_in:  # no loop: everything passes through registers at once
        in_registers = config.block_k * (config.rows + config.block_n) // (32 * config.num_warps)
        return config.split_k == 1 and config.num_stages == 2 and in_registers <= 192 and config.block_k < 2 * product.num_in
    accumulators = config.weight_rows * config.rows // (32 * config.num_warps)
    return (
        3 <= config.num_stages <= blocks // config.split_k + 1
        and blocks >= 2 * config.split_k
        and config.shared_bytes(1 if quantized else 2) <= SHARED_LIMIT
        and accumulators <= (128 if config.rows < 128 else 192)
        and config.block_n * config.block_k >= 32 * config.num_warps * 8
        and (config.block_n >= 64 or config.rows <= 64)
        and (config.block_n <= 128 or config.rows >= 128)
        # The rows pass through registers to be scaled: at most 64 values a thread.
        and (config.prenorm or product.kind == "linear_add" or config.rows * config.block_k <= 64 * 32 * config.num_warps)
    )


def estimate(product: Product, num_rows: int, config: Config, quantized: str | None = None) -> float:
    """Seconds by a roofline with waves and latency: good enough to drop what cannot win."""
    row_tiles, weight_tiles = config.tiles(num_rows, product.num_out)
    tiles = row_tiles * weight_tiles
    programs = tiles * config.split_k
    looped = config.block_k < product.num_in
    resident = max(1, min(SHARED_LIMIT // (config.shared_bytes(1 if quantized else 2) + 1024) if looped else 2, 16 // config.num_warps, 8))
    waves = programs / (132 * resident)
    efficiency = 1.0 if waves > 8 else min(1.0, programs / 132) if waves <= 1 else waves / -(-waves // 1)
    width = 1 if quantized else 2
    in_flight = min(programs, 132 * resident) * config.weight_rows * config.block_k * width * (config.num_stages - 1.5 if looped else 1)
    weights = product.num_out * product.num_in * width
    reread = (row_tiles - 1) * weights + tiles * config.rows * product.num_in * 2
    partials = (2 * programs * config.weight_rows * config.rows * 4) if config.split_k > 1 else 0
    padded = 2 * max(64, config.block_n) / config.block_n * product.num_out * product.num_in * config.rows * row_tiles
    step = 12e-9 if config.block_n >= 64 else 20e-9  # of a chain of dependent tensor core instructions, 16 columns each
    chain = step * product.num_in / (16 * config.split_k * config.lanes) * max(1.0, waves)
    memory = weights / min(MEMORY, in_flight / LATENCY)
    rounds = -(-product.num_in // (config.block_k * config.split_k))
    latency = LATENCY * (1 + rounds / max(1, config.num_stages - 1) / 4) * max(1.0, waves)
    extra = 1.5e-6 * config.prenorm
    if config.split_k > 1 and not config.owes_sum:  # one program reads all parts of its tile, alone
        extra += 1e-6 + config.split_k * config.block_n * config.rows * 4 / 1e11
    return max(memory, (weights + reread + partials) / L2, padded / TENSOR, chain) / efficiency + latency + extra


def sweep(output: Path, budget: float, num_workers: int, tiny: bool, only: Sequence[str] = (), quantized: Sequence[str] = ()) -> int:
    """Measure until the budget is spent; writes the card's table and sweep.json below `output`. Returns the exit code.

    `only` names what is measured as "model:rows" or "model:rows:product", `quantized` the kinds of 8-bit weights that are measured
    instead of 16-bit ones; the table keeps its other entries.
    """
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    order = (("tiny", 3), ("tiny", 17)) if tiny else QUANTIZED_PRIORITY if quantized else PRIORITY
    card_here = card()
    table = TUNED if card_here is None else TUNED_BY_CARD[card_here]
    groups = [
        (product, rows, kind, candidates(product, rows, 2 if tiny else most_candidates(product, rows, kind), kind))
        for model, rows in order
        for product in products(model)
        for kind in (quantized or (None,))
        if not only or f"{model}:{rows}" in only or f"{model}:{rows}:{product.name}" in only
    ]
    jobs = [Job(product, rows, config, kind) for product, rows, kind, configs in groups for config in configs]
    pool = None if tiny else torch.randn(POOL, device="cuda", dtype=torch.bfloat16).mul_(0.02)
    log: list[dict[str, Any]] = []
    tuned: dict[str, Any] = json.loads(table.read_text()) if only or quantized else {}
    num_done = 0
    with _workers(num_workers) as workers:
        compiled = workers.imap(_compile, jobs, chunksize=2)
        for product, rows, kind, configs in groups:
            if time.perf_counter() - started > budget:
                break
            faults = [next(compiled) for _ in configs]
            inputs = make_inputs(product, rows, "cpu" if tiny else "cuda", torch.bfloat16)
            has_library = product.kind != "readout" and kind is None
            entries = [measure(Job(product, rows, None), inputs, pool)] if has_library else []
            for config, fault in zip(configs, faults, strict=True):
                job = Job(product, rows, config, kind)
                entries.append(_entry(job, error=fault) if fault else measure(job, inputs, pool))
            log += entries
            _keep_best(product, rows, kind, entries, tuned)
            num_done += 1
        workers.terminate()
    (output / table.name).write_text(
        "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(tuned[name])}" for name in sorted(tuned)) + "\n}\n"
    )
    (output / "sweep.json").write_text(json.dumps(log, indent=1) + "\n")
    seconds = time.perf_counter() - started
    print(f"{num_done} of {len(groups)} products, {len(log)} measurements, {sum('error' in e for e in log)} failed, {seconds:.0f} s")
    return 0


def compile_all(jobs: list[Job], num_workers: int) -> None:
    """Compile in parallel what would otherwise be compiled one after the other at its first use."""
    with _workers(num_workers) as workers:
        for fault in filter(None, workers.map(_compile, jobs, chunksize=1)):
            print(f"  did not compile: {fault}", file=sys.stderr)


def _workers(num: int) -> Any:
    """Compile workers; they must not interpret, even if this process does."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        return multiprocessing.get_context("spawn").Pool(num)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def _compile(job: Job) -> str:
    """Compile one candidate into the disk cache. Returns what went wrong, or nothing."""
    assert job.config is not None
    try:
        kernels = compile_for_h100(job.product, job.num_rows, job.config, job.quantized)
    except Exception as error:  # any compiler failure only loses this candidate; it is logged
        return f"{type(error).__name__}: {error}"[:300]
    shared = max(kernel.metadata.shared for kernel in kernels)
    return f"needs {shared} bytes of shared memory" if shared > SHARED_LIMIT else ""


def measure(job: Job, inputs: Inputs, pool: torch.Tensor | None) -> dict[str, Any]:
    """Time one candidate; a failing one becomes a log entry with an error."""
    num_bytes = job.product.num_out * job.product.num_in * (1 if job.quantized else 2)
    weights = rotating_weights(job, pool)
    begin = time.perf_counter()
    try:
        run(job.product, inputs, weights[0], job.config, in_place=True)
        if pool is not None:
            torch.cuda.synchronize()
        first_call = time.perf_counter() - begin  # far above 0.1 s: the compiled kernel was not found in the cache
        seconds = time_calls(
            [lambda weight=weight: run(job.product, inputs, weight, job.config, in_place=True) for weight in weights], pool is not None
        )
    except Exception as error:  # out of resources at launch and the like: this candidate is lost, the sweep goes on
        return _entry(job, error=f"{type(error).__name__}: {error}"[:300])
    return _entry(job, microseconds=seconds * 1e6, terabytes_per_second=num_bytes / seconds / 1e12, first_call_seconds=first_call)


def rotating_weights(job: Job, pool: torch.Tensor | None) -> list[Weight]:
    """So many that they come from memory, cut from the pool; one random one without it."""
    shape = (job.product.num_out, job.product.num_in)
    if pool is None:
        plain = torch.randn(shape, dtype=torch.bfloat16)
        return [quantize(plain, "int8" if job.quantized == "int8" else "float8") if job.quantized else plain]
    # Any bytes are int8 codes; as float8 those of bfloat16 numbers may be no numbers, which take as long.
    codes = pool.view(QUANTIZED[job.quantized]) if job.quantized else pool
    size = shape[0] * shape[1]
    count = max(1, min(codes.numel() // size, int(ROTATION / (size * codes.element_size())) + 1))
    found = [codes[i * size : (i + 1) * size].view(shape) for i in range(count)]
    scale = torch.full((shape[0],), 1e-3, device=pool.device)
    return [QuantizedWeight(weight, scale) for weight in found] if job.quantized else list(found)


def time_calls(calls: list[Callable[[], Any]], on_gpu: bool = True) -> float:
    """Seconds per call of all calls in a row, captured in one CUDA graph; median of five timings."""
    if not on_gpu:
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # libraries allocate their workspace for this stream
        graph.capture_begin()  # not torch.cuda.graph, whose garbage collection takes longer than the measurement
        for call in calls:
            call()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    single = _time_replays(graph, 1)
    num_replays = max(1, min(50, int(2e-3 / single)))
    return statistics.median(_time_replays(graph, num_replays) for _ in range(5)) / len(calls)


def _time_replays(graph: torch.cuda.CUDAGraph, count: int) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(count):
        graph.replay()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e-3 / count


def _entry(job: Job, **figures: Any) -> dict[str, Any]:
    config = None if job.config is None else job.config.to_dict()
    return {
        "product": f"{job.product.model} {job.product.name}",
        "key": job.product.key(job.num_rows, job.quantized or "bfloat16"),
        "config": config,
        **figures,
    }


def _keep_best(product: Product, rows: int, kind: str | None, entries: list[dict[str, Any]], tuned: dict[str, Any]) -> None:
    for entry in entries:
        if "error" in entry:
            print(f"  skipped {entry['key']} {entry['config']}: {entry['error']}", file=sys.stderr)
    measured = [entry for entry in entries if "error" not in entry]
    if not measured:
        return
    best = min(measured, key=lambda entry: entry["microseconds"])
    tuned[product.key(rows, kind or "bfloat16")] = best["config"]
    library = next((entry for entry in measured if entry["config"] is None), None)
    against = f"library {library['microseconds']:8.1f} us" if library else ""
    choice = "library" if best["config"] is None else " ".join(f"{name}={value}" for name, value in best["config"].items() if value)
    reached = f"{best['microseconds']:8.1f} us {best['terabytes_per_second']:5.2f} TB/s"
    print(f"{product.model:13} {product.name:13} {kind or 'bfloat16':8} T={rows:<4} {reached}  {against}  {choice}", flush=True)
