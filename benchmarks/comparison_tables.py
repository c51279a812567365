"""Tables of the benchmarks, the controlled comparison, ablations, recipes and published numbers; `tables.py` puts them into documents.

`suite`: result files of `refusion eval` side by side, files of one title together in one column. `ablations`: a file's title is the group
that is shown; `ratios`: the contender that speeds are over. `published`: claims of others with their conditions, from a file that is no
result of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from table_forms import Source, interval, percent, points, rows, three, times, two, value_of, whole, with_interval

from refusion.errors import DataError

Figures = dict[str, Any]
CLAIM = ("what", "value", "conditions", "source")
TOO_LOW = "too low, for shapes were still run for the first time in the turn that was timed (`first_runs` in the result file)."
RESTS_ON_TOO_LOW = "rests on a speed that is too low (`*` in the table of speeds)."


def suite(sources: Sequence[Source]) -> list[str]:
    """Scores by benchmark; the mean is that over the benchmarks which every column has, made-up rows apart."""
    columns, titles = _suite(sources)
    body = []
    for name, title in titles.items():
        counts = {str(found[name]["num_samples"]) for found in columns.values() if name in found}
        cells = [with_interval(found.get(name, {}).get("score")) for found in columns.values()]
        body.append([title, " / ".join(sorted(counts)), *cells])
    made_up = {run["label"] for source in sources for run in source.content["runs"] if run["settings"].get("is_made_up")}
    shared = [name for name in titles if name not in made_up and all(name in found for found in columns.values())]
    if shared:
        means = [sum(value_of(found[name]["score"]) or 0.0 for name in shared) / len(shared) for found in columns.values()]
        body.append([f"mean of {len(shared)}", "", *map(percent, means)])
    return rows(["benchmark", "questions", *columns], body)


def suite_cost(sources: Sequence[Source]) -> list[str]:
    """Tokens per forward and per answer by benchmark. Tokens/s are left out: runs may have shared a GPU."""
    columns, titles = _suite(sources)
    head = ["benchmark", *(f"{name}: {what}" for name in columns for what in ("tokens per forward", "tokens per answer"))]
    body = []
    for name, title in titles.items():
        of_column = [found.get(name, {}) for found in columns.values()]
        body.append([title, *(cell for f in of_column for cell in (two(f.get("tokens_per_forward")), whole(f.get("tokens_per_answer"))))])
    return rows(head, body)


def comparison(sources: Sequence[Source]) -> list[str]:
    """Accuracy of every contender that was asked: mean over tasks, then each task."""
    runs = [run for run in _runs(sources, "contender") if "seeds" in run["settings"] and "mean_accuracy" in run["figures"]]
    names = list(dict.fromkeys(task for run in runs for task in run["settings"]["tasks"]))
    head = ["", "seeds", "problems", "mean", "95 % interval", *names]
    body = []
    for run in runs:
        figures = run["figures"]
        each = [percent(figures.get(f"accuracy_{name}")) for name in names]
        counts = [str(len(run["settings"]["seeds"])), whole(sum(run["settings"]["num_problems"].values()))]
        body.append([run["label"], *counts, percent(figures["mean_accuracy"]), interval(figures["mean_accuracy"]), *each])
    return rows(head, body)


def comparison_training(sources: Sequence[Source]) -> list[str]:
    """What every model of the comparison was trained for, and its losses on held-out rows."""
    head = ["", "steps", "examples", "seconds", "validation: AR", "validation: MDM"]
    body = []
    for run in _runs(sources, "trained"):
        f = run["figures"]
        losses = [three(f.get(f"validation_{term}")) for term in ("ar", "mdm")]
        body.append([run["settings"]["trained"], *(whole(f.get(name)) for name in ("steps", "examples", "seconds")), *losses])
    return rows(head, body)


def comparison_cost(sources: Sequence[Source]) -> list[str]:
    """Speed and fidelity of every contender."""
    runs = [run for run in _runs(sources, "contender") if "seeds" in run["settings"]]
    speeds = list(dict.fromkeys(name for run in runs for name in run["figures"] if name.startswith("tokens_per_second_")))
    speed_heads = [f"{kind}, batch {size}: tokens/s" for kind, size in (name.rsplit("_", 2)[1:] for name in speeds)]
    head = ["", "tokens per forward, tasks", "chat", *speed_heads, "agreement", "base NLL", "own NLL"]
    body = []
    for run in runs:
        f = run["figures"]
        fidelity = [percent(f.get("chat_agreement")), three(f.get("chat_base_nll")), three(f.get("chat_nll"))]
        costs = [two(f.get("tokens_per_forward")), two(f.get("chat_tokens_per_forward"))]
        timed = [_marked(whole(f.get(name)), _had_first_runs(f, name)) for name in speeds]
        body.append([run["label"], *costs, *timed, *fidelity])
    return _with_mark_explained(rows(head, body), TOO_LOW)


def differences(sources: Sequence[Source]) -> list[str]:
    """Paired differences of accuracy in points."""
    runs = [run for run in _runs(sources, "first") if "mean_accuracy" in run["figures"]]
    names = list(dict.fromkeys(task for run in runs for task in run["settings"]["tasks"]))
    body = [
        [run["label"], points(run["figures"]["mean_accuracy"]), *(points(run["figures"].get(f"accuracy_{name}")) for name in names)]
        for run in runs
    ]
    return rows(["points, 95 % interval", "mean", *names], body)


def ratios(sources: Sequence[Source]) -> list[str]:
    """Tokens per second over one another, or over the contender that is a file's title; marked where either speed is."""
    runs = []
    for source in sources:
        chosen = [run for run in _runs([source], "first") if source.title in (None, run["settings"]["second"])]
        timed = [run for run in chosen if any(name.startswith("speed_") for name in run["figures"])]
        if not timed:
            raise DataError(f"{source.stem} has no speeds over {source.title or 'one another'}")
        runs += timed
    contenders = {run["settings"]["contender"]: run["figures"] for run in _runs(sources, "contender") if "seeds" in run["settings"]}
    names = list(dict.fromkeys(name for run in runs for name in run["figures"]))
    heads = [f"{kind}, batch {size}" for kind, size in (name.rsplit("_", 2)[1:] for name in names)]
    body = []
    for run in runs:
        sides = [contenders.get(run["settings"][side], {}) for side in ("first", "second")]
        marks = [any(_had_first_runs(side, name) for side in sides) for name in names]
        cells = [_marked(times(run["figures"].get(name)), mark) for name, mark in zip(names, marks, strict=True)]
        body.append([run["label"], *cells])
    return _with_mark_explained(rows(["tokens/s", *heads], body), RESTS_ON_TOO_LOW)


