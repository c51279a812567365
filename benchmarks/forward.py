"""What one forward costs, head and readout included: the static forward against eager code and against the bytes it has to read.

    python benchmarks/forward.py --device cuda --profile runs/forward-profile.json
    python benchmarks/forward.py --device cuda --shapes smollm2-135m --contenders static
    python benchmarks/forward.py --device cuda --contenders static --variants attention        # how attention should be cut
    python benchmarks/forward.py --device cuda --contenders static --cached 512 --variants overlap

Weights are random: a forward's time does not depend on what it says. Times are medians of many forwards with their quartiles, on a GPU
between CUDA events with the forwards queued one behind the other, so code that the host cannot launch in time shows the host's time. The
floor is the weights' bytes (the keys and values of the cache beside it) at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import carrier
import harness
import torch
from torch import Tensor

from refusion.atomic import atomic_file
from refusion.decoding.forward import EagerForward, ForwardBatch
from refusion.decoding.sampling import Draw
from refusion.engine.build import flat_network
from refusion.engine.network import FlatNetwork, KeyValues
from refusion.engine.ops import TritonOps
from refusion.engine.settings import EngineSettings
from refusion.engine.shapes import LONE_TILE_ROWS, LONG_CONTEXT, tile_rows, wide_groups
from refusion.evaluation.results import Figure, Result, Run, to_plain, write_result
from refusion.evaluation.statistics import Interval
from refusion.model.cache import KVCache
from refusion.model.config import ModelConfig
from refusion.model.quantize import Kind
from refusion.model.rows import Rows, Spans, plain_tiles
from refusion.model.segments import NO_PARENT, Segments
from refusion.model.transformer import Transformer

# T = new tokens of the forward, C = cached tokens

PAGE_SIZE = EngineSettings().page_tokens("cuda")
PROFILED = (1, 32, 192)
Forward = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model shape, and the forwards of it that are of interest."""

    config: ModelConfig
    widths: tuple[int, ...]
    cached: tuple[int, ...]
    marks: dict[int, float]
    """Milliseconds to reach on an H100 with the fewest cached tokens, by T."""


QWEN3_8B = ModelConfig(
    model_type="qwen3",
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
    attention_bias=False,
    mask_token_id=151670,
    eos_token_ids=(151645,),
)
SMOLLM2_135M = replace(
    QWEN3_8B,
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    mask_token_id=16,
    eos_token_ids=(2,),
)
TINY = replace(SMOLLM2_135M, vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
CASES = {
    "qwen3-8b": Case(config=QWEN3_8B, widths=(1, 32, 128, 192), cached=(512, 8192), marks={1: 5.7, 32: 6.2, 128: 6.8, 192: 7.3}),
    "smollm2-135m": Case(config=SMOLLM2_135M, widths=(1, 16, 32, 64, 128, 192), cached=(512,), marks=dict.fromkeys((1, 16, 32, 64), 0.7)),
    "tiny": Case(config=replace(TINY, num_key_value_heads=2, head_dim=16), widths=(1, 5), cached=(16, 48), marks={1: 1000.0}),
}


def main() -> None:
    args = flags()
    device = torch.device(args.device)
    if args.variants and device.type != "cuda":
        raise SystemExit("--variants are of kernels, which need --device cuda")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    bandwidth = copy_bandwidth(device)
    print(json.dumps({"copy_tb_per_s": bandwidth / 1e12}), flush=True)
    runs: list[Run] = []
    profiles: list[dict[str, Any]] = []
    if device.type == "cuda":  # one process after the other would compile for minutes
        import forward_variants

        forward_variants.compile_all(args.variants, {name: narrowed(CASES[name], args) for name in args.shapes}, args.quantization)
    settings = {
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": args.repeats,
        "quantization": args.quantization,
        "copy_bytes_per_s": bandwidth,
        "shapes": {name: asdict(CASES[name].config) for name in args.shapes},
    }

    def write(**more: bool) -> None:
        if args.profile is not None:
            with atomic_file(args.profile) as draft:
                draft.write_text(json.dumps(profiles, indent=1) + "\n")
        write_result(args.output, Result(name="forward", settings=settings | more, runs=runs, notes=args.notes, device=args.device))
        print(f"written {args.output}", file=sys.stderr)

    with harness.written_at_any_end(write, runs):
        for name in args.shapes:
            case = narrowed(CASES[name], args)
            model = random_model(case.config, device, dtype)
            for cached in case.cached:
                bench = Bench(model, cached, args.quantization)
                runs += measured(name, case, bench, args, bandwidth)
                if args.variants:
                    runs += varied(name, case, bench, args)
                if args.profile is not None:
                    profiles += [
                        profile_of(name, bench, num_rows)
                        for num_rows in case.widths
                        if num_rows in (args.widths or PROFILED) or name == "tiny"
                    ]
            del model


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Milliseconds of one forward.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"], help="by default bfloat16 on a GPU")
    parser.add_argument("--shapes", nargs="+", default=["qwen3-8b", "smollm2-135m"], choices=list(CASES), help="model shapes")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), help="whose forward")
    parser.add_argument("--quantization", default=None, choices=get_args(Kind), help="weights of the static forward in 8 bits (GPU)")
    parser.add_argument("--widths", nargs="+", type=int, default=None, help="new tokens of a forward; by default those of the shape")
    parser.add_argument("--cached", nargs="+", type=int, default=None, help="tokens in the cache; by default those of the shape")
    parser.add_argument(
        "--variants", default=None, choices=["overlap", "attention"], help="also other ways to run the static forward (GPU)"
    )
    parser.add_argument("--repeats", type=int, default=50, help="timed forwards")
    parser.add_argument("--profile", type=Path, default=None, help="JSON file for time by kernel of the static forward")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "forward.json", help="result file")
    parser.add_argument("--notes", default="", help="a sentence for the result file")
    return parser.parse_args()


