"""Made-up questions in GPQA's column layout, so that the task can be tried end to end where its authors' rows are not at hand.

    python benchmarks/made_up_gpqa.py DIR                              # writes DIR/gpqa/train.csv
    refusion eval --tasks gpqa --data DIR --output made-up.json

GPQA's own rows come from its authors only and belong into no repository. These are arithmetic and logic that a child can do, drawn from a
seed: a score on them says nothing about GPQA. Every `Record ID` begins with "made-up", from which `refusion eval` knows them: the result
is called `gpqa_made_up`, "GPQA (made-up rows)", and counts in no mean. Columns are those of the hub that lm-eval's gpqa tasks read, and
four more that tell what a row is.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import harness

from refusion.atomic import atomic_file
from refusion.errors import ConfigError, DataError
from refusion.evaluation.benchmark_data import MADE_UP, read_table

COLUMNS: tuple[str, ...] = (
    "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3",
    "Explanation", "Subdomain", "High-level domain", "Record ID",
)  # fmt: skip
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gita", "Hugo")
MOST_QUESTIONS = 10_000
"""Well below the number of different ones that can be made."""
Drawn = tuple[str, str, Iterable[str]]
"""A question, the right answer, and wrong ones to choose from, most tempting first; some may equal the right one or each other."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder for `refusion eval --data`; DIR/gpqa is written")
    parser.add_argument("--questions", type=int, default=198, help="so many; by default as many as GPQA diamond has")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 1 <= args.questions <= MOST_QUESTIONS:
        raise ConfigError(f"questions is {args.questions}; it must be in [1, {MOST_QUESTIONS}]")
    target = args.folder / "gpqa" / "train.csv"
    check_free(target)
    write(target, rows(args.questions, args.seed))
    print(f"written {target}: {args.questions} made-up questions, not GPQA", file=sys.stderr)


def check_free(target: Path) -> None:
    """Raises DataError if there is anything in the folder but what this script writes: real rows must neither be lost nor hidden."""
    others = [path for path in sorted(target.parent.glob("*")) if path != target]
    if target.exists() and not all(row.get("Record ID", "").startswith(MADE_UP) for row in read_table(target)):
        others = [target]
    if others:
        raise DataError(f"{others[0]} is there already and not made up; choose another folder")


def write(target: Path, made: list[dict[str, str]]) -> None:
    with atomic_file(target) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(made)


def rows(num_questions: int, seed: int) -> list[dict[str, str]]:
    """So many different questions, the kinds in turn."""
    generator = random.Random(seed)
    found: dict[str, dict[str, str]] = {}
    for number in range(100 * MOST_QUESTIONS):
        kind = KINDS[number % len(KINDS)]
        question, right, tempting = kind(generator)
        wrong = list(islice((answer for answer in dict.fromkeys(tempting) if answer != right), 3))
        assert len(wrong) == 3, f"{kind.__name__} has {wrong} beside {right}"
        about = {"Explanation": "By construction.", "Subdomain": kind.__name__, "High-level domain": "made up"}
        options = {f"Incorrect Answer {i}": answer for i, answer in enumerate(wrong, 1)}
        name = {"Record ID": f"{MADE_UP}-{seed}-{number}"}
        found.setdefault(question, {"Question": question, "Correct Answer": right} | options | about | name)
        if len(found) == num_questions:
            return list(found.values())
    raise AssertionError("the kinds say the same again and again")


def arithmetic(generator: random.Random) -> Drawn:
    first, second, third = (generator.randint(2, 40) for _ in range(3))
    right = first + second * third
    near = (right + off for off in (1, -1, 10))
    return f"What is {first} + {second} * {third}?", str(right), map(str, ((first + second) * third, *near))


def remainder(generator: random.Random) -> Drawn:
    divisor = generator.randint(5, 12)
    number = generator.randint(30, 300)
    right = number % divisor
    others = ((right + off) % divisor for off in range(1, 4))
    return f"What is left when {number} is divided by {divisor}?", str(right), map(str, others)


def sequence(generator: random.Random) -> Drawn:
    first, step = generator.randint(1, 60), generator.randint(2, 15)
    shown = [first + step * i for i in range(4)]
    right = first + step * 4
    near = (right + off for off in (-1, 1, step, 2))
    return f"Which number comes next?\n{', '.join(map(str, shown))}, ...", str(right), map(str, near)


def order(generator: random.Random) -> Drawn:
    oldest, second, third, youngest = generator.sample(NAMES, 4)
    facts = [f"{one} is older than {other}." for one, other in ((oldest, second), (second, third), (third, youngest))]
    generator.shuffle(facts)
    asked, right = generator.choice((("oldest", oldest), ("youngest", youngest)))
    return f"{' '.join(facts)} Who is the {asked}?", right, (oldest, second, third, youngest)


def conclusion(generator: random.Random) -> Drawn:
    first, second, third = generator.sample(("blick", "dax", "fep", "gorp", "lum", "plim", "toma", "wug"), 3)
    right = f"Every {first} is a {third}."
    others = (f"Every {third} is a {first}.", f"No {first} is a {third}.", f"Every {second} is a {first}.")
    return f"Every {first} is a {second}, and every {second} is a {third}. What follows?", right, others


KINDS: tuple[Callable[[random.Random], Drawn], ...] = (arithmetic, remainder, sequence, order, conclusion)


if __name__ == "__main__":
    harness.script(main)
