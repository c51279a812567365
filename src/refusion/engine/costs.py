"""What a forward costs by its number of rows, measured on the machine at hand.

A decoder may prepare the next drafts for several accepted lengths in the same forward: more rows, fewer forwards, the same tokens. How
many pay, and which decoder does, depends on where the cost of a forward stops being flat, so it is measured and not guessed.
"""

import hashlib
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from refusion import __version__, hub
from refusion import model as model_package
from refusion.atomic import atomic_file
from refusion.engine.network import FlatNetwork, KeyValues
from refusion.engine.shapes import LONE_TILE_ROWS, tile_rows, wide_groups
from refusion.model.rows import Rows, Spans, Tiles

_log = logging.getLogger(__name__)

CPU_WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
GPU_WIDTHS = (1, 16, 32, 64, 128, 192, 256, 512, 1024, 2048, 4096)
NUM_CACHED = 256
WARM_UP = 2
"""Forwards of each width before it is timed."""
CALM = 1.25
"""A median this far above the least says that others use the machine."""
MOST_SECONDS = 20.0
"""After so long no further turn is begun on a CPU; whatever takes so long is disturbed."""


TYPICAL_WIDTHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
WITH_AMX = tuple(ms / 1000 for ms in (49.77, 52.30, 52.30, 54.24, 54.24, 73.93, 73.93, 86.15, 86.15, 119.27, 128.07))
"""Seconds of the 135M model's forwards in bfloat16 on two cores of a processor that multiplies tiles (results/cpu.json)."""
WITHOUT_AMX = tuple(ms / 1000 for ms in (12.65, 13.41, 14.47, 17.22, 21.54, 26.82, 31.07, 45.08, 52.64, 70.38, 93.70))
"""The same of one that multiplies vectors (results/cpu-without-amx.json): a row costs four times as much of a forward."""


@dataclass(frozen=True, slots=True)
class CostTable:
    """Seconds of a forward by its number of rows, at growing widths."""

    widths: tuple[int, ...]
    seconds: tuple[float, ...]
    unrest: float = 1.0
    """How far repeats of the same forward were apart: the median over the least, of the median width."""

    def cost(self, num_rows: "float | np.ndarray") -> "float | np.ndarray":
        """Seconds of a forward of `num_rows`, linear between the measured widths and beyond the last."""
        last = self.seconds[-1] + (np.asarray(num_rows) - self.widths[-1]) * self._slope()
        return np.where(np.asarray(num_rows) > self.widths[-1], last, np.interp(num_rows, self.widths, self.seconds))

    def _slope(self) -> float:
        return (self.seconds[-1] - self.seconds[-2]) / (self.widths[-1] - self.widths[-2])


def measured_costs(network: FlatNetwork) -> CostTable:
    """The cost table of this network on this machine; measured once (seconds), then read from the cache directory.

    What was measured while others used the machine serves this process alone: costs that come from waiting for them are flat, and with
    flat costs everything that saves forwards seems to pay.
    """
    name = _fingerprint(network)
    path = hub.cache_dir() / "costs" / f"{name}.json"
    if (known := _read(path) or _of_this_process.get(name)) is not None:
        return known
    table = measure(network, GPU_WIDTHS if network.device.type == "cuda" else CPU_WIDTHS)
    if table.unrest > CALM:
        _log.warning("refusion: this machine is busy, so what forwards cost is uncertain; it is measured again at the next start")
        _of_this_process[name] = table
        return table
    with atomic_file(path) as draft:
        draft.write_text(json.dumps(asdict(table)), encoding="utf-8")
    return table


def typical_costs(network: FlatNetwork) -> CostTable:
    """What forwards cost on CPUs of this kind: nothing is measured, so nobody waits, and the same command does the same again.

    Only how much dearer a forward becomes with its rows decides anything, and that hangs on the processor more than on the model.
    """
    has_tiles = network.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return CostTable(TYPICAL_WIDTHS, WITH_AMX if has_tiles else WITHOUT_AMX)


_of_this_process: dict[str, CostTable] = {}
"""By fingerprint, what is not good enough to keep."""