def narrowed(case: Case, args: argparse.Namespace) -> Case:
    return replace(case, widths=tuple(args.widths or case.widths), cached=tuple(args.cached or case.cached))


def measured(name: str, case: Case, bench: Bench, args: argparse.Namespace, bandwidth: float) -> Iterator[Run]:
    """One run per contender, one for the floor and one for the marks, each with `forward_ms_T` per width."""
    settings: dict[str, Any] = {"shape": name, "cached_tokens": bench.cached}
    floor = {f"forward_ms_{width}": bench.floor_ms(bandwidth) for width in case.widths}
    yield shown(Run(label=f"{name}, {bench.cached} cached: floor", settings=settings | bench.bytes(), figures=floor))
    first = case.cached[0]
    for label in args.contenders:
        figures: dict[str, Figure] = {}
        for width in case.widths:
            try:
                taken = milliseconds(CONTENDERS[label](bench, width), bench.device, args.repeats)
            except NotImplementedError as reason:  # a contender that does not exist on this machine or in this version
                print(f"{label}, T = {width}: {reason}", file=sys.stderr)
                continue
            figures[f"forward_ms_{width}"] = Interval(statistics.median(taken), *quartiles(taken))
        yield shown(Run(label=f"{name}, {bench.cached} cached: {label}", settings=settings | {"contender": label}, figures=figures))
    if bench.cached == first:
        marks = {f"forward_ms_{width}": case.marks[width] for width in case.widths if width in case.marks}
        yield Run(label=f"{name}, {bench.cached} cached: mark of an H100", settings=settings, figures=marks)


def varied(name: str, case: Case, bench: Bench, args: argparse.Namespace) -> Iterator[Run]:
    """One run per variant."""
    import forward_variants  # needs Triton

    bench.network = bench.network or network_of(bench.model, bench.quantization)
    table = forward_variants.compare(
        args.variants, bench, case.widths, lambda width: milliseconds(static_forward(bench, width), bench.device, args.repeats)
    )
    for label, figures in table.items():
        settings = {"shape": name, "cached_tokens": bench.cached, "variant": label}
        forward_ms: dict[str, Figure] = {f"forward_ms_{width}": taken for width, taken in figures.items()}
        yield Run(label=f"{name}, {bench.cached} cached: {label}", settings=settings, figures=forward_ms)


def shown(run: Run) -> Run:
    print(json.dumps({"label": run.label} | to_plain(run.figures)), flush=True)
    return run


# ---- the contenders ----


