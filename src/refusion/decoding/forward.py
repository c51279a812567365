"""The one interface between the algorithm and a network: a batch of new tokens in, what the algorithm needs to know of them out.

Full logits never leave a forward. `readout_logits` is shared by every `ForwardFn`, so all of them agree on bans, temperature and ties.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refusion.decoding.sampling import Draw, draw_tokens, filtered_log_probs
from refusion.model.cache import KVCache
from refusion.model.ops import next_best
from refusion.model.segments import Segments

# B = requests, T = new tokens of one forward, R = rows that are read, V = vocabulary

ROWS_AT_ONCE = 4096  # rows whose float32 logits exist at the same time


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """New tokens of one forward, and which of their rows are read."""

    token_ids: Tensor  # [B, T]
    positions: Tensor  # [B, T] where each token stands in the text, prompt included
    segments: Segments
    is_read: Tensor  # [B, T] bool
    given_ids: Tensor  # [B, T] the token whose probability is wanted at this row; 0 where none is
    draw: Draw
    num_runner_ups: int = 0  # how many are wanted of each row


@dataclass(frozen=True, slots=True)
class Readout:
    """What one forward tells, per new token [B, T] (flat: [T]); rows that were not read hold zeros."""

    token_ids: Tensor  # the drawn (greedy: most probable) token
    confidence: Tensor  # its probability, float32
    given_probability: Tensor  # probability of the given token, float32
    given_is_argmax: Tensor  # bool
    runner_ups: Tensor  # [B, T, R] the most probable tokens but the drawn one, falling; R as many as were asked for


class ForwardFn(Protocol):
    """Runs new tokens over a cache. The K/V of all new tokens wait in the cache for `keep`."""

    def new_cache(self, num_requests: int, capacity: int) -> KVCache:
        """An empty cache of this network."""
        ...

    def __call__(self, batch: ForwardBatch, cache: KVCache) -> Readout:
        """One forward."""
        ...


class Network(Protocol):
    """The part of `refusion.model.Transformer` a forward needs; an adapted `transformers` model is another."""

    def new_cache(self, num_requests: int, capacity: int) -> KVCache: ...

    def forward(self, token_ids: Tensor, positions: Tensor, segments: Segments, cache: KVCache) -> Tensor: ...

    def lm_head(self, hidden: Tensor) -> Tensor: ...


class EagerForward:
    """A network run operation by operation: the plain twin of every faster forward."""

    def __init__(self, network: Network, banned_ids: Tensor) -> None:
        """banned_ids [N]: tokens that are never emitted, whatever their logits say."""
        self.network = network
        self.banned_ids = banned_ids

    def new_cache(self, num_requests: int, capacity: int) -> KVCache:
        return self.network.new_cache(num_requests, capacity)

    @torch.no_grad()
    def __call__(self, batch: ForwardBatch, cache: KVCache) -> Readout:
        hidden = self.network.forward(batch.token_ids, batch.positions, batch.segments, cache)
        request, place = batch.is_read.nonzero(as_tuple=True)  # [R]
        rows = Rows(
            seeds=batch.draw.seeds[request],
            attempts=batch.draw.attempts[request],
            positions=batch.positions[request, place] + batch.draw.shift,
            given_ids=batch.given_ids[request, place],
        )
        read = hidden[request, place]
        parts = [
            readout_logits(
                self.network.lm_head(read[start : start + ROWS_AT_ONCE]).float(),
                self.banned_ids,
                batch.draw,
                rows.part(start),
                batch.num_runner_ups,
            )
            for start in range(0, len(request), ROWS_AT_ONCE)  # no part at all where nobody reads: verifying the last slot of one token
        ]
        return _scatter(parts, request, place, batch)


@dataclass(frozen=True, slots=True)
class Rows:
    """What the readout of each row depends on besides its logits. All [R]."""

    seeds: Tensor
    attempts: Tensor
    positions: Tensor
    given_ids: Tensor

    def part(self, start: int) -> "Rows":
        stop = start + ROWS_AT_ONCE
        return Rows(self.seeds[start:stop], self.attempts[start:stop], self.positions[start:stop], self.given_ids[start:stop])


def readout_logits(logits: Tensor, banned_ids: Tensor, draw: Draw, rows: Rows, num_runner_ups: int = 0) -> Readout:
    """Readout [R] of float32 logits [R, V], which are overwritten. Banned ids get probability 0."""
    logits.index_fill_(1, banned_ids, -torch.inf)
    best = logits.argmax(dim=1)
    if draw.is_greedy:
        normaliser = logits.logsumexp(dim=1)
        chosen = best
        log_chosen = logits.gather(1, chosen[:, None])[:, 0] - normaliser
        log_given = logits.gather(1, rows.given_ids[:, None])[:, 0] - normaliser
    else:
        log_probs = filtered_log_probs(logits, draw)
        chosen = draw_tokens(log_probs, rows.seeds, rows.positions, rows.attempts)
        log_chosen = log_probs.gather(1, chosen[:, None])[:, 0]
        log_given = log_probs.gather(1, rows.given_ids[:, None])[:, 0]
    runner_ups = next_best(logits, chosen, num_runner_ups)
    return Readout(chosen, log_chosen.exp(), log_given.exp(), best == rows.given_ids, runner_ups)


def _scatter(parts: list[Readout], request: Tensor, place: Tensor, batch: ForwardBatch) -> Readout:
    """Rows [R] back to the shape [B, T] of the batch."""

    def spread(name: str, dtype: torch.dtype, *more: int) -> Tensor:
        whole = torch.zeros((*batch.token_ids.shape, *more), dtype=dtype, device=batch.token_ids.device)
        if parts:
            whole[request, place] = torch.cat([getattr(part, name) for part in parts])
        return whole

    return Readout(
        token_ids=spread("token_ids", torch.long),
        confidence=spread("confidence", torch.float32),
        given_probability=spread("given_probability", torch.float32),
        given_is_argmax=spread("given_is_argmax", torch.bool),
        runner_ups=spread("runner_ups", torch.long, batch.num_runner_ups),
    )
