"""Draw docs/ablations-*.svg from the result file of ablations.py: accuracy (or agreement) against tokens per second, by group of arms.

pip install 'refusion[plot]'
python benchmarks/ablation_plots.py --input benchmarks/results/ablations-slots-h200.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import harness

from refusion.atomic import atomic_file
from refusion.errors import DataError
from refusion.evaluation.results import read_result

MARKERS, NUM_COLOURS = "os^D", 10
"""Where the colours begin again, another marker tells the arms apart."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the ablations.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--input", type=Path, default=harness.RESULTS / "ablations-slots-h200.json", help="result file of ablations.py")
    parser.add_argument("--output", type=Path, default=harness.ROOT / "docs", help="folder of the plots")
    args = parser.parse_args()
    content = read_result(args.input)
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in content["runs"]:
        if "tokens_per_second" in run["figures"]:
            groups.setdefault(run["settings"]["group"], []).append(run)
    if not groups:
        raise DataError(f"{args.input} holds no arm with tokens per second")
    for group, runs in groups.items():
        if len(runs) == 1:
            continue  # nothing to compare
        path = args.output / f"ablations-{group}.svg"
        draw(group, runs, path)
        print(f"written {path}")


def draw(group: str, runs: list[dict[str, Any]], path: Path) -> None:
    """Accuracy with its interval against tokens per second; where there is chat, agreement beside it."""
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
                found, speed = run["figures"][name], run["figures"]["tokens_per_second"]
                low, high = (100 * abs(found["value"] - found[side]) for side in ("low", "high"))
                label = run["settings"]["label"] if axes is panels[0] else None  # one legend for both: labels beside points overlap
                axes.errorbar(
                    [speed], [100 * found["value"]], yerr=[[low], [high]], fmt=MARKERS[number // NUM_COLOURS], capsize=2, label=label
                )
            axes.axvline(runs[0]["figures"]["autoregressive_tokens_per_second"], linestyle=":", color="grey")
            axes.set_xlabel("tokens/s at batch 1 (dotted: autoregressive)")
            axes.set_ylabel({"accuracy": "right answers, %", "chat_agreement": "agreement on chat, %"}[name])
        figure.suptitle(group)
        figure.legend(loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
        with atomic_file(path) as draft:
            figure.savefig(draft, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    harness.script(main)