def _read(path: Path) -> CostTable | None:
    """A stored table; None if there is none that can be read."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        table = CostTable(tuple(map(int, stored["widths"])), tuple(map(float, stored["seconds"])), float(stored["unrest"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return table if len(table.widths) == len(table.seconds) > 1 else None


def measure(network: FlatNetwork, widths: Sequence[int], repeats: int = 5) -> CostTable:
    """Least seconds of a forward with its readout, one request with NUM_CACHED tokens in the cache: what disturbs only adds."""
    if network.device.type == "cuda":
        _compile(network, widths)
        seconds = [_seconds(_captured(_forward_of(network, width)), network.device, WARM_UP + repeats)[WARM_UP:] for width in widths]
    else:  # all widths in turn, so that a slow second of the machine hits none of them alone
        forwards = [_forward_of(network, width) for width in widths]
        began, turns = time.perf_counter(), list[list[float]]()
        while len(turns) < WARM_UP + repeats and (len(turns) <= WARM_UP or time.perf_counter() - began < MOST_SECONDS):
            turns.append([_seconds(forward, network.device, 1)[0] for forward in forwards])
        seconds = [list(taken) for taken in zip(*turns[WARM_UP:], strict=True)]
    monotone = np.maximum.accumulate([min(taken) for taken in seconds])  # noise must not make a wider forward cheaper
    unrest = statistics.median(statistics.median(taken) / min(taken) for taken in seconds)
    if len(seconds[0]) < repeats:
        unrest = math.inf  # too few to tell
    return CostTable(tuple(widths), tuple(float(value) for value in monotone), unrest)


def _forward_of(network: FlatNetwork, width: int) -> Callable[[], None]:
    device = network.device
    rows = Rows.empty(width, device)
    rows.token_ids.copy_(torch.arange(width) % network.config.vocab_size)
    rows.positions.copy_((torch.arange(width) + NUM_CACHED) % network.config.max_position_embeddings)
    rows.rank.copy_(torch.arange(width))
    rows.seat.zero_()
    one = torch.ones(1, dtype=torch.int32, device=device)
    table = torch.arange(NUM_CACHED // 16, dtype=torch.int32, device=device)[None]
    spans = Spans(one * NUM_CACHED, one * 0, one * 0, one * 0, one * width, table, 16)
    block = tile_rows(width, NUM_CACHED, wide_groups=wide_groups(network.config)) if width > 1 else LONE_TILE_ROWS
    first = torch.arange(0, width, block, dtype=torch.int32, device=device)
    tiles = Tiles(torch.zeros_like(first), first, (first + block).clamp(max=width), block)
    pool = KeyValues.empty(network.config, NUM_CACHED, device, network.dtype)
    new = KeyValues.empty(network.config, width, device, network.dtype)
    bias = torch.zeros(network.config.vocab_size, device=device)
    given = torch.zeros(width, dtype=torch.int32, device=device)

    def forward() -> None:
        network.readout(network.forward(rows, spans, tiles, pool, new), bias, given)

    return forward


def _compile(network: FlatNetwork, widths: Sequence[int]) -> None:
    """The kernels of all widths together; one layer has them all."""
    from refusion.model.kernels.launch import compile_together  # triton is there only where there are kernels

    shallow = network.shallow()
    with compile_together():
        for width in widths:
            _forward_of(shallow, width)()


def _captured(forward: Callable[[], None]) -> Callable[[], None]:
    forward()  # what needs to be there before a capture: workspaces, counters
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        forward()
    return graph.replay


def _seconds(run: Callable[[], None], device: torch.device, repeats: int) -> list[float]:
    taken: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return taken


def _fingerprint(network: FlatNetwork) -> str:
    """Changes with whatever changes the costs: model shape, dtype, operations and their source, device, threads, torch."""
    device = torch.cuda.get_device_name(network.device) if network.device.type == "cuda" else f"cpu-{torch.get_num_threads()}"
    names = ("quantization", "is_batch_invariant")
    ops = [type(network.ops).__name__, *(str(getattr(network.ops, name, None)) for name in names), __version__, _kernel_source()]
    shape = {**asdict(network.config), "dtype": str(network.dtype), "ops": ops}
    said = json.dumps([shape, device, torch.__version__], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


@cache
def _kernel_source() -> str:
    """A hash of what the operations are made of, and of what says which of them a forward takes."""
    folder = Path(model_package.__file__ or "").parent
    files = sorted(path for path in folder.glob("**/*") if path.suffix in (".py", ".json"))
    files += [Path(__file__).with_name(name) for name in ("network.py", "ops.py", "shapes.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
