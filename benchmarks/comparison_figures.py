"""The figures of the controlled comparison from its log of answers: per model, per contender over seeds, differences and ratios of speed.

Intervals of one model are Wilson's; those over seeds and of differences resample problems and seeds (`refusion.evaluation.seeds`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from refusion.checkpoint import read_json
from refusion.evaluation.results import Figure, Result, Run
from refusion.evaluation.seeds import difference, mean_score, speed_ratio
from refusion.evaluation.statistics import pooled_ratio, wilson

if TYPE_CHECKING:
    from comparison import Contender, Model, Task

Row = dict[str, Any]
PAIRS = (
    ("refusion", "autoregressive"),
    ("refusion", "refusion_one_by_one"),
    ("refusion_one_by_one", "autoregressive"),
    ("refusion_few", "autoregressive"),
    ("refusion_sliding", "autoregressive"),
    ("refusion_few_sliding", "autoregressive"),
    ("refusion_sliding", "refusion"),
    ("refusion_few_sliding", "refusion_few"),
    ("refusion_few", "refusion"),
    ("refusion_few", "block_diffusion"),
    ("refusion", "block_diffusion"),
    ("block_diffusion", "masked_diffusion"),
    ("refusion", "masked_diffusion"),
    ("refusion", "refusion_paper"),
)
"""Whose accuracy is set against whose."""
CHAT = "chat"
TRAINING = ("steps", "examples", "seconds", "tokens_per_second", "packed_share", "validation_ar", "validation_mdm")
"""What the report of a training has that is worth a figure."""


def key_of(contender: str, seed: int, sha256: str, task: str) -> str:
    """What the rows of the log are told apart by."""
    return f"{contender}/{seed}@{sha256[:12]}/{task}"


def result(
    rows: Sequence[Row], models: Sequence[Model], contenders: Sequence[Contender], asked: Sequence[Task], settings: dict[str, Any]
) -> Result:
    """Runs of every model, every contender, every pair and every ratio; a task counts for who answered all of it."""
    table = _Table(rows, models, contenders, asked)
    runs = [*trainings(models), *table.models(), *table.contenders(), *table.differences(), *table.ratios()]
    return Result(name="comparison", settings=settings | {"unfinished": table.unfinished()}, runs=runs)


def trainings(models: Sequence[Model]) -> Iterator[Run]:
    """What the reports beside the models say."""
    for model in models:
        path = model.path.parent / "report.json"
        report = read_json(path) if path.exists() else {}
        figures = {name: report[name] for name in TRAINING if report.get(name)}  # a term that the objective lacks is 0
        if figures:
            yield Run(label=f"training of {model.name}", settings={"trained": model.name, "sha256": model.sha256}, figures=figures)


class _Table:
    def __init__(self, rows: Sequence[Row], models: Sequence[Model], contenders: Sequence[Contender], asked: Sequence[Task]) -> None:
        self.asked = [task for task in asked if task.name != CHAT]
        self.tasks = {task.name: task for task in asked}
        self.rows: dict[str, list[Row]] = {}
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            self.rows.setdefault(row["task"], []).append(row)
        self.pairs = [(contender, model) for contender in contenders for model in models if model.recipe == contender.trained_by]
        self.names = [contender.name for contender in contenders]

    def of(self, contender: Contender, model: Model, task: str) -> list[Row]:
        """Rows of one task if it is finished."""
        rows = self.rows.get(key_of(contender.name, model.seed, model.sha256, task), [])
        if task not in self.tasks:
            return rows
        size = contender.size(self.tasks[task])
        rows = [row for row in rows if row["doc_id"] < size]
        return rows if len(rows) == size else []

    def unfinished(self) -> list[str]:
        return [
            key_of(contender.name, model.seed, model.sha256, task)
            for contender, model in self.pairs
            if contender.is_main
            for task in self.tasks
            if not self.of(contender, model, task)
        ]

    def models(self) -> Iterator[Run]:
        for contender, model in self.pairs:
            figures: dict[str, Figure] = {}
            for task in self.asked:
                found = self.of(contender, model, task.name)
                if found:
                    figures |= _task_figures(task, found)
            figures |= self._chat_figures([(contender, model)])
            if figures:
                settings = {"contender": contender.name, "seed": model.seed, "sha256": model.sha256}
                yield Run(label=f"{contender.name} seed {model.seed}", settings=settings, figures=figures)

    def contenders(self) -> Iterator[Run]:
        """Over seeds: mean accuracy and its parts, cost, agreement, likelihood and speed."""
        for name in self.names:
            pairs = [(contender, model) for contender, model in self.pairs if contender.name == name]
            seeds, scores = self._scores(name)
            figures: dict[str, Figure] = {}
            if scores:
                figures["mean_accuracy"] = mean_score(scores)
                figures |= {f"accuracy_{task}": mean_score({task: values}) for task, values in scores.items()}
                found = [
                    row for contender, model in pairs if model.seed in seeds for task in scores for row in self.of(contender, model, task)
                ]
                figures["tokens_per_forward"] = _tokens_per_forward(found)
                figures["mean_tokens"] = sum(row["num_tokens"] for row in found) / len(found)
            figures |= self._chat_figures(pairs) | self._speeds(pairs)
            if figures:
                counts = {task: values.shape[1] for task, values in scores.items()}
                settings = {"contender": name, "seeds": seeds, "tasks": list(scores), "num_problems": counts}
                yield Run(label=name, settings=settings, figures=figures)

    def differences(self) -> Iterator[Run]:
        for first, second in PAIRS:
            (seeds, one), (other_seeds, other) = self._scores(first), self._scores(second)
            shared = [task for task in one if task in other]
            if not shared:
                continue
            # Problem by problem: the first ones, where somebody was asked only those.
            counts = {task: min(one[task].shape[1], other[task].shape[1]) for task in shared}
            one, other = ({task: scores[task][:, : counts[task]] for task in shared} for scores in (one, other))
            figures: dict[str, Figure] = {"mean_accuracy": difference(one, other)}
            figures |= {f"accuracy_{task}": difference({task: one[task]}, {task: other[task]}) for task in shared}
            settings = {"first": first, "second": second, "seeds": [seeds, other_seeds], "tasks": shared, "num_problems": counts}
            yield Run(label=f"{first} - {second}", settings=settings, figures=figures)

    def ratios(self) -> Iterator[Run]:
        """Speed over autoregressive of everybody, and of ReFusion over the others; of the same seeds on the same prompts."""
        pairs = [(name, "autoregressive") for name in self.names if name != "autoregressive"]
        for ours in ("refusion", "refusion_few", "refusion_sliding", "refusion_few_sliding"):
            pairs += [(ours, name) for name in self.names if name not in (ours, "autoregressive")]
        for first, second in dict.fromkeys(pairs):
            figures: dict[str, Figure] = {}
            for task in self._speed_tasks():
                one, other = self._walls(first, task), self._walls(second, task)
                seeds = [seed for seed in one if seed in other]
                if not seeds:
                    continue
                if task.endswith("_1"):  # prompt by prompt: the first ones, where somebody answered only those
                    both = [pair for seed in seeds for pair in zip(one[seed], other[seed], strict=False)]
                    figures[task] = speed_ratio([ours for ours, _ in both], [others for _, others in both])
                else:  # as many prompts as there was time for: not the same ones
                    pooled = [[pair for seed in seeds for pair in walls[seed]] for walls in (one, other)]
                    figures[task] = _pooled_speed(pooled[0]) / _pooled_speed(pooled[1])
            if figures:
                yield Run(label=f"{first} over {second}", settings={"first": first, "second": second}, figures=figures)

    def _scores(self, name: str) -> tuple[list[int], dict[str, npt.NDArray[np.float64]]]:
        """Seeds, and [S, N] right answers of every task; only seeds that have begun, and tasks that all of them have finished."""
        seeds: dict[int, dict[str, list[float]]] = {}
        for contender, model in self.pairs:
            if contender.name == name:
                found = {task.name: [row["scores"]["right"] for row in self.of(contender, model, task.name)] for task in self.asked}
                if any(found.values()):
                    seeds[model.seed] = found
        tasks = [task.name for task in self.asked if seeds and all(found[task.name] for found in seeds.values())]
        return list(seeds), {task: np.array([found[task] for found in seeds.values()]) for task in tasks}

    def _chat_figures(self, pairs: Sequence[tuple[Contender, Model]]) -> dict[str, Figure]:
        figures: dict[str, Figure] = {}
        chat = [row for contender, model in pairs for row in self.of(contender, model, CHAT)]
        if chat:
            tokens = [row["num_tokens"] for row in chat]
            figures["chat_tokens_per_forward"] = _tokens_per_forward(chat)
            figures["chat_agreement"] = pooled_ratio([int(row["scores"]["agreed"]) for row in chat], tokens)
            figures["chat_base_nll"] = math.fsum(row["scores"]["nats"] for row in chat) / sum(tokens)
            figures["chat_mean_tokens"] = sum(tokens) / len(chat)
        own = [row for contender, model in pairs for row in self.of(contender, model, "likelihood")]
        if own:
            figures["chat_nll"] = math.fsum(row["scores"]["nats"] for row in own) / sum(row["num_tokens"] for row in own)
        return figures

    def _speeds(self, pairs: Sequence[tuple[Contender, Model]]) -> dict[str, Figure]:
        figures: dict[str, Figure] = {}
        for task in self._speed_tasks():
            rows = [row for contender, model in pairs for row in self.of(contender, model, task)]
            if rows:
                figures[f"tokens_per_second_{task.removeprefix('speed_')}"] = _pooled_speed(_timed(rows))
                figures[f"tokens_per_forward_{task.removeprefix('speed_')}"] = _tokens_per_forward(rows)
                if all("num_first_runs" in row for row in rows):  # at batch 1 the log does not hold it
                    figures[f"first_runs_{task.removeprefix('speed_')}"] = sum(row["num_first_runs"] for row in rows)
                figures |= _prepared(rows, task.removeprefix("speed_"))
        return figures

    def _speed_tasks(self) -> list[str]:
        found = {key.rpartition("/")[2] for key in self.rows}
        return sorted((task for task in found if task.startswith("speed_")), key=lambda task: (int(task.rpartition("_")[2]), task))

    def _walls(self, name: str, task: str) -> dict[int, list[tuple[float, float]]]:
        """Seed -> (tokens, seconds) of every prompt."""
        found = {model.seed: _timed(self.of(contender, model, task)) for contender, model in self.pairs if contender.name == name}
        return {seed: walls for seed, walls in found.items() if walls}


def _task_figures(task: Task, rows: Sequence[Row]) -> dict[str, Figure]:
    """Accuracy and cost of one task; of its families too, where it has several."""
    figures: dict[str, Figure] = {
        f"accuracy_{task.name}": _accuracy(rows),
        f"tokens_per_forward_{task.name}": _tokens_per_forward(rows),
        f"mean_tokens_{task.name}": sum(row["num_tokens"] for row in rows) / len(rows),
        f"share_cut_{task.name}": sum(row["is_cut"] for row in rows) / len(rows),
    }
    families = list(dict.fromkeys(row["family"] for row in task.rows))
    if len(families) > 1:
        for family in families:
            figures[f"accuracy_{task.name}_{family}"] = _accuracy([row for row in rows if task.rows[row["doc_id"]]["family"] == family])
    return figures


def _accuracy(rows: Sequence[Row]) -> Figure:
    return wilson(round(sum(row["scores"]["right"] for row in rows)), len(rows))


def _tokens_per_forward(rows: Sequence[Row]) -> Figure:
    return pooled_ratio([row["num_tokens"] for row in rows], [row["num_forwards"] for row in rows])


def _prepared(rows: Sequence[Row], name: str) -> dict[str, Figure]:
    """Accepted lengths that a forward of slot decoding prepared: in the mean, and the last one of the last seed. Old logs do not tell."""
    found = [row["prepared"] for row in rows if row.get("prepared")]
    if not found:
        return {}
    mean = sum(total for _, total, _ in found) / sum(forwards for forwards, _, _ in found)
    return {f"prepared_lengths_{name}": mean, f"prepared_lengths_last_{name}": found[-1][2]}


def _timed(rows: Sequence[Row]) -> list[tuple[float, float]]:
    return [(row["num_tokens"], row["scores"]["wall"]) for row in rows]


def _pooled_speed(walls: Sequence[tuple[float, float]]) -> float:
    return sum(tokens for tokens, _ in walls) / math.fsum(seconds for _, seconds in walls)