class Bench:
    """A model and what every contender's forward starts from."""

    def __init__(self, model: Transformer, cached: int, quantization: Kind | None) -> None:
        self.model, self.config, self.device = model, model.config, model.device
        self.cached = cached
        self.quantization: Kind | None = quantization
        self.tile_rows: int | None = None  # of forwards with several rows; None: the engine's
        self.network: FlatNetwork | None = None
        self.theirs: Any = None  # the same weights in transformers

    def bytes(self) -> dict[str, int]:
        """What one forward has to read: every matrix once (an untied embedding only in parts), and the committed keys and values."""
        config, size = self.config, self.model.dtype.itemsize
        weights = {name: weight.numel() for name, weight in self.model.named_parameters() if weight.dim() == 2}
        if not config.tie_word_embeddings:
            del weights["embed_tokens.weight"]
        cache_row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
        return {"weight_bytes": sum(weights.values()) * (1 if self.quantization else size), "cache_bytes": self.cached * cache_row}

    def floor_ms(self, bandwidth: float) -> float:
        return 1000 * sum(self.bytes().values()) / bandwidth

    def token_ids(self, width: int) -> Tensor:
        return torch.arange(width, device=self.device) % self.config.vocab_size

    def positions(self, width: int) -> Tensor:
        return torch.arange(self.cached, self.cached + width, device=self.device)

    def random_cache(self, num_rows: int) -> KeyValues:
        """Keys and values of ordinary size; zeros would draw less power."""
        made = KeyValues.empty(self.config, num_rows, self.device, self.model.dtype)
        made.keys.normal_()
        made.values.normal_()
        return made


