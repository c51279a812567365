"""Other ways to run the static forward: when the next kernel may start, and how attention is cut.

`forward.py --variants overlap` or `--variants attention` runs this; kernels of all variants are compiled first, in parallel processes. A
variant changes no result but its roundings.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from kernels_linear_products import compiling_for_h100

from refusion.engine.ops import LARGEST_TILE
from refusion.model.kernels import attention, launch
from refusion.model.kernels.attention_config import Changes, padded_rows, set_changes
from refusion.model.kernels.launch import Overlap

H100_PROCESSORS = 132
KINDS = ("overlap", "attention")


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run a forward."""

    label: str
    use_pdl: bool = True
    overlap: Overlap | None = None
    joined_rows: int | None = None
    """Up to so many rows attention turns queries and keys itself, in tiles of any size; None: what the operations choose."""
    tile_rows: int | None = None
    """Rows of a query tile, of forwards with several rows; None: what the engine takes."""
    changes: Changes = field(default_factory=dict)
    """Of the attention's config."""

    @contextmanager
    def applied(self, bench: Any) -> Iterator[None]:
        """Inside, forwards of a `forward.Bench` are launched (and captured) this way."""
        launch.set_pdl(self.use_pdl)
        launch.set_overlap(self.overlap)
        set_changes(self.changes)
        ops = bench.network.ops
        before = ops.joined_rows, ops.joined_tile
        if self.joined_rows is not None:
            ops.joined_rows, ops.joined_tile = self.joined_rows, LARGEST_TILE
        bench.tile_rows = self.tile_rows
        try:
            yield
        finally:
            launch.set_pdl(None)
            launch.set_overlap(None)
            set_changes({})
            (ops.joined_rows, ops.joined_tile), bench.tile_rows = before, None


def variants(kind: str | None) -> list[Variant]:
    """The default first, alone if no kind is named. large-off = only products of small weights, and what is no product, overlap."""
    if kind is None:
        return [Variant("default")]
    if kind == "overlap":
        return [
            Variant("default"),
            Variant("off", use_pdl=False),
            Variant("early", overlap=Overlap(small="early", large="early")),
            Variant("late", overlap=Overlap(small="late", large="late")),
            Variant("large-off", overlap=Overlap(small="early", large="off")),
        ]
    cuts = [(4, 128, 4, 2), *((rows, columns, 4, stages) for rows in (8, 16) for columns, stages in ((128, 2), (64, 3)))]
    cuts += [(32, 128, 8, 3), (32, 64, 8, 3)]
    return [
        Variant("default"),
        *(
            Variant(
                f"tiles of {rows}, {columns} columns, {warps} warps, {stages} stages, {programs} programs{', whole' if whole else ''}",
                tile_rows=rows,
                changes={"columns": columns, "num_warps": warps, "num_stages": stages, "num_programs": programs, "is_long": whole},
            )
            for rows, columns, warps, stages in cuts
            for programs in (1, 2)
            for whole in (False, True)
        ),
        *(Variant(f"tiles of {rows}, rotation apart", joined_rows=0, tile_rows=rows) for rows in (4, 8, 16)),
        *(Variant(f"tiles of {rows}, rotation joined", joined_rows=512, tile_rows=rows) for rows in (8, 16)),
    ]


def compare(kind: str, bench: Any, widths: Sequence[int], milliseconds: Callable[[int], list[float]]) -> dict[str, dict[int, float]]:
    """Median milliseconds by variant and width, printed as a table on the way."""
    table: dict[str, dict[int, float]] = {}
    print(f"{'':64}" + "".join(f"{f'T={width}':>9}" for width in widths), flush=True)
    for variant in variants(kind):
        figures = table[variant.label] = {}
        for width in widths:
            try:
                with variant.applied(bench):
                    figures[width] = statistics.median(milliseconds(width))
            except Exception as error:  # out of resources and the like: this figure is lost, the others are not
                print(f"{variant.label}, T = {width}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
        cells = (f"{figures[width]:9.3f}" if width in figures else f"{'-':>9}" for width in widths)
        print(f"{variant.label:64}" + "".join(cells), flush=True)
    return table


def compile_all(kind: str | None, cases: dict[str, Any], quantization: str | None, num_workers: int | None = None) -> None:
    """Compile what the variants launch into Triton's disk cache; what fails here is compiled, or fails, at its first use."""
    jobs = [
        (name, width, case.cached[0], variant, quantization)
        for name, case in cases.items()
        for width in case.widths
        for variant in variants(kind)
        if variant.label != "large-off"  # which mixes kernels of the others
    ]
    started = time.perf_counter()
    os.environ.setdefault("REFUSION_CARD", torch.cuda.get_device_name())  # the workers must not ask
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), num_workers or os.cpu_count() or 1)) as workers:
        faults = list(filter(None, workers.imap_unordered(_compile, jobs, chunksize=1)))
    for fault in sorted(set(faults)):
        print(f"  not compiled ahead: {fault}", file=sys.stderr)
    print(f"compiled {len(jobs)} forwards in {time.perf_counter() - started:.0f} s, {len(faults)} failed", file=sys.stderr, flush=True)


def _compile(job: tuple[str, int, int, Variant, Any]) -> str:
    """Walk through one forward on the meta device, compiling its kernels for an H100. Returns what went wrong, or nothing."""
    import forward

    from refusion.engine.network import FlatNetwork
    from refusion.engine.ops import TritonOps

    shape, width, cached, variant, quantization = job
    meta = torch.device("meta")
    try:
        attention.Workspace.for_device = _workspace  # there is no device to ask
        bench = forward.Bench(forward.random_model(forward.CASES[shape].config, meta, torch.bfloat16), cached, quantization)
        bench.network = FlatNetwork(bench.model, TritonOps(bench.config, meta, quantization))
        with compiling_for_h100(variant.use_pdl), variant.applied(bench):
            forward.static_forward(bench, width)()
    except Exception as error:  # only costs time
        return f"{variant.label}, T = {width}: {type(error).__name__}: {error}"[:300]
    return ""


def _workspace(block: int, num_groups: int, head_dim: int, device: torch.device) -> attention.Workspace:
    return attention.Workspace(2 * H100_PROCESSORS, padded_rows(block, num_groups), head_dim, device)
