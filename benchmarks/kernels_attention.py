"""The attention kernels on a GPU: checked against float64, then timed over a small sweep of configurations.

    python benchmarks/kernels_attention.py --output runs/kernels
    python benchmarks/kernels_attention.py --tiny      # every line of it in Triton's interpreter, without a GPU

A time is that of one launch in a replayed CUDA graph whose launches read different K/V, more than the L2 cache holds. Every figure is in
`kernels_attention.json` in the output directory; the lines printed say per case the best configuration, how the default one does, and
what the default one gains or loses by each of its options. `--compare` names the JSON file of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, whose own functions read it too

import torch
from torch import Tensor

from refusion.engine.shapes import LONG_CONTEXT
from refusion.model import attention_ops
from refusion.model.kernels import launch, rotary, store
from refusion.model.kernels.attention import Workspace, attend
from refusion.model.kernels.attention_config import MAX_SPLITS, Config, choose_config, padded_rows
from refusion.model.rows import PROMPT, Rows, Spans, Tiles, plain_tiles
from refusion.model.segments import NO_PARENT, TRUNK

PAGE_SIZE = 128
SMALL_PAGE_SIZE = 16
BYTES_PER_GRAPH = 160e6  # of K/V: three times the L2 cache of an H100
LONG_PARTS = 4  # times as many parts as the engine has room for
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
        """Tile sizes worth trying; the options are tried on the first."""
        if self.rows <= 4:
            return (4,)
        if self.rows > 512:
            return (32,)
        if self.cached > 2048:
            return (16, 32) if self.rows < 128 else (32, 16)
        return (8, 4, 16) if self.rows < 128 else (16, 8, 32)


@dataclass(frozen=True)
class Variant:
    """One way to attend."""

    block: int
    config: Config
    pdl: bool = True
    in_place: bool = True
    page_size: int = PAGE_SIZE

    def __str__(self) -> str:
        config = self.config
        return (
            f"block {self.block} splits {config.splits} columns {config.columns}+{config.new_columns} "
            f"warps {config.num_warps} stages {config.num_stages}{' long' if config.is_long else ''}"
        )


@dataclass(frozen=True)
class Figure:
    """One variant of one case."""

    shape: str
    case: str
    label: str  # default, an option of it, or nothing
    variant: Variant
    microseconds: float
    terabytes_per_second: float  # of K/V, each byte counted once
    relative_error: float


EIGHT_B = Shape("8B", 36, 8, 4, 128)
SMALL = Shape("135M", 30, 3, 3, 64)
CASES = [
    *(Case(1, rows, cached) for cached in (512, 8192) for rows in (1, 32, 128, 192)),
    *(Case(1, 64, cached) for cached in (512, 8192)),
    Case(32, 1, 512),
    Case(32, 48, 512),
    Case(1, 2048, 0, is_prompt=True),
]
TINY = Shape("tiny", 2, 2, 3, 16), [Case(1, 1, 20), Case(2, 6, 17), Case(1, 20, 0, is_prompt=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="directory for kernels_attention.json")
    parser.add_argument("--compare", type=Path, default=None, help="kernels_attention.json of an earlier run")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cases, as '8B 1x192*'")
    parser.add_argument("--budget-seconds", type=float, default=70, help="stop before the next case after so long")
    parser.add_argument("--workers", type=int, default=16, help="processes that compile ahead; 0: compile as needed")
    parser.add_argument("--tiny", action="store_true", help="toy shapes in the interpreter: times mean nothing")
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget_seconds
    work = [(TINY[0], case) for case in TINY[1]] if args.tiny else [(shape, case) for case in CASES for shape in (EIGHT_B, SMALL)]
    work = [(shape, case) for shape, case in work if any(fnmatchcase(f"{shape.name} {case.name}", pattern) for pattern in args.only)]
    shapes = list(dict.fromkeys(shape for shape, _ in work))
    if not args.tiny:
        compile_ahead(work, args.workers)
    before = earlier(args.compare)
    others: list[dict[str, Any]] = []
    for shape in shapes:
        others += small_kernels(shape, (1, 5) if args.tiny else (1, 32, 192))
    figures: list[Figure] = []
    for shape, case in work:
        if time.monotonic() > deadline:
            print(f"left out for want of time: {shape.name} {case.name}")
            continue
        figures += sweep(shape, case, before.get((shape.name, case.name)))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        report = {"device": device_name(), "attend": [asdict(figure) for figure in figures], "others": others}
        (args.output / "kernels_attention.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    wrong = [figure for figure in figures if not figure.relative_error < TOLERANCE]
    if wrong:
        sys.exit("wrong results:\n" + "\n".join(map(str, wrong)))


def earlier(path: Path | None) -> dict[tuple[str, str], float]:
    """(shape, case) -> best microseconds of an earlier run."""
    best: dict[tuple[str, str], float] = {}
    for figure in json.loads(path.read_text(encoding="utf-8"))["attend"] if path else []:
        key = figure["shape"], figure["case"]
        best[key] = min(best.get(key, math.inf), figure["microseconds"])
    return best


def sweep(shape: Shape, case: Case, before: float | None) -> list[Figure]:
    """Every variant of a case, and a few lines about them."""
    batch = Batch(shape, case, device())
    figures: list[Figure] = []
    for label, variant in variants_of(shape, case, batch.num_parts):
        try:
            figures.append(measure(batch, label, variant))
        except Exception as error:  # out of shared memory, say: the sweep goes on
            print(f"skipped {shape.name} {case.name} {variant}: {type(error).__name__}: {str(error).splitlines()[0]}")
    if not figures:
        return []
    best = min(figures, key=lambda figure: figure.microseconds)
    defaults = [figure for figure in figures if figure.label == "default"]
    earlier_best = "" if before is None else f" (earlier {before:.2f})"
    name = f"{shape.name:>5} {case.name:<26}"
    print(f"{name} best    {best.microseconds:7.2f} us{earlier_best} {best.terabytes_per_second:5.2f} TB/s  {best.label} {best.variant}")
    for figure in defaults:
        print(f"{name} default {figure.microseconds:7.2f} us  error {figure.relative_error:.1e}  {figure.variant}")
    options = [figure for figure in figures if figure.label not in ("", "default")]
    if options and defaults:
        print(f"{name} default with", *(f"{f.label} {f.microseconds - defaults[0].microseconds:+.2f}," for f in options))
    for block in case.blocks:
        times = [
            f"{f.microseconds:.1f}={cut_of(f.variant.config)}" for f in figures if f.variant.block == block and f.label in ("", "default")
        ]
        print(f"{name} block {block}:", *times, flush=True)
    return figures


def cut_of(config: Config) -> str:
    return f"{config.splits}s{config.columns}c{config.num_warps}w{config.num_stages}{'long' if config.is_long else ''}"


def variants_of(shape: Shape, case: Case, num_parts: int) -> Iterator[tuple[str, Variant]]:
    """(label, variant): the default per tile size, the options of the first of them, other cuts."""
    for block in case.blocks:
        tile_rows = padded_rows(block, shape.num_groups)
        tiles = num_tiles(case, block)
        is_long = case.cached > LONG_CONTEXT and case.rows > 1
        default = choose_config(tiles, shape.num_kv_heads, tile_rows, shape.head_dim, torch.bfloat16, num_parts, is_long)
        yield "default", Variant(block, default)
        if block == case.blocks[0] and (case in OPTIONS_OF.get(shape.name, ()) or device().type == "cpu"):
            for label, changes in OPTIONS.items():
                yield label, Variant(block, replace(default, **changes))
            yield "without PDL", Variant(block, default, pdl=False)
            yield "clearing", Variant(block, default, in_place=False)
            yield f"pages of {SMALL_PAGE_SIZE}", Variant(block, default, page_size=SMALL_PAGE_SIZE)
        seen = {default}
        for columns, num_warps, num_stages in cuts(tile_rows, shape.head_dim):
            for splits, is_long in splits_of(tiles * shape.num_kv_heads, num_parts):
                config = Config(splits, columns, default.new_columns, num_warps, num_stages, is_long=is_long)
                if config not in seen:
                    seen.add(config)
                    yield "", Variant(block, config)


def splits_of(num_owners: int, num_parts: int) -> Iterator[tuple[int, bool]]:
    """(splits, is_long) worth trying for so many tiles and heads: up to two programs a multiprocessor, eight of those that are long."""
    most = max(1, min(MAX_SPLITS, num_parts // num_owners))
    yield from ((splits, False) for splits in dict.fromkeys((most, max(1, most // 2), max(1, most // 4))))
    more = (min(MAX_SPLITS, num_parts * times // (2 * num_owners)) for times in (1, 2, 4, 2 * LONG_PARTS))
    yield from ((splits, True) for splits in dict.fromkeys(more) if splits > 1)


OPTIONS: dict[str, dict[str, Any]] = {
    "not eager": {"is_eager": False},
    "late": {"is_late": True},
    "long": {"is_long": True},
}
OPTIONS_OF = {
    EIGHT_B.name: (Case(1, 1, 512), Case(1, 32, 512), Case(1, 192, 512), Case(1, 192, 8192)),
    SMALL.name: (Case(1, 1, 512), Case(1, 32, 512)),
}
"""Where the options are tried: every one of them is a kernel to compile."""


def cuts(tile_rows: int, head_dim: int) -> list[tuple[int, int, int]]:
    """(columns, num_warps, num_stages) worth trying."""
    if device().type == "cpu":
        return [(16, 4, 2)]
    if tile_rows <= 16:
        more = [(64, 4, 3), (64, 4, 4), (64, 8, 4), (128, 8, 3)] if head_dim > 64 else [(64, 4, 3)]
        return [(64, 4, 2), (128, 4, 2), (128, 8, 2), *more]
    if tile_rows <= 64:
        return [(128, 4, 2), (64, 4, 3), (64, 4, 4), (32, 4, 4), (32, 4, 6)] if head_dim > 64 else [(64, 4, 2), (128, 4, 2), (64, 4, 3)]
    return [(64, 8, 2), (64, 8, 3), (128, 8, 2), (128, 8, 3), (64, 4, 3)] if head_dim > 64 else [(64, 8, 2), (64, 8, 3)]


class Batch:
    """A forward of a case, with K/V for as many layers as keep the L2 cache cold."""

    def __init__(self, shape: Shape, case: Case, device: torch.device, layers: int | None = None) -> None:
        self.shape, self.case = shape, case
        self.rows = rows_of(case, device)
        self.spans = {size: spans_of(case, device, size) for size in (PAGE_SIZE, SMALL_PAGE_SIZE)}
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
        self.num_parts = 2 * processors
        dtype = torch.bfloat16 if device.type != "cpu" else torch.float32
        num_rows = case.seats * case.rows
        pool = case.seats * -(-max(case.cached, 1) // PAGE_SIZE) * PAGE_SIZE
        self.bytes = 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize * case.seats * (case.cached + case.rows)
        cold = shape.layers if device.type != "cuda" else min(200, max(shape.layers, int(BYTES_PER_GRAPH / self.bytes)))
        self.layers = layers or cold
        self._expected: dict[int, Tensor] = {}

        def noise(*size: int) -> Tensor:
            return (
                torch.empty(size, dtype=dtype, device=device) if device.type == "meta" else torch.randn(*size, dtype=dtype, device=device)
            )

        self.query = noise(num_rows, shape.num_kv_heads * shape.num_groups, shape.head_dim)
        self.new_keys, self.new_values = noise(2, self.layers, num_rows, shape.num_kv_heads, shape.head_dim)
        self.keys, self.values = noise(2, self.layers, pool, shape.num_kv_heads, shape.head_dim)

    def expected(self, page_size: int) -> Tensor:
        """Attention of the first layer in float64."""
        if page_size not in self._expected:
            new, pages = (self.new_keys[0].double(), self.new_values[0].double()), (self.keys[0].double(), self.values[0].double())
            self._expected[page_size] = attention_ops.attend(self.query.double(), *new, *pages, self.rows, self.spans[page_size])
        return self._expected[page_size]

    def launch(self, query: Tensor, layer: int, tiles: Tiles, workspace: Workspace, variant: Variant) -> Tensor:
        new, pages = (self.new_keys[layer], self.new_values[layer]), (self.keys[layer], self.values[layer])
        spans = self.spans[variant.page_size]
        return attend(query, *new, *pages, self.rows, spans, tiles, workspace, variant.config, in_place=variant.in_place)

    def tiles(self, block: int) -> Tiles:
        return plain_tiles(self.spans[PAGE_SIZE], block, num_tiles(self.case, block))

    def workspace(self, block: int) -> Workspace:
        return Workspace(LONG_PARTS * self.num_parts, padded_rows(block, self.shape.num_groups), self.shape.head_dim, self.query.device)


def measure(batch: Batch, label: str, variant: Variant) -> Figure:
    tiles, workspace = batch.tiles(variant.block), batch.workspace(variant.block)
    query = batch.query.clone()
    launch.set_pdl(None if variant.pdl else False)
    try:
        found = batch.launch(query, 0, tiles, workspace, variant).double()
        expected = batch.expected(variant.page_size)
        error = float((found - expected).norm() / expected.norm())

        def forward() -> None:
            for layer in range(batch.layers):
                batch.launch(query, layer, tiles, workspace, variant)

        seconds = seconds_of(forward) / batch.layers
    finally:
        launch.set_pdl(None)
    return Figure(batch.shape.name, batch.case.name, label, variant, 1e6 * seconds, batch.bytes / seconds / 1e12, error)


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
            ("store_rows", store.store_rows, stored, 20),
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


def spans_of(case: Case, device: torch.device, page_size: int) -> Spans:
    """Every seat's pages in an order of their own."""
    pages = -(-max(case.cached, 1) // page_size)
    table = torch.randperm(case.seats * pages, generator=torch.Generator().manual_seed(0)).view(case.seats, pages)
    start = (torch.arange(case.seats) * case.rows).int().to(device)
    none = torch.zeros_like(start)
    prompt, decode = (start, start + case.rows), (none, none)
    if not case.is_prompt:
        prompt, decode = decode, prompt
    return Spans(torch.full_like(start, case.cached), *prompt, *decode, page_table=table.int().to(device), page_size=page_size)


def num_tiles(case: Case, block: int) -> int:
    return case.seats * -(-case.rows // block)


def compile_ahead(work: list[tuple[Shape, Case]], workers: int) -> None:
    """Compile what will be launched into Triton's disk cache, side by side: one at a time takes longer than all the measuring."""
    if not workers:
        return
    jobs: dict[tuple[Shape, Variant], None] = {}
    num_parts = 2 * torch.cuda.get_device_properties(0).multi_processor_count
    for shape, case in work:
        for _, variant in variants_of(shape, case, num_parts):
            jobs[shape, unsplit(variant)] = None
    start = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = [error for error in pool.map(compile_job, jobs) if error]
    print(f"compiled {len(jobs)} variants in {time.monotonic() - start:.0f} s; {len(failed)} failed", *failed[:3], sep="\n", flush=True)


def unsplit(variant: Variant) -> Variant:
    """What needs to be compiled: but for there being several, splits are no constant of the kernels."""
    return replace(variant, config=replace(variant.config, splits=min(variant.config.splits, 2)))


def compile_job(job: tuple[Shape, Variant]) -> str:
    """Compile one variant without running it; an error comes back as text, for the sweep will meet it again."""
    shape, variant = job
    launch.set_pdl(None if variant.pdl else False)
    meta = torch.device("meta")
    index = torch.empty(1, dtype=torch.int32, device=meta)
    try:
        batch = Batch(shape, Case(1, variant.block, 512), meta, layers=1)
        tiles, workspace = Tiles(index, index, index, variant.block), batch.workspace(variant.block)
        with launch.compile_only():
            batch.launch(batch.query, 0, tiles, workspace, variant)
    except Exception as error:
        return f"{shape.name} {variant}: {type(error).__name__}: {error}"
    return ""


def device() -> torch.device:
    return torch.device("cpu" if "--tiny" in sys.argv else "cuda")


def device_name() -> str:
    return "interpreter" if device().type == "cpu" else torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
