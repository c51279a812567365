"""From a model and limits to an engine: how large the cache is, and which operations run."""

import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from refusion.decoding.params import MAX_SLOT_SIZE
from refusion.engine.auto import Auto
from refusion.engine.candidates import Candidates
from refusion.engine.core import Engine
from refusion.engine.costs import CostTable, measured_costs, typical_costs
from refusion.engine.network import FlatNetwork, Ops
from refusion.engine.ops import TritonOps
from refusion.engine.runner import Runner
from refusion.engine.scheduler import Limits
from refusion.engine.settings import EngineSettings
from refusion.engine.shapes import PROMPT_ROWS, TILE_ROWS, Shape, at_least, power_of_two
from refusion.errors import RequestError
from refusion.model.config import ModelConfig
from refusion.model.cpu import CpuOps
from refusion.model.quantize import Kind, QuantizedWeight
from refusion.model.transformer import Transformer

CPU_CACHE_BYTES = 512 << 20
CPU_CACHE_TOKENS = 4096
"""A CPU holds at least so many tokens, however wide the model."""
ROWS_AT_ONCE = 8192
"""Rows of a weight that are quantised together."""


def build_engine(
    network: FlatNetwork,
    settings: EngineSettings,
    *,
    banned_ids: Tensor,
    tokens_per_forward: float | None = None,
    costs: Callable[[], CostTable] | None = None,
) -> Engine:
    """An engine over this network. tokens_per_forward: what slot decoding is known to reach. Raises `RequestError` without memory."""
    device = network.device
    num_seats, prompt_rows = settings.seats(device.type), settings.prompt_rows(device.type)
    most_rows = settings.decode_rows(device.type)
    max_rows = at_least(PROMPT_ROWS, prompt_rows) + max(power_of_two(most_rows), num_seats)
    page_size = settings.page_tokens(device.type)
    pages_per_seat = -(-(network.config.max_position_embeddings + MAX_SLOT_SIZE) // page_size)
    num_tokens = settings.cache_tokens or _cache_tokens(network, settings, num_seats * pages_per_seat * page_size, max_rows)
    num_pages = -(-num_tokens // page_size)
    runner = Runner(
        network,
        page_size=page_size,
        num_pages=num_pages,
        max_seats=num_seats,
        pages_per_seat=min(pages_per_seat, num_pages),
        max_rows=max_rows,
        banned_ids=banned_ids,
        mask_id=network.config.mask_token_id,
        use_kernels=device.type == "cuda",
        has_fixed_tiles=settings.batch_invariant,
        prefill_rows=min(prompt_rows, most_rows // 2),
    )
    measure = cache(costs or (lambda: measured_costs(network)))
    # On a CPU measuring takes seconds, and only `auto` waits for that. What is chosen there must not hang on whether it was asked before.
    at_hand = measure if device.type == "cuda" or costs is not None else cache(lambda: typical_costs(network))
    rows_limit = sys.maxsize if settings.batch_invariant else most_rows  # then the scheduler limits seats, not lengths
    candidates = Candidates(
        None if settings.batch_invariant else at_hand,
        rows_limit,
        runs_ahead=runner.runs_ahead,
        spares_rows=device.type == "cpu",
        tokens_per_forward=tokens_per_forward,
    )
    return Engine(
        runner,
        Limits(num_seats, prompt_rows, most_rows),
        prefix_caching=settings.shares_prefixes,
        batch_invariant=settings.batch_invariant,
        auto=Auto(measure, candidates, most_rows),
        candidates=candidates,
    )


def _cache_tokens(network: FlatNetwork, settings: EngineSettings, most: int, max_rows: int) -> int:
    """Tokens the memory holds, at most a whole context for every seat."""
    config = network.config
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * network.dtype.itemsize
    if network.device.type != "cuda":
        return min(most, max(CPU_CACHE_BYTES // each, CPU_CACHE_TOKENS + MAX_SLOT_SIZE))
    free, total = torch.cuda.mem_get_info(network.device)
    left = int(settings.gpu_memory_fraction * total) - (total - free) - max_rows * each
    if left < settings.page_tokens("cuda") * each:
        raise RequestError(
            f"gpu_memory_fraction {settings.gpu_memory_fraction:g} of {total >> 20} MiB leaves no room for a KV cache; "
            "raise it, lower max_prompt_rows or load smaller weights"
        )
    return min(most, left // each)


def flat_network(model: Transformer, settings: EngineSettings | None = None) -> FlatNetwork:
    """The model over flat rows, with the fastest operations its device has that do what the settings ask for."""
    if model.device.type != "cuda":
        return FlatNetwork(model, CpuOps(model.config, model.dtype))
    return FlatNetwork(model, TritonOps(model.config, model.device, invariant_tiles=_invariant_tiles(settings)))


def quantized_network(model: Transformer, device: torch.device, quantization: Kind, settings: EngineSettings | None = None) -> FlatNetwork:
    """The same on a GPU, with its matrices in 8 bits. The model is emptied: see `moved_network`."""
    network = moved_network(model, _QuantizedOps(model.config, device, quantization, _invariant_tiles(settings)), device)
    torch.cuda.empty_cache()  # what the making took is for the KV cache
    return network


def moved_network(model: Transformer, ops: Ops, device: torch.device) -> FlatNetwork:
    """The model on another device, where `ops.prepare` brings its matrices one by one.

    The embedding and all that is no matrix move in the model itself; its matrices become empty, so it can no longer be called.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    is_tied = model.lm_head.weight is model.embed_tokens.weight
    matrices = {id(linear.weight) for linear in linears} - {id(model.embed_tokens.weight)}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in matrices:
                setattr(module, name, nn.Parameter(parameter.to(device), requires_grad=False))
    if is_tied:
        model.lm_head.weight = model.embed_tokens.weight
    model.inv_freq = model.inv_freq.to(device)
    network = FlatNetwork(model, ops)
    for linear in linears:
        if linear.weight is not model.embed_tokens.weight:
            linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
    return network


def _invariant_tiles(settings: EngineSettings | None) -> int | None:
    """Query tiles of the largest forward, where nothing may depend on how many there are."""
    if settings is None or not settings.batch_invariant:
        return None
    seats, prompt_rows = settings.seats("cuda"), at_least(PROMPT_ROWS, settings.prompt_rows("cuda"))
    return Shape(seats, prompt_rows, max(power_of_two(settings.decode_rows("cuda")), seats), 0, TILE_ROWS).num_tiles


class _QuantizedOps(TritonOps):
    """Quantises weights on the GPU wherever they come from, a piece at a time: the exact rows would not all fit."""

    def __init__(self, config: ModelConfig, device: torch.device, quantization: Kind, invariant_tiles: int | None) -> None:
        super().__init__(config, device, quantization, invariant_tiles=invariant_tiles)
        self.device = device

    def prepare(self, weight: Tensor) -> QuantizedWeight:
        pieces = [super(_QuantizedOps, self).prepare(piece.to(self.device)) for piece in weight.split(ROWS_AT_ONCE)]
        return QuantizedWeight(torch.cat([piece.data for piece in pieces]), torch.cat([piece.scale for piece in pieces]))
