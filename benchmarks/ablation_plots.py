"""Draw docs/ablations-*.svg from result files of ablations.py: accuracy and agreement against speed over autoregressive decoding, by group.

pip install 'refusion[plot]'
python benchmarks/ablation_plots.py

Speed is the ratio to autoregressive decoding that took turns with the arm: where the host was disturbed, both are slow.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import harness

from refusion.atomic import atomic_file
from refusion.errors import DataError
from refusion.evaluation.results import read_result

INPUTS = [harness.RESULTS / f"ablations-{name}-h200.json" for name in ("slots", "infill")]
MARKERS, NUM_COLOURS = "os^D", 10
"""Where the colours begin again, another marker tells the arms apart."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the ablations.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--input", type=Path, nargs="+", default=INPUTS, help="result files of one checkpoint; an arm that several have is the first's"
    )
    parser.add_argument("--output", type=Path, default=harness.ROOT / "docs", help="folder of the plots")
    args = parser.parse_args()
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for path in args.input:
        for run in read_result(path)["runs"]:
            if "over_autoregressive" in run["figures"]:
                groups.setdefault(run["settings"]["group"], {}).setdefault(run["settings"]["label"], run)
    if not groups:
        raise DataError(f"{', '.join(map(str, args.input))}: no arm with a speed")
    for group, runs in groups.items():
        if len(runs) == 1:
            continue  # nothing to compare
        path = args.output / f"ablations-{group}.svg"
        draw(group, list(runs.values()), path)
        print(f"written {path}")


def draw(group: str, runs: list[dict[str, Any]], path: Path) -> None:
    """Accuracy with its interval against speed over autoregressive decoding; where there is chat, agreement beside it."""
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]  (an extra)
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise DataError("plots need matplotlib; install it with `pip install 'refusion[plot]'`") from error

    names = [name for name in ("accuracy", "chat_agreement") if all(name in run["figures"] for run in runs)]
    with matplotlib.rc_context({"svg.hashsalt": group, "svg.fonttype": "none"}):  # the same figures give the same file
        figure = Figure(figsize=(5 * len(names), 4.4), layout="constrained")
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            for number, run in enumerate(runs):
                found, speed = run["figures"][name], run["figures"]["over_autoregressive"]
                low, high = (100 * abs(found["value"] - found[side]) for side in ("low", "high"))
                label = run["settings"]["label"] if axes is panels[0] else None  # one legend for both: labels beside points overlap
                axes.errorbar(
                    [speed], [100 * found["value"]], yerr=[[low], [high]], fmt=MARKERS[number // NUM_COLOURS], capsize=2, label=label
                )
            axes.axvline(1.0, linestyle=":", color="grey")
            axes.set_xlabel("tokens/s at batch 1 over autoregressive (dotted: 1)")
            axes.set_ylabel({"accuracy": "right answers, %", "chat_agreement": "agreement on chat, %"}[name])
        figure.suptitle(group)
        figure.legend(loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
        with atomic_file(path) as draft:
            figure.savefig(draft, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    harness.script(main)