def static_forward(bench: Bench, width: int) -> Forward:
    """Flat rows through the engine's operations, captured in a CUDA graph; on a CPU run as they are."""
    if bench.network is None:
        bench.network = network_of(bench.model, bench.quantization)
    network, device = bench.network, bench.device
    rows = Rows.empty(width, device)
    for field, values in (
        (rows.token_ids, bench.token_ids(width)),
        (rows.positions, bench.positions(width)),
        (rows.rank, torch.arange(width)),
    ):
        field.copy_(values)
    rows.seat.zero_()
    rows.parent.fill_(NO_PARENT)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    pages = torch.arange(-(-bench.cached // PAGE_SIZE), dtype=torch.int32, device=device)[None]
    spans = Spans(zero + bench.cached, zero, zero, zero, zero + width, pages, PAGE_SIZE)
    chosen_rows = tile_rows(width, bench.cached, wide_groups=wide_groups(bench.config))
    block = (bench.tile_rows or chosen_rows) if width > 1 else LONE_TILE_ROWS
    tiles = plain_tiles(spans, block, -(-width // block), width > 1 and bench.cached > LONG_CONTEXT)
    pool, new = bench.random_cache(pages.numel() * PAGE_SIZE), KeyValues.empty(bench.config, width, device, bench.model.dtype)
    bias = torch.zeros(bench.config.vocab_size, device=device)
    given = torch.zeros(width, dtype=torch.int32, device=device)

    def forward() -> object:
        return network.readout(network.forward(rows, spans, tiles, pool, new), bias, given)

    return captured(forward) if device.type == "cuda" else forward


def eager_forward(bench: Bench, width: int) -> Forward:
    """Our plain padded transformer with its readout, operation by operation."""
    cache = KVCache(bench.config, 1, bench.cached + width, device=bench.device, dtype=bench.model.dtype)
    cache.keys.normal_()
    cache.values.normal_()
    cache.lengths += bench.cached
    cache.longest = bench.cached
    everything = torch.ones(1, width, dtype=torch.bool, device=bench.device)
    zeros = torch.zeros(1, width, dtype=torch.long, device=bench.device)
    draw = Draw(0.0, 1.0, zeros[:, 0], zeros[:, 0])
    batch = ForwardBatch(bench.token_ids(width)[None], bench.positions(width)[None], Segments.causal(everything), everything, zeros, draw)
    run = EagerForward(bench.model, zeros[0, :0])
    return lambda: run(batch, cache)


def transformers_forward(bench: Bench, width: int) -> Forward:
    """An eager model of `transformers` over its own cache, logits of all rows and their argmax."""
    theirs = transformers_model(bench)
    past = their_cache(bench)
    token_ids, positions = bench.token_ids(width)[None], bench.positions(width)[None]

    @torch.inference_mode()
    def forward() -> object:
        best = theirs(input_ids=token_ids, position_ids=positions, past_key_values=past, use_cache=True).logits.argmax(-1)
        past.crop(-width)
        return best

    return forward


def transformers_graph_forward(bench: Bench, width: int) -> Forward:
    """The same captured in a CUDA graph: every replay starts from the same cache, and the mask is given whole."""
    if bench.device.type != "cuda":
        raise NotImplementedError("CUDA graphs need a GPU")
    theirs, past = transformers_model(bench), their_cache(bench)
    start = [(layer.keys, layer.values) for layer in past.layers]
    token_ids, positions = bench.token_ids(width)[None], bench.positions(width)[None]
    is_hidden = torch.ones(width, bench.cached + width, dtype=torch.bool, device=bench.device).triu(bench.cached + 1)
    mask = torch.zeros_like(is_hidden, dtype=bench.model.dtype).masked_fill_(is_hidden, -torch.inf)[None, None]

    @torch.no_grad()
    def forward() -> object:
        for layer, (keys, values) in zip(past.layers, start, strict=True):
            layer.keys, layer.values = keys, values
        said = theirs(input_ids=token_ids, position_ids=positions, attention_mask=mask, past_key_values=past, use_cache=True)
        return said.logits.argmax(-1)

    try:
        return captured(forward)
    except RuntimeError as error:  # this version synchronises somewhere
        raise NotImplementedError(f"cannot be captured: {str(error).splitlines()[0]}") from error


CONTENDERS: dict[str, Callable[[Bench, int], Forward]] = {
    "static": static_forward,
    "eager": eager_forward,
    "transformers": transformers_forward,
    "transformers-graph": transformers_graph_forward,
}


def network_of(model: Transformer, quantization: Kind | None) -> FlatNetwork:
    """The engine's network, its weights in 8 bits if wanted."""
    return flat_network(model) if quantization is None else FlatNetwork(model, TritonOps(model.config, model.device, quantization))


def transformers_model(bench: Bench) -> Any:
    if bench.theirs is None:
        bench.theirs = carrier.to_transformers(bench.model)
    return bench.theirs


def their_cache(bench: Bench) -> Any:
    """A `DynamicCache` that holds the cached tokens."""
    from transformers import DynamicCache

    past = DynamicCache()
    pool = bench.random_cache(bench.cached)
    for layer in range(bench.config.num_hidden_layers):
        past.update(pool.keys[layer].transpose(0, 1)[None], pool.values[layer].transpose(0, 1)[None], layer)
    return past


def captured(forward: Forward) -> Forward:
    """The forward as a CUDA graph; it runs twice before, which compiles and loads its kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward()
        forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = forward()  # the result lives in the graph's memory

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Dense normal weights that keep activations of ordinary size."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            torch.nn.init.ones_(weight) if "norm" in name else torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.inv_freq = carrier.inverse_frequencies(config).to(device)
    return model.eval().requires_grad_(False)


# ---- the clock ----


def milliseconds(forward: Forward, device: torch.device, repeats: int) -> list[float]:
    """Time of each of `repeats` forwards, queued without waiting in between."""
    for _ in range(3):
        forward()
    if device.type != "cuda":
        return [1000 * seconds(forward) for _ in range(repeats)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        forward()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def seconds(forward: Forward) -> float:
    started = time.perf_counter()
    forward()
    return time.perf_counter() - started


def quartiles(taken: Sequence[float]) -> tuple[float, float]:
    if len(taken) < 2:
        return taken[0], taken[0]
    low, _, high = statistics.quantiles(taken, n=4)
    return low, high


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy inside the device's memory, read and written bytes together."""
    size = 2**32 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = milliseconds(lambda: target.copy_(source), device, 20)
    return 2 * size / statistics.median(taken) * 1000


def profile_of(name: str, bench: Bench, width: int, repeats: int = 10) -> dict[str, Any]:
    """Count and microseconds per forward of every kernel of the static forward, the costliest first.

    On a GPU without programmatic dependent launch: a kernel that already waits for the one before it would be charged for waiting.
    """
    from torch.profiler import ProfilerActivity, profile

    is_cuda = bench.device.type == "cuda"
    if is_cuda:
        from refusion.model.kernels import launch

        launch.set_pdl(False)
    forward = static_forward(bench, width)
    if is_cuda:
        launch.set_pdl(None)
    forward()
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as recorded:
        for _ in range(repeats):
            forward()
        if is_cuda:
            torch.cuda.synchronize()
    kernels = [
        {
            "name": item.key,
            "count": item.count / repeats,
            "us": (item.self_device_time_total if is_cuda else item.self_cpu_time_total) / repeats,
        }
        for item in recorded.key_averages()
    ]
    kernels = sorted((kernel for kernel in kernels if kernel["us"] > 0), key=lambda kernel: -kernel["us"])
    for kernel in kernels[:8]:
        each = kernel["us"] / kernel["count"]
        print(f"{name} T={width} {kernel['count']:6.0f} x {each:8.2f} us = {kernel['us']:8.1f} us  {kernel['name'][:60]}", flush=True)
    return {"shape": name, "cached_tokens": bench.cached, "num_rows": width, "kernels": kernels}


if __name__ == "__main__":
    harness.script(main)
