"""Check that the modules of `refusion` import only downward; prints each offence as FILE:LINE and exits with 1.

Imports inside functions and under TYPE_CHECKING count too. The order is the one of CONTRIBUTING.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "refusion"
TIERS = (
    ("errors",),
    ("atomic", "checkpoint"),
    ("slots", "tokenizer", "deltas", "adapter", "download", "gguf_import"),
    ("hub", "convert"),
    ("model",),
    ("decoding",),
    ("engine",),
    ("llm",),
    ("serving", "evaluation", "synthesis", "training"),
    ("cli",),
    ("__init__", "__main__"),
)
"""Lowest first. A unit is a top-level module or package; it may import itself and what stands in a lower tier."""

TRAINING_STANDS_ON = ("errors", "atomic", "checkpoint", "slots", "tokenizer", "deltas", "adapter", "hub", "convert")

_RANK = {unit: rank for rank, units in enumerate(TIERS) for unit in units}
_CONSTANTS = {"__version__"}


def main(root: Path) -> int:
    """Check every module below `root`, the directory of the package; returns the exit code."""
    offences = [offence for file in sorted(root.rglob("*.py")) for offence in find_offences(file, root)]
    for offence in offences:
        print(offence, file=sys.stderr)
    print(f"import direction: {len(offences)} offences in {root}")
    return 1 if offences else 0


def find_offences(file: Path, root: Path) -> Iterator[str]:
    """The imports of one file that point sideways or upward."""
    unit = file.relative_to(root).parts[0].removesuffix(".py")
    if unit not in _RANK:
        yield f"{file}:1: {unit} has no place in the order; add it to TIERS in tools/check_imports.py"
        return
    for line, imported in _imported_units(file, root):
        if imported not in _RANK:
            yield f"{file}:{line}: imports {PACKAGE}.{imported}, which has no place in the order"
        elif not _is_allowed(unit, imported):
            yield f"{file}:{line}: {unit} must not import {imported}"


def _is_allowed(unit: str, imported: str) -> bool:
    if unit == imported:
        return True
    if unit == "training":
        return imported in TRAINING_STANDS_ON
    return _RANK[imported] < _RANK[unit]


def _imported_units(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, unit) of every import of this package in `file`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, file, root)
            names = [f"{PACKAGE}.{alias.name}" for alias in node.names] if module == PACKAGE else [module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE and len(parts) > 1 and parts[1] not in _CONSTANTS:
                yield node.lineno, _unit(parts[1], root)


def _absolute(node: ast.ImportFrom, file: Path, root: Path) -> str:
    """The module that `from X import ...` names, relative ones resolved."""
    if not node.level:
        return node.module or ""
    parents = [PACKAGE, *file.relative_to(root).parts[:-1]]
    return ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])


def _unit(name: str, root: Path) -> str:
    """A submodule's name, or "llm" for the names that the package forwards from there."""
    return name if name in _RANK or (root / name).exists() or (root / f"{name}.py").exists() else "llm"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "src" / PACKAGE))
