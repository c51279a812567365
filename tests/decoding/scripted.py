"""A network without weights: what each row predicts is written by hand or hashed from exactly what the row may see.

`ScriptedForward` follows the segments and the cache like a transformer does: a row sees the committed rows of its request and the new
rows its mask allows, and a committed row stays what it was in the forward that committed it. Any error in who sees whom therefore changes
a prediction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refusion.decoding.forward import ForwardBatch, Readout, Rows, readout_logits


@dataclass(frozen=True)
class Row:
    """One token where it stands, and all it was computed from."""

    token: int
    position: int
    seen: frozenset[tuple[int, int]]  # (position, token) of every visible row, itself included
    value: int  # hash of the token, its position and the values of the rows it saw, in any order

    @classmethod
    def of(cls, token: int, position: int, others: Sequence[Row]) -> Row:
        """The row of a token that sees `others`."""
        context = sum(other.value for other in others) % 2**64
        digest = hashlib.blake2b(f"{token} {position} {context}".encode(), digest_size=8).digest()
        seen = frozenset({(other.position, other.token) for other in others} | {(position, token)})
        return cls(token, position, seen, int.from_bytes(digest, "little"))


Script = Callable[[Row], Tensor]
"""Logits [V] that a row predicts."""


class ScriptedCache:
    """Committed rows per request, with the part of KVCache that decoders use."""

    def __init__(self, num_requests: int) -> None:
        self.rows: list[list[Row]] = [[] for _ in range(num_requests)]
        self.new: list[list[Row | None]] = []

    def keep(self, rows: Tensor, is_kept: Tensor) -> None:
        if not is_kept.any():
            return
        assert self.new, "rows of a forward are kept once"
        for request, (places, kept) in enumerate(zip(rows.tolist(), is_kept.tolist(), strict=True)):
            assert kept == sorted(kept, reverse=True), "what is kept is a prefix"
            for place, is_wanted in zip(places, kept, strict=True):
                if is_wanted:
                    row = self.new[request][place]
                    assert row is not None, "padding is never kept"
                    self.rows[request].append(row)
        self.new = []

    def select(self, requests: Tensor) -> None:
        self.rows = [self.rows[request] for request in requests.tolist()]


class ScriptedForward:
    """A `ForwardFn` whose predictions come from a script."""

    def __init__(self, script: Script, banned: Sequence[int] = ()) -> None:
        self.script, self.banned = script, torch.tensor(list(banned), dtype=torch.long)
        self.forwards: list[list[list[Row]]] = []  # per forward and request, the rows that ran

    def new_cache(self, num_requests: int, capacity: int) -> ScriptedCache:
        self.cache = ScriptedCache(num_requests)
        return self.cache

    def __call__(self, batch: ForwardBatch, cache: ScriptedCache) -> Readout:
        visible = batch.segments.attn_mask()
        is_token = batch.segments.segment >= 0
        cache.new = [
            _run(batch.token_ids[request].tolist(), batch.positions[request].tolist(), is_token[request], visible[request], committed)
            for request, committed in enumerate(cache.rows)
        ]
        self.forwards.append([[row for row in rows if row is not None] for rows in cache.new])
        shape, count = batch.token_ids.shape, batch.num_runner_ups
        parts = [torch.zeros(shape, dtype=kind) for kind in (torch.long, torch.float, torch.float, torch.bool)]
        readout = Readout(*parts, torch.zeros(*shape, count, dtype=torch.long))
        for request, place in batch.is_read.nonzero().tolist():
            row = cache.new[request][place]
            assert row is not None, "padding is never read"
            keys = Rows(
                batch.draw.seeds[[request]],
                batch.draw.attempts[[request]],
                batch.positions[request, [place]] + batch.draw.shift,
                batch.given_ids[request, [place]],
            )
            one = readout_logits(self.script(row).clone()[None], self.banned, batch.draw, keys, count)
            for name in ("token_ids", "confidence", "given_probability", "given_is_argmax", "runner_ups"):
                getattr(readout, name)[request, place] = getattr(one, name)[0]
        return readout


def _run(tokens: list[int], positions: list[int], is_token: Tensor, visible: Tensor, committed: list[Row]) -> list[Row | None]:
    """Rows of one request, each after all it sees."""
    rows: list[Row | None] = [None] * len(tokens)

    def run(place: int) -> Row:
        row = rows[place]
        if row is None:
            others = [run(other) for other in visible[place].nonzero()[:, 0].tolist() if other != place]
            row = rows[place] = Row.of(tokens[place], positions[place], [*committed, *others])
        return row

    for place in is_token.nonzero()[:, 0].tolist():
        run(place)
    return rows


def hashed_language(vocab_size: int, *, peak: float = 4.0, eos_id: int | None = None, eos_bonus: float = 0.0) -> Script:
    """Logits drawn from the row's hash: every context predicts something else, with all degrees of confidence."""

    def script(row: Row) -> Tensor:
        generator = torch.Generator().manual_seed(row.value % 2**63)
        logits = torch.randn(vocab_size, generator=generator) * torch.rand(1, generator=generator) * peak
        if eos_id is not None:
            logits[eos_id] += eos_bonus
        return logits

    return script


def certain(probabilities: dict[int, float], vocab_size: int) -> Tensor:
    """Logits that give these tokens these probabilities and share the rest among all others."""
    rest = (1.0 - sum(probabilities.values())) / (vocab_size - len(probabilities))
    probability = torch.full((vocab_size,), max(rest, 1e-9))
    for token, value in probabilities.items():
        probability[token] = value
    return probability.log()
