"""Public training sets and installed Python packages as {"query", "response", "source"} rows.

Train splits only; the functions come from the standard library and from installed packages under BSD or Apache licences.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from refusion.errors import DataError
from refusion.synthesis.jsonl import read_rows

MIN_STATEMENTS = 2
MAX_SOURCE_CHARACTERS = 2400
"""Longer functions are skipped before their tokens are counted."""
SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "lib2to3", "_vendor", "vendor", "turtledemo"}


class Pair(TypedDict):
    """One training row."""

    query: str
    response: str
    source: str


def gsm8k(path: Path) -> Iterator[Pair]:
    """Word problems with worked answers; the calculator marks <<...>> go, the final `#### N` stays."""
    for place, row in read_rows(path):
        question, answer = (text_of(row, key, place) for key in ("question", "answer"))
        yield {"query": question.strip(), "response": re.sub(r"<<[^>]*>>", "", answer).strip(), "source": "gsm8k"}


def arc(path: Path) -> Iterator[Pair]:
    """Multiple-choice science questions; the answer names letter and text."""
    for place, row in read_rows(path):
        try:
            labels, texts = row["choices"]["label"], row["choices"]["text"]
            right = f"{row['answerKey']}. {texts[labels.index(row['answerKey'])]}"
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place}: not an ARC row ({error})") from error
        choices = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
        yield {"query": f"{text_of(row, 'question', place)}\n\n{choices}", "response": f"The answer is {right}", "source": "arc"}


def mbpp(path: Path) -> Iterator[Pair]:
    """Small Python problems with one of their tests in the query."""
    for place, row in read_rows(path):
        text, code = (text_of(row, key, place) for key in ("text", "code"))
        code = code.replace("\r\n", "\n").replace("\t", "    ").strip()
        test = (row.get("test_list") or [""])[0]
        yield {"query": f"{text.strip()}\nIt should pass this test: {test}", "response": fenced(code), "source": "mbpp"}


def functions(files: Iterable[tuple[Path, str]], count_tokens: Callable[[str], int], max_tokens: int = 300) -> Iterator[Pair]:
    """Docstring -> function pairs of (file, source name), without repeated bodies; at most `max_tokens` per answer."""
    seen: set[str] = set()
    for path, source in files:
        for query, code in functions_of(path):
            body = code.partition("\n")[2]
            if body in seen:
                continue
            seen.add(body)
            response = fenced(code)
            if count_tokens(response) <= max_tokens:
                yield {"query": query, "response": response, "source": source}


def functions_of(path: Path) -> Iterator[tuple[str, str]]:
    """(query, code) of every documented function of a file; files that do not parse have none."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__") and not node.decorator_list:
            pair = pair_of(node)
            if pair is not None:
                yield pair


def pair_of(node: ast.FunctionDef) -> tuple[str, str] | None:
    """The query (signature and first paragraph of the docstring) and the function without its docstring."""
    doc = ast.get_docstring(node)
    if not doc or len(node.body) < 1 + MIN_STATEMENTS or (node.end_lineno or 0) - node.lineno > 80:
        return None
    summary = " ".join(doc.split("\n\n")[0].split())
    if not 20 <= len(summary) <= 300 or not summary.isascii() or any(mark in summary for mark in (">>>", "::", "@", "{{")):
        return None
    node.body = node.body[1:]
    code = ast.unparse(node)
    if len(code) > MAX_SOURCE_CHARACTERS or not code.isascii():
        return None
    signature = f"{node.name}({ast.unparse(node.args)})"
    return f"Write the Python function `{signature}`: {summary}", code


def python_files() -> Iterator[tuple[Path, str]]:
    """Files of the standard library and of installed BSD and Apache packages with the name of their source, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    yield from ((path, "python") for path in sorted(library.rglob("*.py")) if is_wanted(path.relative_to(library)))
    found = {name.lower(): dist for dist in importlib.metadata.distributions() if (name := dist.metadata["Name"])}
    for name, dist in sorted(found.items()):
        if is_permissive(dist.metadata):
            files = sorted(str(file) for file in dist.files or [] if file.suffix == ".py" and is_wanted(Path(file)))
            yield from ((Path(str(dist.locate_file(file))), name) for file in files)


def is_wanted(path: Path) -> bool:
    return not SKIPPED_FOLDERS & set(path.parts) and not path.name.startswith("test_")


def is_permissive(metadata: Any) -> bool:
    """Whether a package says that it is under a BSD or Apache licence."""
    said = [metadata.get("License-Expression") or "", metadata.get("License") or "", *(metadata.get_all("Classifier") or [])]
    text = " ".join(line for line in said if len(line) < 200)  # a licence's whole text may mention others
    return bool(re.search(r"BSD|Apache", text)) and not re.search(r"GPL|MPL|Mozilla|Proprietary", text)


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def text_of(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{place}: `{key}` is missing or no text")
    return value
