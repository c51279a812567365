"""The final answer of a text that works towards it: what stands behind the last mark of one, else the last number.

This is the "flexible" reading of lm-evaluation-harness's gsm8k tasks (regular expression for the last number, `,` and `$` ignored),
preceded by the marks that our training rows end with: `Answer: X`, `#### X` (GSM8K), `The answer is X`.
"""

from __future__ import annotations

import re

_MARKED = re.compile(r"(?:answer is:?|answer:|####)[ \t]*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def is_right(text: str, answer: str) -> bool:
    """Whether the final answer of `text` is `answer`, both normalised; where that is a number, words around the number do not matter."""
    wanted, found = normalised(answer), final_answer(text)
    if found is None:
        return False
    if normalised(found) == wanted:
        return True
    numbers = _NUMBER.findall(found)
    return _NUMBER.fullmatch(answer.strip()) is not None and bool(numbers) and normalised(numbers[-1]) == wanted


def final_answer(text: str) -> str | None:
    """What stands behind the last mark on its line; without a mark the last number; None without either."""
    found = _MARKED.findall(text) or _NUMBER.findall(text)
    return found[-1].strip() if found else None


def normalised(answer: str) -> str:
    """Lower case, no white space, quotes or full stop around; numbers without `,`, `$` and trailing decimal zeros."""
    answer = answer.strip().strip("\"'*` ").rstrip(".").strip("\"'*` ").lower()
    if _NUMBER.fullmatch(answer):
        answer = re.sub(r"[,$]", "", answer)
        answer = re.sub(r"\.0+$", "", answer)
    return answer
