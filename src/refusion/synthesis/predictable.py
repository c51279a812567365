"""Verifiable tasks a 135M-parameter model can learn, with low-entropy answers: the yardstick for predictable text.

    python -m refusion.synthesis.predictable --seed 1 --count 1000 --exclude heldout.jsonl > rows.jsonl

Rows are {"family", "query", "response", "check"}. Any seed below 10**6 is free for training; the held-out rows are seed 10**6, and a
training row whose query is among them is dropped. The same seed gives the same rows everywhere; standard library only. Running the
tests of python rows is left to `refusion.evaluation.sandbox`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypedDict

HELD_OUT_SEED = 10**6

# ruff: noqa: SIM905 - word lists read better as text
NAMES = "Ana Ben Carla David Eva Farid Greta Hugo Ines Jonas Karin Leo Maya Nils Olga Pavel Rosa Sami Tara Umar".split()
CITIES = "Oslo Lima Cairo Porto Kyoto Quito Delhi Turin Accra Perth Dublin Bergen Malaga Tunis Lyon".split()
JOBS = "nurse pilot baker tailor farmer teacher welder painter dentist librarian plumber gardener".split()
WORDS = (
    "apple river stone candle window garden silver planet bridge forest pencil market engine basket mirror rocket "
    "island button ladder copper violin thunder carpet lantern marble saddle anchor helmet kettle pillow"
).split()


class Check(TypedDict, total=False):
    """How an answer is judged: `type` is exact, final, json or python; the others hold what the type compares with."""

    type: str
    answer: object
    tests: list[str]


class Row(TypedDict):
    """One task."""

    family: str
    query: str
    response: str
    check: Check


Draft = tuple[str, str, Check]  # query, response, check


def make(seed: int, count: int) -> list[Row]:
    """`count` rows, the families in turn; deterministic in `seed`."""
    r = random.Random(seed)
    rows: list[Row] = []
    for i in range(count):
        family = FAMILIES[i % len(FAMILIES)]
        query, response, rule = family(r)
        rows.append({"family": family.__name__, "query": query, "response": response, "check": rule})
    return rows


def make_training_rows(seed: int, count: int, held_out_queries: Iterable[str]) -> list[Row]:
    """Rows of a training seed without repeated and without held-out queries; up to `count` of them are left."""
    assert seed < HELD_OUT_SEED, f"seed {seed} is not below {HELD_OUT_SEED}, which is the held-out one"
    seen = set(held_out_queries)
    rows = []
    for row in make(seed, count):
        if row["query"] not in seen:
            seen.add(row["query"])
            rows.append(row)
    return rows


def check(row: Row, text: str) -> bool | None:
    """True if `text` answers `row`; for python rows True/None = has a code block/has none, and the tests are still to be run."""
    rule, text = row["check"], text.strip()
    kind, answer = rule.get("type"), rule.get("answer")
    if kind == "exact":
        return text == answer
    if kind == "final":
        found = re.findall(r"Answer: (-?\d+)", text)
        return bool(found) and found[-1] == answer
    if kind == "json":
        try:
            return json.loads(text) == answer
        except (ValueError, RecursionError):
            return False
    return True if code_block(text) is not None else None


def code_block(text: str) -> str | None:
    """The first ```python block of an answer, or None."""
    block = re.search(r"```python\n(.*?)```", text, re.S)
    return block.group(1) if block else None


def addition(r: random.Random) -> Draft:
    a, b = r.randint(100, 99999), r.randint(100, 99999)
    x, y, carry, lines, out = str(a)[::-1], str(b)[::-1], 0, [], ""
    for i in range(max(len(x), len(y))):
        p, q = int(x[i]) if i < len(x) else 0, int(y[i]) if i < len(y) else 0
        s = p + q + carry
        lines.append(f"{p} + {q} + {carry} = {s}: write {s % 10}, carry {s // 10}")
        out, carry = str(s % 10) + out, s // 10
    response = "\n".join(lines) + f"\nAnswer: {a + b}"
    return f"Add {a} and {b} digit by digit, from the right.", response, {"type": "final", "answer": str(a + b)}


def shopping(r: random.Random) -> Draft:
    who, thing = r.choice(NAMES), r.choice(WORDS)
    n, price = r.randint(2, 12), r.randint(2, 25)
    paid = n * price + r.randint(1, 40)
    change = paid - n * price
    query = f"{who} buys {n} {thing}s for {price} coins each and pays with {paid} coins. How much change does {who} get? Show the steps."
    response = (
        f"{who} buys {n} {thing}s at {price} coins each.\nCost: {n} * {price} = {n * price} coins.\n"
        f"Change: {paid} - {n * price} = {change} coins.\nAnswer: {change}"
    )
    return query, response, {"type": "final", "answer": str(change)}


def sort_words(r: random.Random) -> Draft:
    words = r.sample(WORDS, r.randint(4, 9))
    response = "\n".join(f"{i}. {word}" for i, word in enumerate(sorted(words), 1))
    return f"Sort these words alphabetically as a numbered list: {', '.join(words)}", response, {"type": "exact", "answer": response}


def to_json(r: random.Random) -> Draft:
    count = r.randint(1, 3)
    people = [{"name": name, "age": r.randint(18, 80), "job": r.choice(JOBS), "city": r.choice(CITIES)} for name in r.sample(NAMES, count)]
    said = " ".join(f"{x['name']} is a {x['age']}-year-old {x['job']} from {x['city']}." for x in people)
    query = f"Write as a JSON list with the keys name, age, job, city: {said}"
    return query, json.dumps(people, indent=2), {"type": "json", "answer": people}


def table(r: random.Random) -> Draft:
    people = r.sample(NAMES, r.randint(2, 5))
    rows = [(person, r.choice(CITIES), r.randint(1, 99)) for person in people]
    response = "| name | city | points |\n| --- | --- | --- |\n" + "\n".join(f"| {a} | {b} | {c} |" for a, b, c in rows)
    said = "; ".join(f"{a}, {b}, {c}" for a, b, c in rows)
    query = f"Make a markdown table with the columns name, city, points: {said}"
    return query, response, {"type": "exact", "answer": response}


def multiples(r: random.Random) -> Draft:
    n, first, count = r.randint(3, 199), r.randint(1, 40), r.randint(5, 15)
    response = "\n".join(f"{n} * {i} = {n * i}" for i in range(first, first + count))
    query = f"Write the multiplication table of {n} from {first} to {first + count - 1}."
    return query, response, {"type": "exact", "answer": response}


def function(r: random.Random) -> Draft:
    name, k, c = "_".join(r.sample(WORDS, 2)), r.randint(2, 9), r.randint(1, 50)
    query, body, tests = FUNCTIONS[r.randrange(len(FUNCTIONS))](name, k, c)
    return query, f"```python\n{body}\n```", {"type": "python", "tests": tests}


def scale_numbers(name: str, k: int, c: int) -> tuple[str, str, list[str]]:
    query = f"Write a Python function {name}(numbers) that multiplies every number by {k}, adds {c} and returns the list."
    body = (
        f"def {name}(numbers):\n    result = []\n    for number in numbers:\n"
        f"        result.append(number * {k} + {c})\n    return result"
    )  # fmt: skip
    return query, body, [f"assert {name}([1, 2, 3]) == {[x * k + c for x in (1, 2, 3)]}", f"assert {name}([]) == []"]


def sum_above(name: str, k: int, c: int) -> tuple[str, str, list[str]]:
    query = f"Write a Python function {name}(numbers) that returns the sum of the numbers greater than {c}."
    body = (
        f"def {name}(numbers):\n    total = 0\n    for number in numbers:\n        if number > {c}:\n"
        f"            total += number\n    return total"
    )  # fmt: skip
    return query, body, [f"assert {name}([{c}, {c + 1}, {c + 5}, 0]) == {2 * c + 6}", f"assert {name}([]) == 0"]


def long_words(name: str, k: int, c: int) -> tuple[str, str, list[str]]:
    query = f"Write a Python function {name}(text) that returns the words of the text longer than {k} letters."
    body = (
        f"def {name}(text):\n    result = []\n    for word in text.split():\n        if len(word) > {k}:\n"
        f"            result.append(word)\n    return result"
    )  # fmt: skip
    return query, body, [f"assert {name}('{'a' * k} {'b' * (k + 1)} c') == ['{'b' * (k + 1)}']", f"assert {name}('') == []"]


def count_items(name: str, k: int, c: int) -> tuple[str, str, list[str]]:
    query = f"Write a Python function {name}(items) that counts how often each item occurs and returns a dictionary, ignoring the item {c}."
    body = (
        f"def {name}(items):\n    counts = {{}}\n    for item in items:\n        if item == {c}:\n            continue\n"
        f"        counts[item] = counts.get(item, 0) + 1\n    return counts"
    )  # fmt: skip
    return query, body, [f"assert {name}([{c}, {c + 1}, {c + 1}]) == {{{c + 1}: 2}}", f"assert {name}([]) == {{}}"]


FUNCTIONS: list[Callable[[str, int, int], tuple[str, str, list[str]]]] = [scale_numbers, sum_above, long_words, count_items]
FAMILIES: list[Callable[[random.Random], Draft]] = [addition, shopping, sort_words, to_json, table, multiples, function]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write predictable training rows as JSON lines.")
    parser.add_argument("--seed", type=int, default=1, help="below 10**6 for training")
    parser.add_argument("--count", type=int, default=1000, help="rows drawn, before repeated and held-out queries are dropped")
    parser.add_argument("--exclude", type=Path, help="JSONL file whose queries are dropped, as are repeated ones")
    args = parser.parse_args()
    if args.exclude is None:
        rows = make(args.seed, args.count)
    else:
        held_out = [json.loads(line)["query"] for line in args.exclude.read_text().splitlines()]
        rows = make_training_rows(args.seed, args.count, held_out)
    sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
