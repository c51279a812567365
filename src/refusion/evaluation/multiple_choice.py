"""Multiple-choice rows that have to be shuffled before they are asked. Which letter was answered is up to lm-eval's filters."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def shuffle_gpqa(rows: Dataset) -> Dataset:
    """Rows of GPQA with choice1 .. choice4 and the letter of the right one; the same row is shuffled alike in every run."""
    return rows.map(_shuffled)


def _shuffled(row: dict[str, Any]) -> dict[str, Any]:
    choices = [_clean(row[name]) for name in (*_WRONG, "Correct Answer")]
    right = choices[-1]
    random.Random(row["Question"]).shuffle(choices)
    letters = {f"choice{number}": choice for number, choice in enumerate(choices, 1)}
    return letters | {"choices": choices, "answer": f"({'ABCD'[choices.index(right)]})"}


def _clean(text: str | None) -> str:
    """As lm-eval's gpqa tasks prepare an option."""
    return " " if text is None else text.strip().replace(" [title]", ". ").replace("  ", " ")