def ablations(sources: Sequence[Source]) -> list[str]:
    """The arms of one group."""
    head = ["", "right answers", "95 % interval", "tokens per forward", "tokens/s", "× AR", "chat: agreement", "tokens per forward"]
    body = []
    for source in sources:
        runs = [run for run in source.content["runs"] if source.title in (None, run["settings"]["group"])]
        if not runs:
            raise DataError(f"{source.stem} has no arms of {source.title}")
        for run in runs:
            f = run["figures"]
            speed = [whole(f.get("tokens_per_second")), two(f.get("over_autoregressive"))]
            chat = [percent(f.get("chat_agreement")), two(f.get("chat_tokens_per_forward"))]
            label = run["label"] if source.title is None else run["settings"]["label"]
            body.append([label, percent(f["accuracy"]), interval(f["accuracy"]), two(f["tokens_per_forward"]), *speed, *chat])
    return rows(head, body)


def recipes(sources: Sequence[Source]) -> list[str]:
    """The arms of `recipe_ablations.py`."""
    head = [
        "",
        "steps",
        "tokens per forward",
        "agreement",
        "one by one",
        "base NLL",
        "validation: AR",
        "MDM",
        "tokens per answer",
        "repetitive",
    ]
    names = ["tokens_per_forward", "agreement", "agreement_one_by_one", "base_nll", "validation_ar", "validation_mdm", "mean_tokens"]
    forms = [two, with_interval, with_interval, three, three, three, whole, percent]
    body = []
    for run in _runs(sources, "changes"):
        f = run["figures"]
        cells = [form(f.get(name)) for name, form in zip([*names, "repetitive_share"], forms, strict=True)]
        body.append([run["label"], whole(run["settings"]["steps"]), *cells])
    return rows(head, body)


def published(sources: Sequence[Source]) -> list[str]:
    """Claims of others, word by word as the file has them."""
    return rows(list(CLAIM), [[claim[name] for name in CLAIM] for source in sources for claim in source.content["claims"]])


KINDS: dict[str, Callable[[Sequence[Source]], list[str]]] = {
    "suite": suite, "suite-cost": suite_cost, "comparison": comparison, "comparison-cost": comparison_cost,
    "comparison-training": comparison_training, "differences": differences,
    "ratios": ratios, "ablations": ablations, "recipes": recipes, "published": published,
}  # fmt: skip


def read_published(path: Path) -> dict[str, Any]:
    """A file of claims. Raises DataError if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_whole = all(isinstance(claim[name], str) for claim in content["claims"] for name in CLAIM)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read the claims of {path}: {error!r}") from error
    if not is_whole:
        raise DataError(f"{path}: a claim is text in {', '.join(CLAIM)}")
    return content


def _runs(sources: Sequence[Source], setting: str) -> list[dict[str, Any]]:
    return [run for source in sources for run in source.content["runs"] if setting in run["settings"]]


def _had_first_runs(figures: Figures, name: str) -> bool:
    """Whether the timed turn of a speed (`..._chat_32`) ran shapes for the first time, as far as the log holds that."""
    kind, size = name.rsplit("_", 2)[1:]
    return figures.get(f"first_runs_{kind}_{size}", 0) > 0


def _marked(cell: str, is_marked: bool) -> str:
    return f"{cell}*" if is_marked and cell != "–" else cell


def _with_mark_explained(lines: list[str], meaning: str) -> list[str]:
    """The table, and what `*` means where it occurs."""
    return [*lines, "", f"`*`: {meaning}"] if any("*" in line for line in lines) else lines


def _suite(sources: Sequence[Source]) -> tuple[dict[str, dict[str, Figures]], dict[str, str]]:
    """Column -> benchmark -> figures, and benchmark -> its title."""
    columns: dict[str, dict[str, Figures]] = {}
    titles: dict[str, str] = {}
    for source in sources:
        found = columns.setdefault(source.title or source.stem, {})
        for run in source.content["runs"]:
            found[run["label"]] = run["figures"]
            titles.setdefault(run["label"], run["settings"].get("title", run["label"]))
    return columns, titles
