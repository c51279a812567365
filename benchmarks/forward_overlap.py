"""Which overlap of kernels helps the whole static forward: when the next kernel may start.

`forward.py --variants` runs this; kernels of all variants are compiled first, in parallel processes.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from kernels_linear_products import compiling_for_h100

from refusion.model.kernels import attention, launch
from refusion.model.kernels.attention_config import padded_rows
from refusion.model.kernels.launch import Overlap

H100_PROCESSORS = 132


@dataclass(frozen=True, slots=True)
class Variant:
    """How the kernels of a forward overlap."""

    label: str
    use_pdl: bool
    overlap: Overlap

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, forwards are launched (and captured) this way."""
        launch.set_pdl(self.use_pdl)
        launch.set_overlap(self.overlap)
        try:
            yield
        finally:
            launch.set_pdl(None)
            launch.set_overlap(None)


def variants() -> list[Variant]:
    """The default and every order; large-off = only products of small weights, and what is no product, overlap."""
    return [
        Variant("default", True, Overlap()),
        Variant("off", False, Overlap()),
        Variant("early", True, Overlap(small="early", large="early")),
        Variant("late", True, Overlap(small="late", large="late")),
        Variant("large-off", True, Overlap(small="early", large="off")),
    ]


def compare(widths: Sequence[int], milliseconds: Callable[[int], list[float]]) -> dict[str, dict[int, float]]:
    """Median milliseconds by variant and width, printed as a table on the way."""
    table: dict[str, dict[int, float]] = {}
    print(f"{'':24}" + "".join(f"{f'T={width}':>9}" for width in widths), flush=True)
    for variant in variants():
        table[variant.label] = {}
        for width in widths:
            try:
                with variant.applied():
                    table[variant.label][width] = statistics.median(milliseconds(width))
            except Exception as error:  # out of resources and the like: this figure is lost, the others are not
                print(f"{variant.label}, T = {width}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
        figures = table[variant.label]
        print(
            f"{variant.label:24}" + "".join(f"{figures[width]:9.3f}" if width in figures else f"{'-':>9}" for width in widths), flush=True
        )
    return table


def compile_all(cases: dict[str, Any], quantization: str | None, num_workers: int | None = None) -> None:
    """Compile what the variants launch into Triton's disk cache; what fails here is compiled, or fails, at its first use."""
    distinct = [variant for variant in variants() if variant.label in ("off", "early", "late")]  # the others mix kernels of these
    shapes = [(name, width, case.cached[0]) for name, case in cases.items() for width in case.widths]
    jobs = [(*shape, variant, quantization) for shape in shapes for variant in distinct]
    started = time.perf_counter()
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
        with compiling_for_h100(variant.use_pdl), variant.applied():
            forward.static_forward(bench, width)()
    except Exception as error:  # only costs time
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def _workspace(block: int, num_groups: int, head_dim: int, device: torch.device) -> attention.Workspace:
    return attention.Workspace(2 * H100_PROCESSORS, padded_rows(block, num_groups), head_dim, device)
