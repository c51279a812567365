"""Tiles of products chosen by the whole forward they stand in, not by the product alone: its neighbours share caches and launch slots.

    python benchmarks/kernels_linear_in_place.py --only smollm2-135m:64 qwen3-8b:1 --output runs/in-place
    python benchmarks/kernels_linear_in_place.py --tiny --output runs/in-place      # a dry run on a CPU: one forward, nothing chosen

For one product after the other the candidates of `kernels_linear_sweep` take the place of the table's choice, a forward is captured with
each and timed, and the fastest stays where it gains more than noise does. Whoever won is timed once more against the old choices, in turns.
The card's table is written below --output, with new entries where the forward as a whole got faster by 1 %; in_place.json has every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import forward as forwards
import kernels_linear_sweep as sweeping
import torch
from kernels_linear_products import Product, products

from refusion.model.kernels import config as configs
from refusion.model.kernels.config import TUNED, TUNED_BY_CARD, Config, card

CACHED = 500
REPEATS = 15
LEAST_GAIN = 0.004  # of a forward; medians of the same forward captured twice differ by less
WORTH_WRITING = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["smollm2-135m:64"], metavar="MODEL:ROWS", help="forwards to choose for")
    parser.add_argument("--output", type=Path, required=True, help="directory for the card's table and in_place.json")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="compile processes")
    parser.add_argument("--tiny", action="store_true", help="a toy forward on the CPU, whose operations have no tiles")
    args = parser.parse_args()
    if args.tiny:
        args.only = ["tiny:3"]
    args.output.mkdir(parents=True, exist_ok=True)
    table_file = TUNED if (known := card()) is None else TUNED_BY_CARD[known]
    table: dict[str, Any] = json.loads(table_file.read_text(encoding="utf-8"))
    log: list[dict[str, Any]] = []
    for name in args.only:
        model, rows = name.split(":")
        table |= chosen(model, int(rows), args, log)
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(table[key])}" for key in sorted(table))
        (args.output / table_file.name).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        (args.output / "in_place.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def chosen(model: str, rows: int, args: argparse.Namespace, log: list[dict[str, Any]]) -> dict[str, Any]:
    """New entries of the table for a forward of so many rows; none where nothing was gained."""
    device = torch.device("cpu" if args.tiny else "cuda")
    dtype = torch.float32 if args.tiny else torch.bfloat16
    bench = forwards.Bench(forwards.random_model(forwards.CASES[model].config, device, dtype), CACHED, None)
    if args.tiny:
        print(f"{model} T={rows}: {milliseconds(bench, rows):.3f} ms", flush=True)
        return {}
    tried = {product: candidates(product, rows) for product in products(model)}
    sweeping.compile_all([sweeping.Job(product, rows, config) for product in tried for config in tried[product] if config], args.workers)
    before = {product: configs.choose_config(*shape_of(product, rows), "bfloat16") for product in tried}
    best, now = dict(before), milliseconds(bench, rows)
    print(f"{model} T={rows}: {now:.4f} ms", flush=True)
    for product, options in tried.items():
        for config in options:
            if config == best[product]:
                continue
            use(product, rows, config)
            try:
                taken = milliseconds(bench, rows)
            except Exception as error:  # out of resources and the like: this candidate is lost
                print(f"  skipped {product.name} {config}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
                taken = None
            log.append({"forward": f"{model}:{rows}", "product": product.name, "config": plain(config), "milliseconds": taken})
            if taken is not None and taken < (1 - LEAST_GAIN) * now:
                best[product], now = config, taken
        use(product, rows, best[product])
        print(f"  {product.name:13} {now:.4f} ms  {best[product]}", flush=True)
    old, new = in_turns(bench, rows, before, best)
    log.append({"forward": f"{model}:{rows}", "before": old, "after": new})
    print(f"{model} T={rows}: {old:.4f} -> {new:.4f} ms", flush=True)
    if new > (1 - WORTH_WRITING) * old:
        for product, config in before.items():
            use(product, rows, config)
        return {}
    return {product.key(rows, "bfloat16"): plain(config) for product, config in best.items() if config != before[product]}


def candidates(product: Product, rows: int) -> list[Config | None]:
    """Those of the sweep, and the library's product where there is one."""
    found: list[Config | None] = list(sweeping.candidates(product, rows, sweeping.most_candidates(product, rows, None)))
    return found if product.kind == "readout" else [*found, None]


def use(product: Product, rows: int, config: Config | None) -> None:
    """What `choose_config` answers from now on for this product and so many rows."""
    entries = configs.tuned(card()).setdefault((product.kind, product.num_out, product.num_in, "bfloat16"), [])
    entries[:] = sorted([entry for entry in entries if entry[0] != rows] + [(rows, config)], key=lambda entry: entry[0])


def in_turns(bench: forwards.Bench, rows: int, before: dict[Product, Config | None], after: dict[Product, Config | None]) -> list[float]:
    """Milliseconds of the forward with the old choices and with the new ones."""
    taken: list[list[float]] = [[], []]
    for _ in range(3):
        for place, choice in enumerate((before, after)):
            for product, config in choice.items():
                use(product, rows, config)
            taken[place].append(milliseconds(bench, rows))
    return [statistics.median(each) for each in taken]


def milliseconds(bench: forwards.Bench, rows: int) -> float:
    return statistics.median(forwards.milliseconds(forwards.static_forward(bench, rows), bench.device, REPEATS))


def shape_of(product: Product, rows: int) -> tuple[int, int, int, Any]:
    return product.num_out, product.num_in, rows, product.kind


def plain(config: Config | None) -> dict[str, Any] | None:
    return None if config is None else config.to_dict()


if __name__ == "__main__":
    main()
