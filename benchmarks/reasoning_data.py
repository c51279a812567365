"""Write the rows of four families of reasoning-gym: rg_FAMILY.jsonl.gz for training, rg_heldout.jsonl.gz to measure with.

    pip install 'refusion[comparison]'
    python benchmarks/reasoning_data.py --output runs/data

Seeds of training and held-out rows differ, and training rows whose query is held out are dropped. Training and scoring need these files
alone. Problems come from reasoning-gym (Apache-2.0); the texts in which `letter_counting` counts are Jules Verne's "In the Year 2889"
(public domain, Project Gutenberg), the words of `spell_backward` are that package's list of English words.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness

from refusion.synthesis.jsonl import write_rows
from refusion.synthesis.reasoning import FAMILIES, HELD_OUT_SEED, make_rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Write problems of reasoning-gym.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the files")
    parser.add_argument("--train", type=int, default=10000, help="training problems of each family, before repeated ones are dropped")
    parser.add_argument("--held-out", type=int, default=500, help="held-out problems of each family")
    parser.add_argument("--seed", type=int, default=1, help="of the training problems")
    args = parser.parse_args()
    if args.seed == HELD_OUT_SEED:
        parser.error(f"--seed {HELD_OUT_SEED} is the held-out one")
    held_out = []
    for family in FAMILIES:
        # Repeated questions are dropped, so some more are drawn.
        held_out += make_rows(family, HELD_OUT_SEED, args.held_out + args.held_out // 4 + 20)[: args.held_out]
    write_rows(args.output / "rg_heldout.jsonl.gz", held_out)
    print(f"rg_heldout.jsonl.gz: {len(held_out)} rows")
    queries = {row["query"] for row in held_out}
    for family in FAMILIES:
        rows = make_rows(family, args.seed, args.train, queries)
        path = args.output / f"rg_{family}.jsonl.gz"
        write_rows(path, rows)
        print(f"{path.name}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    harness.script(main)
