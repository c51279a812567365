"""Which self-written pairs are kept: closed, not repetitive, long enough, free of special-token text, new.

Every reason to drop a pair has a name, so that a run can say what became of its drafts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

Reason = Literal[
    "query not closed",
    "query empty",
    "duplicate query",
    "held-out query",
    "special-token text",
    "answer not closed",
    "answer short",
    "repetition",
]


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same sequence, 0 for fewer than two n-grams."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def normalised(query: str) -> str:
    """The form in which two queries count as the same: lower case, words only, single spaces."""
    return re.sub(r"[\W_]+", " ", query.lower()).strip()


class QueryFilter:
    """Knows the held-out queries and those of the pairs kept so far."""

    def __init__(self, held_out: Iterable[str] = (), seen: Iterable[str] = ()) -> None:
        self.held_out = {normalised(query) for query in held_out}
        self.seen = {normalised(query) for query in seen}

    def reason(self, query: str) -> Reason | None:
        """Why the query is dropped, or None."""
        key = normalised(query)
        if not key:
            return "query empty"
        if key in self.held_out:
            return "held-out query"
        return "duplicate query" if key in self.seen else None

    def add(self, query: str) -> None:
        """Remember the query of a kept pair."""
        self.seen.add(normalised(query))


def answer_reason(
    token_ids: Sequence[int], eos_token_ids: Sequence[int], special_ids: Iterable[int], *, min_tokens: int = 12, max_repetition: float = 0.2
) -> Reason | None:
    """Why the drawn answer (its EOS included) is dropped, or None."""
    if not token_ids or token_ids[-1] not in set(eos_token_ids):
        return "answer not closed"
    body = token_ids[:-1]
    if len(body) < min_tokens:
        return "answer short"
    if not set(special_ids).isdisjoint(body):
        return "special-token text"
    if repetition(body) >= max_repetition:
        return "repetition"
    return None


def has_special_text(text: str, special_texts: Iterable[str]) -> bool:
    """Whether the text spells a special token, e.g. `<|im_end|>` written with ordinary tokens."""
    return any(special in text for special in special_texts)
