"""Figures of the controlled comparison made anew from its raw answers, over all seeds that they hold; no model and no GPU are needed.

    python benchmarks/comparison_again.py --raw benchmarks/results/raw/comparison-h200.tgz --input benchmarks/results/comparison-h200.json

Machine, versions, date, commit and command stay those of the result file, for nothing is measured here; its `notes` say that the figures
were made anew. With the seeds that a result file was written for, its figures come out again exactly.
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comparison
import comparison_figures
import harness
from tasks import NUM_HELD_OUT

from refusion.atomic import atomic_file
from refusion.errors import DataError
from refusion.evaluation.results import read_result, to_plain
from refusion.synthesis.predictable import HELD_OUT_SEED, make

NOTE = "Figures made anew from the raw answers by benchmarks/comparison_again.py; seeds {}."
KEY = re.compile(r"(?P<contender>\w+)/(?P<seed>\d+)@(?P<sha256>\w{12})/(?P<task>\w+)")
SIZES = {"gsm8k": 1319, "chain_sum": 500, "gcd": 500, "letter_counting": 500, "spell_backward": 500}
"""Problems of the tasks of one family; of the predictable ones the rows themselves are made, for the families they belong to."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures from raw answers.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--raw", type=Path, default=harness.RESULTS / "raw" / "comparison-h200.tgz", help="answers/ and reports/ of that run"
    )
    parser.add_argument("--input", type=Path, default=harness.RESULTS / "comparison-h200.json", help="the result file of that run")
    parser.add_argument("--output", type=Path, default=None, help="by default the same file")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="by default all there are")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        unpack(args.raw, Path(folder))
        content = again(read_result(args.input), Path(folder), args.seeds)
    with atomic_file(args.output or args.input) as draft:
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def unpack(raw: Path, state: Path) -> None:
    """The archive, with every report where one lies beside a trained model. Raises DataError if it cannot be read."""
    try:
        with tarfile.open(raw) as archive:
            archive.extractall(state, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot unpack {raw}: {error}") from error
    for path in (state / "reports").glob("comparison-*.json"):
        folder = state / "reports" / path.stem.removeprefix("comparison-")
        folder.mkdir()
        path.rename(folder / "report.json")


def again(content: dict[str, Any], state: Path, seeds: list[int] | None = None) -> dict[str, Any]:
    """The result file with the figures of all seeds, or of these."""
    # No `splitlines`: answers may hold U+2028 and its like.
    lines = [line for path in sorted((state / "answers").glob("*.jsonl")) for line in path.read_text(encoding="utf-8").split("\n")]
    rows = [json.loads(line) for line in lines if line]
    models = models_of(rows, content["settings"]["weights"], state, seeds)
    tasks = tasks_of(content["settings"]["chat_rows"])
    result = comparison_figures.result(rows, models, comparison.CONTENDERS, tasks, {})
    weights = {model.name: model.sha256 for model in models}
    note = NOTE.format(", ".join(map(str, sorted({model.seed for model in models}))))
    return content | {
        "settings": content["settings"] | {"weights": weights, "unfinished": result.settings["unfinished"]},
        "runs": [{name: value for name, value in to_plain(asdict(run)).items() if name != "series"} for run in result.runs],
        "notes": f"{content['notes']} {note}".strip() if note not in content["notes"] else content["notes"],
    }


def models_of(rows: list[dict[str, Any]], weights: dict[str, str], state: Path, seeds: list[int] | None) -> list[comparison.Model]:
    """Every model that answered. Where the result file has not its whole checksum, the first digits stand for it."""
    recipes = {contender.name: contender.trained_by for contender in comparison.CONTENDERS}
    found = {}
    for row in rows:
        key = KEY.fullmatch(row["task"])
        if key is None or key["contender"] not in recipes:
            raise DataError(f"{row['task']} is no key of an answer of the comparison")
        name = f"{recipes[key['contender']]}-{key['seed']}"
        sha256 = next((whole for whole in weights.values() if whole.startswith(key["sha256"])), key["sha256"])
        path = state / "reports" / name / "final"  # what matters is the report beside it
        found[name] = comparison.Model(recipes[key["contender"]], int(key["seed"]), path, sha256)
    return [model for _, model in sorted(found.items()) if seeds is None or model.seed in seeds]


def tasks_of(chat_rows: int) -> list[comparison.Task]:
    """Tasks of the sizes that were asked, in their order."""
    predictable = comparison.Task("predictable", [dict(row) for row in make(HELD_OUT_SEED, NUM_HELD_OUT)], 0)
    others = [comparison.Task(name, [{"family": name}] * size, 0) for name, size in SIZES.items()]
    return [predictable, *others, comparison.Task("chat", [{}] * chat_rows, 0)]


if __name__ == "__main__":
    harness.script(main)
