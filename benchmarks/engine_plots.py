"""Draw docs/engine-*.svg from result files: a forward by its rows over its floor, and tokens a second by how many requests run together.

pip install 'refusion[plot]'
python benchmarks/engine_plots.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

from refusion.atomic import atomic_file
from refusion.errors import DataError
from refusion.evaluation.results import read_result

FORWARDS = [harness.RESULTS / f"{name}-h200.json" for name in ("forward", "forward-small")]
SERVING = harness.RESULTS / "serving-h200.json"
WIDTH = "forward_ms_"
DECODERS = {"autoregressive": "o-", "refusion": "s-", "auto": "^--"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the engine's speeds.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--forwards", type=Path, nargs="+", default=FORWARDS, help="result files of forward.py; a later one takes the place"
    )
    parser.add_argument("--serving", type=Path, default=SERVING, help="result file of serving.py")
    parser.add_argument("--output", type=Path, default=harness.ROOT / "docs", help="folder of the plots")
    args = parser.parse_args()
    lines = forward_lines(args.forwards)
    points = serving_points(args.serving)
    for name, paint in (
        ("forwards", lambda figure: draw_forwards(figure, lines)),
        ("serving", lambda figure: draw_serving(figure, points)),
    ):
        path = args.output / f"engine-{name}.svg"
        draw(name, paint, path)
        print(f"written {path}")


def forward_lines(paths: list[Path]) -> dict[str, dict[str, dict[int, float]]]:
    """Shape -> label of a line -> milliseconds by rows."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for path in paths:
        for run in read_result(path)["runs"]:
            rows = {int(key.removeprefix(WIDTH)): value_of(value) for key, value in run["figures"].items() if key.startswith(WIDTH)}
            if rows and not run["label"].endswith(("mark of an H100", "mark")):
                shape, label = run["label"].split(", ", 1)
                found.setdefault(shape, {})[label] = dict(sorted(rows.items()))
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: no forwards")
    return found


def serving_points(path: Path) -> dict[str, dict[int, float]]:
    """Decoder -> tokens a second by requests that run together."""
    found: dict[str, dict[int, float]] = {}
    for run in read_result(path)["runs"]:
        if "tokens_per_second" in run["figures"]:
            settings = run["settings"]
            found.setdefault(settings["decoder"], {})[settings["concurrency"]] = value_of(run["figures"]["tokens_per_second"])
    if not found:
        raise DataError(f"{path}: no speeds")
    return found


def value_of(figure: Any) -> float:
    return figure["value"] if isinstance(figure, dict) else figure


def draw(name: str, paint: Callable[[Any], None], path: Path) -> None:
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]  (an extra)
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise DataError("plots need matplotlib; install it with `pip install 'refusion[plot]'`") from error
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):  # the same figures give the same file
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        paint(figure)
        with atomic_file(path) as draft:
            figure.savefig(draft, format="svg", metadata={"Date": None})


def draw_forwards(figure: Any, lines: dict[str, dict[str, dict[int, float]]]) -> None:
    """A panel for each shape; a floor is dotted, in the colour of its forward."""
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for axes, (shape, found) in zip(panels, lines.items(), strict=True):
        colours: dict[str, Any] = {}
        for label, rows in sorted(found.items(), key=lambda item: item[0].endswith("floor")):
            cached = label.split(":")[0]
            is_floor = label.endswith("floor")
            (line,) = axes.plot(
                list(rows),
                list(rows.values()),
                ":" if is_floor else "o-",
                color=colours.get(cached),
                label=f"{cached}, weights and cache read once" if is_floor else cached,
            )
            colours.setdefault(cached, line.get_color())
        axes.set(title=shape, xlabel="new tokens of a forward", ylim=(0, None))
        axes.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel("milliseconds")


def draw_serving(figure: Any, points: dict[str, dict[int, float]]) -> None:
    """Speeds, and beside them what they are over autoregressive decoding."""
    figure.suptitle("the default model on chat")
    speeds, ratios = figure.subplots(1, 2)
    for decoder, form in DECODERS.items():
        if decoder not in points:
            continue
        counts = sorted(points[decoder])
        speeds.plot(counts, [points[decoder][count] for count in counts], form, label=decoder)
        shared = [count for count in counts if count in points.get("autoregressive", {})]
        ratios.plot(shared, [points[decoder][count] / points["autoregressive"][count] for count in shared], form)
    for axes in (speeds, ratios):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("requests that run together")
        axes.set_xticks(sorted({count for found in points.values() for count in found}))
        axes.xaxis.set_major_formatter("{x:.0f}")
    speeds.set(yscale="log", ylabel="tokens/s")
    ratios.set(ylabel="over autoregressive", ylim=(0, None))
    speeds.legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    harness.script(main)
