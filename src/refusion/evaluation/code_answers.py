"""From a model's answer to a program, and whether it passes: HumanEval and MBPP.

What runs, runs in the sandbox. The reduction to what an entry point needs follows EvalPlus (github.com/evalplus/evalplus, sanitize.py) in
what it keeps, and Python in which of several definitions of a name counts: the last.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from refusion.evaluation.sandbox import SandboxLimits, run_python

LIMITS = SandboxLimits(seconds=10.0)
"""Generous: the published solution of MBPP/123 computes for three seconds on an idle core."""

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|$)", re.DOTALL)
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def humaneval_programs(resps: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A filter of lm-eval: the prompt and the code of the answer's first fence, reduced to what the entry point needs."""
    return [[humaneval_program(doc["prompt"], answer, doc["entry_point"]) for answer in answers] for answers, doc in _each(resps, docs)]


def humaneval_program(prompt: str, answer: str, entry_point: str) -> str:
    """The answer begins inside a fence that the prompt opened, but may open one of its own."""
    code = answer.split("```python\n", 1)[-1].split("```")[0]
    return reduce_to(f"{prompt}\n{code}", entry_point, keep=_names_in(longest_valid(prompt)))


def mbpp_programs(resps: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A filter of lm-eval: the code of the first fence where there is one, else the answer as it stands."""
    return [[first_block(answer) for answer in answers] for answers, _ in _each(resps, docs)]


def first_block(answer: str) -> str:
    """The code of the first fence, closed or not, or the whole answer if there is none; `[BEGIN]` and `[DONE]` are no code."""
    match = _FENCED.search(answer)
    code = match.group(1) if match else answer
    return code.replace("[BEGIN]", "").split("[DONE]")[0]


def pass_at_1(references: Sequence[str], predictions: Sequence[Sequence[str]], **_: Any) -> float:
    """Share of programs after which the test of their row runs to its end. A metric of lm-eval, which hands over one row at a time."""
    passed = [run_python(program[0], [test], LIMITS).passed for test, program in zip(references, predictions, strict=True)]
    return sum(passed) / len(passed)


def reduce_to(code: str, entry_point: str, keep: Iterable[str] = ()) -> str:
    """Imports, and the definitions that `entry_point` and `keep` need, of the longest run of lines that is Python.

    Calls at top level, prints and examples go, so that what an answer says beside its function cannot fail it. Where the entry point is
    not defined, nothing is taken away. `keep` is for helpers of the prompt: the tests of HumanEval/32, 38 and 50 call them.
    """
    code = longest_valid(code)
    imports, definitions = [], {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(node)
        else:
            definitions.update(dict.fromkeys(_defined_names(node), node))
    if entry_point not in definitions:
        return code
    needed = _reachable({entry_point, *keep} & definitions.keys(), definitions)
    kept = [*imports, *sorted({definitions[name] for name in needed}, key=lambda node: node.lineno)]
    lines = code.splitlines()
    return "\n".join("\n".join(lines[_first_line(node) - 1 : node.end_lineno]) for node in kept)


def longest_valid(text: str) -> str:
    """The longest run of consecutive lines that parses; an answer cut off by its length ends in the middle of a statement."""
    lines = text.splitlines()
    for length in range(len(lines), 0, -1):
        for start in range(len(lines) - length + 1):
            candidate = "\n".join(lines[start : start + length])
            if _is_python(candidate):
                return candidate
    return ""


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all of them are how the parser refuses a text
        return False
    return True


def _names_in(code: str) -> set[str]:
    return {name for node in ast.parse(code).body for name in _defined_names(node)}


def _defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, _Definition):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _first_line(node: ast.stmt) -> int:
    """Decorators stand above the line that a definition is said to begin in."""
    decorators = node.decorator_list if isinstance(node, _Definition) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _reachable(roots: set[str], definitions: dict[str, ast.stmt]) -> set[str]:
    found, waiting = set(roots), sorted(roots)
    while waiting:
        used = {name.id for name in ast.walk(definitions[waiting.pop()]) if isinstance(name, ast.Name)}
        new = (used & definitions.keys()) - found
        found |= new
        waiting += sorted(new)
    return found


def _each(resps: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> Iterator[tuple[Sequence[str], dict[str, Any]]]:
    return zip(resps, docs, strict=True)
