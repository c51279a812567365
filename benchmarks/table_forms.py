"""What the tables are made of: the runs of result files, rows of Markdown, and how a figure is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Source:
    """A result file as a marker names it."""

    stem: str
    title: str | None
    content: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One run of a result file with the title of its row."""

    title: str
    figures: dict[str, Any]


def lines_of(sources: Sequence[Source]) -> list[Line]:
    """All runs of all files; a file of one run goes by its title, the runs of others by their labels."""
    found = []
    for source in sources:
        runs = source.content["runs"] or [{"label": source.stem, "figures": source.content["figures"]}]
        for run in runs:
            label = source.title if source.title and len(runs) == 1 else ": ".join(filter(None, [source.title, run["label"]]))
            found.append(Line(label or source.stem, run["figures"]))
    return found


def rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    align = [":--", *["--:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, align, *body)]


def value_of(figure: Any) -> float | None:
    return figure["value"] if isinstance(figure, dict) else figure


def shown(figure: Any, form: str, factor: float = 1.0) -> str:
    value = value_of(figure)
    return "–" if value is None else format(factor * value, form)


def one(figure: Any) -> str:
    return shown(figure, ".1f")


def two(figure: Any) -> str:
    return shown(figure, ".2f")


def three(figure: Any) -> str:
    return shown(figure, ".3f")


def whole(figure: Any) -> str:
    return shown(figure, ",.0f")


def milliseconds(figure: Any) -> str:
    """Of seconds, in two or more digits."""
    value = value_of(figure)
    return shown(figure, ".1f" if value is not None and value < 0.01 else ",.0f", 1000)


def gigabytes(figure: Any) -> str:
    return shown(figure, ".1f", 1e-9)


def percent(figure: Any) -> str:
    return shown(figure, ".1f", 100) + (" %" if value_of(figure) is not None else "")


def hundredth_percent(figure: Any) -> str:
    return shown(figure, ".2f", 100) + (" %" if value_of(figure) is not None else "")


def plain(figure: Any) -> str:
    """Four digits, or a whole number where those would come with an exponent."""
    return shown(figure, ",.0f" if abs(value_of(figure) or 0.0) >= 9999.5 else ".4g")


def interval(figure: Any) -> str:
    if not isinstance(figure, dict) or figure["low"] is None:
        return "–"
    return f"{100 * figure['low']:.1f}–{100 * figure['high']:.1f}"


def with_interval(figure: Any) -> str:
    """A share in percent with its interval, where it has one."""
    return percent(figure) if interval(figure) == "–" else f"{percent(figure)} ({interval(figure)})"


def points(figure: Any) -> str:
    """A difference of shares in points with its interval."""
    if value_of(figure) is None:
        return "–"
    return f"{100 * figure['value']:+.1f} ({100 * figure['low']:+.1f} to {100 * figure['high']:+.1f})"


def times(figure: Any) -> str:
    """A ratio, with its interval where it has one."""
    if not isinstance(figure, dict):
        return shown(figure, ".2f") + ("×" if figure is not None else "")
    return f"{figure['value']:.2f}× ({figure['low']:.2f}–{figure['high']:.2f})"
