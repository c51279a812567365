"""From a model and limits to an engine: how large the cache is, and which operations run."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from refusion.decoding.params import FREE_ROWS, MAX_SLOT_SIZE
from refusion.engine.auto import TOKENS_PER_FORWARD, Auto
from refusion.engine.candidates import ByBudget, ByCost
from refusion.engine.core import Engine
from refusion.engine.costs import CostTable, measured_costs
from refusion.engine.network import FlatNetwork
from refusion.engine.ops import PlainOps, TritonOps
from refusion.engine.runner import Runner
from refusion.engine.scheduler import Limits
from refusion.engine.settings import EngineSettings
from refusion.engine.shapes import PROMPT_ROWS, at_least, row_bucket
from refusion.errors import RequestError
from refusion.model.transformer import Transformer

CPU_CACHE_BYTES = 512 << 20
CPU_CACHE_TOKENS = 4096
"""A CPU holds at least so many tokens, however wide the model."""


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
    max_rows = at_least(PROMPT_ROWS, prompt_rows) + row_bucket(settings.max_decode_rows)
    page_size = settings.page_size
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
    )
    most_rows, measure = settings.max_decode_rows, cache(costs or (lambda: measured_costs(network)))
    by_budget = ByBudget(settings.row_budget or FREE_ROWS, most_rows)
    return Engine(
        runner,
        Limits(num_seats, prompt_rows, most_rows),
        prefix_caching=settings.prefix_caching,
        auto=Auto(measure, by_budget, tokens_per_forward=tokens_per_forward or TOKENS_PER_FORWARD),
        choose_candidates=by_budget if settings.row_budget else ByCost(measure, most_rows),
    )


def _cache_tokens(network: FlatNetwork, settings: EngineSettings, most: int, max_rows: int) -> int:
    """Tokens the memory holds, at most a whole context for every seat."""
    config = network.config
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * network.dtype.itemsize
    if network.device.type != "cuda":
        return min(most, max(CPU_CACHE_BYTES // each, CPU_CACHE_TOKENS + MAX_SLOT_SIZE))
    free, total = torch.cuda.mem_get_info(network.device)
    left = int(settings.gpu_memory_fraction * total) - (total - free) - max_rows * each
    if left < settings.page_size * each:
        raise RequestError(
            f"gpu_memory_fraction {settings.gpu_memory_fraction:g} of {total >> 20} MiB leaves no room for a KV cache; "
            "raise it, lower max_prompt_rows or load smaller weights"
        )
    return min(most, left // each)


def flat_network(model: Transformer) -> FlatNetwork:
    """The model over flat rows, with the fastest operations its device has."""
    ops = TritonOps(model.config, model.device) if model.device.type == "cuda" else PlainOps(model.config, model.dtype)
    return FlatNetwork(model, ops)
