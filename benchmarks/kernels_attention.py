"""The attention kernels on a GPU: checked against float64, then timed over a small sweep of configurations.

    python benchmarks/kernels_attention.py --output runs/kernels
    python benchmarks/kernels_attention.py --tiny      # every line of it in Triton's interpreter, without a GPU

A time is that of one launch in a replayed CUDA graph whose launches read different K/V, more than the L2 cache holds. Every figure is in
`kernels_attention.json` in the output directory; the lines printed say the best configuration per case, and how the default one does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, whose own functions read it too

import torch
from torch import Tensor

from refusion.model import attention_ops
from refusion.model.kernels import launch, rotary, store
from refusion.model.kernels.attention import Config, Workspace, attend, choose_config, choose_splits, padded_rows
from refusion.model.rows import PROMPT, Rows, Spans, Tiles, plain_tiles
from refusion.model.segments import NO_PARENT, TRUNK

PAGE_SIZE = 128
BYTES_PER_GRAPH = 160e6  # of K/V: three times the L2 cache of an H100
TOLERANCE = 1e-2  # relative, in the Frobenius norm: weights and result are rounded to bfloat16, half a step of which is 2e-3


@dataclass(frozen=True)
class Shape:
    """Heads of a model: H key/value heads, G query heads for each, of D numbers."""

    name: str
    layers: int
    num_kv_heads: int
    num_groups: int
    head_dim: int


@dataclass(frozen=True)
class Case:
    """`seats` requests with `cached` committed tokens, and `rows` decode rows (or prompt rows) each."""

    seats: int
    rows: int
    cached: int
    is_prompt: bool = False

    @property
    def name(self) -> str:
        return f"{self.seats}x{self.rows}{' prompt' if self.is_prompt else ''} rows, {self.cached} cached"

    @property
    def blocks(self) -> tuple[int, ...]:
        """Tile sizes worth trying."""
        if self.rows <= 4:
            return (4,)
        return (16, 32) if self.rows <= 512 else (32,)


@dataclass(frozen=True)
class Figure:
    """One configuration of one case."""

    shape: str
    case: str
    block: int
    config: Config
    pdl: bool
    is_default: bool
    microseconds: float
    terabytes_per_second: float  # of K/V, each byte counted once
    relative_error: float


EIGHT_B = Shape("8B", 36, 8, 4, 128)
SMALL = Shape("135M", 30, 3, 3, 64)
CASES = [
    *(Case(1, rows, cached) for cached in (512, 8192) for rows in (1, 32, 128, 192)),
    Case(32, 1, 512),
    Case(32, 48, 512),
    Case(1, 2048, 0, is_prompt=True),
]
TINY = Shape("tiny", 2, 2, 3, 16), [Case(1, 1, 20), Case(2, 6, 17), Case(1, 20, 0, is_prompt=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="directory for kernels_attention.json")
    parser.add_argument("--budget-seconds", type=float, default=80, help="stop before the next case after so long")
    parser.add_argument("--workers", type=int, default=16, help="processes that compile ahead; 0: compile as needed")
    parser.add_argument("--tiny", action="store_true", help="toy shapes in the interpreter: times mean nothing")
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget_seconds
    work = [(TINY[0], case) for case in TINY[1]] if args.tiny else [(shape, case) for shape in (EIGHT_B, SMALL) for case in CASES]
    if not args.tiny:
        compile_ahead(work, args.workers)
    figures: list[Figure] = []
    others: list[dict[str, Any]] = []
    for shape, case in work:
        if time.monotonic() > deadline:
            print(f"left out for want of time: {shape.name} {case.name}")
            continue
        figures += sweep(shape, case)
    for shape in dict.fromkeys(shape for shape, _ in work):
        others += small_kernels(shape, (1, 5) if args.tiny else (1, 32, 192))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        report = {"device": device_name(), "attend": [asdict(figure) for figure in figures], "others": others}
        (args.output / "kernels_attention.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    wrong = [figure for figure in figures if not figure.relative_error < TOLERANCE]
    if wrong:
        sys.exit("wrong results:\n" + "\n".join(map(str, wrong)))


def sweep(shape: Shape, case: Case) -> list[Figure]:
    """Every configuration of a case, the default among them, then the best one without programmatic dependent launch."""
    batch = Batch(shape, case, device())
    expected = batch.expected()
    figures = []
    for block, config, is_default in configurations(shape, case, batch.num_parts):
        try:
            figures.append(measure(batch, expected, block, config, is_default))
        except Exception as error:  # out of shared memory, say: the sweep goes on
            print(f"skipped {shape.name} {case.name} block {block} {config}: {type(error).__name__}: {str(error).splitlines()[0]}")
    if not figures:
        return []
    for label, figure in (
        ("best", min(figures, key=lambda figure: figure.microseconds)),
        *(("default", f) for f in figures if f.is_default),
    ):
        launch.set_pdl(False)
        alone = measure(batch, expected, figure.block, figure.config, figure.is_default)
        launch.set_pdl(None)
        figures.append(alone)
        config = f"block {figure.block} splits {figure.config.splits} columns {figure.config.columns} warps {figure.config.num_warps}"
        print(
            f"{shape.name:>5} {case.name:<30} {label:<8}{figure.microseconds:7.2f} us ({alone.microseconds:.2f} without PDL) "
            f"{figure.terabytes_per_second:5.2f} TB/s  error {figure.relative_error:.1e}  {config} stages {figure.config.num_stages}",
            flush=True,
        )
    return figures


def configurations(shape: Shape, case: Case, num_parts: int) -> Iterator[tuple[int, Config, bool]]:
    """(tile size, configuration, whether it is the default one)."""
    for block in case.blocks:
        tile_rows = padded_rows(block, shape.num_groups)
        tiles = num_tiles(case, block)
        default = choose_config(tiles, shape.num_kv_heads, tile_rows, shape.head_dim, torch.bfloat16, num_parts)
        yield block, default, True
        seen = {default}
        for columns, num_warps, num_stages in cuts(tile_rows, shape.head_dim):
            most = choose_splits(tiles, shape.num_kv_heads, num_parts)
            for splits in {most, max(1, most // 2), max(1, most // 4)}:
                config = Config(splits, columns, num_warps, num_stages)
                if config not in seen:
                    seen.add(config)
                    yield block, config, False


def cuts(tile_rows: int, head_dim: int) -> list[tuple[int, int, int]]:
    """(columns, num_warps, num_stages) worth trying."""
    if device().type == "cpu":
        return [(16, 4, 2)]
    if tile_rows <= 16:
        return [(64, 4, 2), (64, 4, 4), (128, 4, 2), (128, 8, 2)]
    if tile_rows <= 64:
        return [(64, 4, 2), (128, 4, 2), (128, 8, 2)] if head_dim > 64 else [(64, 4, 2), (64, 4, 4), (128, 8, 2)]
    return [(64, 8, 2), (128, 8, 2)] if head_dim > 64 else [(64, 8, 2), (128, 8, 2), (64, 4, 2)]


class Batch:
    """A forward of a case, with K/V for as many layers as keep the L2 cache cold."""

    def __init__(self, shape: Shape, case: Case, device: torch.device) -> None:
        self.shape, self.case = shape, case
        self.rows, self.spans = rows_of(case, device), spans_of(case, device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
        self.num_parts = 2 * processors
        dtype = torch.bfloat16 if device.type != "cpu" else torch.float32
        num_rows, pool = case.seats * case.rows, int(self.spans.page_table.max() + 1) * PAGE_SIZE
        self.bytes = 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize * case.seats * (case.cached + case.rows)
        self.layers = shape.layers if device.type != "cuda" else min(200, max(shape.layers, int(BYTES_PER_GRAPH / self.bytes)))

        def noise(*size: int) -> Tensor:
            if device.type == "meta":
                return torch.empty(size, dtype=dtype, device=device)
            return torch.randn(*size, dtype=dtype, device=device)

        self.query = noise(num_rows, shape.num_kv_heads * shape.num_groups, shape.head_dim)
        self.new_keys, self.new_values = noise(2, self.layers, num_rows, shape.num_kv_heads, shape.head_dim)
        self.keys, self.values = noise(2, self.layers, pool, shape.num_kv_heads, shape.head_dim)

    def expected(self) -> Tensor:
        """Attention of the first layer in float64."""
        new, pages = (self.new_keys[0].double(), self.new_values[0].double()), (self.keys[0].double(), self.values[0].double())
        return attention_ops.attend(self.query.double(), *new, *pages, self.rows, self.spans)

    def launch(self, layer: int, tiles: Tiles, workspace: Workspace, config: Config) -> Tensor:
        new, pages = (self.new_keys[layer], self.new_values[layer]), (self.keys[layer], self.values[layer])
        return attend(self.query, *new, *pages, self.rows, self.spans, tiles, workspace, config)


def measure(batch: Batch, expected: Tensor, block: int, config: Config, is_default: bool) -> Figure:
    shape, case = batch.shape, batch.case
    tiles = plain_tiles(batch.spans, block, num_tiles(case, block))
    workspace = Workspace(batch.num_parts, padded_rows(block, shape.num_groups), shape.head_dim, batch.query.device)
    found = batch.launch(0, tiles, workspace, config).double()
    error = float((found - expected).norm() / expected.norm())

    def forward() -> None:
        for layer in range(batch.layers):
            batch.launch(layer, tiles, workspace, config)

    seconds = seconds_of(forward) / batch.layers
    pdl = launch.pdl()
    return Figure(shape.name, case.name, block, config, pdl, is_default, 1e6 * seconds, batch.bytes / seconds / 1e12, error)


def small_kernels(shape: Shape, row_counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Times of rotation (with norm) and of the commit."""
    figures = []
    heads, dtype = (shape.num_kv_heads * shape.num_groups, shape.num_kv_heads), torch.bfloat16
    for num_rows in row_counts:
        qkv = torch.randn(num_rows, (heads[0] + 2 * heads[1]) * shape.head_dim, device=device()).to(dtype)
        positions = torch.arange(num_rows, dtype=torch.int32, device=device())
        cos, sin = torch.rand(2, 4096, shape.head_dim // 2, device=device())
        norm = torch.ones(shape.head_dim, dtype=dtype, device=device())
        new = torch.zeros(2, shape.layers, num_rows, heads[1], shape.head_dim, dtype=dtype, device=device())
        pages = torch.zeros(2, shape.layers, 2 * num_rows, heads[1], shape.head_dim, dtype=dtype, device=device())
        source = torch.arange(num_rows, dtype=torch.int32, device=device())
        rotated = (qkv, positions, cos, sin, norm, norm, 1e-6, *heads, shape.head_dim, new[0, 0], new[1, 0])
        stored = (new[0], new[1], pages[0], pages[1], source, 2 * source)
        for name, kernel, arguments, launches in (
            ("rotate_and_store", rotary.rotate_and_store, rotated, shape.layers),
            ("store_rows", store.store_rows, stored, 1),
        ):
            work = partial(repeat, kernel, arguments, launches)
            seconds = seconds_of(work) / launches
            figures.append({"shape": shape.name, "kernel": name, "rows": num_rows, "microseconds": 1e6 * seconds})
            print(f"{shape.name:>5} {name} {num_rows} rows {1e6 * seconds:.2f} us", flush=True)
    return figures


def repeat(kernel: Callable[..., Any], arguments: tuple[Any, ...], times: int) -> None:
    for _ in range(times):
        kernel(*arguments)


def seconds_of(work: Callable[[], Any]) -> float:
    """Median seconds of `work` in a replayed CUDA graph; without a GPU, of one run."""
    if device().type == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # compile, allocate
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def rows_of(case: Case, device: torch.device) -> Rows:
    """A prompt; or half drafts, half masks behind all drafts, as a fused round has them."""
    rank = torch.arange(case.rows).repeat(case.seats)
    seat = torch.arange(case.seats).repeat_interleave(case.rows)
    drafts = -(-case.rows // 2)
    is_draft = rank < drafts
    segment = torch.full_like(rank, PROMPT) if case.is_prompt else (~is_draft).long()
    parent = torch.where(is_draft | torch.tensor(case.is_prompt), NO_PARENT, TRUNK)
    columns = (rank, rank, seat, segment, rank, parent, torch.zeros_like(rank), is_draft)
    return Rows(*(column.int().to(device) for column in columns))


def spans_of(case: Case, device: torch.device) -> Spans:
    """Every seat's pages in an order of their own."""
    pages = -(-max(case.cached, 1) // PAGE_SIZE)
    table = torch.randperm(case.seats * pages, generator=torch.Generator().manual_seed(0)).view(case.seats, pages)
    start = (torch.arange(case.seats) * case.rows).int().to(device)
    none = torch.zeros_like(start)
    prompt, decode = (start, start + case.rows), (none, none)
    if not case.is_prompt:
        prompt, decode = decode, prompt
    return Spans(torch.full_like(start, case.cached), *prompt, *decode, page_table=table.int().to(device), page_size=PAGE_SIZE)


def num_tiles(case: Case, block: int) -> int:
    return case.seats * -(-case.rows // block)


def compile_ahead(work: list[tuple[Shape, Case]], workers: int) -> None:
    """Compile what the sweep will launch into Triton's disk cache, side by side: one at a time takes longer than all the measuring."""
    if not workers:
        return
    variants: dict[tuple[Shape, int, Config, bool], None] = {}
    for shape, case in work:
        for block, config, _ in configurations(shape, case, 2 * torch.cuda.get_device_properties(0).multi_processor_count):
            cut = replace(config, splits=1)  # splits are no constant of the kernel
            variants |= {(shape, block, cut, pdl): None for pdl in {launch.pdl(), False}}
    start = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = [error for error in pool.map(compile_variant, variants) if error]
    print(f"compiled {len(variants)} variants in {time.monotonic() - start:.0f} s; {len(failed)} failed", *failed[:3], sep="\n", flush=True)


def compile_variant(variant: tuple[Shape, int, Config, bool]) -> str:
    """Compile one variant without running it; an error comes back as text, for the sweep will meet it again."""
    shape, block, config, pdl = variant
    launch.set_pdl(pdl)
    meta = torch.device("meta")
    try:
        batch = Batch.__new__(Batch)
        batch.shape, batch.case = shape, Case(1, block, 1)
        batch.rows, batch.spans = rows_of(batch.case, meta), spans_of(batch.case, meta)
        size = (2, 1, 2 * PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
        batch.query = torch.empty(block, shape.num_kv_heads * shape.num_groups, shape.head_dim, dtype=torch.bfloat16, device=meta)
        (batch.new_keys, batch.new_values), (batch.keys, batch.values) = torch.empty((2, *size), dtype=torch.bfloat16, device=meta)
        index = torch.empty(1, dtype=torch.int32, device=meta)
        tiles = Tiles(index, index, index, block)
        workspace = Workspace(shape.num_kv_heads, padded_rows(block, shape.num_groups), shape.head_dim, meta)
        with launch.compile_only():
            batch.launch(0, tiles, workspace, config)
    except Exception as error:
        return f"{shape.name} block {block} {config}: {type(error).__name__}: {error}"
    return ""


def device() -> torch.device:
    return torch.device("cpu" if "--tiny" in sys.argv else "cuda")


def device_name() -> str:
    return "interpreter" if device().type == "cpu" else torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
