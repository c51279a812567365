"""The figures of `refusion bench` as a picture: tokens per second by decoder and batch size, a forward by its rows. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refusion.atomic import atomic_file
from refusion.errors import ConfigError

FORMATS = (".png", ".svg", ".pdf")


def check_format(path: Path) -> None:
    """Raises ConfigError for a file name that says no format, and ModuleNotFoundError without matplotlib."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"plot is {str(path)!r}; it must end in one of {', '.join(FORMATS)}")
    import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]  (an extra; its absence is told before anything is measured)


def plot_speed(content: dict[str, Any], path: Path) -> None:
    """Draw the content of a result file of `refusion.evaluation.speed`."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  (without pyplot: no display, no global state)

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, [run for run in content["runs"] if "tokens_per_second" in run["figures"]])
    _forwards(right, next(run["figures"] for run in content["runs"] if run["label"] == "forward"))
    figure.suptitle(f"{content['settings']['model']}, {content['machine'].get('gpu') or content['machine']['cpu']}")
    with atomic_file(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(axes: Any, runs: list[dict[str, Any]]) -> None:
    sizes = list(dict.fromkeys(run["settings"]["concurrency"] for run in runs))
    decoders = list(dict.fromkeys(run["settings"]["decoder"] for run in runs))
    width = 0.8 / len(decoders)
    for place, decoder in enumerate(decoders):
        mine = [run for run in runs if run["settings"]["decoder"] == decoder]
        where = [sizes.index(run["settings"]["concurrency"]) + (place - (len(decoders) - 1) / 2) * width for run in mine]
        axes.bar(where, [run["figures"]["tokens_per_second"] for run in mine], width, label=decoder)
    axes.set_xticks(range(len(sizes)), [f"batch {size}" for size in sizes])
    axes.set_ylabel("tokens/s")
    axes.legend(frameon=False)


def _forwards(axes: Any, figures: dict[str, float]) -> None:
    widths = [int(name.removeprefix("forward_ms_")) for name in figures]
    axes.plot(widths, list(figures.values()), marker="o")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of a forward")
    axes.set_ylabel("ms")
