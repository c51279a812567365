"""Which self-written pairs are kept: closed, not repetitive, long enough, free of special-token text, new.

Every reason a pair can be dropped for has a name, so that a run can say what became of its drafts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

Reason = Literal["query not closed", "query empty", "duplicate query", "held-out query", "answer not closed", "answer short", "repetition", "special-token text"]  # fmt: skip
REASONS: tuple[str, ...] = get_args(Reason)


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same sequence, 0 for fewer than two n-grams."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def normalised(query: str) -> str:
    """The form in which two queries count as the same: lower case, words only, single spaces."""
    return re.sub(r"[\W_]+", " ", query.lower()).strip()


class QueryFilter:
    """Remembers the queries seen so far; `held_out` ones are never let through."""

    def __init__(self, held_out: Iterable[str] = ()) -> None:
        self.held_out = {normalised(query) for query in held_out}
        self.seen: set[str] = set()

    def reason(self, query: str) -> Reason | None:
        """Why the query is dropped, or None after noting it as seen."""
        key = normalised(query)
        if not key:
            return "query empty"
        if key in self.held_out:
            return "held-out query"
        if key in self.seen:
            return "duplicate query"
        self.seen.add(key)
        return None


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
