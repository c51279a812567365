"""Verifiable tasks of four further families: problems of reasoning-gym, with worked answers a 135M-parameter model can learn to write.

Questions, gold answers and the judgement whether an answer is right are reasoning-gym's (PyPI, Apache-2.0); the steps are written here, and
every row is checked by its `score_answer` when it is made, so that whoever scores answers later needs no reasoning-gym. Rows are
{"family", "query", "response", "answer"}; the same seed gives the same rows with the same version of that package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypedDict

from refusion.errors import DataError

HELD_OUT_SEED = 10**6
"""Of the held-out problems; any seed below is free for training."""


class ReasoningRow(TypedDict):
    """One problem; `answer` is what a right text gives last."""

    family: str
    query: str
    response: str
    answer: str


@dataclass(frozen=True, slots=True)
class Family:
    """A data set of reasoning-gym: how its problems are drawn, asked and worked."""

    settings: dict[str, int]
    ask: Callable[[str], str]
    work: Callable[[dict[str, Any]], list[str]]
    """Steps from the `metadata` of a problem."""


def make_rows(family: str, seed: int, count: int, excluded: Collection[str] = ()) -> list[ReasoningRow]:
    """`count` problems drawn, less repeated questions and those in `excluded`. Raises DataError without the package."""
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]  (an extra)
    except ModuleNotFoundError as error:
        raise DataError(f"these problems need {error.name}; install it with `pip install 'refusion[comparison]'`") from error

    how = FAMILIES[family]
    problems = reasoning_gym.create_dataset(family, size=count, seed=seed, **how.settings)
    seen, rows = set(excluded), []
    for problem in problems:
        row = _row(family, how, problem)
        if row["query"] in seen:
            continue
        assert problems.score_answer(row["answer"], problem) == 1.0, f"{row['answer']!r} is no answer to {row['query']!r}"
        seen.add(row["query"])
        rows.append(row)
    return rows


def _row(family: str, how: Family, problem: dict[str, Any]) -> ReasoningRow:
    answer = str(problem["answer"])
    steps = how.work(problem["metadata"])
    return {"family": family, "query": how.ask(problem["question"]), "response": "\n".join([*steps, f"Answer: {answer}"]), "answer": answer}


def running_sum(metadata: dict[str, Any]) -> list[str]:
    """205 - 838 + 505: one line per operation."""
    total, *terms = metadata["expression"].split()
    value, lines = int(total), []
    for sign, term in zip(terms[::2], terms[1::2], strict=True):
        after = value + int(term) if sign == "+" else value - int(term)
        lines.append(f"{value} {sign} {term} = {after}")
        value = after
    return lines


def euclid(metadata: dict[str, Any]) -> list[str]:
    """The larger number modulo the smaller, until nothing is left."""
    small, large = sorted(metadata["numbers"])
    lines = []
    while small:
        lines.append(f"{large} = {large // small} * {small} + {large % small}")
        small, large = large % small, small
    return lines


def letters_by_word(metadata: dict[str, Any]) -> list[str]:
    """How often the letter occurs in each word, and the running count."""
    letter, count, lines = metadata["target_letter"], 0, []
    for word in metadata["span"]:
        found = word.lower().count(letter)
        count += found
        lines.append(f"{word}: {' '.join(word)}: {found}, together {count}")
    return lines


def spelled(metadata: dict[str, Any]) -> list[str]:
    """The letters one by one, forward and backward."""
    word = metadata["word"]
    return [f"Letters: {' '.join(word)}", f"Backward: {' '.join(reversed(word))}"]


def _with_steps(question: str) -> str:
    """reasoning-gym asks for the result alone; here the steps come first."""
    question = re.sub(r"\s*Give only the GCD as your final answer\.", "", question)
    question = question.replace("State the final answer to the following arithmetic problem:", "Solve the following arithmetic problem:")
    return f'{question.strip()}\nShow the steps and end with "Answer: " and the result.'


FAMILIES = {
    "chain_sum": Family({"max_terms": 5, "max_digits": 3}, _with_steps, running_sum),
    "gcd": Family({"max_value": 1000}, _with_steps, euclid),
    "letter_counting": Family({"min_words": 3, "max_words": 8}, _with_steps, letters_by_word),
    "spell_backward": Family({}, _with_steps, spelled),
}
