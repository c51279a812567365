"""How close an answer is to the base model.

Agreement and negative log-likelihood follow the project's definition: each emitted token, the EOS included, is compared with the base
model's argmax given the true prefix (system prompt and all), in float32, pooled over the answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from refusion.evaluation.scoring import ScoreRow, TokenScores, score_rows
from refusion.evaluation.statistics import Interval, pooled_ratio
from refusion.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Agreement in [0, 1] with an interval over answers, and the base model's nats per token."""

    agreement: float
    nll_per_token: float
    num_tokens: int
    agreement_interval: Interval


def score_fidelity(
    base_model: Transformer,
    prompt_ids: Sequence[Sequence[int]],
    token_ids: Sequence[Sequence[int]],
    batch_size: int = 8,
    *,
    banned_ids: Iterable[int] = (),
) -> Fidelity:
    """Agreement and NLL of the answers under `base_model`, which should be in float32; `banned_ids` are never its argmax."""
    assert len(prompt_ids) == len(token_ids), f"{len(prompt_ids)} prompts but {len(token_ids)} answers"
    scores = [score for score in answer_scores(base_model, prompt_ids, token_ids, batch_size, banned_ids=banned_ids) if score.log_probs]
    counts = [len(score.is_argmax) for score in scores]
    interval = pooled_ratio([sum(score.is_argmax) for score in scores], counts)
    num_tokens = sum(counts)
    nll = -math.fsum(score.total for score in scores)
    return Fidelity(interval.value, nll / num_tokens if num_tokens else math.nan, num_tokens, interval)


def answer_scores(
    base_model: Transformer,
    prompt_ids: Sequence[Sequence[int]],
    token_ids: Sequence[Sequence[int]],
    batch_size: int = 8,
    *,
    banned_ids: Iterable[int] = (),
) -> list[TokenScores]:
    """The base model's scores of every answer, none of an empty one."""
    filled = [i for i, answer in enumerate(token_ids) if len(answer) > 0]
    rows = [ScoreRow.continuation(prompt_ids[i], token_ids[i]) for i in filled]
    found = dict(zip(filled, score_rows(base_model, rows, batch_size, banned_ids), strict=True))
    return [found.get(i, TokenScores([], [])) for i in range(len(token_ids))]
