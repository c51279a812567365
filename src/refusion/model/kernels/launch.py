"""How the kernels of this package are started: programmatic dependent launch, overlap, arrival counters, compiling without running.

Every kernel takes a constexpr `PDL`. Where it is set, a kernel may start while the one before it still runs and calls `gdc_wait` in *every*
program before it touches anything an earlier kernel wrote. Since no program gets past its wait before the previous grid is complete, and
that one waited likewise, everything launched earlier is complete too: a chain of such kernels needs no other order.
"""

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from triton import AsyncCompileMode, knobs

NUM_COUNTERS = 16384
"""Arrival counters of a device, one per output tile whose K is split."""

Order = Literal["off", "early", "late"]
"""When the kernel after a product may start: once the product has ended, once all its programs have begun, or once their loops are done."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """When the kernel after a product may start, by measurement; results do not depend on it."""

    small: Order = "late"
    """Weights of a few megabytes: everything is latency, so the next kernel should stand ready."""
    large: Order = "early"
    """Larger ones: a kernel that stands ready early takes room and memory traffic from the one that runs."""
    large_bytes: int = 16_000_000
    """From here on a weight is large."""

    def order(self, num_bytes: int) -> Order:
        """Of a product with a weight of so many bytes."""
        return self.large if num_bytes >= self.large_bytes else self.small


_forced: bool | None = None
_overlap = Overlap()
_compiling = False
_counters: dict[torch.device, Tensor] = {}


def pdl() -> bool:
    """Whether kernels are launched as programmatic dependents: on Hopper and later unless `set_pdl` says otherwise, never interpreted."""
    if interpreted():
        return False
    return _has_pdl() if _forced is None else _forced


def set_pdl(enabled: bool | None) -> None:
    """Switch programmatic dependent launch on or off; None = by device. Graphs captured before keep what they were captured with."""
    global _forced
    _forced = enabled


def overlap() -> Overlap:
    """How launches overlap now."""
    return _overlap


def set_overlap(chosen: Overlap | None) -> None:
    """For measurements; None = the default. Graphs captured before keep what they were captured with."""
    global _overlap
    _overlap = chosen or Overlap()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return knobs.runtime.interpret


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, is_dependent: bool = True, **constants: Any) -> Any:
    """Run `kernel` on `grid` with `PDL` as it is switched, without it unless `is_dependent`.

    `constants` are the constexprs of the kernel and Triton's options.
    """
    if pdl() and is_dependent:
        constants |= {"PDL": True, "launch_pdl": True}
    else:
        constants |= {"PDL": False}
    if _compiling:
        return compiled.append(kernel.warmup(*arguments, grid=grid, **constants))
    return kernel[grid](*arguments, **constants)


compiled: list[Any] = []
"""What `compile_only` compiled, in order."""


@contextmanager
def compile_only() -> Iterator[list[Any]]:
    """Inside, `launch` compiles (into Triton's disk cache) and runs nothing, so the operators may be called with meta tensors."""
    global _compiling
    _compiling = True
    compiled.clear()
    try:
        yield compiled
    finally:
        _compiling = False


@contextmanager
def compile_together() -> Iterator[None]:
    """`compile_only` on all cores at once: when it ends, everything launched inside is compiled and loaded on the current device."""
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        with compile_only() as kernels, AsyncCompileMode(workers):
            yield
        finished = [kernel.result() if hasattr(kernel, "result") else kernel for kernel in kernels]
        device = torch.cuda.current_device()
        list(workers.map(lambda kernel: _load(kernel, device), {id(kernel): kernel for kernel in finished}.values()))


def _load(kernel: Any, device: int) -> None:
    """Build the launcher of a compiled kernel, which takes a C compiler, and bring its code to the device; a thread knows no device."""
    with torch.cuda.device(device):
        assert callable(kernel.run)  # Triton loads when this is first looked at


def counters(device: torch.device) -> Tensor:
    """[NUM_COUNTERS] int32 zeros; whoever counts up resets to zero, so that captured graphs replay.

    All kernels of a device share them: two streams of one device must not run split products at the same time.
    """
    if device not in _counters:
        assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "run once before capturing a graph"
        _counters[device] = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
    return _counters[device]


@functools.cache
def _has_pdl() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
