"""Log-probabilities of given tokens, batched: one forward per batch of rows, logits only where a token is scored.

A row is whatever physical sequence the caller lays out (text left to right, or clean slots and then masks); attention is causal over it
unless the row says otherwise. What the numbers mean is up to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refusion.model.segments import Segments
from refusion.model.transformer import Transformer

# B = rows of a batch, T = tokens of its longest row, N = scored tokens of the batch, V = vocabulary

ROWS_PER_HEAD = 2048
"""Scored tokens whose logits exist at the same time."""


@dataclass(frozen=True, slots=True)
class Sight:
    """Per token of a row: its segment, its rank there (tokens of equal rank see one another), and up to which rank it sees segment 0."""

    segments: Sequence[int]
    ranks: Sequence[int]
    visible: Sequence[int]


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One sequence: its tokens, their positions in the text, and which token the hidden state at which index has to predict."""

    input_ids: Sequence[int]
    position_ids: Sequence[int]
    indices: Sequence[int]
    targets: Sequence[int]
    sight: Sight | None = None
    """Who sees whom; None: every token sees those before it."""

    @classmethod
    def continuation(cls, context_ids: Sequence[int], answer_ids: Sequence[int]) -> ScoreRow:
        """Every answer token predicted from the token before it; the context must not be empty."""
        assert len(context_ids) > 0, f"no context before {len(answer_ids)} answer tokens"
        input_ids = [*context_ids, *answer_ids][:-1]
        return cls(input_ids, range(len(input_ids)), range(len(context_ids) - 1, len(input_ids)), answer_ids)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per target of one row: natural logarithm of its probability, and whether it is the most probable token."""

    log_probs: list[float]
    is_argmax: list[bool]

    @property
    def total(self) -> float:
        return math.fsum(self.log_probs)


@torch.inference_mode()
def score_rows(model: Transformer, rows: Sequence[ScoreRow], batch_size: int = 8, banned_ids: Iterable[int] = ()) -> list[TokenScores]:
    """Scores of every row, in the order given; `banned_ids` have probability 0."""
    banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=model.device)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))  # longest first: what does not fit fails at once
    scores: dict[int, TokenScores] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        scores.update(zip(batch, _score_batch(model, [rows[i] for i in batch], banned), strict=True))
    return [scores[i] for i in range(len(rows))]


def _score_batch(model: Transformer, rows: list[ScoreRow], banned: Tensor) -> Iterator[TokenScores]:
    hidden = _hidden_states(model, rows)  # [N, hidden]
    targets = torch.tensor([token for row in rows for token in row.targets], device=model.device)  # [N]
    log_probs, is_argmax = [], []
    for states, wanted in zip(hidden.split(ROWS_PER_HEAD), targets.split(ROWS_PER_HEAD), strict=True):
        logits = model.lm_head(states).float().index_fill_(1, banned, -math.inf)  # [n, V]
        is_argmax.append(logits.argmax(dim=-1) == wanted)
        log_probs.append(-torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
    counts = [len(row.targets) for row in rows]
    parts = torch.cat(log_probs).cpu().split(counts), torch.cat(is_argmax).cpu().split(counts)  # one host sync a batch
    for probs, hits in zip(*parts, strict=True):
        yield TokenScores(probs.tolist(), hits.tolist())


def _hidden_states(model: Transformer, rows: list[ScoreRow]) -> Tensor:
    """Final hidden states [N, hidden] where something is predicted; rows are right-padded, padding lies behind what they see."""
    width = max(len(row.input_ids) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.input_ids)] = torch.as_tensor(row.input_ids)
        positions[i, : len(row.input_ids)] = torch.as_tensor(row.position_ids)
    cache = model.new_cache(len(rows), width)
    hidden = model(input_ids.to(model.device), positions.to(model.device), _segments(rows, width, model.device), cache)  # [B, T, hidden]
    places = torch.tensor([(i, index) for i, row in enumerate(rows) for index in row.indices], device=model.device)  # [N, 2]
    return hidden[places[:, 0], places[:, 1]]


def _segments(rows: list[ScoreRow], width: int, device: torch.device) -> Segments:
    """Of all rows, padded to `width`."""
    columns = torch.zeros(3, len(rows), width, dtype=torch.long)
    columns[0] = -1  # padding
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        sight = row.sight or Sight([0] * length, range(length), [0] * length)
        for column, values in zip(columns, (sight.segments, sight.ranks, sight.visible), strict=True):
            column[i, :length] = torch.as_tensor(values)
    segment, rank, visible = columns.to(device)
    return Segments(segment, rank, torch.zeros_like(segment), visible, torch.zeros_like(segment, dtype=torch.bool))
