"""How close an answer is to the base model.

Agreement and negative log-likelihood follow the project's definition: each emitted token, the EOS included, is compared with the base
model's argmax given the true prefix (system prompt and all), in float32, pooled over the answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from refusion.evaluation.scoring import ScoreRow, score_rows
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
    rows = [ScoreRow.continuation(prompt, answer) for prompt, answer in zip(prompt_ids, token_ids, strict=True) if len(answer) > 0]
    scores = score_rows(base_model, rows, batch_size, banned_ids)
    counts = [len(score.is_argmax) for score in scores]
    interval = pooled_ratio([sum(score.is_argmax) for score in scores], counts)
    num_tokens = sum(counts)
    nll = -math.fsum(score.total for score in scores)
    return Fidelity(interval.value, nll / num_tokens if num_tokens else math.nan, num_tokens, interval)
